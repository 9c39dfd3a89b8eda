// A round: the plain text whatever was drafted and accepted, and as many decodes as it promises.
#include "session_fixture.hpp"

#include <algorithm>

using namespace fixture;

TEST(every_depth_and_accept_count_gives_the_plain_text) {
    for (const auto & o : kinds()) {
        for (int32_t depth = 0; depth <= o.n_draft_max; ++depth) {
            for (int32_t accepted = 0; accepted <= depth; ++accepted) {
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(7), depth, 200);
                // Each round accepts exactly `accepted`: the draft after those is wrong.
                h.wrong.assign(h.truth.size() + 8, false);
                for (size_t p = 8; p < h.wrong.size(); ++p) {
                    h.wrong[p] = accepted < depth && (p - 8) % (accepted + 1) == static_cast<size_t>(accepted);
                }
                g.run(150);
                CHECK(h.faults() == "");
                CHECK(h.n_unknown_rows == 0);
                mtp_counters c{};
                CHECK(mtp_settle(s) == MTP_OK);
                mtp_session_counters(s, &c);
                CHECK(c.n_target_decodes == c.n_rounds);
                CHECK(c.target_ns + c.draft_ns + c.sample_ns + c.rollback_ns <= c.total_ns);
                if (o.checkpoint && depth > 0) {
                    CHECK(c.n_draft_decodes == c.n_drafted);  // a round that has much to replay drafts nothing
                } else if (o.shares_kv) {
                    CHECK(c.n_draft_decodes == c.n_rounds * depth);  // nothing to catch up with
                } else if (depth > 0) {
                    // Catch-up rides on the first step; heads of a chain that were not reached catch up as well.
                    CHECK(c.n_draft_decodes == c.n_rounds * (o.n_heads > 1 ? o.n_heads : depth));
                } else {
                    CHECK(c.n_draft_decodes == 149 / o.n_batch * o.n_heads);  // only when n_batch rows wait
                }
                CHECK(c.n_sampled == 142);
                CHECK(h.n_samples == 142);
                if (depth > 0 && !o.checkpoint) {
                    CHECK(c.n_drafted == c.n_rounds * depth);
                }
                mtp_session_close(s, 1);
                CHECK(h.n_chains_alive == 0);
            }
        }
    }
}

TEST(the_end_of_the_context_is_reached_and_not_passed) {
    for (bool recurrent : { false, true }) {
        options o;
        o.n_ctx     = 40;
        o.recurrent = recurrent;
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(5), 4, 60);
        g.run(41);  // the last token stands on the edge and is not decoded
        CHECK(h.target.end() <= 40);
        CHECK(g.try_next() == MTP_INVALID);
        mtp_session_close(s, 1);
    }
}

// Drafts of the caller: the rounds of a source that is right as often, with one decode each.
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
            const int32_t        pos = static_cast<int32_t>(g.text.size()) - 1;
            std::vector<int32_t> drafts(h.truth.begin() + pos + 1, h.truth.begin() + pos + 4);
            const int32_t        right = round % 4;
            for (int32_t i = right; i < 3; ++i) {
                drafts[i] = (drafts[i] + 1) % fake::n_vocab;
            }
            const bool replays_only = g.step.replays_next != 0;
            replays += replays_only ? 1 : 0;
            const int32_t n = replays_only ? 0 : 3, agreed = replays_only ? 0 : right;
            CHECK(next(s, g.text.back(), pos, rule_of(3), drafts, g.step) == MTP_OK);
            CHECK(g.step.new_round == 1);
            CHECK(g.step.n_drafted == n);
            CHECK(g.step.draft_ns == 0);
            CHECK(std::all_of(g.step.classes, g.step.classes + g.step.n_picks, [](int klass) { return klass == 0; }));
            g.text.push_back(g.step.token);
            g.run(pos + 2 + agreed);
            CHECK(g.step.n_accepted == agreed);
            CHECK(g.step.rows_left == 0);
            CHECK(mtp_n_past(s) == static_cast<int32_t>(g.text.size()) - 1);
            const int32_t row = mtp_live_row(s);
            CHECK(o.checkpoint ? row >= agreed : row == agreed);
            CHECK(h.target.outputs[row]);
            CHECK(h.target.batch_pos[row] == mtp_n_past(s) - 1);
        }
        CHECK(mtp_settle(s) == MTP_OK);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_target_decodes == c.n_rounds);
        CHECK(h.draft.n_decodes == c.n_draft_decodes);
        CHECK((replays > 0) == o.checkpoint);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}

// MTP_INVALID and MTP_ROLLBACK in the middle of a round: the rows that wait are still there, the counters too.
TEST(a_refusal_in_a_round_keeps_the_round) {
    for (bool recurrent : { false, true }) {
        options o;
        o.recurrent = recurrent;
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 100);
        CHECK(g.try_next() == MTP_OK);
        CHECK(g.try_next() == MTP_OK);
        CHECK(g.step.rows_left == 2);
        const int32_t              end = mtp_n_past(s);
        const std::vector<int32_t> many(9, 1);
        mtp_step                   step{};
        CHECK(next(s, fake::n_vocab, end, rule_of(3), many, step) == MTP_INVALID);
        CHECK(next(s, 1, end, rule_of(3), { 1, fake::n_vocab }, step) == MTP_INVALID);
        CHECK(next(s, 1, end + 1, rule_of(3, 0), step) == MTP_INVALID);
        CHECK(mtp_truncate(s, end + 1) == MTP_INVALID);
        h.fail_in["seq_rm target"] = 1;
        CHECK(mtp_truncate(s, end) == MTP_ROLLBACK);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_rounds == 0);
        CHECK(g.try_next() == MTP_OK);
        CHECK(g.step.new_round == 0);
        CHECK(g.step.rows_left == 1);
        g.run(50);
        mtp_session_close(s, 1);
    }
}
