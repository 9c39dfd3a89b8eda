// The engine against the fake host: same tokens whatever the drafts, right hidden rows, counted decodes, and no call
// of the host whose failure changes the text.

#include "fake_host.hpp"
#include "rule.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>

using fake::host;
using fake::options;

namespace {

void * const sampler = reinterpret_cast<void *>(8);

std::vector<int32_t> prompt_of(int32_t n, uint32_t seed = 1) {
    std::mt19937         rng(seed);
    std::vector<int32_t> prompt(n);
    for (auto & t : prompt) {
        t = static_cast<int32_t>(rng() % fake::n_vocab);
    }
    return prompt;
}

// The rule that drafts and verifies `depth` tokens; valid until the thread asks for the next one.
const mtp_rule * rule_of(int32_t depth, float p_min) {
    thread_local mtp_rule rule;
    rule = mtp::constant_rule(depth, p_min);
    return &rule;
}

// A generation in the way of the Python package: the text by position, one next() per token.
struct generation {
    host &               h;
    mtp_session *        s;
    std::vector<int32_t> text;
    int32_t              depth;
    const mtp_rule *     rule = nullptr;  // in place of a constant depth
    mtp_step             step{};

    generation(host & fake, mtp_session * session, const std::vector<int32_t> & prompt, int32_t n_draft, int32_t n)
        : h(fake), s(session), text(prompt), depth(n_draft) {
        h.truth = host::plain_text(prompt, n);
        CHECK(mtp_truncate(s, 0) == MTP_OK);
        h.eval(s, prompt, 0);
        text.push_back(h.truth[prompt.size()]);  // the caller samples the prompt's last row itself
    }

    int try_next(float p_min = 0.0f) {
        const int32_t pos    = static_cast<int32_t>(text.size()) - 1;
        const int     status = mtp_next(s, sampler, text.back(), pos, rule != nullptr ? rule : rule_of(depth, p_min), &step);
        if (status == MTP_OK) {
            text.push_back(step.token);
        }
        return status;
    }

    void run(int32_t n, float p_min = 0.0f) {
        while (static_cast<int32_t>(text.size()) < n) {
            CHECK(try_next(p_min) == MTP_OK);
            CHECK(text.back() == h.truth[text.size() - 1]);
        }
    }
};

std::vector<options> kinds() {
    std::vector<options> all;
    for (int i = 0; i < 8; ++i) {
        options o;
        o.recurrent = (i & 1) != 0;
        o.gathers   = (i & 2) != 0;
        o.confidence = (i & 4) != 0;
        all.push_back(o);
    }
    all.push_back([] { options o; o.device_picks = false; return o; }());
    for (int i = 0; i < 4; ++i) {
        options o;
        o.checkpoint = true;
        o.gathers    = (i & 1) != 0;
        o.confidence = (i & 2) != 0;
        all.push_back(o);
    }
    for (int i = 0; i < 8; ++i) {
        options o;
        o.gathers    = (i & 1) != 0;
        o.confidence = (i & 2) != 0;
        o.n_heads    = (i & 4) != 0 ? 1 : 4;
        o.shares_kv  = (i & 4) != 0;
        all.push_back(o);
    }
    all.push_back([] { options o; o.all_outputs = true; return o; }());
    for (int i = 0; i < 4; ++i) {  // other numbers for the same tokens
        options o;
        o.n_draft_vocab = fake::n_vocab;
        o.confidence    = (i & 1) != 0;
        o.n_heads       = (i & 2) != 0 ? 4 : 1;
        all.push_back(o);
    }
    return all;
}

void every_depth_and_accept_count_gives_the_plain_text() {
    for (const auto & o : kinds()) {
        for (int32_t depth = 0; depth <= o.n_draft_max; ++depth) {
            for (int32_t accepted = 0; accepted <= depth; ++accepted) {
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(7), depth, 200);
                // Each round accepts exactly `accepted`: the draft after those is wrong.
                h.wrong.assign(h.truth.size() + 8, false);
                for (size_t p = 8; p < h.wrong.size(); ++p) {
                    h.wrong[p] = accepted < depth && (p - 8) % (accepted + 1) == static_cast<size_t>(accepted);
                }
                g.run(150);
                CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && h.n_holes == 0);
                mtp_counters c{};
                CHECK(mtp_settle(s) == MTP_OK);
                mtp_session_counters(s, &c);
                CHECK(c.n_target_decodes == c.n_rounds);
                CHECK(c.target_ns + c.draft_ns + c.sample_ns + c.rollback_ns <= c.total_ns);
                if (o.checkpoint && depth > 0) {
                    CHECK(c.n_draft_decodes == c.n_drafted);  // a round that has much to replay drafts nothing
                } else if (o.shares_kv) {
                    CHECK(c.n_draft_decodes == c.n_rounds * depth);  // nothing to catch up with
                } else if (depth > 0) {
                    // Catch-up rides on the first step; heads of a chain that were not reached catch up as well.
                    CHECK(c.n_draft_decodes == c.n_rounds * (o.n_heads > 1 ? o.n_heads : depth));
                } else {
                    CHECK(c.n_draft_decodes == 149 / o.n_batch * o.n_heads);  // only when n_batch rows wait
                }
                CHECK(c.n_sampled == 142 && h.n_samples == 142);
                if (depth > 0 && !o.checkpoint) {
                    CHECK(c.n_drafted == c.n_rounds * depth);
                }
                mtp_session_close(s, 1);
                CHECK(h.n_chains_alive == 0);
            }
        }
    }
}

void a_narrow_head_proposes_what_it_knows() {
    for (int i = 0; i < 4; ++i) {
        options o;
        o.n_draft_vocab = 60;
        o.confidence    = (i & 1) != 0;
        o.n_heads       = (i & 2) != 0 ? 4 : 1;
        for (int32_t depth = 1; depth <= o.n_draft_max; ++depth) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(7), depth, 200);
            int32_t       n_right = 0;
            while (g.text.size() < 150) {
                CHECK(g.try_next() == MTP_OK);
                CHECK(g.text.back() == h.truth[g.text.size() - 1]);
                if (g.step.new_round == 0) {
                    continue;
                }
                // A round begins with the token at `at`, sampled from its first row; drafts stand from there on.
                const size_t at = g.text.size() - 1;
                int32_t      n  = 0;
                while (n < depth && h.vocabulary.has(h.truth[at + n])) {
                    ++n;
                }
                n_right += n;
            }
            while (g.step.rows_left > 0) {
                CHECK(g.try_next() == MTP_OK);
            }
            CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && h.n_holes == 0);
            mtp_counters c{};
            CHECK(mtp_settle(s) == MTP_OK);
            mtp_session_counters(s, &c);
            CHECK(c.n_accepted == n_right && n_right > 0);
            CHECK(c.n_draft_restarts == 0);
            mtp_session_close(s, 1);
        }
    }
}

void a_round_rolls_back_once() {
    for (bool recurrent : { false, true }) {
        options o;
        o.recurrent = recurrent;
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(5), 3, 100);
        h.wrong.assign(120, true);
        const int before = h.target.n_seq_rm;
        g.run(26);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(h.target.n_seq_rm - before == c.n_rounds);  // the last round is not settled yet
        // In the middle of a round, further back than the sampled rows: still one removal.
        const int32_t end = mtp_n_past(s);
        const int     now = h.target.n_seq_rm;
        CHECK(mtp_can_truncate(s, end) == 1);
        CHECK(mtp_truncate(s, end) == MTP_OK);
        CHECK(h.target.n_seq_rm == now + 1);
        mtp_session_close(s, 1);
    }
}

void a_recurrent_state_is_never_believed() {
    options o;
    o.recurrent = true;
    for (int32_t plain = 0; plain <= 5; ++plain) {
        for (int32_t back = 1; back <= 6; ++back) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(12), 0, 100);
            for (int32_t i = 0; i < plain; ++i) {
                CHECK(g.try_next() == MTP_OK);
            }
            const int32_t end  = mtp_n_past(s);
            const int32_t to   = end - back;
            const bool    can  = mtp_can_truncate(s, to) == 1;
            CHECK(can == (plain == 0 && back <= o.n_rs_seq));
            CHECK(mtp_truncate(s, to) == (can ? MTP_OK : MTP_ROLLBACK));
            CHECK(mtp_n_past(s) == (can ? to : end));
            CHECK(!h.target.poisoned);
            if (can) {
                CHECK(mtp_can_truncate(s, to - 1) == 0);  // single use until the next decode
            }
            mtp_session_close(s, 1);
        }
    }
}

void long_prompts_are_fed_in_batches() {
    for (int32_t n : { 1, 15, 16, 17, 32, 33, 100 }) {
        for (const auto & o : kinds()) {
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(n), 3, 180);
            g.run(n + 40);
            CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && h.n_holes == 0);
            CHECK(h.draft.start == 0);
            CHECK(g.step.n_accepted == g.step.n_sampled - (g.step.n_sampled > g.step.n_drafted ? 1 : 0));
            mtp_session_close(s, 1);
        }
    }
}

void a_long_stretch_without_drafts_is_caught_up() {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(3), 0, 250);
    g.run(120);
    g.depth = 4;
    g.run(200);
    CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0);
    CHECK(g.step.n_accepted >= g.step.n_sampled - 1);
    mtp_session_close(s, 1);
}

void the_end_of_the_context_is_reached_and_not_passed() {
    for (bool recurrent : { false, true }) {
        options o;
        o.n_ctx     = 40;
        o.recurrent = recurrent;
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(5), 4, 60);
        g.run(41);  // the last token stands on the edge and is not decoded
        CHECK(h.target.end() <= 40);
        CHECK(g.try_next() == MTP_INVALID);
        mtp_session_close(s, 1);
    }
}

void gaps_restart_the_draft_context_or_are_kept() {
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
        CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 1);
        CHECK(h.draft.start == (gaps ? 0 : 20));
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_draft_restarts == (gaps ? 0 : 1));
        CHECK(c.n_accepted > 30);
        mtp_session_close(s, 1);
    }
}

void a_replaced_memory_drafts_again() {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 200);
    g.run(30);
    // Another text is loaded into the target behind our back.
    const auto other = prompt_of(50, 2);
    h.target.tokens.assign(other.begin(), other.begin() + 40);
    h.target.own.assign(40, false);
    h.truth = host::plain_text(other, 200);
    CHECK(mtp_forget(s, 40) == MTP_OK);
    CHECK(mtp_align(s, other.data(), 40) == MTP_OK);
    CHECK(mtp_live_row(s) == -1);
    h.eval(s, { other.begin() + 40, other.end() }, 40);
    g.text = other;
    g.text.push_back(h.truth[50]);
    g.run(120);
    CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0);
    mtp_session_close(s, 1);
}

void drafts_from_elsewhere_use_draft_verify_commit() {
    for (int kind = 0; kind < 4; ++kind) {
        const bool with_context = (kind & 1) != 0;
        options    o;
        o.draft_context = with_context;
        o.checkpoint    = (kind & 2) != 0;
        int replays     = 0;
        host          h(o);
        mtp_session * s      = h.open();
        const auto    prompt = prompt_of(6);
        h.truth              = host::plain_text(prompt, 100);
        h.eval(s, prompt, 0);
        std::vector<int32_t> text = prompt;
        text.push_back(h.truth[6]);
        for (int32_t round = 0; text.size() < 60; ++round) {
            const int32_t        pos = static_cast<int32_t>(text.size()) - 1;
            std::vector<int32_t> drafts(h.truth.begin() + pos + 1, h.truth.begin() + pos + 4);
            if (with_context) {
                int32_t n = -1;
                const int32_t expected = mtp_replays_only(s) != 0 ? 0 : 3;
                CHECK(mtp_draft(s, text.back(), pos, 3, 0, drafts.data(), &n) == MTP_OK && n == expected);
            }
            const int32_t right = round % 4;
            for (int32_t i = right; i < 3; ++i) {
                drafts[i] = (drafts[i] + 1) % fake::n_vocab;
            }
            replays += mtp_replays_only(s);
            CHECK(mtp_verify(s, text.back(), pos, drafts.data(), 3, 3) == MTP_OK);
            CHECK(mtp_rows_left(s) == 4);
            CHECK(mtp_commit(s, 9) == MTP_INVALID);
            CHECK(mtp_commit(s, right + 1) == MTP_OK);
            for (int32_t i = 0; i <= right; ++i) {
                text.push_back(h.truth[text.size()]);
            }
            CHECK(mtp_n_past(s) == static_cast<int32_t>(text.size()) - 1);
            const int32_t row = mtp_live_row(s);
            CHECK(o.checkpoint ? row >= right : row == right);
            CHECK(h.target.outputs[row] && h.target.batch_pos[row] == mtp_n_past(s) - 1);
        }
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_target_decodes == c.n_rounds + replays && (replays > 0) == o.checkpoint);  // given drafts are taken
        CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0);
        mtp_session_close(s, 1);
    }
}

void short_drafts_are_dropped() {
    options o;
    o.confidence  = true;
    o.n_draft_min = 2;
    host          h(o);
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(6), 4, 100);
    g.run(60, 0.5f);  // every second position is uncertain: no draft is longer than one
    mtp_counters c{};
    CHECK(mtp_settle(s) == MTP_OK);
    mtp_session_counters(s, &c);
    CHECK(c.n_drafted == 0 && c.n_draft_decodes > 0);
    CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0);
    mtp_session_close(s, 1);
}

// What the rule says in words, tried for every number of drafts.
void a_rule_verifies_what_pays_most() {
    std::mt19937 rng(7);
    std::uniform_real_distribution<float> chance(0.0f, 1.0f);
    for (int trial = 0; trial < 2000; ++trial) {
        mtp_rule   rule = mtp::constant_rule(6, 0);
        mtp::picks drafts;
        for (float & a : rule.accept) {
            a = chance(rng);
        }
        for (int32_t k = 0; k < 6; ++k) {
            rule.price[k + 1] = 2 * chance(rng);
            drafts.tokens.push_back(k);
            drafts.classes.push_back(static_cast<uint8_t>(rng() % MTP_CLASSES));
        }
        const auto value = [&](int32_t m) {
            float right = 1.0f, sum = 0.0f;
            for (int32_t k = 0; k < m; ++k) {
                right *= rule.accept[k * MTP_CLASSES + drafts.classes[k]];
                sum += right;
            }
            return sum - rule.price[m];
        };
        const int32_t m = mtp::verified(rule, drafts);
        for (int32_t other = 0; other <= 6; ++other) {
            CHECK(value(m) >= value(other));
        }
    }
    CHECK(mtp::class_of(0.0f) == 0 && mtp::class_of(0.19f) == 0 && mtp::class_of(0.2f) == 1);
    CHECK(mtp::class_of(0.9599f) == 6 && mtp::class_of(0.96f) == 7 && mtp::class_of(1.0f) == 7);
}

// Drafts that are only looked at cost a draft step and no row, and every one of them gets a verdict.
void a_look_has_a_verdict_and_no_row() {
    for (const options & o : kinds()) {
        host       h(o);
        generation g(h, h.open(), prompt_of(5), 0, 120);
        h.wrong.assign(200, false);
        for (size_t i = 0; i < h.wrong.size(); i += 3) {
            h.wrong[i] = true;
        }
        mtp_rule look = mtp::constant_rule(1, 0);
        look.price[1] = INFINITY;
        g.rule        = &look;
        while (g.text.size() < 100) {
            const int32_t pos = static_cast<int32_t>(g.text.size());
            g.run(pos + 1);
            CHECK(g.step.n_drafted == 0 && g.step.n_picks == 1 && g.step.n_sampled == 1);
            CHECK(g.step.spare == (h.wrong[pos] ? 0 : 1));
        }
        mtp_counters c{};
        mtp_session_counters(g.s, &c);
        CHECK(c.n_draft_decodes == o.n_heads * c.n_target_decodes && c.n_drafted == 0);  // a chain reads all rows
        mtp_session_close(g.s, 1);
    }
}

void a_rule_stops_where_going_on_does_not_pay() {
    for (const options & o : kinds()) {
        host       h(o);
        generation g(h, h.open(), prompt_of(5), 0, 120);
        mtp_rule   rule = mtp::constant_rule(4, 0);
        std::fill(std::begin(rule.accept), std::end(rule.accept), 0.5f);
        rule.go[1] = 0.5f;   // one right in two is reached here ...
        rule.go[2] = 0.26f;  // ... and one in four is not
        g.rule     = &rule;
        g.run(50);
        mtp_counters c{};
        mtp_session_counters(g.s, &c);
        CHECK(g.step.n_picks == 2 && g.step.n_drafted == 2);
        CHECK(c.n_draft_decodes == std::max(2, o.n_heads) * c.n_target_decodes);
        rule.price[2] = 1.0f;  // the second brings a quarter
        g.run(80);
        CHECK(g.step.n_picks == 2 && g.step.n_drafted == 1);
        g.run(static_cast<int32_t>(g.text.size()) + g.step.rows_left);
        CHECK(g.step.spare == 1);  // all drafts of the fake are right
        mtp_session_close(g.s, 1);
    }
}

// Every function of the host fails once, at every place of a generation, by its own sign and by an exception.
void a_failing_host_never_changes_the_text() {
    const char * names[] = { "decode target", "decode draft", "seq_rm target", "seq_rm draft", "get_logits_ith",
                             "sampler_sample", "get_sampled_token_ith", "get_embeddings_nextn",
                             "get_embeddings_nextn_ith", "compute target", "compute draft", "state size",
                             "state save", "state load" };
    for (const auto & o : kinds()) {
        for (const char * name : names) {
            for (int nth : { 1, 2, 3, 5, 8 }) {
                for (bool throws : { false, true }) {
                    host          h(o);
                    mtp_session * s = h.open();
                    generation    g(h, s, prompt_of(9), 3, 200);
                    h.wrong.assign(220, false);
                    for (size_t p = 0; p < h.wrong.size(); p += 3) {
                        h.wrong[p] = true;
                    }
                    h.throws        = throws;
                    h.lenient       = true;
                    h.fail_in[name] = nth;
                    int failures    = 0;
                    while (g.text.size() < 80) {
                        const int status = g.try_next();
                        if (status == MTP_OK) {
                            continue;
                        }
                        ++failures;
                        CHECK(status == MTP_HOST || status == MTP_EXCEPTION || status == MTP_ROLLBACK);
                        CHECK(std::string(mtp_session_error(s)).size() > 4);
                        // What the adapter does: the text so far is evaluated again.
                        h.target.tokens.clear();
                        h.target.state.clear();
                        h.target.poisoned = false;
                        CHECK(mtp_forget(s, 0) == MTP_OK);
                        h.eval(s, { g.text.begin(), g.text.end() - 1 }, 0);
                    }
                    CHECK(failures <= 1);
                    CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
                    CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_holes == 0);
                    mtp_session_close(s, 1);
                    CHECK(h.n_chains_alive == 0);
                }
            }
        }
    }
}

// The chain of the user may throw (a grammar does): the row stays, and the same call may be made again.
void a_throwing_sampler_leaves_the_row() {
    for (const auto & o : kinds()) {
        for (int32_t depth : { 0, 3 }) {
            for (int nth = 1; nth <= 6; ++nth) {
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(9), depth, 100);
                h.fail_in["sampler_sample"] = nth;
                for (int i = 1; i < nth; ++i) {
                    CHECK(g.try_next() == MTP_OK);
                }
                CHECK(g.try_next() == MTP_EXCEPTION);
                CHECK(g.try_next() == MTP_OK);
                g.run(60);
                CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0);
                CHECK(h.n_samples == 50);
                mtp_session_close(s, 1);
            }
        }
    }
}

// The very first decode fails after its rows went in: an emptied target must really be empty.
void a_failed_first_decode_can_be_cleared() {
    for (bool recurrent : { false, true }) {
        options o;
        o.recurrent = recurrent;
        host          h(o);
        mtp_session * s      = h.open();
        const auto    prompt = prompt_of(1);
        h.truth              = host::plain_text(prompt, 60);
        h.lenient            = true;
        mtp_step step{};
        h.fail_in["compute target"] = 1;
        CHECK(mtp_next(s, sampler, prompt[0], 0, rule_of(3, 0), &step) == MTP_HOST);
        CHECK(mtp_truncate(s, 0) == MTP_OK);
        CHECK(h.target.end() == 0);
        CHECK(mtp_next(s, sampler, prompt[0], 0, rule_of(3, 0), &step) == MTP_OK);
        CHECK(step.token == h.truth[1]);
        mtp_session_close(s, 1);
    }
}

// After a decode that failed somewhere in between, the engine promises no rollback that the memory does not have.
void a_failed_decode_promises_no_rollback() {
    for (bool recurrent : { false, true }) {
        for (bool throws : { false, true }) {
            for (int32_t to = 1; to <= 12; ++to) {
                options o;
                o.recurrent = recurrent;
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(12), 3, 100);
                h.throws                    = throws;
                h.fail_in["compute target"] = 1;
                CHECK(g.try_next() == (throws ? MTP_EXCEPTION : MTP_HOST));
                if (mtp_can_truncate(s, to) == 1) {
                    CHECK(mtp_truncate(s, to) == MTP_OK);
                    CHECK(h.target.end() == to && !h.target.poisoned);
                    CHECK(mtp_next(s, sampler, h.truth[to], to, rule_of(3, 0), &g.step) == MTP_OK);
                    const std::vector<int32_t> kept(h.truth.begin(), h.truth.begin() + to + 1);
                    CHECK(g.step.token == host::plain_text(kept, to + 2).back());
                } else {
                    CHECK(mtp_truncate(s, to) == MTP_ROLLBACK);
                }
                mtp_session_close(s, 1);
            }
        }
    }
}

// MTP_INVALID and MTP_ROLLBACK in the middle of a round: the rows that wait are still there, the counters too.
void a_refusal_in_a_round_keeps_the_round() {
    for (bool recurrent : { false, true }) {
        options o;
        o.recurrent = recurrent;
        host          h(o);
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 100);
        CHECK(g.try_next() == MTP_OK && g.try_next() == MTP_OK && g.step.rows_left == 2);
        const int32_t              end = mtp_n_past(s);
        const std::vector<int32_t> many(9, 1);
        mtp_step                   step{};
        CHECK(mtp_verify(s, 1, end, many.data(), 9, 9) == MTP_INVALID);
        CHECK(mtp_next(s, sampler, 1, end + 1, rule_of(3, 0), &step) == MTP_INVALID);
        CHECK(mtp_truncate(s, end + 1) == MTP_INVALID);
        h.fail_in["seq_rm target"] = 1;
        CHECK(mtp_truncate(s, end) == MTP_ROLLBACK);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_rounds == 0);
        CHECK(g.try_next() == MTP_OK && g.step.new_round == 0 && g.step.rows_left == 1);
        g.run(50);
        mtp_session_close(s, 1);
    }
}

// From the middle of a round to a token before its start, by the position alone: one removal, as mtp_truncate does.
void going_back_in_a_round_is_one_removal() {
    options o;
    o.recurrent = true;
    host          h(o);
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 100);
    CHECK(g.try_next() == MTP_OK && g.try_next() == MTP_OK && g.step.rows_left == 2);
    g.text.resize(g.text.size() - 1);  // take the last token back: its row is 1 of 4
    const int32_t pos = static_cast<int32_t>(g.text.size()) - 1;
    CHECK(mtp_can_truncate(s, pos) == 1);
    CHECK(mtp_verify(s, g.text.back(), pos, nullptr, 0, 0) == MTP_OK);
    CHECK(h.target.n_seq_rm == 1 && !h.target.poisoned);
    mtp_session_close(s, 1);
}

// Rejected drafts of the round before an image do not stay in the draft memory behind it.
void a_gap_leaves_no_rejected_drafts_behind() {
    options o;
    o.gaps = true;
    host          h(o);
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 120);
    h.wrong.assign(140, true);
    CHECK(g.try_next() == MTP_OK && mtp_settle(s) == MTP_OK);
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

void opening_can_fail_and_leaks_nothing() {
    const char * names[] = { "get_memory", "chain_init", "init_greedy", "set_sampler" };
    for (const char * name : names) {
        for (int nth : { 1, 2 }) {
            for (bool throws : { false, true }) {
                host h(options{});
                h.throws        = throws;
                h.fail_in[name] = nth;
                const auto    a = host::api();
                const auto    l = host::layout();
                const auto    p = h.params();
                mtp_session * s = nullptr;
                char          text[64];
                const int     status = mtp_session_open(&a, &l, &p, &s, text, sizeof text);
                CHECK((status == MTP_OK) == (s != nullptr));
                h.fail_in.clear();
                mtp_session_close(s, 1);
                CHECK(h.n_chains_alive == 0);
            }
        }
    }
    // A context that was freed before its session: its sampler is not touched.
    host          h(options{});
    mtp_session * s = h.open();
    h.draft.sampler = nullptr;
    mtp_session_close(s, 0);
    CHECK(h.n_chains_alive == 0);
}

void a_draft_context_that_keeps_failing_is_left_alone() {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(9), 3, 250);
    for (int i = 0; i < 40; ++i) {
        h.fail_in["decode draft"] = 1;
        CHECK(g.try_next() == MTP_OK);
    }
    h.fail_in.clear();
    const int before = h.draft.n_decodes;
    g.run(120);
    CHECK(h.draft.n_decodes == before);
    CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
    mtp_session_close(s, 1);
}

void bad_arguments_are_refused_and_change_nothing() {
    host       h(options{});
    const auto a = host::api();
    const auto l = host::layout();
    const auto p = h.params();
    mtp_session * s = nullptr;
    char          text[128];
    CHECK(mtp_session_open(nullptr, &l, &p, &s, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_session_open(&a, nullptr, &p, &s, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_session_open(&a, &l, nullptr, &s, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_session_open(&a, &l, &p, nullptr, nullptr, 0) == MTP_INVALID);
    for (auto change : { +[](mtp_session_params & q) { q.target = nullptr; },
                         +[](mtp_session_params & q) { q.n_vocab = 0; }, +[](mtp_session_params & q) { q.n_ctx = -1; },
                         +[](mtp_session_params & q) { q.n_embd = 0; },
                         +[](mtp_session_params & q) { q.n_draft_max = q.n_batch; },
                         +[](mtp_session_params & q) { q.rollback = 7; },
                         +[](mtp_session_params & q) { q.rollback = MTP_ROLLBACK_SNAPSHOTS; q.n_rs_seq = 99; } }) {
        auto q = p;
        change(q);
        CHECK(mtp_session_open(&a, &l, &q, &s, text, sizeof text) == MTP_INVALID && s == nullptr && text[0] != 0);
    }
    const fake::draft_vocabulary narrow(60);
    for (auto change : { +[](mtp_session_params & q) { q.n_draft_vocab = 0; },
                         +[](mtp_session_params & q) { q.n_draft_vocab = fake::n_vocab + 1; },
                         +[](mtp_session_params & q) { q.n_draft_vocab = 59; },  // stand-ins reach further
                         +[](mtp_session_params & q) { q.draft_tokens = nullptr; },
                         +[](mtp_session_params & q) { q.stand_ins = nullptr; },
                         +[](mtp_session_params & q) { q.draft_tokens = q.stand_ins; } }) {
        auto q          = p;
        q.n_draft_vocab = 60;
        q.draft_tokens  = narrow.tokens.data();
        q.stand_ins     = narrow.stand_ins.data();
        change(q);
        CHECK(mtp_session_open(&a, &l, &q, &s, text, sizeof text) == MTP_INVALID && s == nullptr && text[0] != 0);
    }
    auto missing         = a;
    missing.llama_decode = nullptr;
    CHECK(mtp_session_open(&missing, &l, &p, &s, text, sizeof text) == MTP_INVALID);
    auto moved = l;
    moved.pos += 8;
    CHECK(mtp_session_open(&a, &moved, &p, &s, text, sizeof text) == MTP_ABI);
    auto grown = l;
    grown.batch_size += 8;
    CHECK(mtp_session_open(&a, &grown, &p, &s, text, sizeof text) == MTP_ABI);

    s = h.open();
    generation g(h, s, prompt_of(5), 3, 100);
    g.run(12);
    const int32_t end = mtp_n_past(s);
    mtp_step      step{};
    int32_t       token = 1, n = 0;
    CHECK(mtp_next(s, nullptr, 1, end, rule_of(3, 0), &step) == MTP_INVALID);
    CHECK(mtp_next(s, sampler, 1, end, rule_of(3, 0), nullptr) == MTP_INVALID);
    CHECK(mtp_next(s, sampler, 1, end, rule_of(-1, 0), &step) == MTP_INVALID);
    CHECK(mtp_next(s, sampler, 1, end + 5, rule_of(3, 0), &step) == MTP_INVALID);
    CHECK(mtp_settle(s) == MTP_OK);
    CHECK(mtp_next(s, sampler, -1, end, rule_of(3, 0), &step) == MTP_INVALID);
    CHECK(mtp_next(s, sampler, fake::n_vocab, end, rule_of(3, 0), &step) == MTP_INVALID);
    CHECK(mtp_draft(s, 1, end, 3, 0, nullptr, &n) == MTP_INVALID);
    CHECK(mtp_draft(s, 1, end, 3, 0, &token, nullptr) == MTP_INVALID);
    CHECK(mtp_verify(s, 1, end, nullptr, 1, 1) == MTP_INVALID);
    token = fake::n_vocab;
    CHECK(mtp_verify(s, 1, end, &token, 1, 1) == MTP_INVALID);
    const std::vector<int32_t> many(9, 1);
    CHECK(mtp_verify(s, 1, end, many.data(), 9, 9) == MTP_INVALID);
    CHECK(mtp_sample(s, sampler, &step) == MTP_INVALID);
    CHECK(mtp_sample(s, sampler, nullptr) == MTP_INVALID);
    CHECK(mtp_commit(s, 1) == MTP_INVALID);
    CHECK(mtp_capture(s, nullptr, 1, 0) == MTP_INVALID);
    CHECK(mtp_capture(s, &token, 0, 0) == MTP_INVALID);
    CHECK(mtp_capture(s, many.data(), 9, -1) == MTP_INVALID);
    CHECK(mtp_truncate(s, -1) == MTP_INVALID);
    CHECK(mtp_truncate(s, end + 1) == MTP_INVALID);
    CHECK(mtp_forget(s, -1) == MTP_INVALID);
    CHECK(mtp_align(s, nullptr, 3) == MTP_INVALID);
    CHECK(mtp_n_past(s) == end);
    g.run(60);
    CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0);
    mtp_session_close(s, 1);

    CHECK(mtp_settle(nullptr) == MTP_INVALID);
    CHECK(mtp_live_row(nullptr) == -1 && mtp_n_past(nullptr) == -1 && mtp_n_past_draft(nullptr) == -1);
    CHECK(mtp_rows_left(nullptr) == -1 && mtp_replays_only(nullptr) == 0 && mtp_replay(nullptr) == MTP_INVALID);
    CHECK(mtp_can_truncate(nullptr, 0) == 0);
    CHECK(std::string(mtp_session_error(nullptr)).size() > 4);
    mtp_session_counters(nullptr, nullptr);
    mtp_session_close(nullptr, 1);
    CHECK(std::string(mtp_version()).size() > 2);
}

void a_second_thread_is_told_to_wait() {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(5), 3, 250);
    int           n = 0;
    h.on_sample     = [&] {  // while the first thread is inside the session
        std::thread([&] {
            mtp_step step{};
            n += mtp_settle(s) == MTP_BUSY ? 1 : 0;
            n += mtp_truncate(s, 0) == MTP_BUSY ? 1 : 0;
            n += mtp_next(s, sampler, 1, 0, rule_of(3, 0), &step) == MTP_BUSY ? 1 : 0;
        }).join();
    };
    g.run(40);
    CHECK(n == 3 * h.n_samples && h.n_samples == 34);
    CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0);
    mtp_session_close(s, 1);
}

void a_session_opened_late_drafts_at_once() {
    host       h(options{});
    const auto prompt = prompt_of(12);
    h.truth           = host::plain_text(prompt, 100);
    h.decode_only(prompt, 0);
    mtp_session * s = h.open();
    CHECK(mtp_n_past(s) == 12);
    mtp_step step{};
    CHECK(mtp_next(s, sampler, h.truth[12], 12, rule_of(3, 0), &step) == MTP_OK);
    CHECK(step.token == h.truth[13] && step.n_drafted == 3 && h.draft.start == 12);
    mtp_session_close(s, 1);
}

// What a caller keeps of a session and its two memories.
struct saved_state {
    std::vector<unsigned char> queue;
    fake::context              target, draft;
    int32_t                    n_past = 0;
};

saved_state save(host & h, mtp_session * s) {
    saved_state state;
    size_t      n = 0;
    CHECK(mtp_state_size(s, &n) == MTP_OK);
    state.queue.resize(n);
    CHECK(mtp_state_get(s, state.queue.data(), n) == MTP_OK);
    state.target = h.target;
    state.draft  = h.draft;
    state.n_past = mtp_n_past(s);
    return state;
}

void load(host & h, mtp_session * s, const saved_state & state, bool with_draft = true) {
    h.target       = state.target;
    h.target.undo  = 0;  // the snapshots are not part of a saved state
    h.target.spent = true;
    CHECK(mtp_forget(s, state.n_past) == MTP_OK);
    if (with_draft) {
        void * const own = h.draft.sampler;
        h.draft          = state.draft;
        h.draft.sampler  = own;
        CHECK(mtp_state_check(s, state.queue.data(), state.queue.size()) == MTP_OK);
        CHECK(mtp_state_set(s, state.queue.data(), state.queue.size()) == MTP_OK);
    } else {
        CHECK(mtp_state_set(s, nullptr, 0) == MTP_OK);
    }
}

// At every row of a round, into the same session and into a new one: the same text, the same rounds.
void a_saved_state_drafts_on_as_before() {
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
                CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && !h.target.poisoned);
                mtp_session_close(s, 1);
            }
        }
    }
}

void a_state_without_a_draft_starts_empty() {
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
        CHECK(h.draft.tokens.empty() && mtp_n_past_draft(s) == state.n_past);
        g.text = kept;
        g.run(70);
        CHECK(h.draft.start == state.n_past && g.step.n_drafted == 3);
        CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0);
        mtp_session_close(s, 1);
    }
}

void a_damaged_state_is_refused_and_changes_nothing() {
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
    CHECK(mtp_state_size(s, &n) == MTP_OK && n == state.queue.size());
    std::vector<unsigned char> out(n);
    CHECK(mtp_state_get(s, nullptr, n) == MTP_INVALID);
    CHECK(mtp_state_get(s, out.data(), n - 1) == MTP_INVALID);
    CHECK(mtp_state_get(s, out.data(), n) == MTP_OK && out == state.queue);
    CHECK(mtp_truncate(s, mtp_n_past(s) - 3) == MTP_OK);
    CHECK(mtp_state_set(s, out.data(), n) == MTP_INVALID);  // longer than the target
    g.text.resize(g.text.size() - 3);
    g.run(40);
    CHECK(g.try_next() == MTP_OK && g.step.rows_left == 0);
    CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0);

    // A round that is open: the size settles it, the bytes alone do not.
    h.wrong.clear();
    do {
        CHECK(g.try_next() == MTP_OK);
    } while (g.step.rows_left == 0);
    CHECK(mtp_state_get(s, out.data(), n) == MTP_INVALID);
    CHECK(mtp_state_size(s, &n) == MTP_OK && mtp_state_size(nullptr, &n) == MTP_INVALID);
    g.run(60);
    mtp_session_close(s, 1);
}

// A chat whose last turn changed: the token before the cut is evaluated again, and no row is missing anywhere.
void a_cut_text_keeps_its_hidden_rows() {
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
                CHECK(mtp_settle(s) == MTP_OK && mtp_n_past(s) == 45);
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
                CHECK(g.try_next() == MTP_OK && g.step.n_drafted == 4 - (o.checkpoint && g.step.n_drafted == 0 ? 4 : 0));
                if (!o.shares_kv && o.n_heads == 1 && g.step.n_drafted == 4) {
                    CHECK(h.draft.n_rows - n_before <= n - keep + 3 + 4);  // what stands before the cut is not read again
                }
                g.run(90);
                CHECK(h.n_unknown_rows == 0 && h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_holes == 0);
                CHECK(!h.target.poisoned);
                mtp_session_close(s, 1);
            }
        }
    }
}

// The token that a truncation leaves in the draft is another one, or an image comes instead.
void what_a_truncation_leaves_is_checked() {
    for (bool gaps : { false, true }) {
        for (bool image : { false, true }) {
            for (bool capture : { false, true }) {
                options o;
                o.gaps = gaps;
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(20), 4, 160);
                g.run(46);
                CHECK(mtp_truncate(s, 29) == MTP_OK && mtp_n_past_draft(s) == 30);
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
                CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 1);
                CHECK(g.step.n_drafted == 4);
                mtp_session_close(s, 1);
            }
        }
    }
}

// A state that cannot be cut is put back by the caller, and the row that stood there with it.
void a_row_comes_back_with_its_position() {
    for (const auto & o : kinds()) {
        host          h(o);
        mtp_session * s      = h.open();
        const auto    prompt = prompt_of(30);
        h.truth              = host::plain_text(prompt, 160);
        h.eval(s, { prompt.begin(), prompt.begin() + 26 }, 0);
        float row[fake::n_embd];
        CHECK(mtp_row_get(s, nullptr) == MTP_INVALID && mtp_row_set(s, nullptr) == MTP_INVALID);
        CHECK(mtp_row_get(s, row) == MTP_OK && row[0] == 26.0f && row[2] == 1.0f);
        const auto kept = h.target;
        h.eval(s, { prompt.begin() + 26, prompt.end() }, 26);
        generation g(h, s, prompt, 4, 160);
        g.run(60);
        CHECK(mtp_row_get(s, row + 0) == MTP_INVALID);  // in a round
        CHECK(mtp_settle(s) == MTP_OK);
        h.target       = kept;
        h.target.undo  = 0;
        h.target.spent = true;
        CHECK(mtp_forget(s, 26) == MTP_OK && mtp_align(s, prompt.data(), 26) == MTP_OK);
        CHECK(mtp_row_set(s, row) == MTP_OK);
        h.eval(s, { prompt.begin() + 26, prompt.end() }, 26);
        g.text = prompt;
        g.text.push_back(h.truth[30]);
        g.run(100);
        CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && h.n_holes == 0);
        mtp_session_close(s, 1);
    }
}

// The draft reads the last rows of a prompt, each with its true row, and goes on from there.
void a_prefill_window_bounds_what_the_draft_reads() {
    for (auto o : kinds()) {
        for (int32_t window : { 1, 2, 7, 15, 16, 17, 40, 64 }) {
            for (int32_t n : { 1, 2, 7, 8, 16, 17, 40, 41, 64, 65, 100 }) {
                o.prefill_window = window;
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(n), 4, 180);
                CHECK(o.shares_kv || h.draft.n_decodes == 0 || window >= n);  // nothing is read before it is needed
                CHECK(g.try_next() == MTP_OK && g.step.n_drafted == 4);
                const int32_t read = std::min(n, std::max(window, 5));  // what a round leaves behind has to fit
                if (!o.shares_kv) {
                    CHECK(h.draft.start == n - read);
                    CHECK(h.draft_positions.front() == n - read);
                    const int32_t catch_up = read + o.n_heads > o.n_batch ? (read + o.n_batch - 1) / o.n_batch : 0;
                    CHECK(h.draft.n_decodes == 4 + catch_up * o.n_heads);
                }
                g.run(n + 60);
                CHECK(o.shares_kv || h.draft.start == n - read);
                CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && h.n_holes == 0);
                mtp_counters c{};
                mtp_session_counters(s, &c);
                CHECK(c.n_draft_restarts == 0);
                mtp_session_close(s, 1);
            }
        }
    }
}

void a_prefill_window_drops_a_stretch_without_drafts() {
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
            CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && h.n_holes == 0);
            mtp_session_close(s, 1);
        }
    }
}

// The rows that a stretch without drafts leaves are read as far back as the rule says, and no text changes.
void a_rule_narrows_the_window() {
    for (auto o : kinds()) {
        for (int32_t narrow : { 1, 7, 30, 500 }) {
            o.prefill_window = 20;
            host          h(o);
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 0, 250);
            g.run(130);
            mtp_rule rule = mtp::constant_rule(3, 0);
            rule.window   = narrow;
            g.rule        = &rule;
            g.run(200);
            CHECK(o.shares_kv || h.draft.start == 129 - std::max(std::min(narrow, 20), o.n_draft_max + 1));
            CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && h.n_holes == 0);
            rule.window = -1;
            CHECK(mtp_settle(s) == MTP_OK);
            CHECK(g.try_next() == MTP_INVALID);
            mtp_session_close(s, 1);
        }
    }
}

// A prompt that shares a prefix with the text: what fits the window is read behind what the memory has.
void a_prefill_window_and_a_text_that_was_cut() {
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
                    const int32_t to    = mtp_lacks_row(s, keep) ? keep - 1 : keep;
                    CHECK(to == keep - 1);
                    CHECK(mtp_truncate(s, to) == MTP_OK);
                    g.text.resize(keep);
                    for (int32_t i = 0; i < more; ++i) {
                        g.text.push_back((h.truth[keep + i] + 1) % fake::n_vocab);
                    }
                    h.truth = host::plain_text(g.text, 200);
                    h.eval(s, { g.text.begin() + to, g.text.end() }, to);
                    g.text.push_back(h.truth[g.text.size()]);
                    g.run(150);
                    if (!o.shares_kv) {
                        const int32_t end = keep + more;
                        CHECK(h.draft.start == (more > window ? end - window : keep <= start ? keep : start));
                    }
                    CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && h.n_holes == 0);
                    mtp_session_close(s, 1);
                }
            }
        }
    }
}

void a_prefill_window_behind_a_gap() {
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
                CHECK(mtp_next(s, sampler, text.back(), static_cast<int32_t>(text.size()) - 1, rule_of(3, 0), &step) == MTP_OK);
                text.push_back(step.token);
            }
            CHECK(std::equal(text.begin(), text.end(), h.truth.begin()));
            CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0);
            // The first token behind the image has no row that anyone knows: it is left out.
            CHECK(h.draft.start == (window == 4 ? 25 : gaps ? 0 : 21));
            mtp_session_close(s, 1);
        }
    }
}

// The part of a prompt that a window leaves out needs no hidden rows: the draft begins behind it, and is right.
void a_prompt_may_be_read_without_hidden_rows() {
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
        CHECK(mtp_next(s, sampler, prompt[30], 30, nullptr, &step) == MTP_INVALID);
        CHECK(mtp_keep_rows(s, 1) == MTP_OK);
        h.draft_positions.clear();
        h.eval(s, { prompt.begin() + 30, prompt.end() }, 30);
        g.text = prompt;
        g.text.push_back(h.truth[40]);
        g.run(90);
        CHECK(h.draft_positions.front() >= 30);
        CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0 && h.n_holes == 0);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_accepted > 30);
        mtp_session_close(s, 1);
    }
}

void more_waiting_rows_than_fit_are_refused() {
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

void a_session_without_a_draft_context_has_no_state() {
    options o;
    o.draft_context = false;
    host          h(o);
    mtp_session * s = h.open();
    size_t        n = 1;
    CHECK(mtp_state_size(s, &n) == MTP_OK && n == 0);
    CHECK(mtp_state_get(s, nullptr, 0) == MTP_OK);
    CHECK(mtp_state_set(s, nullptr, 0) == MTP_OK);
    CHECK(mtp_state_set(s, &n, sizeof n) == MTP_INVALID);
    mtp_session_close(s, 1);
}

void vocabularies_are_compared_by_content() {
    const auto                     a = host::api();
    const auto                     l = host::layout();
    const std::vector<std::string> words{ "one", "two", "three" };
    char                           text[128];
    const auto compare = [&](const std::vector<std::string> & other) {
        text[0] = 0;
        return mtp_compare_vocabularies(&a, &l, &words, &other, nullptr, 0, text, sizeof text);
    };
    CHECK(compare({ "one", "two", "three" }) == MTP_OK && text[0] == 0);
    CHECK(compare({ "one", "two" }) == MTP_INVALID && std::strstr(text, "3 tokens, the other 2"));
    CHECK(compare({ "one", "tow", "three" }) == MTP_INVALID && std::strstr(text, "token 1 ('two' and 'tow')"));
    CHECK(compare({ "one", "?", "three" }) == MTP_INVALID);  // the host has no text for it
    CHECK(mtp_compare_vocabularies(&a, &l, &words, nullptr, nullptr, 0, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_compare_vocabularies(&a, &l, &words, nullptr, nullptr, 0, nullptr, 0) == MTP_INVALID);
    const auto pick = [&](const std::vector<std::string> & other, std::vector<int32_t> tokens) {
        return mtp_compare_vocabularies(&a, &l, &words, &other, tokens.data(), static_cast<int32_t>(tokens.size()), text,
                                        sizeof text);
    };
    CHECK(pick({ "three", "one" }, { 2, 0 }) == MTP_OK);
    CHECK(pick({ "three" }, { 2 }) == MTP_OK);  // alone it has other attributes
    CHECK(pick({ "three", "one" }, { 2, 1 }) == MTP_INVALID && std::strstr(text, "token 1 ('two' and 'one')"));
    CHECK(pick({ "three" }, { 2, 0 }) == MTP_INVALID && std::strstr(text, "2 tokens, the other 1"));
    CHECK(pick({ "three" }, { 3 }) == MTP_INVALID && pick({ "three" }, { -1 }) == MTP_INVALID);
}

options with_checkpoint() {
    options o;
    o.checkpoint = true;
    return o;
}

// Each round decodes once and copies the state at most once, in or out: what a rejection left is decoded in front of
// the next round's rows, and where that is more than n_draft_max rows the round takes no drafts.
void a_rejection_costs_rows_and_no_decode() {
    for (int32_t accepted = 0; accepted <= 4; ++accepted) {
        host          h(with_checkpoint());
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(8), 4, 200);
        h.wrong.assign(220, false);
        for (size_t p = 9; p < h.wrong.size(); ++p) {
            h.wrong[p] = accepted < 4 && (p - 9) % (accepted + 1) == static_cast<size_t>(accepted);
        }
        while (g.text.size() < 129 || g.step.rows_left > 0) {
            CHECK(g.try_next() == MTP_OK && g.text.back() == h.truth[g.text.size() - 1]);
        }
        int32_t size = 9, rounds = 0, drafted = 0, replayed = 0, saves = 0, loads = 0, carried = 0;
        for (bool behind = false; size < static_cast<int32_t>(g.text.size()); ++rounds) {
            const int32_t n = carried > 4 ? 0 : 4;
            drafted += n;
            replayed += carried;
            loads += behind ? 1 : 0;
            saves += !behind && n > 0 ? 1 : 0;
            int32_t agreed = 0;
            while (agreed < n && !h.wrong[size + agreed]) {
                ++agreed;
            }
            behind  = agreed < n;
            carried = behind ? carried + agreed + 1 : 0;
            size += agreed + 1;
        }
        CHECK(mtp_settle(s) == MTP_OK);
        mtp_counters c{};
        mtp_session_counters(s, &c);
        CHECK(c.n_rounds == rounds && c.n_target_decodes == rounds && h.target.n_decodes == rounds + 1);
        CHECK(c.n_drafted == drafted && c.n_replayed == replayed && h.n_saves == saves && h.n_loads == loads);
        CHECK(h.target.n_rows == 8 + rounds + drafted + replayed);
        CHECK(accepted == 4 ? loads == 0 && drafted == 4 * rounds : loads > saves);
        mtp_session_close(s, 1);
    }
}

// At every row of a round: the memory is what it says it is, the last row is live, and nothing was captured twice.
void a_replay_makes_the_memory_real() {
    for (int32_t at = 10; at < 60; ++at) {
        host          h(with_checkpoint());
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 4, 120);
        h.wrong.assign(140, false);
        for (size_t p = 10; p < 120; p += 2 + p % 5) {
            h.wrong[p] = true;
        }
        g.run(at + 1);
        CHECK(mtp_settle(s) == MTP_OK);
        const int32_t end = mtp_n_past(s), decodes = h.target.n_decodes;
        CHECK(end == at || end == at - 1);  // a token that came from a row is not decoded before the next round
        CHECK(mtp_replay(s) == MTP_OK && mtp_n_past(s) == end);
        CHECK(h.target.end() == end && h.target.state == h.target.tokens && !h.target.poisoned);
        CHECK(std::equal(h.target.tokens.begin(), h.target.tokens.end(), h.truth.begin()));
        const int32_t row = mtp_live_row(s);
        CHECK(row >= 0 && h.target.outputs[row] && h.target.batch_pos[row] == end - 1);
        CHECK(mtp_n_past_draft(s) == end);
        const int32_t once = h.target.n_decodes;
        CHECK(once - decodes <= 1);
        CHECK(mtp_replay(s) == MTP_OK && h.target.n_decodes == once);
        h.eval(s, { h.truth[end], h.truth[end + 1] }, end);
        g.text.assign(h.truth.begin(), h.truth.begin() + end + 3);
        g.run(100);
        CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_unknown_rows == 0);
        mtp_session_close(s, 1);
    }
}

// Going back reaches the copy and no further, in the middle of a round and after it, and the draft follows.
void a_copy_is_as_far_as_one_can_go_back() {
    for (int32_t wrong : { 0, 2, 4 }) {  // of the second round
        for (int32_t back = 0; back < 12; ++back) {
            for (bool settled : { false, true }) {
                host          h(with_checkpoint());
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(9), 4, 120);
                h.wrong.assign(140, false);
                if (wrong > 0) {
                    h.wrong[15 + wrong - 1] = true;
                }
                g.run(15);  // one round, all right: positions 9 to 13, and a token
                const int32_t base = 14;
                g.run(wrong > 0 ? base + 1 + wrong : base + 6);
                if (settled) {
                    CHECK(mtp_settle(s) == MTP_OK);
                }
                const int32_t end = mtp_n_past(s), to = end - back;
                CHECK(end == (wrong > 0 ? base + wrong : base + 5));
                CHECK(mtp_can_truncate(s, to) == (to >= base ? 1 : 0));
                CHECK(mtp_truncate(s, to) == (to >= base ? MTP_OK : MTP_ROLLBACK));
                if (to >= base) {
                    CHECK(mtp_n_past(s) == to);
                    CHECK(mtp_replay(s) == MTP_OK && h.target.end() == to && h.target.state == h.target.tokens);
                    CHECK((to > base) == (mtp_live_row(s) >= 0));
                    g.text.resize(to + 1);
                }
                g.run(90);
                CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && !h.target.poisoned);
                mtp_session_close(s, 1);
            }
        }
    }
}

void without_a_copy_there_are_no_drafts() {
    for (const char * name : { "state size", "state save" }) {
        host          h(with_checkpoint());
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 120);
        h.fail_in[name] = 2;
        g.run(14);
        CHECK(g.step.n_drafted == 3);
        CHECK(g.try_next() == MTP_OK && g.step.new_round == 1 && g.step.n_drafted == 0 && g.step.rows_left == 0);
        g.run(90);
        CHECK(g.step.n_drafted == 3 && h.n_mispaired == 0 && h.n_stale_cells == 0);
        mtp_session_close(s, 1);
    }
}

// A decode that fails after the copy went in may be tried again; a copy that does not go in leaves nothing to go on
// from, which is said and not hidden.
void a_failed_replay_loses_no_text() {
    for (const char * name : { "decode target", "compute target", "state load", "seq_rm target" }) {
        for (bool alone : { false, true }) {  // the replay by itself, or in front of the next round
            host          h(with_checkpoint());
            mtp_session * s = h.open();
            generation    g(h, s, prompt_of(9), 3, 120);
            h.wrong.assign(140, true);
            g.run(12);
            h.fail_in[name]     = 1;
            const bool    loads = std::string(name) == "state load" || std::string(name) == "seq_rm target";
            const int     code  = alone ? mtp_replay(s) : g.try_next();
            CHECK(code == (loads ? MTP_ROLLBACK : MTP_HOST));
            CHECK(mtp_n_past(s) == 11);
            if (loads) {
                CHECK(mtp_can_truncate(s, 11) == 0 && g.try_next() == MTP_ROLLBACK);
                CHECK(mtp_truncate(s, 0) == MTP_OK);
                h.eval(s, { g.text.begin(), g.text.end() - 1 }, 0);
            }
            g.run(90);
            CHECK(h.n_mispaired == 0 && h.n_stale_cells == 0 && !h.target.poisoned);
            mtp_session_close(s, 1);
        }
    }
    for (const char * name : { "decode target", "compute target" }) {  // with nothing to replay, but a copy
        host          h(with_checkpoint());
        mtp_session * s = h.open();
        generation    g(h, s, prompt_of(9), 3, 120);
        g.run(14);
        CHECK(g.step.rows_left == 0 && h.n_loads == 0);
        h.fail_in[name] = 1;
        CHECK(g.try_next() == MTP_HOST && mtp_n_past(s) == 13);
        g.run(90);
        CHECK(h.n_loads == 1 && h.n_mispaired == 0 && h.n_stale_cells == 0 && !h.target.poisoned);
        mtp_session_close(s, 1);
    }
}

// Random operations against a list of tokens: what the adapter may do, in any order.
void random_operations(uint32_t seed, int steps) {
    std::mt19937 rng(seed);
    const auto   pick = [&](uint32_t n) { return static_cast<int32_t>(rng() % n); };
    options      o;
    o.recurrent  = pick(2) != 0;
    o.gathers    = pick(2) != 0;
    o.gaps       = pick(2) != 0;
    o.confidence = pick(2) != 0;
    o.n_heads    = pick(3) == 0 ? 1 + pick(4) : 1;
    o.shares_kv  = o.n_heads == 1 && pick(4) == 0;
    o.checkpoint = !o.recurrent && !o.shares_kv && pick(2) != 0;
    o.n_batch    = (o.checkpoint ? 5 : 7) + pick(20);  // down to where nothing fits beside a round
    o.n_rs_seq   = 1 + pick(4);
    o.n_ubatch   = o.n_rs_seq + 2 + pick(std::max(1, o.n_batch - o.n_rs_seq - 1));
    o.n_ctx      = 60 + pick(200);
    o.prefill_window = pick(2) != 0 ? 1 + pick(40) : 0;
    host                 h(o);
    mtp_session *        s = h.open();
    std::vector<int32_t> text;  // its last token is not evaluated
    const auto           restart = [&](int32_t n) {
        text = prompt_of(n, rng());
        CHECK(mtp_truncate(s, 0) == MTP_OK);
        h.truth = host::plain_text(text, o.n_ctx + 2);
        h.eval(s, text, 0);
        text.push_back(h.truth[n]);
    };
    restart(5);
    saved_state          kept;
    std::vector<int32_t> kept_text;
    for (int i = 0; i < steps; ++i) {
        const int32_t pos = static_cast<int32_t>(text.size()) - 1;
        if (pos + 2 >= o.n_ctx) {
            restart(1 + pick(40));
            continue;
        }
        h.wrong.assign(o.n_ctx + 16, false);
        for (int32_t p = 0; p < o.n_ctx; ++p) {
            h.wrong[p] = ((p * 7 + static_cast<int32_t>(seed)) % 5) < 2;
        }
        switch (pick(16)) {
            case 0: CHECK((pick(2) != 0 ? mtp_settle(s) : mtp_replay(s)) == MTP_OK); break;
            case 12: kept = save(h, s), kept_text = text; break;
            case 13: {
                if (!kept_text.empty()) {
                    load(h, s, kept, pick(4) != 0);
                    text    = kept_text;
                    h.truth = host::plain_text(text, o.n_ctx + 2);
                }
                break;
            }
            case 1: restart(1 + pick(40)); break;
            case 2: {  // resend a prefix, as a chat with a changed last turn does
                const int32_t keep = pick(pos + 1);
                if (keep > 0 && mtp_can_truncate(s, keep)) {
                    CHECK(mtp_truncate(s, keep) == MTP_OK);
                    text.resize(keep + 1);
                    h.truth = host::plain_text(text, o.n_ctx + 2);
                } else if (mtp_can_truncate(s, keep) == 0) {
                    CHECK(mtp_truncate(s, keep) == MTP_ROLLBACK);
                }
                break;
            }
            case 3: {  // evaluate the next few tokens outside a round
                const int32_t n = std::min(1 + pick(4), o.n_ctx - pos - 2);
                CHECK(mtp_replay(s) == MTP_OK);
                h.eval(s, { h.truth.begin() + pos, h.truth.begin() + pos + n }, pos);
                text.assign(h.truth.begin(), h.truth.begin() + pos + n + 1);
                break;
            }
            case 4:
            case 5: {  // drafts from elsewhere
                mtp_step             step{};
                const int32_t        most = o.recurrent ? o.n_rs_seq : o.n_draft_max;
                const int32_t        n    = std::min(pick(most + 1), o.n_ctx - pos - 1);
                std::vector<int32_t> drafts(h.truth.begin() + pos + 1, h.truth.begin() + pos + 1 + n);
                if (n > 0 && pick(3) != 0) {
                    const int32_t at = pick(n);
                    drafts[at]       = (drafts[at] + 1) % fake::n_vocab;
                }
                CHECK(mtp_verify(s, text.back(), pos, drafts.data(), n, n) == MTP_OK);
                CHECK(mtp_sample(s, sampler, &step) == MTP_OK && step.n_drafted == n);
                text.push_back(step.token);
                break;
            }
            default: {
                mtp_step step{};
                mtp_rule rule = mtp::constant_rule(pick(o.n_draft_max + 2), pick(2) * 0.3f);
                if (pick(2) != 0) {
                    std::fill(std::begin(rule.accept), std::end(rule.accept), 0.7f);
                    rule.go[1 + pick(3)]    = 0.6f;
                    rule.price[1 + pick(3)] = 0.8f;
                }
                CHECK(mtp_next(s, sampler, text.back(), pos, &rule, &step) == MTP_OK);
                text.push_back(step.token);
            }
        }
        CHECK(std::equal(text.begin(), text.end(), h.truth.begin()));
        CHECK(!h.target.poisoned && h.n_mispaired == 0 && h.n_stale_cells == 0 && h.n_holes == 0);
        CHECK(mtp_n_past(s) == static_cast<int32_t>(text.size()) - 1);
    }
    mtp_session_close(s, 1);
}

void random_operations_keep_the_text() {
    for (uint32_t seed = 1; seed <= 200; ++seed) {
        random_operations(seed, 500);
    }
}

}  // namespace

// An argument picks the tests whose names contain it.
int main(int argc, char ** argv) {
    int        n   = 0;
    const auto run = [&](const char * name, void (*test)()) {
        if (argc > 1 && std::string(name).find(argv[1]) == std::string::npos) {
            return;
        }
        std::printf("%s\n", name);
        std::fflush(stdout);
        test();
        ++n;
    };
#define RUN(test) run(#test, test)
    RUN(every_depth_and_accept_count_gives_the_plain_text);
    RUN(a_narrow_head_proposes_what_it_knows);
    RUN(a_round_rolls_back_once);
    RUN(a_recurrent_state_is_never_believed);
    RUN(long_prompts_are_fed_in_batches);
    RUN(a_long_stretch_without_drafts_is_caught_up);
    RUN(the_end_of_the_context_is_reached_and_not_passed);
    RUN(gaps_restart_the_draft_context_or_are_kept);
    RUN(a_replaced_memory_drafts_again);
    RUN(drafts_from_elsewhere_use_draft_verify_commit);
    RUN(short_drafts_are_dropped);
    RUN(a_rule_verifies_what_pays_most);
    RUN(a_look_has_a_verdict_and_no_row);
    RUN(a_rule_stops_where_going_on_does_not_pay);
    RUN(a_failing_host_never_changes_the_text);
    RUN(a_throwing_sampler_leaves_the_row);
    RUN(a_failed_first_decode_can_be_cleared);
    RUN(a_failed_decode_promises_no_rollback);
    RUN(a_refusal_in_a_round_keeps_the_round);
    RUN(going_back_in_a_round_is_one_removal);
    RUN(a_gap_leaves_no_rejected_drafts_behind);
    RUN(opening_can_fail_and_leaks_nothing);
    RUN(a_draft_context_that_keeps_failing_is_left_alone);
    RUN(bad_arguments_are_refused_and_change_nothing);
    RUN(a_second_thread_is_told_to_wait);
    RUN(a_session_opened_late_drafts_at_once);
    RUN(a_saved_state_drafts_on_as_before);
    RUN(a_state_without_a_draft_starts_empty);
    RUN(a_damaged_state_is_refused_and_changes_nothing);
    RUN(a_cut_text_keeps_its_hidden_rows);
    RUN(what_a_truncation_leaves_is_checked);
    RUN(a_row_comes_back_with_its_position);
    RUN(a_prefill_window_bounds_what_the_draft_reads);
    RUN(a_prefill_window_drops_a_stretch_without_drafts);
    RUN(a_rule_narrows_the_window);
    RUN(a_prefill_window_and_a_text_that_was_cut);
    RUN(a_prefill_window_behind_a_gap);
    RUN(a_prompt_may_be_read_without_hidden_rows);
    RUN(more_waiting_rows_than_fit_are_refused);
    RUN(a_session_without_a_draft_context_has_no_state);
    RUN(vocabularies_are_compared_by_content);
    RUN(a_rejection_costs_rows_and_no_decode);
    RUN(a_replay_makes_the_memory_real);
    RUN(a_copy_is_as_far_as_one_can_go_back);
    RUN(without_a_copy_there_are_no_drafts);
    RUN(a_failed_replay_loses_no_text);
    RUN(random_operations_keep_the_text);
    std::printf("%d passed, 0 failed\n", n);
    return 0;
}
