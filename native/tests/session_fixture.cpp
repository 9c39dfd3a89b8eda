#include "session_fixture.hpp"

#include <random>

namespace fixture {

std::vector<int32_t> prompt_of(int32_t n, uint32_t seed) {
    std::mt19937         rng(seed);
    std::vector<int32_t> prompt(n);
    for (auto & t : prompt) {
        t = static_cast<int32_t>(rng() % fake::n_vocab);
    }
    return prompt;
}

mtp_rule constant_rule(int32_t depth, float p_min) {
    mtp_rule rule{};
    rule.depth = depth;
    rule.p_min = p_min;
    return rule;  // no price, and go[k] = 0 is always reached
}

const mtp_rule * rule_of(int32_t depth, float p_min) {
    thread_local mtp_rule rule;
    rule = constant_rule(depth, p_min);
    return &rule;
}

int next(mtp_session * s, int32_t last, int32_t pos, const mtp_rule * rule, mtp_step & step) {
    return mtp_next(s, sampler, last, pos, rule, nullptr, 0, &step);
}

int next(mtp_session * s, int32_t last, int32_t pos, const mtp_rule * rule, const std::vector<int32_t> & drafts,
         mtp_step & step) {
    static const int32_t none = 0;  // an empty vector has no address
    const auto *         data = drafts.empty() ? &none : drafts.data();
    return mtp_next(s, sampler, last, pos, rule, data, static_cast<int32_t>(drafts.size()), &step);
}

options recurrent(bool snapshots) {
    options o;
    o.recurrent  = snapshots;
    o.checkpoint = !snapshots;
    return o;
}

mtp_counters counters_of(const mtp_session * s) {
    mtp_counters c{};
    mtp_session_counters(s, &c);
    return c;
}

std::vector<int32_t> first(const std::vector<int32_t> & text, int32_t n) {
    return { text.begin(), text.begin() + n };
}

void generation::take_up(const std::vector<int32_t> & prompt, int32_t kept) {
    const auto end = static_cast<int32_t>(prompt.size());
    CHECK(kept < end);
    if (kept == 0) {
        CHECK(mtp_truncate(s, 0) == MTP_OK);
    }
    CHECK(mtp_replay(s) == MTP_OK);
    h.truth          = host::plain_text(prompt, 240);
    const int32_t at = mtp_checkpoint_at(s, end);
    if (at > kept) {
        h.eval(s, { prompt.begin() + kept, prompt.begin() + at }, kept);
        CHECK(mtp_checkpoint(s, prompt.data(), at) == MTP_OK);
        kept = at;
    }
    h.eval(s, { prompt.begin() + kept, prompt.end() }, kept);
    CHECK(mtp_begin(s, prompt.data(), end) == MTP_OK);
    text = prompt;
    text.push_back(h.truth[end]);
}

void generation::read_to_checkpoint(int32_t end) {
    const int32_t from = mtp_n_past(s);
    h.eval(s, { h.truth.begin() + from, h.truth.begin() + end }, from);
    CHECK(mtp_checkpoint(s, h.truth.data(), end) == MTP_OK);
    text.assign(h.truth.begin(), h.truth.begin() + end + 1);
}

int32_t reuse(mtp_session * s, const std::vector<int32_t> & text, const std::vector<int32_t> & prompt) {
    int32_t kept = -1;
    CHECK(mtp_reuse(s, text.data(), static_cast<int32_t>(text.size()), prompt.data(),
                    static_cast<int32_t>(prompt.size()), &kept) == MTP_OK);
    return kept;
}

std::vector<options> kinds() {
    std::vector<options> all;
    for (int i = 0; i < 8; ++i) {
        options o;
        o.recurrent = (i & 1) != 0;
        o.gathers   = (i & 2) != 0;
        o.confidence = (i & 4) != 0;
        all.push_back(o);
    }
    all.push_back([] { options o; o.device_picks = false; return o; }());
    for (int i = 0; i < 4; ++i) {
        options o;
        o.checkpoint = true;
        o.gathers    = (i & 1) != 0;
        o.confidence = (i & 2) != 0;
        all.push_back(o);
    }
    for (int i = 0; i < 8; ++i) {
        options o;
        o.gathers    = (i & 1) != 0;
        o.confidence = (i & 2) != 0;
        o.n_heads    = (i & 4) != 0 ? 1 : 4;
        o.shares_kv  = (i & 4) != 0;
        all.push_back(o);
    }
    all.push_back([] { options o; o.all_outputs = true; return o; }());
    for (int i = 0; i < 4; ++i) {  // other numbers for the same tokens
        options o;
        o.n_draft_vocab = fake::n_vocab;
        o.confidence    = (i & 1) != 0;
        o.n_heads       = (i & 2) != 0 ? 4 : 1;
        all.push_back(o);
    }
    return all;
}

options with_checkpoint() {
    options o;
    o.checkpoint = true;
    return o;
}

saved_state save(host & h, mtp_session * s) {
    saved_state state;
    size_t      n = 0;
    CHECK(mtp_state_size(s, &n) == MTP_OK);
    state.queue.resize(n);
    CHECK(mtp_state_get(s, state.queue.data(), n) == MTP_OK);
    state.target = h.target;
    state.draft  = h.draft;
    state.n_past = mtp_n_past(s);
    return state;
}

void load(host & h, mtp_session * s, const saved_state & state, bool with_draft) {
    h.target       = state.target;
    h.target.undo  = 0;  // the snapshots are not part of a saved state
    h.target.spent = true;
    CHECK(mtp_forget(s, state.n_past) == MTP_OK);
    if (with_draft) {
        void * const own = h.draft.sampler;
        h.draft          = state.draft;
        h.draft.sampler  = own;
        CHECK(mtp_state_check(s, state.queue.data(), state.queue.size()) == MTP_OK);
        CHECK(mtp_state_set(s, state.queue.data(), state.queue.size()) == MTP_OK);
    } else {
        CHECK(mtp_state_set(s, nullptr, 0) == MTP_OK);
    }
}

}  // namespace fixture
