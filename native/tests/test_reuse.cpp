// mtp_reuse: what a new prompt keeps of the text, by cutting it or by a checkpoint of the recurrent state.
#include "session_fixture.hpp"

#include <algorithm>

using namespace fixture;

// Evaluates what mtp_reuse left of a prompt, and leaves the generation behind it.
static void take_up(host & h, generation & g, const std::vector<int32_t> & prompt, int32_t kept, int32_t n) {
    CHECK(mtp_replay(g.s) == MTP_OK);
    CHECK(kept < static_cast<int32_t>(prompt.size()));
    h.truth = host::plain_text(prompt, n);
    h.eval(g.s, { prompt.begin() + kept, prompt.end() }, kept);
    CHECK(mtp_begin(g.s, prompt.data(), static_cast<int32_t>(prompt.size())) == MTP_OK);
    g.text = prompt;
    g.text.push_back(h.truth[prompt.size()]);
}

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
        CHECK(mtp_checkpoint(s, prompt.data(), 46) == MTP_INVALID);  // in a round
        CHECK(mtp_settle(s) == MTP_OK);
        std::vector<int32_t> text(g.text.begin(), g.text.begin() + mtp_n_past(s));
        auto                 other = prompt;
        other[47]                  = (other[47] + 1) % fake::n_vocab;
        h.draft_positions.clear();
        const int32_t kept = reuse(s, text, other);
        CHECK(kept == 46);
        CHECK(mtp_n_past(s) == 46);
        CHECK(mtp_n_past_draft(s) == 46);
        take_up(h, g, other, kept, 160);
        CHECK(g.try_next() == MTP_OK);
        CHECK(g.step.n_drafted > 0);
        CHECK(h.draft_positions.front() == 46);
        g.run(120);
        CHECK(h.n_unknown_rows == 0);
        CHECK(h.faults() == "");
        CHECK(!h.target.poisoned);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_checkpoints_restored == 1);
        CHECK(c.n_tokens_kept == 46);
        mtp_session_close(s, 1);
    }
}
