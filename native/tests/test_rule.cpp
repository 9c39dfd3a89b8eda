// The rule of a round: what is drafted, and how much of it is verified.
#include "rule.hpp"
#include "session_fixture.hpp"

#include <algorithm>
#include <cmath>
#include <random>

using namespace fixture;

// What the rule says in words, tried for every number of drafts.
TEST(a_rule_verifies_what_pays_most) {
    std::mt19937 rng(7);
    std::uniform_real_distribution<float> chance(0.0f, 1.0f);
    for (int trial = 0; trial < 2000; ++trial) {
        mtp_rule   rule = constant_rule(6, 0);
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
}

TEST(a_class_counts_the_bounds_that_are_reached) {
    const float bounds[] = { 0.2f, 0.35f, 0.5f, 0.65f, 0.8f, 0.9f, 0.96f };
    CHECK(mtp::class_of(bounds, 0.0f) == 0);
    CHECK(mtp::class_of(bounds, 0.19f) == 0);
    CHECK(mtp::class_of(bounds, 0.2f) == 1);
    CHECK(mtp::class_of(bounds, 0.9599f) == 6);
    CHECK(mtp::class_of(bounds, 0.96f) == 7);
    CHECK(mtp::class_of(bounds, 1.0f) == 7);
    CHECK(mtp::class_of(bounds, NAN) == 0);
}

// Drafts that are only looked at cost a draft step and no row, and every one of them gets a verdict.
TEST(a_look_has_a_verdict_and_no_row) {
    for (const options & o : kinds()) {
        host       h(o);
        generation g(h, h.open(), prompt_of(5), 0, 120);
        h.wrong.assign(200, false);
        for (size_t i = 0; i < h.wrong.size(); i += 3) {
            h.wrong[i] = true;
        }
        mtp_rule look = constant_rule(1, 0);
        look.price[1] = INFINITY;
        g.rule        = &look;
        while (g.text.size() < 100) {
            const int32_t pos = static_cast<int32_t>(g.text.size());
            g.run(pos + 1);
            CHECK(g.step.n_drafted == 0);
            CHECK(g.step.n_picks == 1);
            CHECK(g.step.n_sampled == 1);
            CHECK(g.step.spare == (h.wrong[pos] ? 0 : 1));
        }
        mtp_counters c{};
        mtp_session_counters(g.s, &c);
        CHECK(c.n_draft_decodes == o.n_heads * c.n_target_decodes);
        CHECK(c.n_drafted == 0);  // a chain reads all rows
        mtp_session_close(g.s, 1);
    }
}

TEST(a_rule_stops_where_going_on_does_not_pay) {
    for (const options & o : kinds()) {
        host       h(o);
        generation g(h, h.open(), prompt_of(5), 0, 120);
        mtp_rule   rule = constant_rule(4, 0);
        std::fill(std::begin(rule.accept), std::end(rule.accept), 0.5f);
        rule.go[1] = 0.5f;   // one right in two is reached here ...
        rule.go[2] = 0.26f;  // ... and one in four is not
        g.rule     = &rule;
        g.run(50);
        mtp_counters c{};
        mtp_session_counters(g.s, &c);
        CHECK(g.step.n_picks == 2);
        CHECK(g.step.n_drafted == 2);
        CHECK(c.n_draft_decodes == std::max(2, o.n_heads) * c.n_target_decodes);
        rule.price[2] = 1.0f;  // the second brings a quarter
        g.run(80);
        CHECK(g.step.n_picks == 2);
        CHECK(g.step.n_drafted == 1);
        g.run(static_cast<int32_t>(g.text.size()) + g.step.rows_left);
        CHECK(g.step.spare == 1);  // all drafts of the fake are right
        mtp_session_close(g.s, 1);
    }
}
