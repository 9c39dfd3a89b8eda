// What the tests of a session share: the kinds of hosts, a generation, and a state to go back to.
#pragma once

#include "fake_host.hpp"
#include "test.hpp"

#include <vector>

namespace fixture {

using fake::host;
using fake::options;

inline void * const sampler = reinterpret_cast<void *>(8);  // the fake host only looks whether there is one

std::vector<int32_t> prompt_of(int32_t n, uint32_t seed = 1);

// Drafts and verifies depth tokens, whatever they promise.
mtp_rule constant_rule(int32_t depth, float p_min);
// The same; valid until the thread asks for the next one.
const mtp_rule * rule_of(int32_t depth, float p_min = 0);

// next() with drafts of the session's own source.
int next(mtp_session * s, int32_t last, int32_t pos, const mtp_rule * rule, mtp_step & step);
// next() with these drafts in their place.
int next(mtp_session * s, int32_t last, int32_t pos, const mtp_rule * rule, const std::vector<int32_t> & drafts,
         mtp_step & step);

// One host of every kind: rollback, hidden rows, confidence, heads, vocabularies.
std::vector<options> kinds();
options              with_checkpoint();
// A memory with a recurrent part, so that there are checkpoints of prompts: with snapshots, or with a copy a round.
options recurrent(bool snapshots);

mtp_counters counters_of(const mtp_session * s);

std::vector<int32_t> first(const std::vector<int32_t> & text, int32_t n);

// mtp_reuse for a caller whose text is `text`: how many tokens of the prompt are kept.
int32_t reuse(mtp_session * s, const std::vector<int32_t> & text, const std::vector<int32_t> & prompt);

// A generation in the way of the Python package: the text by position, one next() per token.
struct generation {
    host &               h;
    mtp_session *        s;
    std::vector<int32_t> text;
    int32_t              depth;
    const mtp_rule *     rule = nullptr;  // in place of a constant depth
    mtp_step             step{};

    generation(host & fake_host, mtp_session * session, const std::vector<int32_t> & prompt, int32_t n_draft, int32_t n)
        : h(fake_host), s(session), text(prompt), depth(n_draft) {
        h.truth = host::plain_text(prompt, n);
        CHECK(mtp_truncate(s, 0) == MTP_OK);
        h.eval(s, prompt, 0);
        text.push_back(h.truth[prompt.size()]);  // the caller samples the prompt's last row itself
    }

    int try_next(float p_min = 0.0f) {
        const int32_t pos    = static_cast<int32_t>(text.size()) - 1;
        const int     status = next(s, text.back(), pos, rule != nullptr ? rule : rule_of(depth, p_min), step);
        if (status == MTP_OK) {
            text.push_back(step.token);
        }
        return status;
    }

    // What the target holds of the text: all but the token that was sampled last.
    std::vector<int32_t> evaluated() const {
        CHECK(mtp_n_past(s) == static_cast<int32_t>(text.size()) - 1);
        return first(text, mtp_n_past(s));
    }

    // Evaluates what mtp_reuse kept not of a prompt, with a checkpoint where one is due, and begins behind it.
    void take_up(const std::vector<int32_t> & prompt, int32_t kept);

    // Evaluates the plain text up to `end` outside of rounds, and keeps a checkpoint there.
    void read_to_checkpoint(int32_t end);

    void run(int32_t n, float p_min = 0.0f) {
        while (static_cast<int32_t>(text.size()) < n) {
            CHECK(try_next(p_min) == MTP_OK);
            CHECK(text.back() == h.truth[text.size() - 1]);
        }
    }
};

// What a caller keeps of a session and its two memories.
struct saved_state {
    std::vector<unsigned char> queue;
    fake::context              target, draft;
    int32_t                    n_past = 0;
};

saved_state save(host & h, mtp_session * s);
void        load(host & h, mtp_session * s, const saved_state & state, bool with_draft = true);

}  // namespace fixture
