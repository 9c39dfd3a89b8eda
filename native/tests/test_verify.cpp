// A round: the plain text whatever was drafted and accepted, and as many decodes as it promises.
#include "session_fixture.hpp"

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
        CHECK(next(s, (g.text.back() + 1) % fake::n_vocab, end, rule_of(3), step) == MTP_INVALID);  // another text's
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
