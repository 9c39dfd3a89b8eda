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
