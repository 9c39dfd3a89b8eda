// Vocabulary: whether two models mean the same by a token id, and which id of the one is which of the other.
#pragma once

#include "host_api.hpp"

#include <string>
#include <vector>

namespace mtp {

// Empty when both have the same tokens, else one sentence on where they part. With tokens (n_tokens of them, or NULL)
// token i of b has to be token tokens[i] of a.
std::string compare_vocabularies(const host_api & api, const void * a, const void * b, const int32_t * tokens,
                                 int32_t n_tokens);

// The draft context's tokens and the target's. A head reads its whole output matrix for every draft, so one that has
// the frequent tokens only drafts for less; what it lacks it can read, by a stand-in, but not propose. Outside of the
// draft context's batches and picks every token is the target's.
//
// Invariant: to_draft(to_target(i)) == i for 0 <= i < n_draft().
class token_map {
  public:
    // Throws failure(MTP_INVALID) where the arrays contradict that.
    explicit token_map(const mtp_session_params & params);

    int32_t n_draft() const { return n_draft_; }
    int32_t to_draft(int32_t token) const { return stand_ins_.empty() ? token : stand_ins_[token]; }
    int32_t to_target(int32_t token) const { return tokens_.empty() ? token : tokens_[token]; }

  private:
    int32_t              n_draft_;
    std::vector<int32_t> tokens_, stand_ins_;  // both empty: the same vocabulary
};

}  // namespace mtp
