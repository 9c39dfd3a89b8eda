// A draft context whose decodes fail: drafting rests, says why, and comes back with the next generation.
#include "session_fixture.hpp"

#include <algorithm>
#include <string>

using namespace fixture;

namespace {

bool is_dead(const mtp_session * s) {
    return mtp_draft_error(s)[0] != 0;
}

// Three decodes of the draft are refused, with rounds that work in between.
void kill(host & h, generation & g) {
    for (int failed = 0; failed < 3;) {
        CHECK(!is_dead(g.s));
        CHECK(std::string(mtp_draft_error(g.s)).empty());
        h.fail_in["decode draft"] = 1;
        g.run(static_cast<int32_t>(g.text.size()) + 1);
        failed += h.fail_in.empty() ? 1 : 0;
    }
    h.fail_in.clear();
    h.n_unknown_rows = 0;
    CHECK(is_dead(g.s));
}

}  // namespace

TEST(a_draft_that_keeps_failing_rests_and_says_why) {
    for (const auto & o : kinds()) {
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 250);
        kill(h, g);
        const std::string reason = mtp_draft_error(s);
        CHECK(reason.find("3 times") != std::string::npos);
        CHECK(reason.find("llama_decode returning -3") != std::string::npos);
        const int decodes = h.draft.n_decodes, removals = h.draft.n_seq_rm;
        g.run(150);
        CHECK(mtp_settle(s) == MTP_OK);
        CHECK(h.draft.n_decodes == decodes);
        CHECK(h.draft.n_seq_rm == removals);
        CHECK(counters_of(s).n_draft_failures == 3);
        CHECK(mtp_draft_error(s) == reason);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}

// What the target can do does not depend on the draft: it goes back, to checkpoints too, and evaluates any prompt.
TEST(a_dead_draft_does_not_concern_the_target) {
    for (const auto & o : kinds()) {
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 250);
        kill(h, g);
        g.run(40);
        for (uint32_t turn = 0; turn < 3; ++turn) {  // nobody begins a generation: it stays dead
            const auto text   = g.evaluated();
            auto       prompt = prompt_of(60, 7);
            prompt[58]        = static_cast<int32_t>(turn);
            int32_t kept = reuse(s, text, prompt);
            CHECK(kept == (turn == 0 ? 0 : o.recurrent || o.checkpoint ? 56 : 58));
            if (kept == 0) {
                CHECK(mtp_truncate(s, 0) == MTP_OK);
            }
            CHECK(mtp_replay(s) == MTP_OK);
            h.truth = host::plain_text(prompt, 250);
            if (kept < 56) {
                h.eval(s, { prompt.begin() + kept, prompt.begin() + 56 }, kept);
                kept = 56;
                CHECK(mtp_checkpoint(s, prompt.data(), 56) == MTP_OK);
            }
            h.eval(s, { prompt.begin() + kept, prompt.end() }, kept);
            g.text = prompt;
            g.text.push_back(h.truth[60]);
            g.run(90);
            CHECK(is_dead(s));
        }
        CHECK(counters_of(s).n_checkpoints_restored == (o.recurrent || o.checkpoint ? 2 : 0));
        CHECK(counters_of(s).n_draft_failures == 3);
        size_t n = 0;
        CHECK(mtp_state_size(s, &n) == MTP_OK);
        CHECK(h.faults() == "");
        CHECK(!h.target.poisoned);
        mtp_session_close(s, 1);
    }
}

TEST(a_generation_that_begins_revives_the_draft) {
    for (const auto & o : kinds()) {
        for (bool from_a_checkpoint : { false, true }) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(50), 3, 250);
            if (from_a_checkpoint) {
                CHECK(mtp_checkpoint(s, g.text.data(), 50) == MTP_OK);
            }
            kill(h, g);
            g.run(100);
            CHECK(mtp_settle(s) == MTP_OK);
            const auto before = counters_of(s);
            const auto text   = g.evaluated();
            auto       prompt = text;
            prompt[60]        = (prompt[60] + 1) % fake::n_vocab;
            const int32_t kept = reuse(s, text, prompt);
            CHECK((kept > 0) == (from_a_checkpoint || !(o.recurrent || o.checkpoint)));
            if (kept == 0) {
                CHECK(mtp_truncate(s, 0) == MTP_OK);
            }
            CHECK(mtp_replay(s) == MTP_OK);
            h.truth = host::plain_text(prompt, 250);
            h.eval(s, { prompt.begin() + kept, prompt.end() }, kept);
            CHECK(is_dead(s));
            CHECK(mtp_begin(s, prompt.data(), static_cast<int32_t>(prompt.size())) == MTP_OK);
            CHECK(!is_dead(s));
            g.text = prompt;
            g.text.push_back(h.truth[prompt.size()]);
            g.run(150);
            CHECK(mtp_settle(s) == MTP_OK);
            const auto after = counters_of(s);
            CHECK(after.n_drafted > before.n_drafted);
            CHECK(after.n_accepted - before.n_accepted >= after.n_drafted - before.n_drafted - 3);  // the last round's
            CHECK(h.faults() == "");
            CHECK(h.n_unknown_rows <= o.n_heads);  // of the token where the draft began, read by each head
            mtp_session_close(s, 1);
        }
    }
}

TEST(failures_are_counted_in_one_generation) {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 250);
    for (int i = 0; i < 5; ++i) {
        for (int failed = 0; failed < 2;) {
            h.fail_in["decode draft"] = 1;
            g.run(static_cast<int32_t>(g.text.size()) + 1);
            failed += h.fail_in.empty() ? 1 : 0;
        }
        h.fail_in.clear();
        CHECK(!is_dead(s));
        CHECK(mtp_settle(s) == MTP_OK);
        CHECK(mtp_begin(s, g.text.data(), mtp_n_past(s)) == MTP_OK);
    }
    CHECK(counters_of(s).n_draft_failures == 10);
    g.run(200);
    CHECK(g.step.n_drafted == 3);
    CHECK(h.faults() == "");
    mtp_session_close(s, 1);
}

// It dies while it catches up with what waits: not one decode more.
TEST(a_draft_that_dies_catching_up_is_left_alone_at_once) {
    for (int32_t waiting = 10; waiting <= 20; ++waiting) {  // 16 fit
        host          h(options{});
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 250);
        for (int failed = 0; failed < 2; ++failed) {
            h.fail_in["decode draft"] = 1;
            do {
                CHECK(g.try_next() == MTP_OK);
            } while (!h.fail_in.empty());
        }
        CHECK(mtp_settle(s) == MTP_OK);
        g.depth = 0;
        g.run(static_cast<int32_t>(g.text.size()) + waiting);
        g.depth = 3;
        const auto decodes = counters_of(s).n_draft_decodes;
        h.fail_in["decode draft"] = 1;
        CHECK(g.try_next() == MTP_OK);
        CHECK(is_dead(s));
        CHECK(counters_of(s).n_draft_decodes == decodes + 1);
        g.run(120);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}

// It dies in a round that then fails: the round is made again without it.
TEST(a_draft_that_died_in_a_failed_round_is_not_asked_again) {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 250);
    for (int failed = 0; failed < 2; ++failed) {
        h.fail_in["decode draft"] = 1;
        do {
            CHECK(g.try_next() == MTP_OK);
        } while (!h.fail_in.empty());
    }
    CHECK(mtp_settle(s) == MTP_OK);
    h.fail_in["decode draft"] = h.fail_in["decode target"] = 1;
    CHECK(g.try_next() == MTP_HOST);
    CHECK(is_dead(s));
    const int decodes = h.draft.n_decodes;
    CHECK(g.try_next() == MTP_OK);
    g.run(60);
    CHECK(h.draft.n_decodes == decodes);
    CHECK(h.faults() == "");
    mtp_session_close(s, 1);
}

// A chain whose later heads fail to catch up has read nothing of the round: `last` is read again.
TEST(a_chain_that_fails_behind_its_drafts_reads_the_round_again) {
    options o;
    o.n_heads = 4;
    for (const char * name : { "decode draft", "seq_rm draft" }) {
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 1, 250);
        g.run(20);
        CHECK(mtp_settle(s) == MTP_OK);
        const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
        h.fail_in[name]   = std::string(name) == "decode draft" ? 2 : 1;
        CHECK(g.try_next() == MTP_OK);
        CHECK(h.fail_in.empty());
        CHECK(g.step.n_drafted == 1);
        CHECK(mtp_settle(s) == MTP_OK);
        h.draft_positions.clear();
        CHECK(g.try_next() == MTP_OK);
        CHECK(h.draft_positions.front() == pos);
        g.run(60);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}

// A generation may begin before the rest of its prompt is evaluated: the draft then reads that part.
TEST(a_draft_that_is_revived_early_reads_the_prompt) {
    for (const auto & o : kinds()) {
        for (bool dead : { true, false }) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(50), 3, 250);
            CHECK(mtp_checkpoint(s, g.text.data(), 50) == MTP_OK);
            if (dead) {
                kill(h, g);
            }
            g.run(100);
            const auto text   = g.evaluated();
            auto       prompt = text;
            prompt[51]        = (prompt[51] + 1) % fake::n_vocab;
            const int32_t kept = reuse(s, text, prompt);
            CHECK(kept == (o.recurrent || o.checkpoint || !dead ? 50 : 51));  // a dead one lacks no row
            CHECK(mtp_replay(s) == MTP_OK);
            CHECK(mtp_begin(s, prompt.data(), kept) == MTP_OK);
            h.draft_positions.clear();
            h.truth = host::plain_text(prompt, 250);
            h.eval(s, { prompt.begin() + kept, prompt.end() }, kept);
            g.text = prompt;
            g.text.push_back(h.truth[prompt.size()]);
            CHECK(g.try_next() == MTP_OK);
            CHECK(g.step.n_drafted == 3);
            CHECK(o.shares_kv || h.draft_positions.front() == (dead || o.recurrent || o.checkpoint ? kept : 51));
            CHECK(o.shares_kv || h.draft.start == (dead ? kept : 0));
            g.run(200);
            CHECK(h.faults() == "");
            CHECK(h.n_unknown_rows <= (dead ? o.n_heads : 0));
            mtp_session_close(s, 1);
        }
    }
}

// The draft of a checkpoint that stands behind where the draft began anew: it begins there, with the row that was kept.
TEST(a_draft_that_began_before_a_checkpoint_goes_on_from_it) {
    for (bool snapshots : { false, true }) {
        host          h(recurrent(snapshots));
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(50), 3, 250);
        CHECK(mtp_checkpoint(s, g.text.data(), 50) == MTP_OK);
        kill(h, g);
        g.run(100);
        CHECK(mtp_begin(s, g.text.data(), 10) == MTP_OK);
        const auto text   = g.evaluated();
        auto       prompt = text;
        prompt[60]        = (prompt[60] + 1) % fake::n_vocab;
        CHECK(reuse(s, text, prompt) == 50);
        g.take_up(prompt, 50);
        g.run(200);
        CHECK(h.draft.start == 50);
        CHECK(h.n_unknown_rows == 0);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}
