// Head: drafts from a NextN head, through the host's context of type MTP.
#pragma once

#include "../capture.hpp"
#include "../vocabulary.hpp"
#include "pick.hpp"
#include "source.hpp"

#include <memory>
#include <vector>

namespace mtp {

class head;

// How a head goes on after its first draft (llama.cpp common/speculative.cpp, common_speculative_impl_draft_mtp). Which of
// the three a head is, is decided once.
struct steps {
    virtual ~steps() = default;

    // Loads the batch of step i: `token` at pos + i, with the head's own row of the step before. False: no more drafts.
    virtual bool add(head & h, int32_t token, int32_t pos, int32_t i) const = 0;
    // The batch of the first step is being loaded.
    virtual void first(head &) const {}
    // n_steps were made, the first of them with n_true rows of true text. False: the draft memory starts anew.
    virtual bool finish(head &, int32_t /*n_steps*/, int32_t /*n_true*/) const { return true; }

    virtual int32_t n_heads() const { return 1; }
    virtual int32_t max_depth() const { return MTP_MAX_DEPTH; }
    virtual bool    owns_memory() const { return true; }  // false: what looks like its memory is the target's
    virtual bool    extends_batch() const { return false; }  // step i reads the rows of the steps before it again
};

// Each step adds one row: the draft of the step before with the hidden row that the head gave for it.
struct one_head : steps {
    bool add(head & h, int32_t token, int32_t pos, int32_t i) const override;
};

// Step i is head i, whose KV is another layer of the same cells: the memory goes back to the true rows, and head i reads
// all that wait, `last`, and every draft so far. Heads that a round does not reach read the true rows, or their KV would
// have holes: n_heads decodes a round.
struct chained_heads : steps {
    explicit chained_heads(int32_t n) : n_(n) {}
    bool    add(head & h, int32_t token, int32_t pos, int32_t i) const override;
    void    first(head & h) const override;
    bool    finish(head & h, int32_t n_steps, int32_t n_true) const override;
    int32_t n_heads() const override { return n_; }
    int32_t max_depth() const override { return n_; }
    bool    extends_batch() const override { return true; }

  private:
    const int32_t n_;
};

// The head attends to the target's own cells and writes none: nothing to catch up with, nothing to remove, and every step
// stands at the position of `last`. llama_memory_clear on this context would wipe the target's cells.
struct shared_kv : steps {
    bool add(head & h, int32_t token, int32_t pos, int32_t i) const override;
    bool owns_memory() const override { return false; }
};

// Invariant between calls: the draft memory holds true rows for [queue.start, queue.decoded), and rows of unverified
// drafts up to memory_end; the latter are removed before the next decode.
//
// With a prefill window of W more than W waiting rows are never read: all but the last W are dropped, and with them the
// memory before them, as a hole in the middle of a text is worth less than a text that begins later.
class head : public source {
  public:
    // The next token of the text stands at `end`.
    head(const host_api & api, const mtp_session_params & params, int32_t end);

    void  begin(const int32_t * tokens, int32_t n) override;
    // Positions after a gap restart the draft memory, unless the architecture allows the gap.
    void  process(const int32_t * tokens, const float * rows, int32_t n, int32_t pos) override;
    // The waiting rows and the first step go in one decode. A failed decode proposes nothing and empties the draft memory.
    picks draft(int32_t last, int32_t pos, int32_t depth, const mtp_rule & rule) override;
    void  accept(int32_t end) override { queue_.cut(end); }

    // Below `decoded` the row that the next token needs, the target's of end - 1, is gone; but the one that follows the
    // token at `end` comes back when that token is evaluated again. So it stays in the draft memory, where process()
    // recognises it.
    void truncate(int32_t end) override;
    void cut(int32_t end) override { queue_.cut(end); }
    void restart(int32_t end) override;
    bool needs_token_before(int32_t end) const override { return alive() && end > 0 && end < queue_.decoded(); }

    const float * row(int32_t end) const override;
    void          set_row(const float * row) override { queue_.set_row(row); }
    size_t        state_size() override;
    void          state_get(uint8_t * data, size_t n) const override;
    const char *  state_check(const uint8_t * data, size_t n, int32_t max_end) const override {
        return queue_.state_check(data, n, params_.n_vocab, max_end);
    }
    void state_set(const uint8_t * data) override;

    void                detach() override { pick_.detach(); }
    const std::string & error() const override { return error_; }
    int32_t             end() const override { return queue_.end(); }
    void                count(mtp_counters & out) const override;
    int64_t             draft_ns() const override { return ns_; }

  private:
    friend struct one_head;
    friend struct chained_heads;
    friend struct shared_kv;

    static constexpr int max_failures = 3;  // in one generation; then the draft context is left alone until the next

    bool    alive() const { return error_.empty(); }
    int32_t window() const;
    void    restart_at_gap(int32_t pos);
    void    keep_waiting(int32_t n);
    void    keep_window(int32_t most = 0);
    void    push(int32_t token, int32_t pos, bool output, const float * hidden);
    void    load_waiting(int32_t end);
    void    catch_up();
    bool    rewind(int32_t pos);
    bool    decode();
    void    drop_unverified();
    bool    read_hidden(int32_t row);
    pick    read_pick(int32_t row);

    const host_api &         api_;
    const mtp_session_params params_;
    void *                   memory_;
    std::unique_ptr<steps>   steps_;
    picker                   pick_;
    capture_queue            queue_;
    row_batch                batch_;
    const token_map          vocabulary_;
    std::vector<float>       hidden_;  // the head's own row for the next step
    int32_t                  memory_end_ = 0;
    int32_t                  base_       = 0;  // where the true rows ended when the batch was loaded
    int                      failures_   = 0;
    std::string              error_;

    int64_t n_decodes_ = 0, n_restarts_ = 0, n_failures_ = 0;
    int64_t ns_          = 0;  // decodes, their waits, and the picks
    int64_t rollback_ns_ = 0;
};

}  // namespace mtp
