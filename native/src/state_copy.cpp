#include "state_copy.hpp"

namespace mtp {

namespace {

constexpr uint32_t partial_only = 1;  // LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY

}  // namespace

size_t state_copy::size_now() const {
    return api_.state_seq_get_size(ctx_, 0, partial_only);
}

bool state_copy::save(int32_t end) {
    drop();
    n_ = 0;
    if (end > 0) {  // an empty memory has no state
        n_ = size_now();
        if (n_ == 0) {
            return false;
        }
        if (data_.size() < n_) {
            data_.resize(n_);
        }
        if (api_.state_seq_get_data(ctx_, data_.data(), n_, 0, partial_only) != n_) {
            return false;
        }
        n_bytes += static_cast<int64_t>(n_);
    }
    end_ = end;
    return true;
}

bool state_copy::load() {
    if (end_ == 0) {
        api_.memory_clear(memory_, false);
        return true;
    }
    // State first: the removal then begins behind the recurrent part's last position and concerns attention cells
    // only. The other way round the recurrent part, which is asked first, would refuse (llama-memory-hybrid.cpp).
    if (api_.state_seq_set_data(ctx_, data_.data(), n_, 0, partial_only) != n_) {
        return false;
    }
    n_bytes += static_cast<int64_t>(n_);
    return api_.memory_seq_rm(memory_, 0, end_, -1) && api_.memory_seq_pos_max(memory_, 0) + 1 == end_;
}

}  // namespace mtp
