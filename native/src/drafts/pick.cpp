#include "pick.hpp"

#include "../rule.hpp"

#include <algorithm>
#include <cmath>

namespace mtp {

namespace {

constexpr int     n_top   = 10;  // as llama.cpp: p is a softmax over the ten best, not over the vocabulary
constexpr int32_t n_block = 64;  // logits that are looked at together

// Whether any of the logits is above the bar; written so that a compiler makes it vector code.
bool any_above(const float * x, int32_t n, float bar) {
    int32_t found = 0;
    for (int32_t i = 0; i < n; ++i) {
        found |= x[i] > bar ? 1 : 0;
    }
    return found != 0;
}

}  // namespace

void picker::attach() {
    if (params_.confidence != 0 || params_.all_outputs != 0) {  // a device chain takes one output at a time
        return;
    }
    chain_.reset(api_.chain_init(api_.chain_default_params()));
    void * greedy = chain_ ? api_.init_greedy() : nullptr;
    if (greedy != nullptr) {
        api_.chain_add(chain_.get(), greedy);
        on_device_ = api_.set_sampler(params_.draft, 0, chain_.get());
    }
}

void picker::detach() {
    if (chain_) {
        api_.set_sampler(params_.draft, 0, nullptr);
    }
}

pick picker::from_device(int32_t row) const {
    return { api_.get_sampled_token_ith(params_.draft, row), 1.0f, 0 };
}

pick picker::from_logits(int32_t row, int32_t n_vocab) const {
    const float * logits = api_.get_logits_ith(params_.draft, row);
    if (logits == nullptr) {
        return { -1, 0.0f, 0 };
    }
    // The ten best by insertion. Most blocks hold none of them and take one look.
    float   best[n_top];
    int32_t best_token = -1;
    int     n          = 0;
    for (int32_t start = 0; start < n_vocab; start += n_block) {
        const int32_t end = std::min(start + n_block, n_vocab);
        if (n == n_top && !any_above(logits + start, end - start, best[n_top - 1])) {
            continue;
        }
        for (int32_t i = start; i < end; ++i) {
            const float x = logits[i];
            if (n == n_top && !(x > best[n_top - 1])) {
                continue;
            }
            int k = n < n_top ? n++ : n_top - 1;
            for (; k > 0 && x > best[k - 1]; --k) {
                best[k] = best[k - 1];
            }
            best[k] = x;
            if (k == 0) {
                best_token = i;
            }
        }
    }
    float sum = 0.0f;
    for (int k = 0; k < n; ++k) {
        sum += std::exp(best[k] - best[0]);
    }
    const float p = sum >= 1.0f ? 1.0f / sum : 0.0f;  // the best counts 1, unless logits are infinite or no numbers
    return { best_token, p, class_of(params_.class_bounds, p) };
}

}  // namespace mtp
