// mtp_reuse: what a new prompt keeps of the text, by cutting it or by a checkpoint of the recurrent state.
#include "session_fixture.hpp"

#include <algorithm>
#include <random>
#include <string>

using namespace fixture;

// Every kind of memory that can go back or cannot: attention, a sliding window, snapshots, a copy.
static std::vector<options> memories() {
    std::vector<options> all;
    for (const auto & o : kinds()) {
        all.push_back(o);
        if (!o.recurrent && !o.checkpoint && !o.shares_kv) {
            all.push_back(o);
            all.back().n_swa = 12;
        }
    }
    return all;
}

// What a chat does, by one prompt after the other: what is kept is the deepest prefix that the memory can give, and the
// text behind it is the plain one. The list of checkpoints is kept a second time here.
struct outcomes {
    int same = 0, cut = 0, loaded = 0, nothing = 0;
};

static void random_prompts(const options & o, uint32_t seed, outcomes & seen) {
    std::mt19937 rng(seed);
    const auto   pick = [&](int32_t n) { return static_cast<int32_t>(rng() % static_cast<uint32_t>(n)); };
    host          h(o);
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(20 + pick(60), seed), pick(o.n_draft_max + 1), 240);
    std::vector<std::vector<int32_t>> made;  // texts of checkpoints, shallowest first
    int                               n_unknown = 0;
    for (int turn = 0; turn < 12; ++turn) {
        h.wrong.assign(260, false);
        for (size_t p = 0; p < h.wrong.size(); ++p) {
            h.wrong[p] = pick(3) == 0;
        }
        const int32_t base = static_cast<int32_t>(g.text.size()) - 1;  // rounds wrote from here on
        g.run(std::min(190, base + 1 + pick(30)));
        switch (pick(4)) {
            case 0: CHECK(mtp_settle(s) == MTP_OK); break;
            case 1: CHECK(mtp_replay(s) == MTP_OK); break;
            default: break;  // in the middle of a round, or with its rollback still to come
        }
        const auto text   = g.evaluated();
        const auto n_text = static_cast<int32_t>(text.size());
        auto       prompt = first(text, pick(4) == 0 ? n_text : n_text - pick(n_text));
        while (prompt.empty() || pick(4) != 0) {
            prompt.push_back(pick(fake::n_vocab));
        }
        if (pick(8) == 0) {
            prompt = first(prompt, 1 + pick(static_cast<int32_t>(prompt.size())));
        }
        const auto n_prompt = static_cast<int32_t>(prompt.size());
        const auto shared   = static_cast<int32_t>(
            std::mismatch(text.begin(), text.end(), prompt.begin(), prompt.end()).first - text.begin());

        const bool    live   = mtp_live_row(s) >= 0;
        const int32_t wanted = std::min(shared, n_prompt - 1);
        const bool    whole  = o.n_swa == 0 || wanted == n_text || h.target.first == 0;
        const bool    cuts   = wanted > 0 && whole && mtp_can_truncate(s, wanted) == 1;
        const bool    lacks  = wanted > 0 && mtp_can_truncate(s, wanted - 1) == 0;  // a row that cannot come back
        const auto    before = counters_of(s);
        const int32_t kept   = reuse(s, text, prompt);
        const bool    loaded = counters_of(s).n_checkpoints_restored > before.n_checkpoints_restored;
        n_unknown += kept > 0 && !loaded && lacks ? 1 : 0;

        int32_t deepest = 0;
        for (const auto & checkpoint : made) {
            const auto end = static_cast<int32_t>(checkpoint.size());
            if (end < n_prompt && end <= shared) {
                deepest = std::max(deepest, end);
            }
        }
        if (shared == n_text && n_text == n_prompt && live) {
            CHECK(kept == n_text);
            ++seen.same;
        } else if (cuts) {
            CHECK(kept == wanted || kept == wanted - 1);
            CHECK(!loaded);
            ++seen.cut;
        } else {
            CHECK(kept == (whole && wanted > 0 ? deepest : 0));
            CHECK(loaded == (kept > 0));
            ++(loaded ? seen.loaded : seen.nothing);
        }
        CHECK(kept == 0 || mtp_n_past(s) == kept);
        while (!made.empty() && static_cast<int32_t>(made.back().size()) > kept) {
            made.pop_back();
        }
        if (kept == n_prompt) {  // the caller samples the row that is live
            const int32_t row = mtp_live_row(s);
            CHECK(h.target.outputs[row]);
            CHECK(h.target.batch_pos[row] == kept - 1);
            CHECK(mtp_begin(s, prompt.data(), n_prompt) == MTP_OK);
            h.truth = host::plain_text(prompt, 240);
            g.text  = prompt;
            g.text.push_back((h.truth[n_prompt] + 1) % fake::n_vocab);  // and its chain may take any token
            h.truth = host::plain_text(g.text, 240);
            continue;
        }
        const int32_t last = made.empty() ? 0 : static_cast<int32_t>(made.back().size());
        const int32_t at   = n_prompt - 4;
        const bool    due  = (o.recurrent || o.checkpoint) && o.n_checkpoints > 0 && at - last >= 32;
        CHECK(kept == 0 || mtp_checkpoint_at(s, n_prompt) == (due ? at : -1));
        g.take_up(prompt, kept);
        if (due && at > kept) {
            made.push_back(first(prompt, at));
            if (static_cast<int32_t>(made.size()) > o.n_checkpoints) {
                made.erase(made.begin());
            }
        }
        CHECK(counters_of(s).n_checkpoints == static_cast<int64_t>(made.size()));
        CHECK(std::equal(prompt.begin(), prompt.end(), h.target.tokens.begin(), h.target.tokens.end()));
        CHECK(h.target.state.empty() || h.target.state == h.target.tokens);
        CHECK(!h.target.poisoned);
        CHECK(h.faults() == "");
        CHECK(h.n_unknown_rows <= n_unknown);
    }
    g.run(static_cast<int32_t>(g.text.size()) + 20);
    CHECK(!h.target.poisoned);
    CHECK(h.faults() == "");
    CHECK(h.n_unknown_rows <= n_unknown);
    mtp_session_close(s, 1);
}

TEST(a_prompt_keeps_all_that_the_memory_can_give) {
    for (const auto & o : memories()) {
        outcomes seen;
        for (uint32_t seed = 1; seed <= 60; ++seed) {
            random_prompts(o, seed, seen);
        }
        CHECK(seen.same > 10);
        CHECK(seen.cut > 10);
        CHECK(seen.nothing > 3);
        CHECK((seen.loaded > 10) == (o.recurrent || o.checkpoint));
    }
}

// The text again, in the middle of a round: the rows that wait belong to what the last generation would have said.
TEST(the_same_text_again_ends_the_round) {
    for (const auto & o : memories()) {
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(20), 4, 100);
        g.run(23);
        CHECK(g.step.rows_left == 3);
        const auto text = g.evaluated();
        CHECK(reuse(s, text, text) == 22);
        CHECK(mtp_n_past(s) == 22);
        CHECK(h.target.batch_pos[mtp_live_row(s)] == 21);
        g.text.back() = (g.text.back() + 1) % fake::n_vocab;  // another chain has another opinion
        h.truth       = host::plain_text(g.text, 100);
        CHECK(g.try_next() == MTP_OK);
        CHECK(g.step.new_round == 1);
        g.run(60);
        CHECK(h.faults() == "");
        CHECK(!h.target.poisoned);
        mtp_session_close(s, 1);
    }
}

TEST(a_generation_that_begins_ends_the_round) {
    for (const auto & o : memories()) {
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(20), 4, 100);
        g.run(23);
        CHECK(g.step.rows_left == 3);
        CHECK(mtp_begin(s, g.text.data(), 22) == MTP_OK);
        g.text.back() = (g.text.back() + 1) % fake::n_vocab;
        h.truth       = host::plain_text(g.text, 100);
        g.run(60);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}

// A text whose end is not what the engine counts: someone changed the memory, and nothing is kept.
TEST(a_text_that_is_not_the_targets_keeps_nothing) {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(20), 4, 100);
    g.run(40);
    const auto text = g.evaluated();
    CHECK(reuse(s, first(text, 30), text) == 0);
    CHECK(reuse(s, {}, text) == 0);
    CHECK(reuse(s, text, {}) == 0);
    CHECK(mtp_n_past(s) == static_cast<int32_t>(text.size()));
    g.run(60);
    CHECK(h.faults() == "");
    mtp_session_close(s, 1);
}

// All of a text is kept only where its last row can be sampled.
TEST(a_text_whose_last_logits_are_gone_is_read_from_its_last_token) {
    options o;
    o.n_batch = 64;  // the draft has read nothing yet
    host          h(o);
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(20), 4, 100);
    CHECK(mtp_truncate(s, 15) == MTP_OK);
    CHECK(mtp_live_row(s) == -1);
    const auto text = first(g.text, 15);
    CHECK(reuse(s, text, text) == 14);
    g.take_up(text, 14);
    g.run(60);
    CHECK(h.faults() == "");
    mtp_session_close(s, 1);
}

// A window that has moved on keeps nothing but the text's own end; one that has not, all of it.
TEST(a_sliding_window_goes_back_while_it_is_whole) {
    for (int32_t n : { 20, 28, 29, 60 }) {
        options o;
        o.n_swa   = 12;
        o.n_batch = 64;  // the draft has read nothing yet
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(n), 0, 120);
        const auto    text  = g.evaluated();
        const bool    whole = n <= o.n_swa + o.n_ubatch;
        auto          other = text;
        other[10] = (other[10] + 1) % fake::n_vocab;
        CHECK(reuse(s, text, other) == (whole ? 10 : 0));
        CHECK(mtp_n_past(s) == (whole ? 10 : n));
        if (!whole) {
            auto more = text;
            more.push_back(1), more.push_back(2);
            CHECK(reuse(s, text, more) == n);
            g.take_up(more, n);
            g.run(n + 40);
            CHECK(!h.target.poisoned);
            CHECK(h.faults() == "");
        }
        mtp_session_close(s, 1);
    }
}

// A host that does not cut its memory: the deepest checkpoint serves, and without one nothing is kept.
TEST(a_refused_cut_falls_back_to_a_checkpoint) {
    for (bool with_checkpoint : { false, true }) {
        host          h(recurrent(true));
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 250);
        if (with_checkpoint) {
            g.read_to_checkpoint(40);
        }
        g.run(63);
        CHECK(g.step.rows_left > 0);
        const auto text = g.evaluated();
        auto       more = text;
        more.push_back(1);
        h.fail_in["seq_rm target"] = 1;
        const int32_t kept = reuse(s, text, more);
        CHECK(kept == (with_checkpoint ? 40 : 0));
        g.take_up(more, kept);
        g.run(90);
        CHECK(h.faults() == "");
        CHECK(!h.target.poisoned);
        mtp_session_close(s, 1);
    }
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 250);
    g.run(63);
    auto more = g.evaluated();
    more.push_back(1);
    h.fail_in["seq_rm target"] = 1;
    CHECK(reuse(s, g.evaluated(), more) == 0);
    g.take_up(more, 0);
    g.run(90);
    CHECK(h.faults() == "");
    mtp_session_close(s, 1);
}
