#include "vocabulary.hpp"

#include <cstring>

namespace mtp {

std::string compare_vocabularies(const host_api & api, const void * a, const void * b) {
    const int32_t n = api.vocab_n_tokens(a), n_other = api.vocab_n_tokens(b);
    if (n != n_other) {
        return "one has " + std::to_string(n) + " tokens, the other " + std::to_string(n_other);
    }
    for (int32_t i = 0; i < n; ++i) {
        const char * text  = api.vocab_get_text(a, i);
        const char * other = api.vocab_get_text(b, i);
        if (text == nullptr || other == nullptr || std::strcmp(text, other) != 0 ||
            api.vocab_get_attr(a, i) != api.vocab_get_attr(b, i)) {
            return "they differ at token " + std::to_string(i) + " ('" + (text ? text : "") + "' and '" +
                   (other ? other : "") + "')";
        }
    }
    return "";
}

}  // namespace mtp
