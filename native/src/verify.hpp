// Verify: the target. One decode over the last token and its drafts, sampled row by row, rolled back once.
#pragma once

#include "state_copy.hpp"

#include <vector>

namespace mtp {

// What the target's memory holds, and how much of it can be taken back.
//
//     position   0 .............. base .......... base + sampled ......... base + rows
//                [ settled        )[ rows that were sampled )[ rows that were not )
//
// Between rounds rows == 0 and base is the end of the memory. `undo` is how many positions can be removed from the
// end of the memory right now: everything for attention; for recurrent snapshots the rows of the last ubatch less
// one, at most n_rs_seq, and nothing once a removal happened (llama-memory-recurrent.cpp answers true more often
// than its state allows, so its word is not taken).
//
// Checkpoint rollback: the state is copied before a decode that has drafts, and `replay` lists the tokens since then
// that were kept.
//
//     position   0 .............. copy.end ............... base
//                [ copied state   )[ replay               )
//
// A rejection only marks the memory as behind. The next verify loads the copy and decodes the replay in front of its
// own rows: no decode is spent on it, and the same copy serves again. What accumulates over rejections in a row is
// bounded: beyond replay_max a round should take no drafts, so that all its rows are kept and a new copy can follow.
// Where there are drafts all the same, the replay takes a decode of its own.
class verifier {
  public:
    verifier(const host_api & api, const mtp_session_params & params);

    // The target's end, rows that nobody sampled left out.
    int32_t n_past() const { return base_ + kept(); }
    // The token that the next verify row was decoded from, and its position.
    int32_t row_pos() const { return base_ + sampled_; }
    int32_t row_token() const { return row_tokens_[sampled_]; }
    int32_t rows_left() const { return rejected_ ? 0 : rows() - sampled_; }
    bool    in_round() const { return !row_tokens_.empty(); }
    int32_t live_row() const { return live_row_; }

    // Someone else decoded n rows of sequence 0 from pos; only the last is known to have logits.
    void observe_decode(int32_t n, int32_t pos);

    // Whether the host keeps hidden rows, from its next decode on. A round needs them.
    void keep_rows(bool on);

    // Someone else replaced the memory; it ends at n_past and nothing can be taken back in a recurrent trunk.
    void forget(int32_t n_past);

    // Empties the memory.
    void clear();

    bool can_truncate(int32_t n_past) const;
    void truncate(int32_t n_past);

    // Makes the host's memory what n_past() says it is. Between rounds; a no-op unless a rejection left it behind.
    void replay();

    // Most drafts that a round may carry from position pos.
    int32_t depth_limit(int32_t pos) const;

    // The next round has so much to replay that drafts had better wait: they would cost a decode more.
    bool replays_only() const;

    // Decodes [last, drafts...] from pos, every row an output. Needs a settled target that ends at pos. The drafts are
    // left out where their rollback needs a copy and the host makes none. `spare` is a draft that is not verified, to
    // stand after them, or -1: where they are all right the last sample says whether it would have been.
    void verify(int32_t last, int32_t pos, const int32_t * drafts, int32_t n, int32_t spare);

    // Samples the next row with the caller's chain: exactly one step of the chain.
    int32_t sample(void * sampler);

    // For measurements: a coin decides which drafts are accepted. No chances: the model decides, as always.
    void accept_by_coin(std::vector<float> chances, uint64_t seed);

    // The round in numbers.
    int32_t drafted() const { return in_round() ? rows() - 1 : 0; }
    int32_t accepted() const { return accepted_; }
    int32_t sampled() const { return sampled_; }
    int32_t spare() const { return spare_right_; }
    // What the host's memory itself says.
    int32_t host_start() const { return api_.memory_seq_pos_min(memory_, 0); }
    int32_t host_end() const { return api_.memory_seq_pos_max(memory_, 0) + 1; }

    // Hidden rows of the last decode from `last` on, n_embd floats each; NULL when the host has none, or keeps none.
    const float * hidden_rows();

    const std::vector<int32_t> & row_tokens() const { return row_tokens_; }

    int64_t n_state_bytes() const { return copy_.n_bytes; }

    int64_t n_decodes   = 0;
    int64_t n_replayed  = 0;
    int64_t ns          = 0;
    int64_t sample_ns   = 0;
    int64_t rollback_ns = 0;

  private:
    int32_t rows() const { return static_cast<int32_t>(row_tokens_.size()); }
    // Row 0 holds `last`, which is text already: it stays even when its sample was never taken.
    int32_t kept() const { return in_round() ? (sampled_ > 0 ? sampled_ : 1) : 0; }
    bool    has_copies() const { return params_.rollback == MTP_ROLLBACK_CHECKPOINT; }
    bool    has_copy() const { return copy_.end() >= 0; }
    int32_t undo_limit(int32_t n_rows) const;
    void    close_round();
    bool    remove(int32_t pos);
    bool    make_ready(bool with_drafts);
    void    load_copy();
    int32_t decode();
    int32_t toss(int32_t token);
    bool    heads(int32_t position);

    const host_api &         api_;
    const mtp_session_params params_;
    void *                   memory_;
    row_batch                batch_;
    std::vector<int32_t>     row_tokens_;  // last, d1..dn
    int32_t                  base_      = 0;
    int32_t                  undo_      = 0;
    int32_t                  sampled_   = 0;
    int32_t                  accepted_  = 0;
    int32_t                  first_row_ = 0;  // batch row of `last`: rows before it are replayed
    int32_t                  live_row_  = -1;
    bool                     rejected_  = false;
    bool                     keeps_rows_  = true;
    int32_t                  spare_       = -1;
    int32_t                  spare_right_ = -1;
    const int32_t            replay_max_;
    state_copy               copy_;
    std::vector<int32_t>     replay_;         // tokens at [copy.end, base); empty without a copy
    std::vector<float>       chances_;        // of the coin; empty unless someone measures
    uint64_t                 coin_   = 0;
    bool                     behind_ = false; // the memory is not the text from copy.end on
};

}  // namespace mtp
