#include "capture.hpp"

#include <algorithm>
#include <cstring>

namespace mtp {

capture_queue::capture_queue(int32_t capacity, int32_t n_embd)
    : n_embd_(n_embd), rows_(static_cast<size_t>(capacity + 1) * n_embd, 0.0f) {}

void capture_queue::zero(int32_t index) {
    std::fill_n(row(index), n_embd_, 0.0f);
}

int32_t capture_queue::common(const int32_t * tokens, int32_t n, int32_t pos) const {
    int32_t i = 0;
    while (i < n && pos + i >= start_ && pos + i < end() && token(pos + i) == tokens[i]) {
        ++i;
    }
    return i;
}

void capture_queue::append(const int32_t * tokens, const float * rows, int32_t n, int32_t pos) {
    const int32_t known = common(tokens, n, pos);
    cut(pos + known);
    // Row i of this decode pairs with the token after it. Rows below `decoded` are the draft memory's already.
    for (int32_t i = 0; i < n; ++i) {
        const int32_t next = pos + i + 1;
        if (i >= known) {
            tokens_.push_back(tokens[i]);
        }
        if (next >= decoded_) {
            std::memcpy(row(next - decoded_), rows + static_cast<size_t>(i) * n_embd_, sizeof(float) * n_embd_);
        }
    }
}

void capture_queue::cut(int32_t pos) {
    if (pos >= end()) {
        return;
    }
    if (pos <= start_) {
        restart(pos);
        return;
    }
    tokens_.resize(pos - start_);
    if (pos < decoded_) {
        decoded_ = pos;
        zero(0);
    }
}

void capture_queue::mark_decoded(int32_t pos) {
    std::memmove(row(0), row(pos - decoded_), sizeof(float) * n_embd_);
    decoded_ = pos;
}

void capture_queue::push_decoded(int32_t token) {
    tokens_.push_back(token);
    decoded_ = end();
    zero(0);
}

void capture_queue::restart(int32_t pos) {
    tokens_.clear();
    start_ = decoded_ = pos;
    zero(0);
}

}  // namespace mtp
