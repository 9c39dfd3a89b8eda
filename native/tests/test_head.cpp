// The head's drafts: what it reads, what it proposes, and when it is left alone.
#include "session_fixture.hpp"

#include <algorithm>
#include <cmath>

using namespace fixture;

TEST(a_narrow_head_proposes_what_it_knows) {
    for (int i = 0; i < 4; ++i) {
        options o;
        o.n_draft_vocab = 60;
        o.confidence    = (i & 1) != 0;
        o.n_heads       = (i & 2) != 0 ? 4 : 1;
        for (int32_t depth = 1; depth <= o.n_draft_max; ++depth) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(7), depth, 200);
            int32_t       n_right = 0;
            while (g.text.size() < 150) {
                CHECK(g.try_next() == MTP_OK);
                CHECK(g.text.back() == h.truth[g.text.size() - 1]);
                if (g.step.new_round == 0) {
                    continue;
                }
                // A round begins with the token at `at`, sampled from its first row; drafts stand from there on.
                const size_t at = g.text.size() - 1;
                int32_t      n  = 0;
                while (n < depth && h.vocabulary.has(h.truth[at + n])) {
                    ++n;
                }
                n_right += n;
            }
            while (g.step.rows_left > 0) {
                CHECK(g.try_next() == MTP_OK);
            }
            CHECK(h.faults() == "");
            CHECK(h.n_unknown_rows == 0);
            mtp_counters c{};
            CHECK(mtp_settle(s) == MTP_OK);
            mtp_session_counters(s, &c);
            CHECK(c.n_accepted == n_right);
            CHECK(n_right > 0);
            CHECK(c.n_draft_restarts == 0);
            mtp_session_close(s, 1);
        }
    }
}

TEST(long_prompts_are_fed_in_batches) {
    for (int32_t n : { 1, 15, 16, 17, 32, 33, 100 }) {
        for (const auto & o : kinds()) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(n), 3, 180);
            g.run(n + 40);
            CHECK(h.faults() == "");
            CHECK(h.n_unknown_rows == 0);
            CHECK(h.draft.start == 0);
            CHECK(g.step.n_accepted == g.step.n_sampled - (g.step.n_sampled > g.step.n_drafted ? 1 : 0));
            mtp_session_close(s, 1);
        }
    }
}

TEST(a_long_stretch_without_drafts_is_caught_up) {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(3), 0, 250);
    g.run(120);
    g.depth = 4;
    g.run(200);
    CHECK(h.faults() == "");
    CHECK(h.n_unknown_rows == 0);
    CHECK(g.step.n_accepted >= g.step.n_sampled - 1);
    mtp_session_close(s, 1);
}

TEST(an_unlikely_pick_ends_the_drafts) {
    options o;
    o.confidence = true;
    host          h(o);
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(6), 4, 100);
    for (int32_t pos = 7; pos < 60; ++pos) {  // the fake is sure of every second position
        g.run(pos + 1, 0.5f);
        CHECK(g.step.n_drafted <= 1);
        CHECK(g.step.n_picks == g.step.n_drafted);
        CHECK(g.step.n_picks == 0 || g.step.classes[0] == 7);
    }
    mtp_counters c{};
    CHECK(mtp_settle(s) == MTP_OK);
    mtp_session_counters(s, &c);
    CHECK(c.n_drafted > 0);
    CHECK(c.n_accepted == c.n_drafted);
    CHECK(c.n_draft_decodes > c.n_drafted);
    CHECK(h.faults() == "");
    mtp_session_close(s, 1);
}

TEST(a_session_opened_late_drafts_at_once) {
    host       h(options{});
    const auto prompt = prompt_of(12);
    h.truth           = host::plain_text(prompt, 100);
    h.decode_only(prompt, 0);
    mtp_session * s = h.open();
    CHECK(mtp_n_past(s) == 12);
    mtp_step step{};
    CHECK(next(s, h.truth[12], 12, rule_of(3, 0), step) == MTP_OK);
    CHECK(step.token == h.truth[13]);
    CHECK(step.n_drafted == 3);
    CHECK(h.draft.start == 12);
    mtp_session_close(s, 1);
}

TEST(a_replaced_memory_drafts_again) {
    for (int32_t n : { 20, 40 }) {
        for (int32_t same : { 0, 10 }) {  // tokens that both texts begin with
            host          h(options{});
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(12), 3, 200);
            g.run(30);
            // Another text is loaded into the target behind our back.
            auto other = prompt_of(50, 2);
            std::copy(g.text.begin(), g.text.begin() + same, other.begin());
            h.target.tokens.assign(other.begin(), other.begin() + n);
            h.target.own.assign(n, false);
            h.truth = host::plain_text(other, 200);
            CHECK(mtp_forget(s, n) == MTP_OK);
            CHECK(mtp_begin(s, other.data(), n) == MTP_OK);
            CHECK(mtp_live_row(s) == -1);
            h.eval(s, { other.begin() + n, other.end() }, n);
            g.text = other;
            g.text.push_back(h.truth[50]);
            g.run(120);
            CHECK(h.faults() == "");
            mtp_session_close(s, 1);
        }
    }
}

// Logits that are no numbers: a pick without confidence, never one that looks sure.
TEST(a_row_that_is_no_number_is_never_sure) {
    const std::vector<std::vector<int32_t>> places = { {}, { 0 }, { 5 }, { 9 }, { 10 }, { 64 }, { fake::n_vocab - 1 } };
    for (const auto & at : places) {
        for (float bad : { NAN, INFINITY, -INFINITY }) {
            options o;
            o.confidence = true;
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 3, 200);
            h.on_logits = [&](std::vector<float> & logits) {
                std::fill(logits.begin(), logits.end(), at.empty() ? bad : 0.5f);
                for (int32_t i : at) {
                    logits[i] = bad;
                }
            };
            while (g.text.size() < 40) {
                CHECK(g.try_next() == MTP_OK);
                CHECK(std::all_of(g.step.classes, g.step.classes + g.step.n_picks, [](int k) { return k == 0; }));
            }
            CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
            CHECK(g.step.n_picks == 3);
            const bool no_number = at.empty() || bad == INFINITY || (std::isnan(bad) && at[0] < 10);
            CHECK(mtp_settle(s) == MTP_OK);
            CHECK(g.try_next(0.05f) == MTP_OK);  // ten equal ones have a tenth each
            CHECK(g.step.n_picks == (no_number ? 0 : 3));
            mtp_session_close(s, 1);
        }
    }
}
