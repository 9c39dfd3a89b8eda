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
            CHECK(next(s, text.back(), static_cast<int32_t>(text.size()) - 1, rule_of(3, 0), step) == MTP_OK);
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
                const std::vector<int32_t> text(g.text.begin(), g.text.begin() + 45);
                g.text.resize(keep);
                if (!same && keep < 45) {
                    g.text.push_back((h.truth[keep] + 1) % fake::n_vocab);
                }
                g.text.push_back(5), g.text.push_back(6);
                const auto    shared = static_cast<int32_t>(
                    std::mismatch(text.begin(), text.end(), g.text.begin(), g.text.end()).first - text.begin());
                const bool    further = mtp_can_truncate(s, shared - 1) == 1;  // than to the shared prefix
                const int32_t kept    = reuse(s, text, g.text);
                if (kept == 0) {
                    CHECK(o.recurrent || o.checkpoint || shared == 1);
                    mtp_session_close(s, 1);
                    continue;
                }
                const bool lacks = kept < shared;  // the row of the next token
                CHECK(kept == shared - (lacks ? 1 : 0));
                CHECK(lacks || shared >= 42 || !further);  // only what the draft has not read yet
                CHECK(mtp_n_past_draft(s) == shared || !further);
                CHECK(mtp_replay(s) == MTP_OK);
                CHECK(h.target.end() == kept);
                h.truth = host::plain_text(g.text, 140);
                h.eval(s, { g.text.begin() + kept, g.text.end() }, kept);
                const int32_t n_before = h.draft.n_rows;
                g.text.push_back(h.truth[g.text.size()]);
                const int32_t n = static_cast<int32_t>(g.text.size());
                CHECK(g.try_next() == MTP_OK);
                CHECK(g.step.n_drafted == 4 - (o.checkpoint && g.step.n_drafted == 0 ? 4 : 0));
                if (!o.shares_kv && o.n_heads == 1 && g.step.n_drafted == 4) {
                    CHECK(h.draft.n_rows - n_before <= n - shared + 3 + 4);  // what stands before the cut is not read again
                }
                g.run(90);
                CHECK(h.n_unknown_rows == 0 || (!further && h.n_unknown_rows == 1));
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
