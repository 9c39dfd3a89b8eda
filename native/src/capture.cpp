#include "capture.hpp"

#include <algorithm>
#include <cstring>

namespace mtp {

capture_queue::capture_queue(int32_t capacity, int32_t n_embd)
    : capacity_(capacity), n_embd_(n_embd), rows_(static_cast<size_t>(n_embd), 0.0f) {}

void capture_queue::zero(int32_t index) {
    std::fill_n(row(index), n_embd_, 0.0f);
}

// Room for so many waiting tokens, and for the row behind them.
void capture_queue::reserve(int32_t n_waiting) {
    const size_t size = (static_cast<size_t>(n_waiting) + 1) * n_embd_;
    if (rows_.size() < size) {
        rows_.resize(size);
    }
}

bool capture_queue::knows_first_row() const {
    return std::any_of(rows_.begin(), rows_.begin() + n_embd_, [](float x) { return x != 0.0f; });
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
    reserve(std::max(0, pos + n - decoded_));
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
    std::memmove(row(0), row(pos - decoded_), sizeof(float) * n_embd_ * static_cast<size_t>(end() - pos + 1));
    decoded_ = pos;
}

void capture_queue::skip(int32_t pos) {
    mark_decoded(pos);
    tokens_.erase(tokens_.begin(), tokens_.begin() + (pos - start_));
    start_ = pos;
}

void capture_queue::push_decoded(int32_t token) {
    tokens_.push_back(token);
    decoded_ = end();
    zero(0);
}

void capture_queue::set_row(const float * hidden) {
    std::memcpy(row(waiting()), hidden, sizeof(float) * n_embd_);
}

void capture_queue::restart(int32_t pos) {
    tokens_.clear();
    start_ = decoded_ = pos;
    zero(0);
}

namespace {

struct state_header {
    int32_t magic, version, n_embd, start, decoded, n_tokens;
};

constexpr int32_t state_magic   = 0x5154504d;  // "MPTQ"
constexpr int32_t state_version = 1;

size_t bytes_of(int64_t n_tokens, int64_t n_waiting, int64_t n_embd) {
    return sizeof(state_header) + static_cast<size_t>(n_tokens) * sizeof(int32_t) +
           static_cast<size_t>((n_waiting + 1) * n_embd) * sizeof(float);
}

}  // namespace

size_t capture_queue::state_size() const {
    return bytes_of(static_cast<int64_t>(tokens_.size()), waiting(), n_embd_);
}

void capture_queue::state_get(uint8_t * data) const {
    const state_header head{ state_magic, state_version, n_embd_, start_, decoded_, end() - start_ };
    std::memcpy(data, &head, sizeof head);
    data += sizeof head;
    if (!tokens_.empty()) {
        std::memcpy(data, tokens_.data(), tokens_.size() * sizeof(int32_t));
        data += tokens_.size() * sizeof(int32_t);
    }
    std::memcpy(data, rows_.data(), static_cast<size_t>(waiting() + 1) * n_embd_ * sizeof(float));
}

const char * capture_queue::state_check(const uint8_t * data, size_t n, int32_t n_vocab, int32_t max_end) const {
    state_header head;
    if (data == nullptr || n < sizeof head) {
        return "the state of the draft is too short";
    }
    std::memcpy(&head, data, sizeof head);
    if (head.magic != state_magic || head.version != state_version) {
        return "these bytes are not the state of a draft of this version";
    }
    if (head.n_embd != n_embd_) {
        return "the state of the draft has hidden rows of another width";
    }
    const int64_t end = static_cast<int64_t>(head.start) + head.n_tokens;
    if (head.start < 0 || head.n_tokens < 0 || head.decoded < head.start || head.decoded > end) {
        return "the state of the draft contradicts itself";
    }
    if (end > max_end) {
        return "the state of the draft is longer than the target's text";
    }
    if (end - head.decoded > capacity()) {
        return "more rows wait in the state of the draft than n_batch; raise n_batch";
    }
    if (n != bytes_of(head.n_tokens, end - head.decoded, n_embd_)) {
        return "the state of the draft is not as long as it says";
    }
    for (int32_t i = 0; i < head.n_tokens; ++i) {
        int32_t token;
        std::memcpy(&token, data + sizeof head + static_cast<size_t>(i) * sizeof token, sizeof token);
        if (token < 0 || token >= n_vocab) {
            return "a token in the state of the draft is outside the vocabulary";
        }
    }
    return nullptr;
}

void capture_queue::state_set(const uint8_t * data) {
    state_header head;
    std::memcpy(&head, data, sizeof head);
    std::vector<int32_t> tokens(head.n_tokens);
    const size_t         n_token_bytes = tokens.size() * sizeof(int32_t);
    if (!tokens.empty()) {
        std::memcpy(tokens.data(), data + sizeof head, n_token_bytes);
    }
    reserve(head.start + head.n_tokens - head.decoded);
    tokens_.swap(tokens);
    start_   = head.start;
    decoded_ = head.decoded;
    std::memcpy(rows_.data(), data + sizeof head + n_token_bytes,
                static_cast<size_t>(waiting() + 1) * n_embd_ * sizeof(float));
}

}  // namespace mtp
