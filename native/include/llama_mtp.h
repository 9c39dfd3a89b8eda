/* llama_mtp.h: the C API of the MTP engine. This span is header, cffi cdef and documentation at once.
 *
 * The engine drives two contexts that belong to the caller: the target (the host's own context) and the draft
 * context (type MTP, made from the same llama_model). It links to no llama.cpp; it is handed the addresses of the
 * functions in the library that the process already loaded, and a description of the one struct that is passed by
 * value.
 *
 * One round, in the direction of the data:
 *
 *     pending rows (token k, hidden row k-1) --catch-up + first step--> draft d1..dn
 *     target decode of [last, d1..dn] --verify--> rows, sampled one by one
 *     settle: both memories are cut to the rows that were really sampled; their hidden rows are pending again
 *
 * Every call returns an mtp_status. On failure mtp_session_error() gives one sentence. No call is reentrant: a
 * second thread gets MTP_BUSY.
 */
#ifndef LLAMA_MTP_H
#define LLAMA_MTP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// cdef-begin

enum mtp_status {
    MTP_OK = 0,
    MTP_INVALID = 1,     /* an argument or the order of calls is wrong; nothing was changed */
    MTP_ABI = 2,         /* the host's llama_batch is not laid out as this build expects */
    MTP_HOST = 3,        /* a host function failed; the target keeps what it had before the call */
    MTP_ROLLBACK = 4,    /* the target cannot go back that far: clear it and evaluate again; nothing was changed */
    MTP_BUSY = 5,        /* another thread is inside this session */
    MTP_NO_MEMORY = 6,
    MTP_EXCEPTION = 7,   /* a C++ exception was caught at the boundary */
};

/* How the target's memory goes back to an earlier position. */
enum mtp_rollback {
    MTP_ROLLBACK_ATTENTION = 0, /* any suffix can be removed */
    MTP_ROLLBACK_SNAPSHOTS = 1, /* recurrent state: the rows of the last ubatch, at most n_rs_seq, once per decode */
    MTP_ROLLBACK_CHECKPOINT = 2, /* recurrent state without snapshots: a copy from before the drafts, and a replay */
};

/* How the draft context proposes more than one token (llama.cpp common/speculative.cpp knows the same three). */
enum mtp_drafting {
    MTP_DRAFTING_ONE_HEAD = 0,  /* one head, its own KV: each step adds a row */
    MTP_DRAFTING_CHAINED = 1,   /* one head for each step, a KV layer each: every head reads all rows */
    MTP_DRAFTING_SHARED_KV = 2, /* the head reads the target's KV and writes none: no catch-up, one position */
};

/* sizeof and offsetof of the host's llama_batch, and the size of llama_sampler_chain_params, as the host's own
 * bindings see them. */
struct mtp_host_layout {
    size_t batch_size;
    size_t n_tokens, token, embd, pos, n_seq_id, seq_id, logits;
    size_t chain_params_size;
};

struct mtp_session_params {
    void *  target;      /* llama_context of the host */
    void *  draft;       /* llama_context of type MTP, or NULL: drafts then come from the caller of mtp_next */
    int32_t n_vocab;
    int32_t n_embd;      /* width of a hidden row, floats */
    int32_t n_ctx;       /* positions that both contexts can hold */
    int32_t n_batch;     /* most rows in one decode of either context */
    int32_t n_ubatch;
    int32_t n_draft_max; /* bound on the depth; 1 + n_draft_max rows must fit n_batch */
    int32_t n_rs_seq;    /* snapshots that the target really has, llama_n_rs_seq() */
    int32_t rollback;    /* enum mtp_rollback */
    int32_t gathers;     /* 1: the MTP graph publishes hidden rows of outputs only (read masked) */
    int32_t gaps;        /* 1: positions of the draft context may jump (M-RoPE) */
    int32_t confidence;  /* 1: draft picks bring their probability (top-10 softmax); 0: argmax on the device */
    float   class_bounds[7]; /* a pick's class is the number of these probabilities, in rising order, that it reaches */
    int32_t drafting;    /* enum mtp_drafting */
    int32_t n_heads;     /* NextN heads of a chain; 1 otherwise */
    int32_t all_outputs; /* 1: every row of the draft context is an output, for a graph that nobody has run yet */
    int32_t prefill_window; /* most waiting rows that the draft context reads, at least 1 + n_draft_max, which is what
                             * rounds leave behind; 0: all. Without effect where KV is shared */
    int32_t n_checkpoints; /* most copies of a recurrent state to keep near the ends of prompts */
    /* A head that knows a part of the vocabulary only; all three 0 or NULL: the draft context has the target's. Both
     * arrays are copied. */
    int32_t         n_draft_vocab;
    const int32_t * draft_tokens; /* [n_draft_vocab] the target's token of each of the draft context's */
    const int32_t * stand_ins;    /* [n_vocab] the draft context's token for each of the target's: the same one where it
                                   * has it, else what is to be read in its place */
};

/* Classes of confidence, most drafts of a round, and how many tokens before a prompt's end a checkpoint stands. */
enum { MTP_CLASSES = 8, MTP_MAX_DEPTH = 64, MTP_CHECKPOINT_TAIL = 4 };

/* What a round drafts and verifies, pick by pick. A pick has a class by its probability, always 0 where the device or the
 * caller picks. With P(k) the product of accept over the first k picks, pick k + 1 is drafted while P(k) >= go[k]; then
 * those m drafts are verified that make P(1) + ... + P(m) - price[m] largest, of equals the most. */
struct mtp_rule {
    int32_t depth;       /* most drafts, 0 to MTP_MAX_DEPTH */
    float   p_min;       /* drafting stops at a pick less likely than this; 0: never */
    int32_t window;      /* most waiting rows that this round reads, below prefill_window; 0: as many as that */
    float   accept[512]; /* [position][class]: chance that a pick is right when all before it are */
    float   go[64];      /* by position, from 0 */
    float   price[65];   /* by number of verified drafts, in tokens */
};

/* What next() did. Times are nanoseconds of one round and are set when a round begins. */
struct mtp_step {
    int32_t token;       /* the emitted token */
    int32_t rows_left;   /* verify rows that can still be sampled; 0: the next call begins a round */
    int32_t new_round;   /* 1 when this call drafted and verified */
    int32_t n_drafted;   /* drafts of the current round */
    int32_t n_accepted;  /* drafts of the current round that the samples so far agreed with */
    int32_t n_sampled;   /* rows of the current round that were sampled so far */
    int64_t target_ns;   /* the round's target decode with its wait; copies of the state and replayed rows included */
    int64_t draft_ns;    /* the round's draft decodes with their waits */
    int32_t n_replayed;  /* kept rows of earlier rounds that this round decoded once more (checkpoint rollback) */
    int32_t n_picks;     /* drafts that were proposed, of which the first n_drafted were verified */
    int32_t spare;       /* would the pick after the verified ones have been right? 1 yes, 0 no, -1 nobody knows (yet) */
    int32_t replays_next; /* 1: the next round decodes so many rows once more (checkpoint rollback) that the
                          * source makes no drafts; a caller's drafts would take a decode more */
    uint8_t classes[64]; /* of the picks */
};

/* Counters since the session was opened. */
struct mtp_counters {
    int64_t n_rounds, n_target_decodes, n_draft_decodes, n_drafted, n_accepted, n_sampled;
    int64_t n_draft_restarts;  /* times a gap emptied the draft context */
    int64_t n_draft_failures;  /* decodes that the host refused in the draft context */
    int64_t target_ns, draft_ns, sample_ns; /* decodes with their waits, and the chain's sampling */
    int64_t rollback_ns;       /* the host's removal of rows from either memory */
    int64_t total_ns;          /* inside this library, what is listed before included */
    int64_t n_replayed;        /* target rows decoded once more after a rejection (checkpoint rollback) */
    int64_t n_state_bytes;     /* recurrent state copied out of and into the target's memory by rounds */
    int64_t n_row_bytes;       /* held now for hidden rows and tokens that wait for the draft, or have waited */
    int64_t n_checkpoints, n_checkpoint_bytes; /* held now */
    int64_t n_checkpoints_saved, n_checkpoints_restored;
    int64_t n_tokens_kept;     /* that checkpoints spared the target */
};

typedef struct mtp_session mtp_session;

/* The package version that this module was built for. */
const char * mtp_version(void);

/* Name of the i-th host function that the engine calls, in the order in which the calls below take their addresses; NULL
 * beyond the last. */
const char * mtp_host_function(int32_t i);

/* Opens a session. On failure *out is NULL and text (n_text bytes) holds one sentence. */
int mtp_session_open(void * const * functions, int32_t n_functions, const struct mtp_host_layout * layout,
                     const struct mtp_session_params * params, mtp_session ** out, char * text, size_t n_text);

/* Frees the session. detach = 1: the draft context is still alive and its sampler is taken off it first. */
void mtp_session_close(mtp_session * session, int detach);

/* One sentence on the last failure. Valid until the next call on the session. */
const char * mtp_session_error(const mtp_session * session);

/* MTP_OK when two llama_vocab have the same tokens: number, text and attributes of each. Otherwise text says where they
 * part. With tokens, b has n_tokens, and token i of b has to have the text of token tokens[i] of a. */
int mtp_compare_vocabularies(void * const * functions, int32_t n_functions, const struct mtp_host_layout * layout,
                             const void * a, const void * b, const int32_t * tokens, int32_t n_tokens, char * text,
                             size_t n_text);

/* --- capture: after each decode of the target that the session did not do itself --------------------------------- */

/* The host decoded n tokens (sequence 0) at consecutive positions from pos, and logits of the last one are live.
 * Copies the hidden rows; decodes them in the draft context when more than n_batch are waiting, or drops them where a
 * prefill window has no use for them. */
int mtp_capture(mtp_session * session, const int32_t * tokens, int32_t n, int32_t pos);

/* Whether the host keeps hidden rows, from its next decode on (on = 1, as at first). Without them its last block computes
 * only the rows that have logits, and mtp_capture takes nothing: the draft starts anew behind what it was not shown. For
 * the part of a long prompt that lies before the prefill window. A round needs the rows and is refused without. */
int mtp_keep_rows(mtp_session * session, int on);

/* --- a generation ------------------------------------------------------------------------------------------------- */

/* A generation begins, or is taken up again, whose text starts with these n tokens, which the target holds. What a round
 * left behind is settled, the source of drafts forgets what says otherwise, and one that had failed is tried again: best
 * before the rest of a prompt is evaluated, so that it is shown that part. */
int mtp_begin(mtp_session * session, const int32_t * tokens, int32_t n);

/* Emits one token: samples the next row with the caller's llama_sampler chain, stepped exactly once. With no row left a
 * round begins: what the last one left behind is settled, drafts follow last (which stands at position pos) as the rule
 * says, and one target decode verifies them. rule NULL: no drafts. With drafts (n_drafts of them, of class 0) these are
 * the round's, and a round that has rows left ends first; NULL: the session's own source makes them. */
int mtp_next(mtp_session * session, void * sampler, int32_t last, int32_t pos, const struct mtp_rule * rule,
             const int32_t * drafts, int32_t n_drafts, struct mtp_step * step);

/* Why the session's source makes no more drafts until the next mtp_begin, in one sentence; "" while it makes some. */
const char * mtp_draft_error(const mtp_session * session);

/* For measurements only, and never on by itself: from now on a seeded coin decides in place of the comparison whether the
 * draft at position i is accepted, with chance chances[i] (the last one serves all deeper positions). What a round costs
 * can so be read at any acceptance; the text is nonsense. n = 0 ends it. */
int mtp_accept_by_coin(mtp_session * session, const float * chances, int32_t n, uint64_t seed);

/* --- going back --------------------------------------------------------------------------------------------------- */

/* Keeps of the target's text (n_text tokens, as the caller knows it) what it shares with a prompt: *n_kept is how many
 * tokens of the prompt need not be evaluated. The memories are cut, as by mtp_truncate, or go back to the deepest
 * checkpoint. All of the prompt is kept only where the logits of its last token are live. Where the draft would lack the
 * hidden row of the next token, one token less is kept than could be. 0: clear the target and evaluate everything. */
int mtp_reuse(mtp_session * session, const int32_t * text, int32_t n_text, const int32_t * prompt, int32_t n_prompt,
              int32_t * n_kept);

/* Where in a prompt that ends at position `end` the evaluation should pause for a checkpoint, or -1. The target may hold
 * more than that already; then there is none to make. */
int32_t mtp_checkpoint_at(const mtp_session * session, int32_t end);

/* Keeps a copy of the recurrent state after these n tokens, which the target holds, and of the hidden row that belongs to
 * it. The oldest copies make room; none is made of a text with images (negative tokens). */
int mtp_checkpoint(mtp_session * session, const int32_t * tokens, int32_t n);

/* Cuts target and draft to the rows that were sampled. A no-op between rounds. With checkpoint rollback the target's
 * memory itself follows at the next round, or at mtp_replay. */
int mtp_settle(mtp_session * session);

/* Settles, and makes the target's memory hold exactly the mtp_n_past positions: with checkpoint rollback by loading the
 * state from before the last drafts and decoding the rows since then that were kept. Needed before anyone else decodes,
 * saves or cuts that memory; a no-op for other kinds of rollback and where nothing was rejected. */
int mtp_replay(mtp_session * session);

/* Cuts target and draft to n_past positions, with one rollback also in the middle of a round. The target's memory
 * follows as after mtp_settle. The draft keeps one token more where it has read beyond n_past: when the token at n_past
 * is evaluated again and is the same, the draft gets the hidden row of the token after it. */
int mtp_truncate(mtp_session * session, int32_t n_past);

/* 1 when mtp_truncate(n_past) would succeed now. */
int mtp_can_truncate(const mtp_session * session, int32_t n_past);

/* The target's memory was replaced or cleared by someone else and now ends at n_past: forget all bookkeeping. */
int mtp_forget(mtp_session * session, int32_t n_past);

/* Batch row whose logits are those of the target's last kept position, or -1. */
int mtp_live_row(const mtp_session * session);

/* Positions the target holds, pending rows left out; and those the draft context has seen with true hidden rows, after
 * mtp_truncate perhaps one more. */
int mtp_n_past(const mtp_session * session);
int mtp_n_past_draft(const mtp_session * session);

void mtp_session_counters(const mtp_session * session, struct mtp_counters * out);

/* --- state: what the session knows beside the two memories, which the caller saves with the host's own functions -- */

/* Replays, takes unverified drafts out of the draft memory, and says how many bytes mtp_state_get writes: where the
 * draft memory starts, its tokens, and the rows that wait. 0 without a draft context. Save both memories after it. */
int mtp_state_size(mtp_session * session, size_t * n_bytes);

/* Writes the state; n_bytes is what mtp_state_size said. */
int mtp_state_get(mtp_session * session, void * data, size_t n_bytes);

/* MTP_INVALID, with the reason, for bytes that mtp_state_set would refuse. Changes nothing. */
int mtp_state_check(mtp_session * session, const void * data, size_t n_bytes);

/* The caller put the target's memory back, called mtp_forget, and put the draft memory back. With data NULL the draft
 * memory is emptied instead, and the draft starts at the target's end. */
int mtp_state_set(mtp_session * session, const void * data, size_t n_bytes);

// cdef-end

#ifdef __cplusplus
}
#endif

#endif
