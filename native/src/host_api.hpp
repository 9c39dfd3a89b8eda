// The host's functions, typed, and the one struct that is passed to them by value.
#pragma once

#include "llama_mtp.h"

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace mtp {

// Carries a status to the boundary, where it becomes a return code and a sentence.
class failure : public std::runtime_error {
  public:
    failure(mtp_status status, const std::string & text) : std::runtime_error(text), status(status) {}
    const mtp_status status;
};

inline void require(bool ok, const char * text) {
    if (!ok) {
        throw failure(MTP_INVALID, text);
    }
}

// llama_batch of include/llama.h. Checked against the host's own bindings in resolve().
struct host_batch {
    int32_t    n_tokens;
    int32_t *  token;
    float *    embd;
    int32_t *  pos;
    int32_t *  n_seq_id;
    int32_t ** seq_id;
    int8_t *   logits;
};

struct host_chain_params {
    bool no_perf;
};

// Every host function that the engine calls: result, name here, parameters, name in include/llama.h or src/llama-ext.h.
// clang-format off
#define MTP_HOST_FUNCTIONS(X)                                                                                             \
    X(int32_t,           decode,                   (void * ctx, host_batch batch),          llama_decode)                       \
    X(void,              synchronize,              (void * ctx),                            llama_synchronize)                  \
    X(void *,            get_memory,               (const void * ctx),                      llama_get_memory)                   \
    X(void,              memory_clear,             (void * memory, bool data),              llama_memory_clear)                 \
    X(bool,              memory_seq_rm,            (void * memory, int32_t seq, int32_t p0, int32_t p1), llama_memory_seq_rm)   \
    X(int32_t,           memory_seq_pos_min,       (void * memory, int32_t seq),            llama_memory_seq_pos_min)           \
    X(int32_t,           memory_seq_pos_max,       (void * memory, int32_t seq),            llama_memory_seq_pos_max)           \
    X(float *,           get_logits_ith,           (void * ctx, int32_t i),                 llama_get_logits_ith)               \
    X(int32_t,           sampler_sample,           (void * sampler, void * ctx, int32_t i), llama_sampler_sample)               \
    X(host_chain_params, chain_default_params,     (),                                      llama_sampler_chain_default_params) \
    X(void *,            chain_init,               (host_chain_params params),              llama_sampler_chain_init)           \
    X(void,              chain_add,                (void * chain, void * sampler),          llama_sampler_chain_add)            \
    X(void *,            init_greedy,              (),                                      llama_sampler_init_greedy)          \
    X(void,              sampler_free,             (void * sampler),                        llama_sampler_free)                 \
    X(bool,              set_sampler,              (void * ctx, int32_t seq, void * sampler), llama_set_sampler)                \
    X(int32_t,           get_sampled_token_ith,    (void * ctx, int32_t i),                 llama_get_sampled_token_ith)        \
    X(void,              set_embeddings_nextn,     (void * ctx, bool value, bool masked),   llama_set_embeddings_nextn)         \
    X(float *,           get_embeddings_nextn,     (void * ctx),                            llama_get_embeddings_nextn)         \
    X(float *,           get_embeddings_nextn_ith, (void * ctx, int32_t i),                 llama_get_embeddings_nextn_ith)     \
    X(void,              set_nextn_layer_offset,   (void * ctx, int32_t offset),            llama_set_nextn_layer_offset)       \
    X(int32_t,           vocab_n_tokens,           (const void * vocab),                    llama_vocab_n_tokens)               \
    X(const char *,      vocab_get_text,           (const void * vocab, int32_t token),     llama_vocab_get_text)               \
    X(int,               vocab_get_attr,           (const void * vocab, int32_t token),     llama_vocab_get_attr)               \
    X(size_t, state_seq_get_size, (void * ctx, int32_t seq, uint32_t flags), llama_state_seq_get_size_ext)                      \
    X(size_t, state_seq_get_data, (void * ctx, uint8_t * data, size_t n, int32_t seq, uint32_t flags),                          \
      llama_state_seq_get_data_ext)                                                                                             \
    X(size_t, state_seq_set_data, (void * ctx, const uint8_t * data, size_t n, int32_t seq, uint32_t flags),                    \
      llama_state_seq_set_data_ext)
// clang-format on

struct host_api {
#define MTP_FIELD(result, name, parameters, symbol) result(*name) parameters;
    MTP_HOST_FUNCTIONS(MTP_FIELD)
#undef MTP_FIELD
};

#define MTP_SYMBOL(result, name, parameters, symbol) #symbol,
constexpr const char * host_functions[] = { MTP_HOST_FUNCTIONS(MTP_SYMBOL) };
#undef MTP_SYMBOL

constexpr int32_t n_host_functions = static_cast<int32_t>(std::size(host_functions));
static_assert(n_host_functions == 26, "a function more or less: look at the guard of the host's version as well");
static_assert(sizeof(host_api) == n_host_functions * sizeof(void *), "nothing but the functions");

// Takes the addresses of host_functions, in their order. Throws failure(MTP_ABI) when the layouts differ and
// failure(MTP_INVALID) when an address is missing.
host_api resolve(void * const * functions, int32_t n, const mtp_host_layout & layout);

// Rows of one decode, all of sequence 0. With a width, each row carries a token and a hidden row.
class row_batch {
  public:
    row_batch(int32_t capacity, int32_t n_embd);

    void clear() {
        n_    = 0;
        rows_ = nullptr;
    }
    // The hidden rows of all that is pushed until clear() are the caller's, one after the other; none is copied.
    void borrow(const float * rows) { rows_ = rows; }
    void push(int32_t token, int32_t pos, bool output, const float * hidden = nullptr);
    void set_output(int32_t row, bool output) { logits_[row] = output ? 1 : 0; }
    void shrink(int32_t n) { n_ = n; }

    int32_t    size() const { return n_; }
    host_batch view();

  private:
    int32_t                capacity_;
    int32_t                n_embd_;
    int32_t                n_    = 0;
    int32_t                zero_ = 0;  // every row's sequence id
    std::vector<int32_t>   token_, pos_, n_seq_id_;
    std::vector<int32_t *> seq_id_;
    std::vector<int8_t>    logits_;
    std::vector<float>     embd_;  // grows with what is copied
    const float *          rows_ = nullptr;
};

int64_t now_ns();

// Adds the time of a scope to a counter, also when the scope is left by an exception.
class stopwatch {
  public:
    explicit stopwatch(int64_t & total) : total_(total), start_(now_ns()) {}
    ~stopwatch() { total_ += now_ns() - start_; }
    stopwatch(const stopwatch &)             = delete;
    stopwatch & operator=(const stopwatch &) = delete;

  private:
    int64_t & total_;
    int64_t   start_;
};

}  // namespace mtp
