// Drafts of the caller, in place of the session's own source.
#include "session_fixture.hpp"

#include <algorithm>
#include <cmath>

using namespace fixture;

namespace {

// n drafts from pos + 1 on, the first `right` of them right.
std::vector<int32_t> drafts_at(const host & h, int32_t pos, int32_t n, int32_t right) {
    std::vector<int32_t> drafts(h.truth.begin() + pos + 1, h.truth.begin() + pos + 1 + n);
    for (int32_t i = right; i < n; ++i) {
        drafts[i] = (drafts[i] + 1) % fake::n_vocab;
    }
    return drafts;
}

std::vector<options> all_kinds() {
    auto all = kinds();
    for (int i = 0; i < 3; ++i) {
        options o;
        o.draft_context = false;
        o.recurrent     = i == 1;
        o.checkpoint    = i == 2;
        all.push_back(o);
    }
    return all;
}

}  // namespace

// Drafts of the caller: the rounds of a source that is right as often, with one decode each and one more for a replay.
TEST(drafts_of_the_caller_are_the_round) {
    for (int kind = 0; kind < 4; ++kind) {
        options o;
        o.draft_context = (kind & 1) != 0;
        o.checkpoint    = (kind & 2) != 0;
        int replays     = 0;
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(6), 3, 100);
        for (int32_t round = 0; g.text.size() < 60; ++round) {
            const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
            const int32_t right = round % 4;
            replays += g.step.replays_next;
            CHECK(next(s, g.text.back(), pos, rule_of(3), drafts_at(h, pos, 3, right), g.step) == MTP_OK);
            CHECK(g.step.new_round == 1);
            CHECK(g.step.n_drafted == 3);
            CHECK(g.step.draft_ns == 0);
            CHECK(std::all_of(g.step.classes, g.step.classes + g.step.n_picks, [](int klass) { return klass == 0; }));
            g.text.push_back(g.step.token);
            g.run(pos + 2 + right);
            CHECK(g.step.n_accepted == right);
            CHECK(g.step.rows_left == 0);
            CHECK(mtp_n_past(s) == static_cast<int32_t>(g.text.size()) - 1);
            const int32_t row = mtp_live_row(s);
            CHECK(o.checkpoint ? row >= right : row == right);
            CHECK(h.target.outputs[row]);
            CHECK(h.target.batch_pos[row] == mtp_n_past(s) - 1);
        }
        CHECK(mtp_settle(s) == MTP_OK);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_target_decodes == c.n_rounds + replays);
        CHECK(h.draft.n_decodes == c.n_draft_decodes);
        CHECK((replays > 0) == o.checkpoint);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}

// In the middle of a round: it ends at the rows that were sampled, and the drafts are the next one's.
TEST(given_drafts_end_the_round_that_is_open) {
    for (const auto & o : all_kinds()) {
        for (int32_t sampled = 1; sampled <= 4; ++sampled) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 4, 200);
            int32_t       n_rounds = 0;
            while (g.text.size() < 150) {
                const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
                CHECK(next(s, g.text.back(), pos, rule_of(4), drafts_at(h, pos, 4, 4), g.step) == MTP_OK);
                g.text.push_back(g.step.token);
                CHECK(g.step.new_round == 1);
                ++n_rounds;
                if (g.step.n_drafted > 0) {  // a replay alone has one row
                    g.run(pos + 1 + sampled);
                    CHECK(g.step.rows_left == 5 - sampled);
                }
            }
            CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
            CHECK(mtp_settle(s) == MTP_OK);
            mtp_counters c{};
            mtp_session_counters(s, &c);
            CHECK(c.n_rounds == n_rounds);
            g.run(180);  // and the source takes over
            CHECK(h.faults() == "");
            CHECK(h.n_unknown_rows == 0);
            CHECK(!h.target.poisoned);
            CHECK(!o.draft_context || g.step.n_drafted == 4 || o.checkpoint);
            mtp_session_close(s, 1);
        }
    }
}

// The rule, the rollback and the context bound what is taken; the rest is left out, and the text is the same.
TEST(given_drafts_are_bounded) {
    for (const auto & o : all_kinds()) {
        for (int32_t depth : { 0, 1, 3, 4, 9, int32_t{ MTP_MAX_DEPTH } }) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 4, 200);
            while (g.text.size() < 80) {
                const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
                CHECK(next(s, g.text.back(), pos, rule_of(depth), drafts_at(h, pos, 80, 2), g.step) == MTP_OK);
                CHECK(g.step.n_drafted == std::min(depth, 4));
                CHECK(g.step.n_picks == g.step.n_drafted);
                CHECK(g.step.draft_ns == 0);
                g.text.push_back(g.step.token);
            }
            CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
            mtp_session_close(s, 1);
        }
    }
    options o;
    o.n_ctx = 40;
    host          h(o);
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 4, 60);
    while (g.text.size() < 40) {
        const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
        CHECK(next(s, g.text.back(), pos, rule_of(4), drafts_at(h, pos, 9, 1), g.step) == MTP_OK);
        CHECK(g.step.n_drafted == std::min(4, 39 - pos));
        g.text.push_back(g.step.token);
    }
    CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
    mtp_session_close(s, 1);
}

// No drafts are drafts too: the source is not asked. Without a rule none are taken.
TEST(no_given_drafts_make_a_plain_round) {
    for (const auto & o : all_kinds()) {
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 4, 200);
        for (int i = 0; i < 6; ++i) {
            const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
            const bool    some = i % 2 != 0;
            CHECK(next(s, g.text.back(), pos, some ? nullptr : rule_of(4), drafts_at(h, pos, some ? 3 : 0, 0), g.step) == MTP_OK);
            CHECK(g.step.new_round == 1);
            CHECK(g.step.n_picks == 0);
            CHECK(g.step.n_drafted == 0);
            CHECK(g.step.rows_left == 0);
            g.text.push_back(g.step.token);
        }
        CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
        CHECK(h.draft.n_decodes == 0);
        g.run(60);
        CHECK(h.faults() == "");
        CHECK(h.n_unknown_rows == 0);
        mtp_session_close(s, 1);
    }
}

// The rule decides on given drafts as on the source's, which all have class 0; what it leaves out may get a verdict.
TEST(the_rule_decides_on_given_drafts) {
    for (const auto & o : all_kinds()) {
        host       h(o);
        generation g(h, h.open(), prompt_of(5), 0, 120);
        mtp_rule   rule = constant_rule(4, 0.9f);  // p_min is for those who say how sure they are
        for (int32_t i = 0; i < 4; ++i) {
            rule.accept[i * MTP_CLASSES] = 0.5f;
        }
        rule.price[2] = 0.6f;
        rule.price[3] = rule.price[4] = INFINITY;
        g.rule        = &rule;
        const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
        CHECK(next(g.s, g.text.back(), pos, &rule, drafts_at(h, pos, 3, 3), g.step) == MTP_OK);
        CHECK(g.step.n_picks == 3);
        CHECK(g.step.n_drafted == 1);
        g.text.push_back(g.step.token);
        CHECK(g.step.spare == -1);
        g.run(pos + 3);
        CHECK(g.step.rows_left == 0);
        CHECK(g.step.spare == 1);
        mtp_session_close(g.s, 1);
    }
}

// A token that is none is refused before anything happens, wherever it stands.
TEST(given_drafts_are_checked_first) {
    for (const auto & o : all_kinds()) {
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 4, 200);
        g.run(21);
        CHECK(next(s, g.text.back(), 20, rule_of(4), drafts_at(h, 20, 4, 4), g.step) == MTP_OK);
        g.text.push_back(g.step.token);
        const int32_t left = g.step.rows_left, decodes = h.target.n_decodes;
        for (int32_t bad : { -1, fake::n_vocab, 0x7fffffff, -0x7fffffff }) {
            for (int32_t at : { 0, 2, 9 }) {  // the last one lies beyond what is taken
                auto drafts = drafts_at(h, 21, 10, 10);
                drafts[at]  = bad;
                mtp_step step{};
                CHECK(next(s, g.text.back(), 21, rule_of(4), drafts, step) == MTP_INVALID);
                CHECK(next(s, g.text.back(), 21, nullptr, drafts, step) == MTP_INVALID);
            }
        }
        CHECK(h.target.n_decodes == decodes);
        g.run(22 + left);
        CHECK(h.target.n_decodes == decodes);
        CHECK(g.step.new_round == 0 || left == 0);
        g.run(60);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}
