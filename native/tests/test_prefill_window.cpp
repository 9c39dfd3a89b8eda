// The prefill window: how far back the draft context reads.
#include "session_fixture.hpp"

#include <algorithm>

using namespace fixture;

// The draft reads the last rows of a prompt, each with its true row, and goes on from there.
TEST(a_prefill_window_bounds_what_the_draft_reads) {
    for (auto o : kinds()) {
        for (int32_t window : { 1, 2, 7, 15, 16, 17, 40, 64 }) {
            for (int32_t n : { 1, 2, 7, 8, 16, 17, 40, 41, 64, 65, 100 }) {
                o.prefill_window = window;
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(n), 4, 180);
                CHECK(o.shares_kv || h.draft.n_decodes == 0 || window >= n);  // nothing is read before it is needed
                CHECK(g.try_next() == MTP_OK);
                CHECK(g.step.n_drafted == 4);
                const int32_t read = std::min(n, std::max(window, 5));  // what a round leaves behind has to fit
                if (!o.shares_kv) {
                    CHECK(h.draft.start == n - read);
                    CHECK(h.draft_positions.front() == n - read);
                    const int32_t catch_up = read + o.n_heads > o.n_batch ? (read + o.n_batch - 1) / o.n_batch : 0;
                    CHECK(h.draft.n_decodes == 4 + catch_up * o.n_heads);
                }
                g.run(n + 60);
                CHECK(o.shares_kv || h.draft.start == n - read);
                CHECK(h.faults() == "");
                CHECK(h.n_unknown_rows == 0);
                mtp_counters c{};
                mtp_session_counters(s, &c);
                CHECK(c.n_draft_restarts == 0);
                mtp_session_close(s, 1);
            }
        }
    }
}

TEST(a_prefill_window_drops_a_stretch_without_drafts) {
    for (auto o : kinds()) {
        for (int32_t window : { 1, 5, 16, 40 }) {
            o.prefill_window = window;
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 0, 250);
            g.run(130);
            CHECK(h.draft.n_decodes == 0);  // rows that wait too long are not read at all
            g.depth = 4;
            g.run(134);
            CHECK(mtp_settle(s) == MTP_OK);
            g.run(200);
            CHECK(o.shares_kv || h.draft.start == 129 - std::max(window, 5));
            CHECK(h.faults() == "");
            CHECK(h.n_unknown_rows == 0);
            mtp_session_close(s, 1);
        }
    }
}

// The rows that a stretch without drafts leaves are read as far back as the rule says, and no text changes.
TEST(a_rule_narrows_the_window) {
    for (auto o : kinds()) {
        for (int32_t narrow : { 1, 7, 30, 500 }) {
            o.prefill_window = 20;
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 0, 250);
            g.run(130);
            mtp_rule rule = constant_rule(3, 0);
            rule.window   = narrow;
            g.rule        = &rule;
            g.run(200);
            CHECK(o.shares_kv || h.draft.start == 129 - std::max(std::min(narrow, 20), o.n_draft_max + 1));
            CHECK(h.faults() == "");
            CHECK(h.n_unknown_rows == 0);
            rule.window = -1;
            CHECK(mtp_settle(s) == MTP_OK);
            CHECK(g.try_next() == MTP_INVALID);
            mtp_session_close(s, 1);
        }
    }
}

// A prompt that shares a prefix with the text: what fits the window is read behind what the memory has.
TEST(a_prefill_window_and_a_text_that_was_cut) {
    for (auto o : kinds()) {
        if (o.recurrent || o.checkpoint) {
            continue;
        }
        for (int32_t window : { 5, 20 }) {
            for (int32_t keep : { 5, 30, 36, 37, 38, 50 }) {
                for (int32_t more : { 1, 4, 5, 6, 25 }) {
                    o.prefill_window = window;
                    host          h(o);
                    mtp_session * s = h.open();
                    generation    g(h, s, prompt_of(40), 4, 200);
                    g.run(60);
                    CHECK(mtp_settle(s) == MTP_OK);
                    const int32_t start = o.shares_kv ? 0 : 40 - window;
                    const std::vector<int32_t> text(g.text.begin(), g.text.end() - 1);
                    g.text.resize(keep);
                    for (int32_t i = 0; i < more; ++i) {
                        g.text.push_back((h.truth[keep + i] + 1) % fake::n_vocab);
                    }
                    const int32_t to = reuse(s, text, g.text);
                    CHECK(to == keep - 1);
                    h.truth = host::plain_text(g.text, 200);
                    h.eval(s, { g.text.begin() + to, g.text.end() }, to);
                    g.text.push_back(h.truth[g.text.size()]);
                    g.run(150);
                    if (!o.shares_kv) {
                        const int32_t end = keep + more;
                        CHECK(h.draft.start == (more > window ? end - window : keep <= start ? keep : start));
                    }
                    CHECK(h.faults() == "");
                    CHECK(h.n_unknown_rows == 0);
                    mtp_session_close(s, 1);
                }
            }
        }
    }
}

TEST(a_prefill_window_behind_a_gap) {
    for (bool gaps : { false, true }) {
        for (int32_t window : { 4, 30 }) {
            options o;
            o.gaps           = gaps;
            o.prefill_window = window;
            host          h(o);
            mtp_session * s      = h.open();
            const auto    prompt = prompt_of(30);
            h.truth              = host::plain_text(prompt, 120);
            h.eval(s, { prompt.begin(), prompt.begin() + 10 }, 0);
            h.decode_only({ prompt.begin() + 10, prompt.begin() + 20 }, 10);  // an image: nobody tells
            h.eval(s, { prompt.begin() + 20, prompt.end() }, 20);
            std::vector<int32_t> text = prompt;
            text.push_back(h.truth[30]);
            mtp_step step{};
            while (text.size() < 80) {
                CHECK(next(s, text.back(), static_cast<int32_t>(text.size()) - 1, rule_of(3, 0), step) == MTP_OK);
                text.push_back(step.token);
            }
            CHECK(std::equal(text.begin(), text.end(), h.truth.begin()));
            CHECK(h.faults() == "");
            CHECK(h.n_unknown_rows == 0);
            // The first token behind the image has no row that anyone knows: it is left out.
            CHECK(h.draft.start == (window == 4 ? 25 : gaps ? 0 : 21));
            mtp_session_close(s, 1);
        }
    }
}

// The part of a prompt that a window leaves out needs no hidden rows: the draft begins behind it, and is right.
TEST(a_prompt_may_be_read_without_hidden_rows) {
    for (options o : kinds()) {
        o.prefill_window = 6;
        host         h(o);
        auto * const s      = h.open();
        const auto   prompt = prompt_of(40);
        generation   g(h, s, prompt_of(3), 3, 20);  // some text before
        g.run(8);
        h.truth = host::plain_text(prompt, 100);
        CHECK(mtp_truncate(s, 0) == MTP_OK);
        CHECK(mtp_keep_rows(s, 0) == MTP_OK);
        h.eval(s, { prompt.begin(), prompt.begin() + 30 }, 0);
        mtp_step step{};
        CHECK(next(s, prompt[30], 30, nullptr, step) == MTP_INVALID);
        CHECK(mtp_keep_rows(s, 1) == MTP_OK);
        h.draft_positions.clear();
        h.eval(s, { prompt.begin() + 30, prompt.end() }, 30);
        g.text = prompt;
        g.text.push_back(h.truth[40]);
        g.run(90);
        CHECK(h.draft_positions.front() >= 30);
        CHECK(h.faults() == "");
        CHECK(h.n_unknown_rows == 0);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_accepted > 30);
        mtp_session_close(s, 1);
    }
}
