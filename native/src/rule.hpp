// Rule: how far a round drafts, and how much of it is verified. The caller's expectations and prices, applied pick by pick.
#pragma once

#include "llama_mtp.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

namespace mtp {

struct picks {
    std::vector<int32_t> tokens;
    std::vector<uint8_t> classes;  // of confidence, one per token

    int32_t size() const { return static_cast<int32_t>(tokens.size()); }
};

inline uint8_t class_of(float p) {
    constexpr float bounds[] = { 0.2f, 0.35f, 0.5f, 0.65f, 0.8f, 0.9f, 0.96f };
    static_assert(std::size(bounds) == MTP_CLASSES - 1, "one bound between two classes");
    return static_cast<uint8_t>(std::upper_bound(std::begin(bounds), std::end(bounds), p) - std::begin(bounds));
}

inline float accept_of(const mtp_rule & rule, int32_t position, uint8_t klass) {
    return rule.accept[position * MTP_CLASSES + klass];
}

// Drafts and verifies depth tokens, whatever they promise.
inline mtp_rule constant_rule(int32_t depth, float p_min) {
    mtp_rule rule{};
    rule.depth = depth;
    rule.p_min = p_min;
    return rule;  // no price, and go[k] = 0 is always reached
}

// How many of the drafts to verify.
inline int32_t verified(const mtp_rule & rule, const picks & drafts) {
    int32_t best  = 0;
    float   value = -rule.price[0], chance = 1.0f, total = 0.0f;
    for (int32_t k = 0; k < drafts.size(); ++k) {
        chance *= accept_of(rule, k, drafts.classes[k]);
        total += chance;
        if (total - rule.price[k + 1] >= value) {
            best  = k + 1;
            value = total - rule.price[best];
        }
    }
    return best;
}

}  // namespace mtp
