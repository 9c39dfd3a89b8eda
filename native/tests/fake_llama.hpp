// The host's functions on contexts, as the fake implements them.
#pragma once

#include "fake_host.hpp"
#include "test.hpp"

namespace fake {

// The host's own struct, declared once more: the layout handshake compares it with the engine's.
struct batch {
    int32_t    n_tokens;
    int32_t *  token;
    float *    embd;
    int32_t *  pos;
    int32_t *  n_seq_id;
    int32_t ** seq_id;
    int8_t *   logits;
};

struct chain_params {
    bool no_perf;
};

context & of(void * ctx);
bool      is_target(const context & c);

int32_t decode(void * ctx, batch b);
void *  get_memory(const void * ctx);
void    memory_clear(void * memory, bool);
bool    seq_rm(void * memory, int32_t seq, int32_t p0, int32_t p1);
int32_t seq_pos_min(void * memory, int32_t);
int32_t seq_pos_max(void * memory, int32_t);
size_t  state_seq_get_size(void * ctx, int32_t seq, uint32_t flags);
size_t  state_seq_get_data(void * ctx, uint8_t * data, size_t n, int32_t seq, uint32_t flags);
size_t  state_seq_set_data(void * ctx, const uint8_t * data, size_t n, int32_t seq, uint32_t flags);

}  // namespace fake
