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

inline uint8_t class_of(const float (&bounds)[MTP_CLASSES - 1], float p) {
    return static_cast<uint8_t>(std::count_if(std::begin(bounds), std::end(bounds), [p](float b) { return p >= b; }));
}

inline float accept_of(const mtp_rule & rule, int32_t position, uint8_t klass) {
    return rule.accept[position * MTP_CLASSES + klass];
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
