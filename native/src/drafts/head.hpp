// Draft: the MTP context. Catches up with the captured rows and proposes the next tokens.
#pragma once

#include "../capture.hpp"
#include "../rule.hpp"
#include "../vocabulary.hpp"

#include <algorithm>
#include <memory>
#include <vector>

namespace mtp {

// What follows the first step differs in three ways (llama.cpp common/speculative.cpp,
// common_speculative_impl_draft_mtp); add_step_ is one of them, chosen once:
//
//     one head    step i adds one row: the draft of step i - 1 with the hidden row that the head gave for it.
//     chained     step i is head i, whose KV is another layer of the same cells: the memory is taken back to the true
//                 rows, and head i reads all that wait, `last`, and every draft so far. Heads that a round does not
//                 reach read the true rows, or their KV would have holes: n_heads decodes a round.
//     shared KV   the head attends to the target's own cells and writes none: nothing to catch up with, nothing to
//                 remove, and every step stands at the position of `last`. llama_memory_clear on this context would
//                 wipe the target's cells.
//
// Invariant between calls: the draft memory holds true rows for [queue.start, queue.decoded), and rows of unverified
// drafts up to memory_end; the latter are removed before the next decode.
//
// With a prefill window of W more than W waiting rows are never read: all but the last W are dropped, and with them the
// memory before them, as a hole in the middle of a text is worth less than a text that begins later.
class drafter {
  public:
    drafter(const host_api & api, const mtp_session_params & params);
    drafter(const drafter &)             = delete;
    drafter & operator=(const drafter &) = delete;

    // The draft context outlives the session: take our sampler off it before it is freed.
    void detach();

    bool alive() const { return failures_ < max_failures; }
    const capture_queue & queue() const { return queue_; }

    // Takes rows that the target decoded at positions pos..pos+n-1. Positions after a gap restart the draft memory,
    // unless the architecture allows the gap.
    void capture(const int32_t * tokens, const float * rows, int32_t n, int32_t pos);

    // Proposes up to `depth` tokens after `last` at position pos, fewer where the rule says so: the waiting rows and the
    // first step go in one decode. A failed decode proposes nothing and empties the draft memory; the target is not
    // concerned.
    picks draft(int32_t last, int32_t pos, int32_t depth, const mtp_rule & rule);

    // Forgets positions from pos on.
    void cut(int32_t pos) { queue_.cut(pos); }
    // The same for a target that goes on at pos. Below `decoded` the row that the next token needs, the target's of
    // pos - 1, is gone; but the one that follows the token at pos comes back when that token is evaluated again. So it
    // stays in the draft memory, where capture recognises it.
    void truncate(int32_t pos);
    // Whether the token at pos would have no hidden row after cut(pos).
    bool lacks_row(int32_t pos) const { return alive() && pos > 0 && pos < queue_.decoded(); }
    // The row of the token to come, from when the queue ended at the same position with the same text.
    void set_row(const float * row) { queue_.set_row(row); }
    void align(const int32_t * tokens, int32_t n);

    // Empties memory and queue; the next token stands at pos.
    void restart(int32_t pos);

    // The queue as bytes. The size comes first: it takes the unverified drafts out of the draft memory.
    size_t       state_size();
    const char * state_check(const uint8_t * data, size_t n, int32_t max_end) const {
        return queue_.state_check(data, n, params_.n_vocab, max_end);
    }
    // The draft memory was put back as it was when these bytes were written.
    void state_set(const uint8_t * data);

    int64_t n_decodes   = 0;
    int64_t n_restarts  = 0;
    int64_t ns          = 0;  // decodes, their waits, and the picks
    int64_t rollback_ns = 0;

  private:
    static constexpr int max_failures = 3;  // then the draft context is left alone for good

    struct pick {
        int32_t token;  // the draft context's own
        float   p;
        uint8_t klass;
    };

    bool chained() const { return params_.drafting == MTP_DRAFTING_CHAINED; }
    bool shares_kv() const { return params_.drafting == MTP_DRAFTING_SHARED_KV; }
    // 0: all rows are read. What rounds leave behind is no prompt, and has to fit.
    int32_t window() const {
        const bool none = shares_kv() || params_.prefill_window == 0;
        return none ? 0 : std::max(params_.prefill_window, params_.n_draft_max + 1);
    }

    void keep_waiting(int32_t n);
    void keep_window(int32_t most = 0);
    void push(int32_t token, int32_t pos, bool output, const float * hidden);
    void load_waiting(int32_t end);
    void catch_up();
    bool grow(int32_t token, int32_t pos, int32_t i);
    bool chain(int32_t token, int32_t pos, int32_t i);
    bool stay(int32_t token, int32_t pos, int32_t i);
    void finish_chain(int32_t n_steps, int32_t n_true);
    bool rewind(int32_t pos);
    bool decode();
    void drop_unverified();
    bool read_hidden(int32_t row);
    pick pick_device(int32_t row);
    pick pick_host(int32_t row);

    const host_api &         api_;
    const mtp_session_params params_;
    void *                   memory_;
    capture_queue            queue_;
    row_batch                batch_;
    const token_map          vocabulary_;
    std::vector<float>       hidden_;      // the head's own row for the next step
    std::unique_ptr<void, void (*)(void *)> chain_;
    pick (drafter::*pick_)(int32_t row);   // resolved once: on the device, or on the host with its probability
    bool (drafter::*add_step_)(int32_t token, int32_t pos, int32_t i);
    int32_t n_heads_;                      // of a chain: those that a round can reach
    int32_t memory_end_ = 0;
    int32_t base_       = 0;               // of a chain: where the true rows ended when the round began
    int     failures_   = 0;
};

}  // namespace mtp
