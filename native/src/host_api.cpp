#include "host_api.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>

namespace mtp {

namespace {

bool same_layout(const mtp_host_layout & host) {
    return host.batch_size == sizeof(host_batch) && host.n_tokens == offsetof(host_batch, n_tokens) &&
           host.token == offsetof(host_batch, token) && host.embd == offsetof(host_batch, embd) &&
           host.pos == offsetof(host_batch, pos) && host.n_seq_id == offsetof(host_batch, n_seq_id) &&
           host.seq_id == offsetof(host_batch, seq_id) && host.logits == offsetof(host_batch, logits) &&
           host.chain_params_size == sizeof(host_chain_params);
}

}  // namespace

host_api resolve(void * const * functions, int32_t n, const mtp_host_layout & layout) {
    require(n == n_host_functions, "the table of host functions has another length; reinstall llama-mtp");
    if (!same_layout(layout)) {
        throw failure(MTP_ABI, "llama_batch of the installed host differs from the one this module was built for; "
                               "install a llama-mtp release for this llama-cpp-python");
    }
    for (int32_t i = 0; i < n; ++i) {
        if (functions[i] == nullptr) {
            throw failure(MTP_INVALID, std::string("the host library has no ") + host_functions[i] +
                                           "; install a llama-cpp-python release that this plugin supports");
        }
    }
    host_api api{};
    int32_t  i = 0;
#define MTP_BIND(result, name, parameters, symbol) api.name = reinterpret_cast<decltype(api.name)>(functions[i++]);
    MTP_HOST_FUNCTIONS(MTP_BIND)
#undef MTP_BIND
    return api;
}

row_batch::row_batch(int32_t capacity, int32_t n_embd)
    : capacity_(capacity), n_embd_(n_embd), token_(capacity), pos_(capacity), n_seq_id_(capacity, 1),
      seq_id_(capacity, &zero_), logits_(capacity) {}

void row_batch::push(int32_t token, int32_t pos, bool output, const float * hidden) {
    if (n_ == capacity_) {
        throw failure(MTP_INVALID, "more rows than n_batch in one decode");
    }
    token_[n_]  = token;
    pos_[n_]    = pos;
    logits_[n_] = output ? 1 : 0;
    if (n_embd_ > 0 && rows_ == nullptr) {
        embd_.resize(std::max(embd_.size(), (static_cast<size_t>(n_) + 1) * n_embd_));
        std::memcpy(&embd_[static_cast<size_t>(n_) * n_embd_], hidden, sizeof(float) * n_embd_);
    }
    ++n_;
}

host_batch row_batch::view() {
    float * rows = rows_ != nullptr ? const_cast<float *>(rows_) : embd_.data();  // the host only reads them
    return { n_, token_.data(), n_embd_ > 0 ? rows : nullptr, pos_.data(), n_seq_id_.data(), seq_id_.data(), logits_.data() };
}

int64_t now_ns() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace mtp
