// A recurrent state without snapshots: a copy before the drafts, and a replay after a rejection.
#include "session_fixture.hpp"

#include <algorithm>
#include <string>

using namespace fixture;

// Each round decodes once and copies the state at most once, in or out: what a rejection left is decoded in front of
// the next round's rows, and where that is more than n_draft_max rows the round takes no drafts.
TEST(a_rejection_costs_rows_and_no_decode) {
    for (int32_t accepted = 0; accepted <= 4; ++accepted) {
        host          h(with_checkpoint());
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(8), 4, 200);
        h.wrong.assign(220, false);
        for (size_t p = 9; p < h.wrong.size(); ++p) {
            h.wrong[p] = accepted < 4 && (p - 9) % (accepted + 1) == static_cast<size_t>(accepted);
        }
        while (g.text.size() < 129 || g.step.rows_left > 0) {
            CHECK(g.try_next() == MTP_OK);
            CHECK(g.text.back() == h.truth[g.text.size() - 1]);
        }
        int32_t size = 9, rounds = 0, drafted = 0, replayed = 0, saves = 0, loads = 0, carried = 0;
        for (bool behind = false; size < static_cast<int32_t>(g.text.size()); ++rounds) {
            const int32_t n = carried > 4 ? 0 : 4;
            drafted += n;
            replayed += carried;
            loads += behind ? 1 : 0;
            saves += !behind && n > 0 ? 1 : 0;
            int32_t agreed = 0;
            while (agreed < n && !h.wrong[size + agreed]) {
                ++agreed;
            }
            behind  = agreed < n;
            carried = behind ? carried + agreed + 1 : 0;
            size += agreed + 1;
        }
        CHECK(mtp_settle(s) == MTP_OK);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_rounds == rounds);
        CHECK(c.n_target_decodes == rounds);
        CHECK(h.target.n_decodes == rounds + 1);
        CHECK(c.n_drafted == drafted);
        CHECK(c.n_replayed == replayed);
        CHECK(h.n_saves == saves);
        CHECK(h.n_loads == loads);
        CHECK(h.target.n_rows == 8 + rounds + drafted + replayed);
        CHECK(accepted == 4 ? loads == 0 && drafted == 4 * rounds : loads > saves);
        mtp_session_close(s, 1);
    }
}

// At every row of a round: the memory is what it says it is, the last row is live, and nothing was captured twice.
TEST(a_replay_makes_the_memory_real) {
    for (int32_t at = 10; at < 60; ++at) {
        host          h(with_checkpoint());
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 4, 120);
        h.wrong.assign(140, false);
        for (size_t p = 10; p < 120; p += 2 + p % 5) {
            h.wrong[p] = true;
        }
        g.run(at + 1);
        CHECK(mtp_settle(s) == MTP_OK);
        const int32_t end = mtp_n_past(s), decodes = h.target.n_decodes;
        CHECK(end == at || end == at - 1);  // a token that came from a row is not decoded before the next round
        CHECK(mtp_replay(s) == MTP_OK);
        CHECK(mtp_n_past(s) == end);
        CHECK(h.target.end() == end);
        CHECK(h.target.state == h.target.tokens);
        CHECK(!h.target.poisoned);
        CHECK(std::equal(h.target.tokens.begin(), h.target.tokens.end(), h.truth.begin()));
        const int32_t row = mtp_live_row(s);
        CHECK(row >= 0);
        CHECK(h.target.outputs[row]);
        CHECK(h.target.batch_pos[row] == end - 1);
        CHECK(mtp_n_past_draft(s) == end);
        const int32_t once = h.target.n_decodes;
        CHECK(once - decodes <= 1);
        CHECK(mtp_replay(s) == MTP_OK);
        CHECK(h.target.n_decodes == once);
        h.eval(s, { h.truth[end], h.truth[end + 1] }, end);
        g.text.assign(h.truth.begin(), h.truth.begin() + end + 3);
        g.run(100);
        CHECK(h.faults() == "");
        CHECK(h.n_unknown_rows == 0);
        mtp_session_close(s, 1);
    }
}

// Going back reaches the copy and no further, in the middle of a round and after it, and the draft follows.
TEST(a_copy_is_as_far_as_one_can_go_back) {
    for (int32_t wrong : { 0, 2, 4 }) {  // of the second round
        for (int32_t back = 0; back < 12; ++back) {
            for (bool settled : { false, true }) {
                host          h(with_checkpoint());
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(9), 4, 120);
                h.wrong.assign(140, false);
                if (wrong > 0) {
                    h.wrong[15 + wrong - 1] = true;
                }
                g.run(15);  // one round, all right: positions 9 to 13, and a token
                const int32_t base = 14;
                g.run(wrong > 0 ? base + 1 + wrong : base + 6);
                if (settled) {
                    CHECK(mtp_settle(s) == MTP_OK);
                }
                const int32_t end = mtp_n_past(s), to = end - back;
                CHECK(end == (wrong > 0 ? base + wrong : base + 5));
                CHECK(mtp_can_truncate(s, to) == (to >= base ? 1 : 0));
                CHECK(mtp_truncate(s, to) == (to >= base ? MTP_OK : MTP_ROLLBACK));
                if (to >= base) {
                    CHECK(mtp_n_past(s) == to);
                    CHECK(mtp_replay(s) == MTP_OK);
                    CHECK(h.target.end() == to);
                    CHECK(h.target.state == h.target.tokens);
                    CHECK((to > base) == (mtp_live_row(s) >= 0));
                    g.text.resize(to + 1);
                }
                g.run(90);
                CHECK(h.faults() == "");
                CHECK(!h.target.poisoned);
                mtp_session_close(s, 1);
            }
        }
    }
}

TEST(without_a_copy_there_are_no_drafts) {
    for (const char * name : { "state size", "state save" }) {
        host          h(with_checkpoint());
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 120);
        h.fail_in[name] = 2;
        g.run(14);
        CHECK(g.step.n_drafted == 3);
        CHECK(g.try_next() == MTP_OK);
        CHECK(g.step.new_round == 1);
        CHECK(g.step.n_drafted == 0);
        CHECK(g.step.rows_left == 0);
        g.run(90);
        CHECK(g.step.n_drafted == 3);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}

// A decode that fails after the copy went in may be tried again; a copy that does not go in leaves nothing to go on
// from, which is said and not hidden.
TEST(a_failed_replay_loses_no_text) {
    for (const char * name : { "decode target", "compute target", "state load", "seq_rm target" }) {
        for (bool alone : { false, true }) {  // the replay by itself, or in front of the next round
            host          h(with_checkpoint());
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 3, 120);
            h.wrong.assign(140, true);
            g.run(12);
            h.fail_in[name]     = 1;
            const bool    loads = std::string(name) == "state load" || std::string(name) == "seq_rm target";
            const int     code  = alone ? mtp_replay(s) : g.try_next();
            CHECK(code == (loads ? MTP_ROLLBACK : MTP_HOST));
            CHECK(mtp_n_past(s) == 11);
            if (loads) {
                CHECK(mtp_can_truncate(s, 11) == 0);
                CHECK(g.try_next() == MTP_ROLLBACK);
                CHECK(mtp_truncate(s, 0) == MTP_OK);
                h.eval(s, { g.text.begin(), g.text.end() - 1 }, 0);
            }
            g.run(90);
            CHECK(h.faults() == "");
            CHECK(!h.target.poisoned);
            mtp_session_close(s, 1);
        }
    }
    for (const char * name : { "decode target", "compute target" }) {  // with nothing to replay, but a copy
        host          h(with_checkpoint());
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 120);
        g.run(14);
        CHECK(g.step.rows_left == 0);
        CHECK(h.n_loads == 0);
        h.fail_in[name] = 1;
        CHECK(g.try_next() == MTP_HOST);
        CHECK(mtp_n_past(s) == 13);
        g.run(90);
        CHECK(h.n_loads == 1);
        CHECK(h.faults() == "");
        CHECK(!h.target.poisoned);
        mtp_session_close(s, 1);
    }
}
