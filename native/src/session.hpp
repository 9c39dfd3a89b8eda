// Session: target and draft side by side, one round at a time. The only place that knows both.
#pragma once

#include "drafts/head.hpp"
#include "verify.hpp"

#include <atomic>
#include <memory>
#include <string>

// Order of a round: settle, draft, verify, sample... Members die in reverse order: the draft before the table.
struct mtp_session {
    mtp_session(const mtp_host_api & api, const mtp_host_layout & layout, const mtp_session_params & params);

    void capture(const int32_t * tokens, int32_t n, int32_t pos);
    void next(void * sampler, int32_t last, int32_t pos, const mtp_rule * rule, mtp_step & step);
    mtp::picks draft(int32_t last, int32_t pos, const mtp_rule & rule);
    void verify(int32_t last, int32_t pos, const int32_t * tokens, int32_t n, int32_t n_picks);
    void sample(void * sampler, mtp_step & step);
    void commit(int32_t n_rows);
    void settle();
    void truncate(int32_t n_past);
    void replay();
    void forget(int32_t n_past);
    void align(const int32_t * tokens, int32_t n);
    void   row_get(float * row) const;
    void   row_set(const float * row);
    size_t state_size();
    void   state_get(uint8_t * data, size_t n) const;
    void   state_check(const uint8_t * data, size_t n, int32_t max_end) const;
    void   state_set(const uint8_t * data, size_t n);

    const mtp_session_params      params;
    const mtp::host_api           api;
    mtp::verifier                 target;
    std::unique_ptr<mtp::drafter> drafter;  // absent when drafts come from the caller

    mtp_counters     counters{};
    std::atomic_flag inside = ATOMIC_FLAG_INIT;
    std::string      error;

  private:
    void begin_round(int32_t pos);
    void hand_over(const int32_t * tokens, int32_t n, int32_t pos);
    void truncate_target(int32_t n_past);
    mtp_counters with_round() const;

    int64_t round_target_ns_ = 0;
    int64_t round_draft_ns_  = 0;
    int32_t round_replayed_  = 0;
    mtp::picks round_picks_;
};
