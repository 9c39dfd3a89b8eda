// Random operations in any order: the text is always the plain one.
#include "session_fixture.hpp"

#include <algorithm>
#include <random>

using namespace fixture;

// Random operations against a list of tokens: what the adapter may do, in any order.
static mtp_counters random_operations(uint32_t seed, int steps) {
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
    o.n_checkpoints  = pick(4);
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
                CHECK(next(s, text.back(), pos, rule_of(o.n_draft_max), drafts, step) == MTP_OK);
                CHECK(step.new_round == 1);
                CHECK(step.n_drafted == n);
                text.push_back(step.token);
                break;
            }
            case 6: {  // a prompt that shares a part with the text
                auto prompt = first(text, pick(3) == 0 ? pos : pick(pos + 1));
                for (int32_t n = std::min(pick(5), o.n_ctx - pos - 3); prompt.empty() || n > 0; --n) {
                    prompt.push_back(pick(fake::n_vocab));
                }
                const auto    n    = static_cast<int32_t>(prompt.size());
                const int32_t kept = reuse(s, first(text, pos), prompt);
                if (kept == 0) {
                    CHECK(mtp_truncate(s, 0) == MTP_OK);
                }
                h.truth = host::plain_text(prompt, o.n_ctx + 2);
                if (kept < n) {
                    CHECK(mtp_replay(s) == MTP_OK);
                    h.eval(s, { prompt.begin() + kept, prompt.end() }, kept);
                }
                text = prompt;
                text.push_back(h.truth[n]);
                break;
            }
            case 7:
                CHECK(mtp_replay(s) == MTP_OK);
                CHECK(mtp_checkpoint(s, text.data(), pos) == MTP_OK);
                break;
            case 8: CHECK(mtp_begin(s, text.data(), pos) == MTP_OK); break;
            case 9: h.fail_in["decode draft"] = 1; break;
            default: {
                mtp_step step{};
                mtp_rule rule = constant_rule(pick(o.n_draft_max + 2), pick(2) * 0.3f);
                if (pick(2) != 0) {
                    std::fill(std::begin(rule.accept), std::end(rule.accept), 0.7f);
                    rule.go[1 + pick(3)]    = 0.6f;
                    rule.price[1 + pick(3)] = 0.8f;
                }
                CHECK(next(s, text.back(), pos, &rule, step) == MTP_OK);
                text.push_back(step.token);
            }
        }
        CHECK(std::equal(text.begin(), text.end(), h.truth.begin()));
        CHECK(!h.target.poisoned);
        CHECK(h.faults() == "");
        CHECK(mtp_n_past(s) == static_cast<int32_t>(text.size()) - 1);
    }
    CHECK(mtp_settle(s) == MTP_OK);
    const auto c = counters_of(s);
    CHECK(c.n_sampled == h.n_samples);
    mtp_session_close(s, 1);
    return c;
}

TEST(random_operations_keep_the_text) {
    mtp_counters all{};
    for (uint32_t seed = 1; seed <= 200; ++seed) {
        const auto c = random_operations(seed, 500);
        all.n_accepted += c.n_accepted;
        all.n_draft_failures += c.n_draft_failures;
        all.n_checkpoints_restored += c.n_checkpoints_restored;
    }
    CHECK(all.n_accepted > 1000);
    CHECK(all.n_draft_failures > 1000);
    CHECK(all.n_checkpoints_restored > 50);
}
