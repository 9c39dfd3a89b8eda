#include "host_api.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>

namespace mtp {

namespace {

template <typename F> void bind(F & target, void * address, const char * name) {
    if (address == nullptr) {
        throw failure(MTP_INVALID, std::string("the host library has no ") + name +
                                       "; install a llama-cpp-python release that this plugin supports");
    }
    target = reinterpret_cast<F>(address);
}

bool same_layout(const mtp_host_layout & host) {
    return host.batch_size == sizeof(host_batch) && host.n_tokens == offsetof(host_batch, n_tokens) &&
           host.token == offsetof(host_batch, token) && host.embd == offsetof(host_batch, embd) &&
           host.pos == offsetof(host_batch, pos) && host.n_seq_id == offsetof(host_batch, n_seq_id) &&
           host.seq_id == offsetof(host_batch, seq_id) && host.logits == offsetof(host_batch, logits) &&
           host.chain_params_size == sizeof(host_chain_params);
}

}  // namespace

host_api resolve(const mtp_host_api & a, const mtp_host_layout & layout) {
    if (!same_layout(layout)) {
        throw failure(MTP_ABI, "llama_batch of the installed host differs from the one this module was built for; "
                               "install a llama-mtp release for this llama-cpp-python");
    }
    host_api api{};
    bind(api.decode, a.llama_decode, "llama_decode");
    bind(api.synchronize, a.llama_synchronize, "llama_synchronize");
    bind(api.get_memory, a.llama_get_memory, "llama_get_memory");
    bind(api.memory_clear, a.llama_memory_clear, "llama_memory_clear");
    bind(api.memory_seq_rm, a.llama_memory_seq_rm, "llama_memory_seq_rm");
    bind(api.memory_seq_pos_max, a.llama_memory_seq_pos_max, "llama_memory_seq_pos_max");
    bind(api.get_logits_ith, a.llama_get_logits_ith, "llama_get_logits_ith");
    bind(api.sampler_sample, a.llama_sampler_sample, "llama_sampler_sample");
    bind(api.chain_default_params, a.llama_sampler_chain_default_params, "llama_sampler_chain_default_params");
    bind(api.chain_init, a.llama_sampler_chain_init, "llama_sampler_chain_init");
    bind(api.chain_add, a.llama_sampler_chain_add, "llama_sampler_chain_add");
    bind(api.init_greedy, a.llama_sampler_init_greedy, "llama_sampler_init_greedy");
    bind(api.sampler_free, a.llama_sampler_free, "llama_sampler_free");
    bind(api.set_sampler, a.llama_set_sampler, "llama_set_sampler");
    bind(api.get_sampled_token_ith, a.llama_get_sampled_token_ith, "llama_get_sampled_token_ith");
    bind(api.set_embeddings_nextn, a.llama_set_embeddings_nextn, "llama_set_embeddings_nextn");
    bind(api.get_embeddings_nextn, a.llama_get_embeddings_nextn, "llama_get_embeddings_nextn");
    bind(api.get_embeddings_nextn_ith, a.llama_get_embeddings_nextn_ith, "llama_get_embeddings_nextn_ith");
    bind(api.set_nextn_layer_offset, a.llama_set_nextn_layer_offset, "llama_set_nextn_layer_offset");
    bind(api.vocab_n_tokens, a.llama_vocab_n_tokens, "llama_vocab_n_tokens");
    bind(api.vocab_get_text, a.llama_vocab_get_text, "llama_vocab_get_text");
    bind(api.vocab_get_attr, a.llama_vocab_get_attr, "llama_vocab_get_attr");
    bind(api.state_seq_get_size, a.llama_state_seq_get_size_ext, "llama_state_seq_get_size_ext");
    bind(api.state_seq_get_data, a.llama_state_seq_get_data_ext, "llama_state_seq_get_data_ext");
    bind(api.state_seq_set_data, a.llama_state_seq_set_data_ext, "llama_state_seq_set_data_ext");
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
