#include "session.hpp"

#include "drafts/head.hpp"

#include <algorithm>

using mtp::failure;
using mtp::require;

namespace {

const mtp_session_params & checked(const mtp_session_params & p) {
    require(p.target != nullptr, "the target context is missing");
    require(p.n_vocab > 0 && p.n_ctx > 0 && p.n_batch > 0 && p.n_ubatch > 0, "sizes must be positive");
    require(p.n_draft_max >= 0 && p.n_draft_max < p.n_batch, "1 + n_draft_max rows must fit n_batch");
    require(p.n_draft_max <= MTP_MAX_DEPTH, "n_draft_max must not exceed MTP_MAX_DEPTH");
    require(p.prefill_window >= 0, "prefill_window must not be negative; 0 reads everything");
    require(p.n_checkpoints >= 0, "n_checkpoints must not be negative; 0 keeps none");
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

mtp_session::mtp_session(void * const * functions, int32_t n_functions, const mtp_host_layout & layout,
                         const mtp_session_params & p)
    : params(checked(p)), api(mtp::resolve(functions, n_functions, layout)), target(api, params),
      checkpoints(api, params.target, api.get_memory(params.target),
                  params.rollback == MTP_ROLLBACK_ATTENTION ? 0 : params.n_checkpoints),
      source(params.draft != nullptr ? std::make_unique<mtp::head>(api, params, target.n_past()) : nullptr) {}

void mtp_session::begin(const int32_t * tokens, int32_t n) {
    require(n >= 0 && (tokens != nullptr || n == 0), "begin needs the tokens of the text");
    settle();  // rows that nobody sampled belong to another generation
    if (source) {
        source->begin(tokens, n);
    }
}

// Hands the tokens and hidden rows of the decode that just ended to the source.
void mtp_session::process(const int32_t * tokens, int32_t n, int32_t pos) {
    if (source) {
        source->process(tokens, target.hidden_rows(), n, pos);
    }
}

void mtp_session::capture(const int32_t * tokens, int32_t n, int32_t pos) {
    require(tokens != nullptr && n > 0 && n <= params.n_batch, "capture needs 1 to n_batch tokens");
    require(pos >= 0 && pos <= params.n_ctx - n, "captured tokens stand outside the context");
    counters = with_round();
    checkpoints.cut(pos);
    if (source && pos > target.n_past()) {
        source->cut(target.n_past());  // what stands in between is not the token that a truncation left there
    }
    target.observe_decode(n, pos);
    process(tokens, n, pos);
}

// Rows that nobody asked for are neither accepted nor rejected.
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

mtp_counters mtp_session::count() const {
    mtp_counters out          = counters;
    out.n_target_decodes      = target.n_decodes;
    out.target_ns             = target.ns;
    out.sample_ns             = target.sample_ns;
    out.rollback_ns           = target.rollback_ns;
    out.n_replayed            = target.n_replayed;
    out.n_state_bytes         = target.n_state_bytes();
    out.n_checkpoints         = checkpoints.size();
    out.n_checkpoint_bytes    = checkpoints.n_bytes();
    out.n_checkpoints_saved   = checkpoints.n_saved;
    out.n_checkpoints_restored = checkpoints.n_restored;
    out.n_tokens_kept         = checkpoints.n_tokens_kept;
    if (source) {
        source->count(out);
    }
    return out;
}

// --- one round ---------------------------------------------------------------------------------------------------------

void mtp_session::begin_round(int32_t pos) {
    require(pos >= 0 && pos < params.n_ctx, "the context is full; raise n_ctx or shorten the text");
    if (pos > target.n_past()) {
        // Someone decoded without telling (libmtmd): believe the memory, not the bookkeeping.
        settle();
        require(target.host_end() == pos, "the token's position does not follow the target's memory");
        const int32_t end = target.n_past();
        counters          = with_round();
        target.forget(pos);
        if (source) {
            source->cut(end);
        }
    } else if (target.in_round() || pos < target.n_past() || !target.can_truncate(pos)) {
        truncate(pos);  // ends the round, and goes further back where asked, with one removal
    }
}

mtp::picks mtp_session::propose(int32_t last, int32_t pos, const mtp_rule * rule, const int32_t * drafts,
                                int32_t n_drafts) {
    const int32_t depth = std::min(rule != nullptr ? rule->depth : 0, target.depth_limit(pos));
    mtp::picks    proposed;
    if (drafts != nullptr) {
        const int32_t n = std::min(n_drafts, depth);
        proposed.tokens.assign(drafts, drafts + n);
        proposed.classes.assign(n, 0);
    } else if (source && depth > 0 && !target.replays_only()) {
        const int64_t before = source->draft_ns();
        proposed             = source->draft(last, pos, depth, *rule);
        round_draft_ns_      = source->draft_ns() - before;
    }
    return proposed;
}

// Verifies the first n drafts. The one after them gets a verdict for nothing where all before it are right.
void mtp_session::verify(int32_t last, int32_t pos, mtp::picks drafts, int32_t n) {
    const int64_t before   = target.ns;
    const int64_t replayed = target.n_replayed;
    round_picks_           = {};
    target.verify(last, pos, drafts.tokens.data(), n, n < drafts.size() ? drafts.tokens[n] : -1);
    round_target_ns_ = target.ns - before;
    round_replayed_  = static_cast<int32_t>(target.n_replayed - replayed);
    round_picks_     = std::move(drafts);
    process(target.row_tokens().data(), 1 + target.drafted(), pos);
}

void mtp_session::sample(void * sampler, mtp_step & step) {
    step.token        = target.sample(sampler);
    step.rows_left    = target.rows_left();
    step.n_drafted    = target.drafted();
    step.n_accepted   = target.accepted();
    step.n_sampled    = target.sampled();
    step.target_ns    = round_target_ns_;
    step.draft_ns     = round_draft_ns_;
    step.n_replayed   = round_replayed_;
    step.spare        = target.spare();
    step.replays_next = target.replays_only() ? 1 : 0;
    step.n_picks      = round_picks_.size();
    std::copy(round_picks_.classes.begin(), round_picks_.classes.end(), step.classes);
}

void mtp_session::next(void * sampler, int32_t last, int32_t pos, const mtp_rule * rule, const int32_t * drafts,
                       int32_t n_drafts, mtp_step & step) {
    require(sampler != nullptr, "the sampler chain is missing");
    require(n_drafts >= 0 && (drafts != nullptr || n_drafts == 0), "drafts is NULL");
    require(drafts == nullptr || std::all_of(drafts, drafts + n_drafts,
                                             [&](int32_t t) { return t >= 0 && t < params.n_vocab; }),
            "a draft token is outside the vocabulary");
    require(rule == nullptr || (rule->depth >= 0 && rule->depth <= MTP_MAX_DEPTH), "depth must be 0 to MTP_MAX_DEPTH");
    require(rule == nullptr || rule->window >= 0, "window must not be negative; 0 leaves it as wide as prefill_window");
    const bool new_round = drafts != nullptr || target.rows_left() == 0;
    if (new_round) {
        require(last >= 0 && last < params.n_vocab, "the last token is outside the vocabulary");
        begin_round(pos);
        round_draft_ns_     = 0;
        mtp::picks    picks = propose(last, pos, rule, drafts, n_drafts);
        const int32_t n     = rule != nullptr ? mtp::verified(*rule, picks) : 0;
        verify(last, pos, std::move(picks), n);
    } else {
        require(pos == target.row_pos() && last == target.row_token(), "the token is not that of the next verify row");
    }
    sample(sampler, step);
    step.new_round = new_round ? 1 : 0;
}

// --- going back --------------------------------------------------------------------------------------------------------

void mtp_session::truncate(int32_t n_past) {
    const bool         ends_round = target.in_round() && n_past == target.n_past();
    const mtp_counters booked     = with_round();
    target.truncate(n_past);
    counters = booked;  // only now: a refusal leaves the round open
    checkpoints.cut(n_past);
    if (source && ends_round) {
        source->accept(n_past);
    } else if (source) {
        source->truncate(n_past);
    }
}

void mtp_session::settle() {
    if (target.in_round()) {
        truncate(target.n_past());
    }
}

void mtp_session::replay() {
    settle();
    target.replay();
}

void mtp_session::forget(int32_t n_past) {
    require(n_past >= 0, "n_past must not be negative");
    counters = with_round();
    checkpoints.cut(0);
    const int32_t end = std::min(n_past, target.n_past());
    target.forget(n_past);
    if (source) {
        source->cut(end);
    }
}

int32_t mtp_session::reuse(const int32_t * text, int32_t n_text, const int32_t * prompt, int32_t n_prompt) {
    require(n_text >= 0 && n_prompt >= 0 && (text != nullptr || n_text == 0) && (prompt != nullptr || n_prompt == 0),
            "reuse needs the tokens of the text and of the prompt");
    if (target.n_past() != n_text) {
        return 0;  // someone else changed the memory, or what counts of it
    }
    const int32_t n      = std::min(n_text, n_prompt);
    const int32_t shared = static_cast<int32_t>(std::mismatch(text, text + n, prompt).first - text);
    const bool    all    = shared == n_text && shared == n_prompt && target.live_row() >= 0;
    int32_t       keep   = all ? shared : std::min(shared, n_prompt - 1);
    // A sliding window that has moved on no longer holds what an earlier position attends to.
    const bool whole = params.rollback != MTP_ROLLBACK_ATTENTION || keep == n_text || target.host_start() <= 0;
    if (keep <= 0 || !whole) {
        return 0;
    }
    if (!target.can_truncate(keep)) {
        return restore(prompt, n_prompt);
    }
    if (!all && source && source->needs_token_before(keep) && target.can_truncate(keep - 1)) {
        --keep;
    }
    try {
        truncate(keep);
        return keep;
    } catch (const failure & refusal) {
        if (refusal.status != MTP_ROLLBACK) {
            throw;
        }
        return restore(prompt, n_prompt);
    }
}

// Takes both back to the deepest checkpoint inside the prompt. 0: there is none, or the host refused and the memory is
// cleared.
int32_t mtp_session::restore(const int32_t * prompt, int32_t n_prompt) {
    mtp::checkpoint * kept = checkpoints.find(prompt, n_prompt);
    if (kept == nullptr) {
        return 0;
    }
    const int32_t end = kept->end();
    counters          = with_round();
    target.forget(0);  // until the copy is in, also where the host throws
    if (source) {
        source->cut(end);
    }
    if (!checkpoints.load(*kept)) {
        forget(0);
        target.clear();
        return 0;
    }
    target.forget(end);
    if (source) {
        if (source->end() != end) {
            source->restart(end);
        }
        if (!kept->row.empty()) {
            source->set_row(kept->row.data());
        }
    }
    return end;
}

void mtp_session::save_checkpoint(const int32_t * tokens, int32_t n) {
    require(n > 0 && tokens != nullptr, "a checkpoint needs the tokens of the text");
    require(!target.in_round() && target.n_past() == n, "the target does not end where the text does");
    checkpoints.save(tokens, n, source ? source->row(n) : nullptr, params.n_embd);
}

// --- state -------------------------------------------------------------------------------------------------------------

size_t mtp_session::state_size() {
    replay();
    if (!source) {
        return 0;
    }
    source->cut(target.n_past());
    return source->state_size();
}

void mtp_session::state_get(uint8_t * data, size_t n) const {
    require(!target.in_round(), "a round is open; ask for the size of the state first");
    if (!source) {
        require(n == 0, "the state has another size by now");
        return;
    }
    require(data != nullptr, "data is NULL");
    source->state_get(data, n);
}

void mtp_session::state_check(const uint8_t * data, size_t n, int32_t max_end) const {
    require(source != nullptr, "this session has no draft context");
    const char * reason = source->state_check(data, n, max_end);
    require(reason == nullptr, reason);
}

void mtp_session::state_set(const uint8_t * data, size_t n) {
    if (data != nullptr) {
        state_check(data, n, target.n_past());
        source->state_set(data);
    } else if (source) {
        source->restart(target.n_past());
    }
}
