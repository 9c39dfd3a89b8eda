// Source: where drafts come from. A new source of drafts is a new class here; the session knows this interface only.
#pragma once

#include "../rule.hpp"

#include <cstddef>
#include <cstdint>
#include <string>

namespace mtp {

// One round, in the order of the calls:
//
//     draft(last, pos)  ->  the target decodes [last, drafts]  ->  process(rows)  ->  rows are sampled  ->  accept(end)
//
// A failure of a source costs drafts, never the text: none of these throws for what the host does to a draft.
class source {
  public:
    source()                           = default;
    source(const source &)             = delete;
    source & operator=(const source &) = delete;
    virtual ~source()                  = default;

    // A generation begins, or is taken up again: the text starts with these n tokens, and the target holds them.
    virtual void begin(const int32_t * tokens, int32_t n) = 0;

    // The target decoded n tokens at positions pos..pos+n-1; drafts that are not verified yet are among them. `rows` are
    // their hidden rows (n x n_embd floats), NULL where the host kept none.
    virtual void process(const int32_t * tokens, const float * rows, int32_t n, int32_t pos) = 0;

    // Proposes up to `depth` tokens after `last`, which stands at pos; fewer where the rule says so.
    virtual picks draft(int32_t last, int32_t pos, int32_t depth, const mtp_rule & rule) = 0;

    // The round is over and the text ends at `end`.
    virtual void accept(int32_t end) = 0;

    // --- going back

    // The target's text was cut to `end`; the token at `end` may be evaluated again.
    virtual void truncate(int32_t end) = 0;
    // Nothing is known of the text from `end` on.
    virtual void cut(int32_t end) = 0;
    // Nothing is known of the text; it goes on at `end`.
    virtual void restart(int32_t end) = 0;
    // Whether drafts after a cut to `end` need the token before `end` evaluated again.
    virtual bool needs_token_before(int32_t end) const = 0;

    // --- what belongs to a checkpoint or a saved state

    // What the source needs of the target for the token at `end`, n_embd floats; NULL where it has nothing to keep.
    virtual const float * row(int32_t end) const = 0;
    virtual void          set_row(const float * row) = 0;
    // The size comes first: it takes unverified drafts out of the source's memory.
    virtual size_t       state_size()                                                 = 0;
    virtual void         state_get(uint8_t * data, size_t n) const                     = 0;
    virtual const char * state_check(const uint8_t * data, size_t n, int32_t max_end) const = 0;  // NULL, or the reason
    virtual void         state_set(const uint8_t * data)                               = 0;

    // --- lifetime and counters

    // The host's context that the source drives outlives the session: take off it what is ours.
    virtual void detach() = 0;
    // Why draft() proposes nothing until the next begin(); empty while it does.
    virtual const std::string & error() const = 0;
    // Positions whose tokens the source knows.
    virtual int32_t end() const                     = 0;
    virtual void    count(mtp_counters & out) const = 0;
    virtual int64_t draft_ns() const                = 0;
};

}  // namespace mtp
