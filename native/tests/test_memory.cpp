// Out of memory: every allocation of the engine fails once, and the session goes on with the same text.
#include "session_fixture.hpp"

#include <algorithm>
#include <string>

using namespace fixture;

namespace {

// The n-th allocation inside fails.
template <typename F> int starved(int64_t n, F && call) {
    test::failing_allocation = n;
    const int status         = call();
    test::failing_allocation = 0;
    return status;
}

// Calls until an allocation fails no more: at every place once. Returns how often it failed.
template <typename F> int starved_everywhere(F && call) {
    for (int64_t n = 1;; ++n) {
        const int status = starved(n, call);
        CHECK(status == MTP_OK || status == MTP_NO_MEMORY);
        if (status == MTP_OK) {
            return static_cast<int>(n - 1);
        }
    }
}

}  // namespace

TEST(a_session_that_finds_no_memory_is_not_opened) {
    for (const auto & o : kinds()) {
        host          h(o);
        const auto    f = host::functions();
        const auto    l = host::layout();
        const auto    p = h.params();
        mtp_session * s = nullptr;
        const int     n = starved_everywhere([&] {
            char text[64];
            const int status = mtp_session_open(f.data(), static_cast<int32_t>(f.size()), &l, &p, &s, text, sizeof text);
            CHECK((status == MTP_OK) == (s != nullptr));
            CHECK(h.n_chains_alive == 0 || s != nullptr);
            return status;
        });
        CHECK(n > 5);
        mtp_session_close(s, 1);
        CHECK(h.n_chains_alive == 0);
    }
}

// A failed call is made again. The rows of a round that was verified are still there; a draft may be lost.
TEST(a_round_without_memory_loses_no_text) {
    for (const auto & o : kinds()) {
        for (int64_t n = 1; n <= 12; ++n) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 3, 200);
            g.text.reserve(200);  // the caller's own
            h.wrong.assign(220, false);
            for (size_t p = 0; p < h.wrong.size(); p += 3) {
                h.wrong[p] = true;
            }
            int n_failed = 0;
            while (g.text.size() < 80) {
                const int status = starved(n, [&] { return g.try_next(); });
                CHECK(status == MTP_OK || status == MTP_NO_MEMORY);
                if (status != MTP_OK) {
                    ++n_failed;
                    CHECK(g.try_next() == MTP_OK);
                }
            }
            CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
            CHECK(n > 1 || n_failed > 0);
            g.run(120);
            CHECK(mtp_settle(s) == MTP_OK);
            mtp_counters c{};
            mtp_session_counters(s, &c);
            CHECK(c.n_accepted > 0);
            CHECK(h.faults() == "");
            CHECK(!h.target.poisoned);
            mtp_session_close(s, 1);
        }
    }
}

TEST(a_prompt_without_memory_can_be_given_again) {
    for (auto o : kinds()) {
        o.n_checkpoints = 2;
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 240);
        h.wrong.assign(260, false);
        for (int turn = 0; turn < 4; ++turn) {
            const auto    prompt = prompt_of(60, 3 + turn % 2);
            const int32_t n_past = mtp_n_past(s);
            const auto    text   = std::vector<int32_t>(g.text.begin(), g.text.begin() + n_past);
            int32_t       kept   = 0;
            starved_everywhere([&] {
                return mtp_reuse(s, text.data(), n_past, prompt.data(), 60, &kept);
            });
            if (kept == 0) {
                CHECK(starved_everywhere([&] { return mtp_truncate(s, 0); }) == 0);
            }
            h.truth = host::plain_text(prompt, 240);
            CHECK(starved_everywhere([&] { return mtp_replay(s); }) == 0);
            for (const auto & part : { std::pair<int32_t, int32_t>{ kept, 56 }, { std::max(kept, 56), 60 } }) {
                for (int32_t pos = part.first; pos < part.second; pos += o.n_batch) {
                    const int32_t end = std::min(part.second, pos + o.n_batch);
                    h.decode_only({ prompt.begin() + pos, prompt.begin() + end }, pos);
                    starved_everywhere([&] { return mtp_capture(s, &prompt[pos], end - pos, pos); });
                }
                if (part.second == 56) {
                    const int n = starved_everywhere([&] { return mtp_checkpoint(s, prompt.data(), 56); });
                    CHECK((n > 0) == (o.recurrent || o.checkpoint));
                }
            }
            CHECK(starved_everywhere([&] { return mtp_begin(s, prompt.data(), 60); }) == 0);
            g.text = prompt;
            g.text.push_back(h.truth[60]);
            g.run(100);
            CHECK(h.faults() == "");
            CHECK(!h.target.poisoned);
        }
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_checkpoints == (o.recurrent || o.checkpoint ? 1 : 0));
        mtp_session_close(s, 1);
    }
}

// The hidden rows of a decode are lost, and nobody asks for them again.
TEST(rows_that_found_no_memory_are_a_gap) {
    for (const auto & o : kinds()) {
        for (int64_t n = 1; n <= 4; ++n) {
            host          h(o);
            mtp_session * s      = h.open();
            const auto    prompt = prompt_of(60);
            generation    g(h, s, prompt_of(3), 3, 20);
            g.run(8);
            CHECK(mtp_truncate(s, 0) == MTP_OK);
            h.truth = host::plain_text(prompt, 200);
            for (int32_t pos = 0; pos < 60; pos += 10) {
                h.decode_only({ prompt.begin() + pos, prompt.begin() + pos + 10 }, pos);
                starved(n, [&] { return mtp_capture(s, &prompt[pos], 10, pos); });
                CHECK(mtp_n_past(s) == pos + 10);
            }
            CHECK(mtp_checkpoint(s, prompt.data(), 60) == MTP_OK);
            g.text = prompt;
            g.text.push_back(h.truth[60]);
            g.run(100);
            const auto text   = g.evaluated();
            auto       other  = first(text, 70);
            other[65]         = (other[65] + 1) % fake::n_vocab;
            const int32_t kept = reuse(s, text, other);
            CHECK(kept == (o.recurrent || o.checkpoint ? 60 : 64));
            g.take_up(other, kept);
            g.run(140);
            CHECK(h.faults() == "");
            CHECK(!h.target.poisoned);
            mtp_session_close(s, 1);
        }
    }
}

// Also where there is no memory for the sentence.
TEST(a_failure_without_memory_has_its_status) {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 240);
    for (int64_t n = 1; n <= 8; ++n) {
        const int status = starved(n, [&] { return mtp_truncate(s, 100); });
        CHECK(status == MTP_INVALID || status == MTP_NO_MEMORY);
    }
    CHECK(mtp_truncate(s, 100) == MTP_INVALID);
    CHECK(std::string(mtp_session_error(s)).find("100") != std::string::npos);
    g.run(40);
    mtp_session_close(s, 1);
}
