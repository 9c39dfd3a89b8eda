// Session: the target and a source of drafts, one round at a time. The only place that knows both.
#pragma once

#include "checkpoints.hpp"
#include "drafts/source.hpp"
#include "verify.hpp"

#include <atomic>
#include <memory>
#include <string>

// Order of a round: settle, draft, verify, sample... Members die in reverse order: the source before the table.
struct mtp_session {
    mtp_session(void * const * functions, int32_t n_functions, const mtp_host_layout & layout,
                const mtp_session_params & params);

    void begin(const int32_t * tokens, int32_t n);
    void capture(const int32_t * tokens, int32_t n, int32_t pos);
    // `drafts` NULL: the source makes them.
    void next(void * sampler, int32_t last, int32_t pos, const mtp_rule * rule, const int32_t * drafts, int32_t n_drafts,
              mtp_step & step);

    int32_t reuse(const int32_t * text, int32_t n_text, const int32_t * prompt, int32_t n_prompt);
    void    save_checkpoint(const int32_t * tokens, int32_t n);
    void    settle();
    void    truncate(int32_t n_past);
    void    replay();
    void    forget(int32_t n_past);

    size_t state_size();
    void   state_get(uint8_t * data, size_t n) const;
    void   state_check(const uint8_t * data, size_t n, int32_t max_end) const;
    void   state_set(const uint8_t * data, size_t n);

    mtp_counters count() const;

    const mtp_session_params     params;
    const mtp::host_api          api;
    mtp::verifier                target;
    mtp::checkpoints             checkpoints;
    std::unique_ptr<mtp::source> source;  // absent when drafts come from the caller

    mtp_counters     counters{};
    std::atomic_flag inside = ATOMIC_FLAG_INIT;
    std::string      error;

  private:
    void       begin_round(int32_t pos);
    mtp::picks propose(int32_t last, int32_t pos, const mtp_rule * rule, const int32_t * drafts, int32_t n_drafts);
    void       verify(int32_t last, int32_t pos, mtp::picks drafts, int32_t n);
    void       sample(void * sampler, mtp_step & step);
    void       process(const int32_t * tokens, int32_t n, int32_t pos);
    int32_t    restore(const int32_t * prompt, int32_t n_prompt);
    // The counters once the round ends here.
    mtp_counters with_round() const;

    int64_t    round_target_ns_ = 0;
    int64_t    round_draft_ns_  = 0;
    int32_t    round_replayed_  = 0;
    mtp::picks round_picks_;
};
