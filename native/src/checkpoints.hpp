// Checkpoints: copies of the recurrent state near the ends of prompts.
//
// The attention part of a hybrid model's memory can be cut to any length, its recurrent part cannot: it holds the state
// after the last token and a few snapshots. So a chat whose last turn changed would be read again from its first token.
// A checkpoint is the recurrent part alone, as it was after a text, with the hidden row that the draft needs next.
//
// A checkpoint is right only while the attention cells of its text are the ones that were there when it was made. Hence
// one rule: where the memory changes from a position on, the checkpoints of longer texts are dropped. Those that are left
// are prefixes of what the memory holds, and end where it does or before.
#pragma once

#include "state_copy.hpp"

#include <cstdint>
#include <list>
#include <vector>

namespace mtp {

struct checkpoint {
    std::vector<int32_t> text;
    state_copy           state;
    std::vector<float>   row;  // empty where nobody knew it

    int32_t end() const { return static_cast<int32_t>(text.size()); }
    size_t  n_bytes() const { return state.n_held() + row.size() * sizeof(float); }
};

class checkpoints {
  public:
    checkpoints(const host_api & api, void * ctx, void * memory, int32_t limit)
        : api_(api), ctx_(ctx), memory_(memory), limit_(limit) {}

    // Where in a prompt that ends at `end` a checkpoint should be made, or -1. It stands some tokens before the end, as in
    // llama.cpp's server: the same prompt again then has tokens left to evaluate, and what a chat template ends a prompt
    // with need not come back in the next turn.
    int32_t place(int32_t end) const;

    // The memory is about to change from position pos on.
    void cut(int32_t pos);

    // Copies the state that the settled target has after n tokens, and `row` (n_embd floats, or NULL) with it. Makes none
    // of a text with images, where the memory does not end at n, and where one copy is too large.
    void save(const int32_t * tokens, int32_t n, const float * row, int32_t n_embd);

    // The deepest checkpoint that leaves at least one token of a prompt; NULL if there is none.
    checkpoint * find(const int32_t * prompt, int32_t n);

    // Takes the memory back to a checkpoint and drops deeper ones. False: the host refused, the memory must be cleared.
    bool load(checkpoint & kept);

    int32_t size() const { return static_cast<int32_t>(kept_.size()); }
    int64_t n_bytes() const;

    int64_t n_saved       = 0;
    int64_t n_restored    = 0;
    int64_t n_tokens_kept = 0;  // that the target need not read again

  private:
    static constexpr int64_t max_bytes = 512ll << 20;  // of all checkpoints together
    // Nearer to the one before it, reading the tokens again costs less than a copy and one more decode.
    static constexpr int32_t min_step = 32;

    const host_api &      api_;
    void *                ctx_;
    void *                memory_;
    int32_t               limit_;
    std::list<checkpoint> kept_;  // shallowest first
};

}  // namespace mtp
