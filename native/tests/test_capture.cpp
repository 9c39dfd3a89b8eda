// The hidden rows that are kept of what the caller evaluates: across gaps, cuts and other texts.
#include "session_fixture.hpp"

#include <algorithm>

using namespace fixture;

TEST(gaps_restart_the_draft_context_or_are_kept) {
    for (bool gaps : { false, true }) {
        options o;
        o.gaps = gaps;
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
            CHECK(mtp_next(s, sampler, text.back(), static_cast<int32_t>(text.size()) - 1, rule_of(3, 0), &step) == MTP_OK);
            text.push_back(step.token);
        }
        CHECK(std::equal(text.begin(), text.end(), h.truth.begin()));
        CHECK(h.faults() == "");
        CHECK(h.n_unknown_rows == 1);
        CHECK(h.draft.start == (gaps ? 0 : 20));
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_draft_restarts == (gaps ? 0 : 1));
        CHECK(c.n_accepted > 30);
        mtp_session_close(s, 1);
    }
}

// Rejected drafts of the round before an image do not stay in the draft memory behind it.
TEST(a_gap_leaves_no_rejected_drafts_behind) {
    options o;
    o.gaps = true;
    host          h(o);
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 120);
    h.wrong.assign(140, true);
    CHECK(g.try_next() == MTP_OK);
    CHECK(mtp_settle(s) == MTP_OK);
    const int32_t at = mtp_n_past(s);
    h.decode_only({ h.truth.begin() + at, h.truth.begin() + at + 10 }, at);
    h.eval(s, { h.truth.begin() + at + 10, h.truth.begin() + at + 15 }, at + 10);
    g.text.assign(h.truth.begin(), h.truth.begin() + at + 16);
    h.wrong.clear();
    g.run(80);
    CHECK(h.n_mispaired == 0);
    CHECK(h.n_stale_cells == 0);
    mtp_session_close(s, 1);
}

// A chat whose last turn changed: the token before the cut is evaluated again, and no row is missing anywhere.
TEST(a_cut_text_keeps_its_hidden_rows) {
    for (const auto & o : kinds()) {
        for (int32_t keep = 1; keep <= 45; ++keep) {
            for (bool same : { true, false }) {
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(20), 4, 120);
                h.wrong.assign(140, false);
                for (size_t p = 22; p < 140; p += 3) {
                    h.wrong[p] = true;
                }
                g.run(46);
                CHECK(mtp_settle(s) == MTP_OK);
                CHECK(mtp_n_past(s) == 45);
                const bool    lacks = mtp_lacks_row(s, keep) == 1;
                const int32_t to    = lacks ? keep - 1 : keep;
                if (mtp_can_truncate(s, to) == 0) {
                    CHECK(o.recurrent || o.checkpoint);
                    mtp_session_close(s, 1);
                    continue;
                }
                CHECK(lacks || keep >= 42);  // only what the draft has not read yet
                CHECK(mtp_truncate(s, to) == MTP_OK);
                CHECK(mtp_n_past_draft(s) == (to > 0 ? keep : 0));
                if (to > 0) {
                    CHECK(mtp_replay(s) == MTP_OK);
                }
                g.text.resize(keep);
                if (!same) {
                    g.text.push_back((h.truth[keep] + 1) % fake::n_vocab);
                }
                g.text.push_back(5), g.text.push_back(6);
                h.truth = host::plain_text(g.text, 140);
                h.eval(s, { g.text.begin() + to, g.text.end() }, to);
                const int32_t n_before = h.draft.n_rows;
                g.text.push_back(h.truth[g.text.size()]);
                const int32_t n = static_cast<int32_t>(g.text.size());
                CHECK(g.try_next() == MTP_OK);
                CHECK(g.step.n_drafted == 4 - (o.checkpoint && g.step.n_drafted == 0 ? 4 : 0));
                if (!o.shares_kv && o.n_heads == 1 && g.step.n_drafted == 4) {
                    CHECK(h.draft.n_rows - n_before <= n - keep + 3 + 4);  // what stands before the cut is not read again
                }
                g.run(90);
                CHECK(h.n_unknown_rows == 0);
                CHECK(h.faults() == "");
                CHECK(!h.target.poisoned);
                mtp_session_close(s, 1);
            }
        }
    }
}

// The token that a truncation leaves in the draft is another one, or an image comes instead.
TEST(what_a_truncation_leaves_is_checked) {
    for (bool gaps : { false, true }) {
        for (bool image : { false, true }) {
            for (bool capture : { false, true }) {
                options o;
                o.gaps = gaps;
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(20), 4, 160);
                g.run(46);
                CHECK(mtp_truncate(s, 29) == MTP_OK);
                CHECK(mtp_n_past_draft(s) == 30);
                g.text.resize(29);
                g.text.push_back((h.truth[29] + 1) % fake::n_vocab);
                if (image) {
                    h.truth = host::plain_text(g.text, 160);
                    h.decode_only({ h.truth.begin() + 29, h.truth.begin() + 35 }, 29);  // nobody tells
                    g.text.assign(h.truth.begin(), h.truth.begin() + 36);
                } else {
                    h.truth = host::plain_text(g.text, 160);
                }
                if (capture) {
                    const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
                    h.eval(s, { h.truth.begin() + pos, h.truth.begin() + pos + 3 }, pos);
                    g.text.assign(h.truth.begin(), h.truth.begin() + pos + 4);
                }
                g.run(110);
                CHECK(h.faults() == "");
                CHECK(h.n_unknown_rows == 1);
                CHECK(g.step.n_drafted == 4);
                mtp_session_close(s, 1);
            }
        }
    }
}

// A state that cannot be cut is put back by the caller, and the row that stood there with it.
TEST(a_row_comes_back_with_its_position) {
    for (const auto & o : kinds()) {
        host          h(o);
        mtp_session * s      = h.open();
        const auto    prompt = prompt_of(30);
        h.truth              = host::plain_text(prompt, 160);
        h.eval(s, { prompt.begin(), prompt.begin() + 26 }, 0);
        float row[fake::n_embd];
        CHECK(mtp_row_get(s, nullptr) == MTP_INVALID);
        CHECK(mtp_row_set(s, nullptr) == MTP_INVALID);
        CHECK(mtp_row_get(s, row) == MTP_OK);
        CHECK(row[0] == 26.0f);
        CHECK(row[2] == 1.0f);
        const auto kept = h.target;
        h.eval(s, { prompt.begin() + 26, prompt.end() }, 26);
        generation g(h, s, prompt, 4, 160);
        g.run(60);
        CHECK(mtp_row_get(s, row + 0) == MTP_INVALID);  // in a round
        CHECK(mtp_settle(s) == MTP_OK);
        h.target       = kept;
        h.target.undo  = 0;
        h.target.spent = true;
        CHECK(mtp_forget(s, 26) == MTP_OK);
        CHECK(mtp_align(s, prompt.data(), 26) == MTP_OK);
        CHECK(mtp_row_set(s, row) == MTP_OK);
        h.eval(s, { prompt.begin() + 26, prompt.end() }, 26);
        g.text = prompt;
        g.text.push_back(h.truth[30]);
        g.run(100);
        CHECK(h.faults() == "");
        CHECK(h.n_unknown_rows == 0);
        mtp_session_close(s, 1);
    }
}
