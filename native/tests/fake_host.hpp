// A host that can be checked: a model whose next token is a hash of all tokens before it, a memory that lies about
// recurrent rollback as the real one does, hidden rows that say which position they come from, and an assert wherever
// the real libllama would abort the process.
#pragma once

#include "llama_mtp.h"

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace fake {

constexpr int32_t n_vocab = 97;
constexpr int32_t n_embd  = 3;

struct options {
    bool    recurrent     = false;
    bool    checkpoint    = false; // a recurrent part without snapshots
    bool    gathers       = false;
    bool    gaps          = false;
    bool    confidence    = false;
    bool    device_picks  = true;  // llama_set_sampler accepts
    int32_t n_ctx         = 256;
    int32_t n_batch       = 16;
    int32_t n_ubatch      = 16;
    int32_t n_draft_max   = 4;
    int32_t n_rs_seq      = 4;
    int32_t n_checkpoints = 4;
    bool    draft_context = true;
    int32_t n_heads       = 1;     // more than one: chained
    bool    shares_kv     = false; // the draft context attends to the target's cells
    bool    all_outputs   = false;
    int32_t prefill_window = 0;
    int32_t n_draft_vocab  = 0;    // not 0: the draft context has so many tokens, with numbers of their own
    int32_t n_swa          = 0;    // not 0: a position attends to so many before it, and what lies further back goes
};

// A draft vocabulary of n tokens: which of the target's each is, and what stands for each of the target's.
struct draft_vocabulary {
    explicit draft_vocabulary(int32_t n);
    bool has(int32_t token) const { return tokens[stand_ins[token]] == token; }

    std::vector<int32_t> tokens, stand_ins;
};

// One context. `start` is the position of tokens[0]: a draft context may begin late.
struct context {
    int32_t              start = 0;
    std::vector<int32_t> tokens;           // -1: a gap
    std::vector<bool>    own;              // draft: made from the head's own row
    int32_t              undo     = 0;     // recurrent: what can really be taken back
    bool                 poisoned = false; // recurrent: rolled back further than the snapshots reach
    bool                 spent    = false; // recurrent: rolled back since the last decode
    std::vector<int32_t> state;            // what the recurrent part has read
    int32_t              first    = 0;     // sliding window: the first cell that is still there
    std::vector<bool>    outputs;          // of the last batch
    std::vector<int32_t> batch_pos;
    std::vector<float>   rows;             // hidden rows of the last batch
    bool                 keeps_rows = true;
    int                  n_decodes = 0;
    int                  n_rows    = 0;
    int                  n_seq_rm  = 0;
    void *               sampler   = nullptr;
    int                  n_own     = 0;    // shared KV: steps since the target's row
    int32_t              head      = 0;    // llama_set_nextn_layer_offset
    // Chained heads have a KV layer each in the same cells: what each head last wrote there, by position.
    std::vector<std::vector<int32_t>> written;

    int32_t end() const { return start + static_cast<int32_t>(tokens.size()); }
    void    clear();  // the memory alone
};

class host {
  public:
    explicit host(const options & o);
    ~host();

    // The text that plain decoding gives after a prompt, prompt included, n tokens in all.
    static std::vector<int32_t> plain_text(const std::vector<int32_t> & prompt, int32_t n);

    mtp_session * open();
    // What the stock class does: decode in batches, tell the session after each.
    void eval(mtp_session * session, const std::vector<int32_t> & tokens, int32_t pos);
    void decode_only(const std::vector<int32_t> & tokens, int32_t pos);
    mtp_session_params params();

    // Addresses in the order of mtp_host_function().
    static std::vector<void *> functions();
    static mtp_host_layout     layout();

    options              opt;
    draft_vocabulary     vocabulary;
    context              target, draft;
    mtp_session *        session = nullptr;  // the one that open() made last
    std::vector<int32_t> truth;     // the text by position: what a right draft proposes
    std::vector<bool>    wrong;     // [position] the draft for it is wrong
    int                  n_samples      = 0;
    int                  n_mispaired    = 0;  // a hidden row that is not the target's of the position before
    int                  n_stale_cells  = 0;  // draft memory that is not the target's text, seen at a decode
    bool                 lenient        = false;  // a position that does not follow is refused instead of checked
    int                  n_unknown_rows = 0;  // zero rows after the start of the text
    int                  n_chains_alive = 0;
    int                  n_saves = 0, n_loads = 0;  // of the recurrent part
    int                  n_holes        = 0;  // a head that reads cells which it did not write
    std::vector<int32_t> draft_positions;     // of all rows of the draft context

    // What the draft context read that it must not: empty, or in words.
    std::string faults() const;

    // The k-th call from now of a function fails in its own way, or throws.
    std::map<std::string, int> fail_in;
    bool                       throws = false;
    std::function<void()>      on_sample;  // runs inside llama_sampler_sample
    std::function<void(std::vector<float> &)> on_logits;  // of the draft context, before they are handed out
    bool                       fails(const char * name);
};

extern host * current;  // the api has no user data; one fake lives at a time

}  // namespace fake
