// The state of a session as bytes: saved, loaded, refused.
#include "session_fixture.hpp"

#include <algorithm>
#include <cstring>
#include <string>

using namespace fixture;

// At every row of a round, into the same session and into a new one: the same text, the same rounds.
TEST(a_saved_state_drafts_on_as_before) {
    for (const auto & o : kinds()) {
        for (int32_t at = 9; at < 40; ++at) {
            for (bool fresh : { false, true }) {
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(9), 3, 120);
                for (size_t p = 10; p < 120; p += 3 + p % 4) {
                    h.wrong.resize(140);
                    h.wrong[p] = true;
                }
                g.run(at + 1);
                const auto state = save(h, s);
                const auto kept  = g.text;
                g.run(90);
                std::vector<int32_t> accepted;
                const auto           rounds = [&](int32_t n) {
                    accepted.clear();
                    while (static_cast<int32_t>(g.text.size()) < n) {
                        CHECK(g.try_next() == MTP_OK);
                        accepted.push_back(g.step.new_round ? -1 : g.step.n_accepted);
                    }
                };
                load(h, s, state);
                g.text = kept;
                rounds(90);
                const auto first = accepted;
                if (fresh) {
                    mtp_session_close(s, 1);
                    h.target = h.draft = {};
                    s = g.s = h.open();
                }
                load(h, s, state);
                CHECK(mtp_n_past(s) == state.n_past);
                g.text = kept;
                rounds(90);
                CHECK(accepted == first);
                CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
                CHECK(h.faults() == "");
                CHECK(h.n_unknown_rows == 0);
                CHECK(!h.target.poisoned);
                mtp_session_close(s, 1);
            }
        }
    }
}

TEST(a_state_without_a_draft_starts_empty) {
    for (bool gaps : { false, true }) {
        options o;
        o.gaps = gaps;
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 120);
        g.run(20);
        const auto state = save(h, s);
        const auto kept  = g.text;
        g.run(60);
        load(h, s, state, false);
        CHECK(h.draft.tokens.empty());
        CHECK(mtp_n_past_draft(s) == state.n_past);
        g.text = kept;
        g.run(70);
        CHECK(h.draft.start == state.n_past);
        CHECK(g.step.n_drafted == 3);
        CHECK(h.faults() == "");
        mtp_session_close(s, 1);
    }
}

TEST(a_damaged_state_is_refused_and_changes_nothing) {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 200);
    h.wrong.assign(220, true);
    g.run(20);
    const auto state = save(h, s);
    for (size_t n = 0; n < state.queue.size(); ++n) {
        CHECK(mtp_state_check(s, state.queue.data(), n) == MTP_INVALID);
        CHECK(mtp_state_set(s, state.queue.data(), n) == MTP_INVALID);
        CHECK(std::string(mtp_session_error(s)).size() > 4);
    }
    auto longer = state.queue;
    longer.push_back(0);
    CHECK(mtp_state_set(s, longer.data(), longer.size()) == MTP_INVALID);
    const int32_t values[] = { -1, 0, 1, 2, 1000, 0x7fffffff, -0x7fffffff };
    for (size_t field = 0; field < 6 + 19; ++field) {
        for (int32_t value : values) {
            auto bad = state.queue;
            std::memcpy(bad.data() + field * sizeof value, &value, sizeof value);
            if (bad == state.queue || (field >= 3 && mtp_state_check(s, bad.data(), bad.size()) == MTP_OK)) {
                continue;  // another queue, but one in itself
            }
            CHECK(mtp_state_set(s, bad.data(), bad.size()) == MTP_INVALID);
        }
    }
    size_t n = 0;
    CHECK(mtp_state_check(s, nullptr, 99) == MTP_INVALID);
    CHECK(mtp_state_size(s, nullptr) == MTP_INVALID);
    CHECK(mtp_state_size(s, &n) == MTP_OK);
    CHECK(n == state.queue.size());
    std::vector<unsigned char> out(n);
    CHECK(mtp_state_get(s, nullptr, n) == MTP_INVALID);
    CHECK(mtp_state_get(s, out.data(), n - 1) == MTP_INVALID);
    CHECK(mtp_state_get(s, out.data(), n) == MTP_OK);
    CHECK(out == state.queue);
    CHECK(mtp_truncate(s, mtp_n_past(s) - 3) == MTP_OK);
    CHECK(mtp_state_set(s, out.data(), n) == MTP_INVALID);  // longer than the target
    g.text.resize(g.text.size() - 3);
    g.run(40);
    CHECK(g.try_next() == MTP_OK);
    CHECK(g.step.rows_left == 0);
    CHECK(h.faults() == "");

    // A round that is open: the size settles it, the bytes alone do not.
    h.wrong.clear();
    do {
        CHECK(g.try_next() == MTP_OK);
    } while (g.step.rows_left == 0);
    CHECK(mtp_state_get(s, out.data(), n) == MTP_INVALID);
    CHECK(mtp_state_size(s, &n) == MTP_OK);
    CHECK(mtp_state_size(nullptr, &n) == MTP_INVALID);
    g.run(60);
    mtp_session_close(s, 1);
}

TEST(more_waiting_rows_than_fit_are_refused) {
    saved_state waiting;
    {
        options o;
        o.n_batch = 32;
        host          h(o);
        mtp_session * s = h.open();
        h.eval(s, prompt_of(30), 0);
        waiting = save(h, s);
        mtp_session_close(s, 1);
    }
    host          h(options{});
    mtp_session * s = h.open();
    CHECK(mtp_state_check(s, waiting.queue.data(), waiting.queue.size()) == MTP_INVALID);
    CHECK(std::string(mtp_session_error(s)).find("n_batch") != std::string::npos);
    mtp_session_close(s, 1);
}

TEST(a_session_without_a_draft_context_has_no_state) {
    options o;
    o.draft_context = false;
    host          h(o);
    mtp_session * s = h.open();
    size_t        n = 1;
    CHECK(mtp_state_size(s, &n) == MTP_OK);
    CHECK(n == 0);
    CHECK(mtp_state_get(s, nullptr, 0) == MTP_OK);
    CHECK(mtp_state_set(s, nullptr, 0) == MTP_OK);
    CHECK(mtp_state_set(s, &n, sizeof n) == MTP_INVALID);
    mtp_session_close(s, 1);
}
