// Vocabulary: whether two models mean the same by a token id.
#pragma once

#include "host_api.hpp"

#include <string>

namespace mtp {

// Empty when both have the same tokens, else one sentence on where they part.
std::string compare_vocabularies(const host_api & api, const void * a, const void * b);

}  // namespace mtp
