#include "session.hpp"

#include "vocabulary.hpp"

#include <algorithm>
#include <cstdio>
#include <new>

using mtp::failure;

namespace {

void require(bool ok, const char * text) {
    if (!ok) {
        throw failure(MTP_INVALID, text);
    }
}

const mtp_session_params & checked(const mtp_session_params & p) {
    require(p.target != nullptr, "the target context is missing");
    require(p.n_vocab > 0 && p.n_ctx > 0 && p.n_batch > 0 && p.n_ubatch > 0, "sizes must be positive");
    require(p.n_draft_max >= 0 && p.n_draft_max < p.n_batch, "1 + n_draft_max rows must fit n_batch");
    require(p.n_draft_max <= MTP_MAX_DEPTH, "n_draft_max must not exceed MTP_MAX_DEPTH");
    require(p.prefill_window >= 0, "prefill_window must not be negative; 0 reads everything");
    require(p.draft == nullptr || p.n_embd > 0, "a draft context needs the width of a hidden row");
    require(p.rollback >= MTP_ROLLBACK_ATTENTION && p.rollback <= MTP_ROLLBACK_CHECKPOINT, "unknown rollback kind");
    require(p.n_rs_seq >= 0, "n_rs_seq must not be negative");
    require(p.drafting >= MTP_DRAFTING_ONE_HEAD && p.drafting <= MTP_DRAFTING_SHARED_KV, "unknown drafting mode");
    require(p.drafting != MTP_DRAFTING_CHAINED || (p.n_heads > 0 && p.n_heads < p.n_batch),
            "a chain needs at least one head, and fewer than n_batch");
    require(p.rollback != MTP_ROLLBACK_SNAPSHOTS || p.n_rs_seq == 0 || p.n_ubatch > p.n_rs_seq + 1,
            "n_ubatch must exceed 1 + n_rs_seq; lower the depth or raise n_ubatch");
    return p;
}

}  // namespace

mtp_session::mtp_session(const mtp_host_api & addresses, const mtp_host_layout & layout,
                         const mtp_session_params & p)
    : params(checked(p)), api(mtp::resolve(addresses, layout)), target(api, params),
      drafter(params.draft != nullptr ? std::make_unique<mtp::drafter>(api, params) : nullptr) {
    target.forget(target.host_end());
    if (drafter) {
        drafter->restart(target.n_past());
    }
}

// Copies the hidden rows of the decode that just ended.
void mtp_session::hand_over(const int32_t * tokens, int32_t n, int32_t pos) {
    if (!drafter) {
        return;
    }
    const float * rows = target.hidden_rows();
    if (rows == nullptr) {
        drafter->restart(pos + n);
        return;
    }
    drafter->capture(tokens, rows, n, pos);
}

void mtp_session::capture(const int32_t * tokens, int32_t n, int32_t pos) {
    require(tokens != nullptr && n > 0 && n <= params.n_batch && pos >= 0, "capture needs 1 to n_batch tokens");
    counters = with_round();
    if (drafter && pos > target.n_past()) {
        drafter->cut(target.n_past());  // what stands in between is not the token that a truncation left there
    }
    target.observe_decode(n, pos);
    hand_over(tokens, n, pos);
}

// The counters once the round ends here. Rows that nobody asked for are neither accepted nor rejected.
mtp_counters mtp_session::with_round() const {
    mtp_counters sum = counters;
    if (target.in_round()) {
        ++sum.n_rounds;
        sum.n_drafted += target.drafted();
        sum.n_accepted += target.accepted();
        sum.n_sampled += target.sampled();
    }
    return sum;
}

void mtp_session::truncate_target(int32_t n_past) {
    const mtp_counters booked = with_round();
    target.truncate(n_past);
    counters = booked;  // only now: a refusal leaves the round open
}

void mtp_session::truncate(int32_t n_past) {
    truncate_target(n_past);
    if (drafter) {
        drafter->truncate(n_past);
    }
}

void mtp_session::settle() {
    if (target.in_round()) {
        truncate_target(target.n_past());
        if (drafter) {
            drafter->cut(target.n_past());
        }
    }
}

void mtp_session::replay() {
    settle();
    target.replay();
}

void mtp_session::forget(int32_t n_past) {
    require(n_past >= 0, "n_past must not be negative");
    counters = with_round();
    const int32_t end = std::min(n_past, target.n_past());
    target.forget(n_past);
    if (drafter) {
        drafter->cut(end);
    }
}

void mtp_session::align(const int32_t * tokens, int32_t n) {
    require(n >= 0 && (tokens != nullptr || n == 0), "align needs the tokens of the history");
    if (drafter) {
        drafter->align(tokens, n);
    }
}

void mtp_session::row_get(float * row) const {
    require(drafter != nullptr, "this session has no draft context");
    require(row != nullptr, "row is NULL");
    require(!target.in_round() && drafter->queue().end() == target.n_past(),
            "the draft does not end where the target does");
    const float * hidden = drafter->queue().hidden(target.n_past());
    std::copy(hidden, hidden + params.n_embd, row);
}

void mtp_session::row_set(const float * row) {
    require(drafter != nullptr, "this session has no draft context");
    require(row != nullptr, "row is NULL");
    require(!target.in_round() && drafter->queue().end() == target.n_past(),
            "the draft does not end where the target does");
    drafter->set_row(row);
}

size_t mtp_session::state_size() {
    replay();
    if (!drafter) {
        return 0;
    }
    drafter->cut(target.n_past());
    return drafter->state_size();
}

void mtp_session::state_get(uint8_t * data, size_t n) const {
    require(!target.in_round(), "a round is open; ask for the size of the state first");
    require(n == (drafter ? drafter->queue().state_size() : 0), "the state has another size by now");
    if (n > 0) {
        require(data != nullptr, "data is NULL");
        drafter->queue().state_get(data);
    }
}

void mtp_session::state_check(const uint8_t * data, size_t n, int32_t max_end) const {
    require(drafter != nullptr, "this session has no draft context");
    const char * reason = drafter->state_check(data, n, max_end);
    require(reason == nullptr, reason);
}

void mtp_session::state_set(const uint8_t * data, size_t n) {
    if (data == nullptr) {
        if (drafter) {
            drafter->restart(target.n_past());
        }
        return;
    }
    state_check(data, n, target.n_past());
    drafter->state_set(data);
}

void mtp_session::begin_round(int32_t pos) {
    require(pos >= 0 && pos < params.n_ctx, "the context is full; raise n_ctx or shorten the text");
    if (pos > target.n_past()) {
        // Someone decoded without telling (libmtmd): believe the memory, not the bookkeeping.
        settle();
        require(target.host_end() == pos, "the token's position does not follow the target's memory");
        forget(pos);
    } else if (target.in_round() || pos < target.n_past() || !target.can_truncate(pos)) {
        truncate(pos);  // ends the round, and goes further back where asked, with one removal
    }
}

mtp::picks mtp_session::draft(int32_t last, int32_t pos, const mtp_rule & rule) {
    require(drafter != nullptr, "this session has no draft context; pass drafts to verify");
    require(last >= 0 && last < params.n_vocab, "the last token is outside the vocabulary");
    require(rule.depth >= 0 && rule.depth <= MTP_MAX_DEPTH, "depth must be 0 to MTP_MAX_DEPTH");
    require(rule.window >= 0, "window must not be negative; 0 leaves it as wide as prefill_window");
    begin_round(pos);
    const int64_t before = drafter->ns;
    const int32_t limit  = target.replays_only() ? 0 : target.depth_limit(pos);
    auto          drafts = drafter->draft(last, pos, std::min(rule.depth, limit), rule);
    round_draft_ns_      = drafter->ns - before;
    return drafts;
}

void mtp_session::verify(int32_t last, int32_t pos, const int32_t * tokens, int32_t n, int32_t n_picks) {
    require(last >= 0 && last < params.n_vocab, "the last token is outside the vocabulary");
    require(n >= 0 && n <= n_picks && (tokens != nullptr || n_picks == 0), "verify needs the draft tokens");
    require(std::all_of(tokens, tokens + n_picks, [&](int32_t t) { return t >= 0 && t < params.n_vocab; }),
            "a draft token is outside the vocabulary");
    require(n <= target.depth_limit(pos), "more drafts than this round can carry");
    begin_round(pos);
    round_picks_ = {};
    const int64_t before   = target.ns;
    const int64_t replayed = target.n_replayed;
    target.verify(last, pos, tokens, n, n < n_picks ? tokens[n] : -1);
    round_target_ns_ = target.ns - before;
    round_replayed_  = static_cast<int32_t>(target.n_replayed - replayed);
    hand_over(target.row_tokens().data(), 1 + target.drafted(), pos);
}

void mtp_session::sample(void * sampler, mtp_step & step) {
    require(sampler != nullptr, "the sampler chain is missing");
    step.token      = target.sample(sampler);
    step.rows_left  = target.rows_left();
    step.new_round  = 0;
    step.n_drafted  = target.drafted();
    step.n_accepted = target.accepted();
    step.n_sampled  = target.sampled();
    step.target_ns  = round_target_ns_;
    step.draft_ns   = round_draft_ns_;
    step.n_replayed = round_replayed_;
    step.spare      = target.spare();
    step.n_picks    = round_picks_.size();
    std::copy(round_picks_.classes.begin(), round_picks_.classes.end(), step.classes);
}

void mtp_session::next(void * sampler, int32_t last, int32_t pos, const mtp_rule * rule, mtp_step & step) {
    require(sampler != nullptr, "the sampler chain is missing");
    require(rule == nullptr || rule->depth >= 0, "depth must not be negative");
    const bool new_round = target.rows_left() == 0;
    if (new_round) {
        round_draft_ns_ = 0;
        mtp::picks drafts;
        int32_t    n = 0;
        if (drafter && rule != nullptr && rule->depth > 0) {
            drafts = draft(last, pos, *rule);
            n      = mtp::verified(*rule, drafts);
        }
        verify(last, pos, drafts.tokens.data(), n < params.n_draft_min ? 0 : n, drafts.size());
        round_picks_ = std::move(drafts);
    } else {
        require(pos == target.row_pos(), "the token's position is not that of the next verify row");
    }
    sample(sampler, step);
    step.new_round = new_round ? 1 : 0;
}

void mtp_session::commit(int32_t n_rows) {
    target.commit(n_rows);
    settle();
}

// --- the boundary: preconditions on pointers, one thread at a time, no exception out ---------------------------------

namespace {

// Runs body and turns what it throws into a status and a sentence.
template <typename F> int guarded(std::string & error, F && body) {
    try {
        error.clear();
        body();
        return MTP_OK;
    } catch (const failure & e) {
        error = e.what();
        return e.status;
    } catch (const std::bad_alloc &) {
        error = "out of memory";  // short enough to need none
        return MTP_NO_MEMORY;
    } catch (const std::exception & e) {
        error = e.what();
        return MTP_EXCEPTION;
    } catch (...) {
        error = "the host threw something that is not an exception";
        return MTP_EXCEPTION;
    }
}

template <typename F> int enter(mtp_session * session, F && body) {
    if (session == nullptr) {
        return MTP_INVALID;
    }
    if (session->inside.test_and_set(std::memory_order_acquire)) {
        return MTP_BUSY;
    }
    struct leave {
        std::atomic_flag & flag;
        ~leave() { flag.clear(std::memory_order_release); }
    } guard{ session->inside };
    mtp::stopwatch watch(session->counters.total_ns);
    return guarded(session->error, [&] { body(*session); });
}

}  // namespace

extern "C" {

const char * mtp_version(void) {
    return LLAMA_MTP_VERSION;
}

int mtp_session_open(const mtp_host_api * api, const mtp_host_layout * layout, const mtp_session_params * params,
                     mtp_session ** out, char * text, size_t n_text) {
    const auto say = [&](const char * what) {
        if (text != nullptr && n_text > 0) {
            std::snprintf(text, n_text, "%s", what);
        }
    };
    if (out == nullptr || api == nullptr || layout == nullptr || params == nullptr) {
        say("an argument of mtp_session_open is NULL");
        return MTP_INVALID;
    }
    *out = nullptr;
    std::string error;
    const int   status = guarded(error, [&] { *out = new mtp_session(*api, *layout, *params); });
    if (status != MTP_OK) {
        say(error.c_str());
    }
    return status;
}

int mtp_compare_vocabularies(const mtp_host_api * api, const mtp_host_layout * layout, const void * a, const void * b,
                             const int32_t * tokens, int32_t n_tokens, char * text, size_t n_text) {
    std::string error = "an argument of mtp_compare_vocabularies is NULL";
    int         status = MTP_INVALID;
    if (api != nullptr && layout != nullptr && a != nullptr && b != nullptr) {
        status = guarded(error, [&] {
            const std::string difference = mtp::compare_vocabularies(mtp::resolve(*api, *layout), a, b, tokens, n_tokens);
            if (!difference.empty()) {
                throw failure(MTP_INVALID, difference);
            }
        });
    }
    if (status != MTP_OK && text != nullptr && n_text > 0) {
        std::snprintf(text, n_text, "%s", error.c_str());
    }
    return status;
}

void mtp_session_close(mtp_session * session, int detach) {
    if (session == nullptr) {
        return;
    }
    try {
        if (detach && session->drafter) {
            session->drafter->detach();
        }
    } catch (...) {
        // The context is about to be freed; nothing is left to undo.
    }
    delete session;
}

const char * mtp_session_error(const mtp_session * session) {
    return session != nullptr ? session->error.c_str() : "the session is closed";
}

int mtp_capture(mtp_session * session, const int32_t * tokens, int32_t n, int32_t pos) {
    return enter(session, [&](mtp_session & s) { s.capture(tokens, n, pos); });
}

int mtp_keep_rows(mtp_session * session, int on) {
    return enter(session, [&](mtp_session & s) { s.target.keep_rows(on != 0); });
}

int mtp_next(mtp_session * session, void * sampler, int32_t last, int32_t pos, const mtp_rule * rule, mtp_step * step) {
    return enter(session, [&](mtp_session & s) {
        require(step != nullptr, "step is NULL");
        s.next(sampler, last, pos, rule, *step);
    });
}

int mtp_draft(mtp_session * session, int32_t last, int32_t pos, int32_t depth, float p_min, int32_t * tokens,
              int32_t * n_out) {
    return enter(session, [&](mtp_session & s) {
        require(tokens != nullptr && n_out != nullptr, "an output of mtp_draft is NULL");
        const auto drafts = s.draft(last, pos, mtp::constant_rule(depth, p_min));
        std::copy(drafts.tokens.begin(), drafts.tokens.end(), tokens);
        *n_out = drafts.size();
    });
}

int mtp_verify(mtp_session * session, int32_t last, int32_t pos, const int32_t * tokens, int32_t n, int32_t n_picks) {
    return enter(session, [&](mtp_session & s) { s.verify(last, pos, tokens, n, n_picks); });
}

int mtp_replays_only(const mtp_session * session) {
    return session != nullptr && session->target.replays_only() ? 1 : 0;
}

int mtp_rows_left(const mtp_session * session) {
    return session != nullptr ? session->target.rows_left() : -1;
}

int mtp_sample(mtp_session * session, void * sampler, mtp_step * step) {
    return enter(session, [&](mtp_session & s) {
        require(step != nullptr, "step is NULL");
        s.sample(sampler, *step);
    });
}

int mtp_accept_by_coin(mtp_session * session, const float * chances, int32_t n, uint64_t seed) {
    return enter(session, [&](mtp_session & s) {
        require(n >= 0 && (n == 0 || chances != nullptr), "chances is NULL");
        s.target.accept_by_coin(std::vector<float>(chances, chances + n), seed);
    });
}

int mtp_commit(mtp_session * session, int32_t n_rows) {
    return enter(session, [&](mtp_session & s) { s.commit(n_rows); });
}

int mtp_settle(mtp_session * session) {
    return enter(session, [](mtp_session & s) { s.settle(); });
}

int mtp_replay(mtp_session * session) {
    return enter(session, [](mtp_session & s) { s.replay(); });
}

int mtp_truncate(mtp_session * session, int32_t n_past) {
    return enter(session, [&](mtp_session & s) { s.truncate(n_past); });
}

int mtp_can_truncate(mtp_session * session, int32_t n_past) {
    return session != nullptr && session->target.can_truncate(n_past) ? 1 : 0;
}

int mtp_lacks_row(const mtp_session * session, int32_t n_past) {
    return session != nullptr && session->drafter && session->drafter->lacks_row(n_past) ? 1 : 0;
}

int mtp_row_get(mtp_session * session, float * row) {
    return enter(session, [&](mtp_session & s) { s.row_get(row); });
}

int mtp_row_set(mtp_session * session, const float * row) {
    return enter(session, [&](mtp_session & s) { s.row_set(row); });
}

int mtp_forget(mtp_session * session, int32_t n_past) {
    return enter(session, [&](mtp_session & s) { s.forget(n_past); });
}

int mtp_align(mtp_session * session, const int32_t * tokens, int32_t n) {
    return enter(session, [&](mtp_session & s) { s.align(tokens, n); });
}

int mtp_live_row(const mtp_session * session) {
    return session != nullptr ? session->target.live_row() : -1;
}

int mtp_n_past(const mtp_session * session) {
    return session != nullptr ? session->target.n_past() : -1;
}

int mtp_n_past_draft(const mtp_session * session) {
    return session != nullptr && session->drafter ? session->drafter->queue().end() : -1;
}

void mtp_session_counters(const mtp_session * session, mtp_counters * out) {
    if (session == nullptr || out == nullptr) {
        return;
    }
    *out                  = session->counters;
    out->n_target_decodes = session->target.n_decodes;
    out->target_ns        = session->target.ns;
    out->sample_ns        = session->target.sample_ns;
    out->rollback_ns      = session->target.rollback_ns;
    out->n_replayed       = session->target.n_replayed;
    out->n_state_bytes    = session->target.n_state_bytes();
    if (session->drafter) {
        out->n_draft_decodes  = session->drafter->n_decodes;
        out->n_draft_restarts = session->drafter->n_restarts;
        out->draft_ns         = session->drafter->ns;
        out->rollback_ns += session->drafter->rollback_ns;
        out->n_row_bytes      = session->drafter->queue().n_bytes();
    }
}

int mtp_state_size(mtp_session * session, size_t * n_bytes) {
    return enter(session, [&](mtp_session & s) {
        require(n_bytes != nullptr, "n_bytes is NULL");
        *n_bytes = s.state_size();
    });
}

int mtp_state_get(mtp_session * session, void * data, size_t n_bytes) {
    return enter(session, [&](mtp_session & s) { s.state_get(static_cast<uint8_t *>(data), n_bytes); });
}

int mtp_state_check(mtp_session * session, const void * data, size_t n_bytes) {
    return enter(session,
                 [&](mtp_session & s) { s.state_check(static_cast<const uint8_t *>(data), n_bytes, s.params.n_ctx); });
}

int mtp_state_set(mtp_session * session, const void * data, size_t n_bytes) {
    return enter(session, [&](mtp_session & s) { s.state_set(static_cast<const uint8_t *>(data), n_bytes); });
}

}  // extern "C"
