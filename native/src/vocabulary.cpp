#include "vocabulary.hpp"

#include <cstring>

namespace mtp {

std::string compare_vocabularies(const host_api & api, const void * a, const void * b, const int32_t * tokens,
                                 int32_t n_tokens) {
    const int32_t n = api.vocab_n_tokens(a), n_other = api.vocab_n_tokens(b);
    if (n_other != (tokens != nullptr ? n_tokens : n)) {
        return "one has " + std::to_string(tokens != nullptr ? n_tokens : n) + " tokens, the other " +
               std::to_string(n_other);
    }
    for (int32_t i = 0; i < n_other; ++i) {
        const int32_t token = tokens != nullptr ? tokens[i] : i;
        if (token < 0 || token >= n) {
            return "token " + std::to_string(i) + " of the one is none of the other's";
        }
        const char * text  = api.vocab_get_text(a, token);
        const char * other = api.vocab_get_text(b, i);
        // The host gives attributes by what else is in a vocabulary: those of a part of it may differ.
        const bool same = tokens != nullptr || api.vocab_get_attr(a, token) == api.vocab_get_attr(b, i);
        if (text == nullptr || other == nullptr || std::strcmp(text, other) != 0 || !same) {
            return "they differ at token " + std::to_string(i) + " ('" + (text ? text : "") + "' and '" +
                   (other ? other : "") + "')";
        }
    }
    return "";
}

token_map::token_map(const mtp_session_params & p) : n_draft_(p.n_vocab) {
    if (p.n_draft_vocab == 0 && p.draft_tokens == nullptr && p.stand_ins == nullptr) {
        return;
    }
    if (p.n_draft_vocab <= 0 || p.n_draft_vocab > p.n_vocab || p.draft_tokens == nullptr || p.stand_ins == nullptr) {
        throw failure(MTP_INVALID, "a draft vocabulary has 1 to n_vocab tokens, and a stand-in for each of the target's");
    }
    n_draft_ = p.n_draft_vocab;
    tokens_.assign(p.draft_tokens, p.draft_tokens + n_draft_);
    stand_ins_.assign(p.stand_ins, p.stand_ins + p.n_vocab);
    for (const int32_t stand_in : stand_ins_) {
        if (stand_in < 0 || stand_in >= n_draft_) {
            throw failure(MTP_INVALID, "a stand-in is outside the draft vocabulary");
        }
    }
    for (int32_t i = 0; i < n_draft_; ++i) {
        if (tokens_[i] < 0 || tokens_[i] >= p.n_vocab || stand_ins_[tokens_[i]] != i) {
            throw failure(MTP_INVALID, "token " + std::to_string(i) + " of the draft vocabulary does not stand for itself");
        }
    }
}

}  // namespace mtp
