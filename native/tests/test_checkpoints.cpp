// Checkpoints: copies of a recurrent state near the ends of prompts, which mtp_reuse goes back to.
#include "session_fixture.hpp"

#include <algorithm>
#include <string>

using namespace fixture;

// A recurrent state goes back to a checkpoint, and the hidden row that stood there with it: the draft lacks none.
TEST(a_checkpoint_brings_its_hidden_row) {
    for (const auto & o : kinds()) {
        if (!o.recurrent && !o.checkpoint) {
            continue;
        }
        host          h(o);
        mtp_session * s      = h.open();
        const auto    prompt = prompt_of(50);
        generation    g(h, s, prompt_of(3), 4, 20);  // some text before
        g.run(8);
        CHECK(mtp_truncate(s, 0) == MTP_OK);
        h.truth = host::plain_text(prompt, 160);
        h.eval(s, { prompt.begin(), prompt.begin() + 46 }, 0);
        CHECK(mtp_checkpoint(s, prompt.data(), 46) == MTP_OK);
        h.eval(s, { prompt.begin() + 46, prompt.end() }, 46);
        g.text = prompt;
        g.text.push_back(h.truth[50]);
        g.run(90);
        const auto text = g.evaluated();
        CHECK(mtp_checkpoint(s, text.data(), static_cast<int32_t>(text.size())) == MTP_INVALID);  // in a round
        auto other = prompt;
        other[47]  = (other[47] + 1) % fake::n_vocab;
        h.draft_positions.clear();
        const int32_t kept = reuse(s, text, other);
        CHECK(kept == 46);
        CHECK(mtp_n_past(s) == 46);
        CHECK(mtp_n_past_draft(s) == 46);
        g.take_up(other, kept);
        CHECK(g.try_next() == MTP_OK);
        CHECK(g.step.n_drafted > 0);
        CHECK(h.draft_positions.front() == 46);
        g.run(120);
        CHECK(h.n_unknown_rows == 0);
        CHECK(h.faults() == "");
        CHECK(!h.target.poisoned);
        CHECK(mtp_settle(s) == MTP_OK);
        CHECK(h.draft.start == 0);  // what it read of the kept part is still there
        CHECK(counters_of(s).n_checkpoints_restored == 1);
        CHECK(counters_of(s).n_tokens_kept == 46);
        CHECK(counters_of(s).n_sampled == h.n_samples);
        mtp_session_close(s, 1);
    }
}

TEST(the_oldest_checkpoint_makes_room) {
    for (bool snapshots : { false, true }) {
        for (int32_t limit : { 0, 1, 2, 3, 8 }) {
            auto o          = recurrent(snapshots);
            o.n_checkpoints = limit;
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 3, 250);
            for (int32_t end : { 40, 80, 120, 160 }) {
                CHECK(mtp_checkpoint_at(s, end + 4) == (limit > 0 ? end : -1));
                g.read_to_checkpoint(end);
                CHECK(mtp_checkpoint_at(s, end + 4 + 31) == -1);
            }
            CHECK(counters_of(s).n_checkpoints == std::min(limit, 4));
            CHECK(counters_of(s).n_checkpoints_saved == (limit > 0 ? 4 : 0));
            CHECK((counters_of(s).n_checkpoint_bytes > 0) == (limit > 0));
            g.run(190);
            for (int32_t shared : { 130, 90, 50 }) {  // each of them cuts what lies deeper
                const auto text   = g.evaluated();
                auto       prompt = first(text, shared);
                prompt.push_back((text[shared] + 1) % fake::n_vocab);
                const int32_t deepest = (shared - 10) / 40 * 40;
                const int32_t kept    = reuse(s, text, prompt);
                CHECK(kept == (deepest > 160 - 40 * limit ? deepest : 0));
                if (kept == 0) {
                    break;
                }
                h.truth = host::plain_text(first(text, shared), 250);
                h.eval(s, { h.truth.begin() + kept, h.truth.begin() + shared + 5 }, kept);
                g.text.assign(h.truth.begin(), h.truth.begin() + shared + 6);
                g.run(shared + 30);
                CHECK(h.n_unknown_rows == 0);
            }
            CHECK(h.faults() == "");
            CHECK(!h.target.poisoned);
            mtp_session_close(s, 1);
        }
    }
}

// A checkpoint of a text is right while its attention cells stay: whatever changes the memory below its end drops it.
TEST(what_changes_the_memory_drops_the_checkpoints_behind_it) {
    for (bool snapshots : { false, true }) {
        for (int way = 0; way < 8; ++way) {
            host          h(recurrent(snapshots));
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 0, 250);
            g.read_to_checkpoint(40);
            g.run(50);
            g.read_to_checkpoint(80);
            CHECK(counters_of(s).n_checkpoints == 2);
            if (!snapshots) {  // a copy from before the drafts, to go back to
                g.depth = 4;
                g.run(83);
            }
            const auto other = (h.truth[79] + 1) % fake::n_vocab;
            int        left  = 2;
            switch (way) {
                case 0: g.run(120); break;
                case 1: CHECK(mtp_truncate(s, mtp_n_past(s)) == MTP_OK); break;
                case 2: CHECK(mtp_begin(s, h.truth.data(), 80) == MTP_OK); break;
                case 3: CHECK(mtp_truncate(s, 0) == MTP_OK); left = 0; break;
                case 4: CHECK(mtp_forget(s, mtp_n_past(s)) == MTP_OK); left = 0; break;
                case 5: {  // someone took cells out and decoded others
                    CHECK(mtp_replay(s) == MTP_OK);
                    h.target.tokens.resize(79);
                    h.target.state.resize(79);
                    h.eval(s, { other }, 79);
                    left = 1;
                    break;
                }
                case 6: {  // a snapshot lies before the checkpoint; a copy does not
                    if (snapshots) {
                        CHECK(mtp_truncate(s, 78) == MTP_OK);
                        left = 1;
                    } else {
                        CHECK(mtp_truncate(s, 80) == MTP_OK);
                    }
                    break;
                }
                case 7: {  // the same by the position alone
                    if (snapshots) {
                        CHECK(next(s, h.truth[78], 78, rule_of(0), g.step) == MTP_OK);
                        CHECK(g.step.token == h.truth[79]);
                        left = 1;
                    }
                    break;
                }
            }
            CHECK(counters_of(s).n_checkpoints == left);
            mtp_session_close(s, 1);
        }
    }
}

// A host that does not take its own state back: nothing is kept, the memory is empty, and all goes on from there.
TEST(a_refused_checkpoint_leaves_an_empty_memory) {
    for (bool snapshots : { false, true }) {
        for (const char * name : { "state load", "seq_rm target" }) {
            for (bool throws : { false, true }) {
                for (bool settled : { false, true }) {
                    host          h(recurrent(snapshots));
                    mtp_session * s = h.open();
                    generation    g(h, s, prompt_of(9), 3, 250);
                    g.read_to_checkpoint(40);
                    h.wrong.assign(260, true);
                    g.run(90);
                    if (settled) {
                        CHECK(mtp_settle(s) == MTP_OK);
                    }
                    const auto text   = g.evaluated();
                    auto       prompt = first(text, 60);
                    prompt.push_back((text[60] + 1) % fake::n_vocab);
                    h.throws        = throws;
                    h.fail_in[name] = 1;
                    int32_t   kept   = -1;
                    const int status = mtp_reuse(s, text.data(), static_cast<int32_t>(text.size()), prompt.data(), 61, &kept);
                    CHECK(status == (throws ? MTP_EXCEPTION : MTP_OK));
                    if (throws) {
                        CHECK(mtp_n_past(s) == 0);  // nothing is known, so nothing is kept
                        CHECK(reuse(s, text, prompt) == 0);
                    } else {
                        CHECK(kept == 0);
                        CHECK(h.target.tokens.empty());
                        CHECK(h.target.state.empty());
                        CHECK(counters_of(s).n_checkpoints == 0);
                        CHECK(counters_of(s).n_checkpoints_restored == 0);
                    }
                    h.wrong.clear();
                    g.take_up(prompt, 0);
                    g.run(120);
                    CHECK(h.faults() == "");
                    CHECK(h.n_unknown_rows == 0);
                    CHECK(!h.target.poisoned);
                    CHECK(counters_of(s).n_checkpoints == 1);
                    mtp_session_close(s, 1);
                }
            }
        }
    }
}

TEST(a_copy_that_cannot_be_made_is_no_checkpoint) {
    for (bool snapshots : { false, true }) {
        for (const char * name : { "state size", "state save" }) {
            host          h(recurrent(snapshots));
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(50), 3, 250);
            h.fail_in[name] = std::string(name) == "state size" ? 2 : 1;
            CHECK(mtp_checkpoint(s, g.text.data(), 50) == MTP_OK);
            CHECK(counters_of(s).n_checkpoints == 0);
            CHECK(counters_of(s).n_checkpoint_bytes == 0);
            CHECK(mtp_checkpoint(s, g.text.data(), 50) == MTP_OK);
            CHECK(counters_of(s).n_checkpoints == 1);
            CHECK(mtp_checkpoint(s, g.text.data(), 50) == MTP_OK);
            CHECK(counters_of(s).n_checkpoints == 1);  // in place of the one that was there
            g.run(90);
            mtp_session_close(s, 1);
        }
    }
}

TEST(a_text_with_images_has_no_checkpoint) {
    for (bool snapshots : { false, true }) {
        host          h(recurrent(snapshots));
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(50), 3, 250);
        auto          text = first(g.text, 50);
        text[7]            = -1;
        CHECK(mtp_checkpoint(s, text.data(), 50) == MTP_OK);
        CHECK(counters_of(s).n_checkpoints_saved == 0);
        mtp_session_close(s, 1);
    }
}

// Attention alone can be cut anywhere, so there is nothing to copy; the fake host would refuse to.
TEST(attention_needs_no_checkpoint) {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(50), 3, 250);
    CHECK(mtp_checkpoint_at(s, 200) == -1);
    CHECK(mtp_checkpoint(s, g.text.data(), 50) == MTP_OK);
    CHECK(counters_of(s).n_checkpoints_saved == 0);
    mtp_session_close(s, 1);
}

// Not the rows of a rejected round: a memory that is behind its text is not copied.
TEST(a_memory_that_is_behind_is_not_copied) {
    host          h(recurrent(false));
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(50), 3, 250);
    h.wrong.assign(260, true);
    g.run(54);
    CHECK(mtp_settle(s) == MTP_OK);
    const int32_t end = mtp_n_past(s);
    CHECK(mtp_checkpoint(s, g.text.data(), end) == MTP_OK);
    CHECK(counters_of(s).n_checkpoints == 0);
    CHECK(mtp_replay(s) == MTP_OK);
    CHECK(mtp_checkpoint(s, g.text.data(), end) == MTP_OK);
    CHECK(counters_of(s).n_checkpoints == 1);
    g.run(90);
    auto prompt = first(g.evaluated(), end);
    prompt.push_back((g.text[end] + 1) % fake::n_vocab);
    CHECK(reuse(s, g.evaluated(), prompt) == end);
    g.take_up(prompt, end);
    g.run(120);
    CHECK(h.faults() == "");
    CHECK(h.n_unknown_rows == 0);
    CHECK(!h.target.poisoned);
    mtp_session_close(s, 1);
}
