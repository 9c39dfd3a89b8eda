#include "checkpoints.hpp"

#include <algorithm>

namespace mtp {

int32_t checkpoints::place(int32_t end) const {
    const int32_t at   = end - MTP_CHECKPOINT_TAIL;
    const int32_t last = kept_.empty() ? 0 : kept_.back().end();
    return limit_ > 0 && at - last >= min_step ? at : -1;
}

void checkpoints::cut(int32_t pos) {
    while (!kept_.empty() && kept_.back().end() > pos) {
        kept_.pop_back();
    }
}

int64_t checkpoints::n_bytes() const {
    int64_t sum = 0;
    for (const auto & c : kept_) {
        sum += static_cast<int64_t>(c.n_bytes());
    }
    return sum;
}

void checkpoints::save(const int32_t * tokens, int32_t n, const float * row, int32_t n_embd) {
    const bool has_images = std::any_of(tokens, tokens + n, [](int32_t t) { return t < 0; });
    if (limit_ <= 0 || has_images || api_.memory_seq_pos_max(memory_, 0) + 1 != n) {
        return;
    }
    checkpoint made{ { tokens, tokens + n }, state_copy(api_, ctx_, memory_), {} };
    if (row != nullptr) {
        made.row.assign(row, row + n_embd);
    }
    const int64_t size = static_cast<int64_t>(made.state.size_now() + made.row.size() * sizeof(float));
    if (size > max_bytes) {
        limit_ = 0;
        kept_.clear();
        return;
    }
    cut(n - 1);
    while (!kept_.empty() && (this->size() >= limit_ || n_bytes() + size > max_bytes)) {
        kept_.pop_front();
    }
    if (made.state.save(n)) {
        kept_.push_back(std::move(made));
        ++n_saved;
    }
}

checkpoint * checkpoints::find(const int32_t * prompt, int32_t n) {
    for (auto kept = kept_.rbegin(); kept != kept_.rend(); ++kept) {
        if (kept->end() < n && std::equal(kept->text.begin(), kept->text.end(), prompt)) {
            return &*kept;
        }
    }
    return nullptr;
}

bool checkpoints::load(checkpoint & kept) {
    cut(kept.end());
    if (!kept.state.load()) {
        return false;
    }
    ++n_restored;
    n_tokens_kept += kept.end();
    return true;
}

}  // namespace mtp
