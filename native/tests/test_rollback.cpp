// Going back in the target's memory: one removal, and never further than the memory really goes.
#include "session_fixture.hpp"

using namespace fixture;

TEST(a_round_rolls_back_once) {
    for (bool recurrent : { false, true }) {
        options o;
        o.recurrent = recurrent;
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(5), 3, 100);
        h.wrong.assign(120, true);
        const int before = h.target.n_seq_rm;
        g.run(26);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(h.target.n_seq_rm - before == c.n_rounds);  // the last round is not settled yet
        // In the middle of a round, further back than the sampled rows: still one removal.
        const int32_t end = mtp_n_past(s);
        const int     now = h.target.n_seq_rm;
        CHECK(mtp_can_truncate(s, end) == 1);
        CHECK(mtp_truncate(s, end) == MTP_OK);
        CHECK(h.target.n_seq_rm == now + 1);
        mtp_session_close(s, 1);
    }
}

TEST(a_recurrent_state_is_never_believed) {
    options o;
    o.recurrent = true;
    for (int32_t plain = 0; plain <= 5; ++plain) {
        for (int32_t back = 1; back <= 6; ++back) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(12), 0, 100);
            for (int32_t i = 0; i < plain; ++i) {
                CHECK(g.try_next() == MTP_OK);
            }
            const int32_t end  = mtp_n_past(s);
            const int32_t to   = end - back;
            const bool    can  = mtp_can_truncate(s, to) == 1;
            CHECK(can == (plain == 0 && back <= o.n_rs_seq));
            CHECK(mtp_truncate(s, to) == (can ? MTP_OK : MTP_ROLLBACK));
            CHECK(mtp_n_past(s) == (can ? to : end));
            CHECK(!h.target.poisoned);
            if (can) {
                CHECK(mtp_can_truncate(s, to - 1) == 0);  // single use until the next decode
            }
            mtp_session_close(s, 1);
        }
    }
}

// After a decode that failed somewhere in between, the engine promises no rollback that the memory does not have.
TEST(a_failed_decode_promises_no_rollback) {
    for (bool recurrent : { false, true }) {
        for (bool throws : { false, true }) {
            for (int32_t to = 1; to <= 12; ++to) {
                options o;
                o.recurrent = recurrent;
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(12), 3, 100);
                h.throws                    = throws;
                h.fail_in["compute target"] = 1;
                CHECK(g.try_next() == (throws ? MTP_EXCEPTION : MTP_HOST));
                if (mtp_can_truncate(s, to) == 1) {
                    CHECK(mtp_truncate(s, to) == MTP_OK);
                    CHECK(h.target.end() == to);
                    CHECK(!h.target.poisoned);
                    CHECK(next(s, h.truth[to], to, rule_of(3, 0), g.step) == MTP_OK);
                    const std::vector<int32_t> kept(h.truth.begin(), h.truth.begin() + to + 1);
                    CHECK(g.step.token == host::plain_text(kept, to + 2).back());
                } else {
                    CHECK(mtp_truncate(s, to) == MTP_ROLLBACK);
                }
                mtp_session_close(s, 1);
            }
        }
    }
}

// From the middle of a round to a token before its start, by the position alone: one removal, as mtp_truncate does.
TEST(going_back_in_a_round_is_one_removal) {
    options o;
    o.recurrent = true;
    host          h(o);
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 100);
    CHECK(g.try_next() == MTP_OK);
    CHECK(g.try_next() == MTP_OK);
    CHECK(g.step.rows_left == 2);
    g.text.resize(g.text.size() - 1);  // take the last token back: its row is 1 of 4
    const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
    CHECK(mtp_can_truncate(s, pos) == 1);
    CHECK(next(s, g.text.back(), pos, rule_of(0), {}, g.step) == MTP_OK);
    CHECK(g.step.token == h.truth[pos + 1]);
    CHECK(h.target.n_seq_rm == 1);
    CHECK(!h.target.poisoned);
    mtp_session_close(s, 1);
}
