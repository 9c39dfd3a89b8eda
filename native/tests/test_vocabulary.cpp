// Two vocabularies are compared token by token.
#include "session_fixture.hpp"

#include <cstring>
#include <string>

using namespace fixture;

TEST(vocabularies_are_compared_by_content) {
    const auto                     f = host::functions();
    const auto                     n = static_cast<int32_t>(f.size());
    const auto                     l = host::layout();
    const std::vector<std::string> words{ "one", "two", "three" };
    char                           text[128];
    const auto compare = [&](const std::vector<std::string> & other) {
        text[0] = 0;
        return mtp_compare_vocabularies(f.data(), n, &l, &words, &other, nullptr, 0, text, sizeof text);
    };
    CHECK(compare({ "one", "two", "three" }) == MTP_OK && text[0] == 0);
    CHECK(compare({ "one", "two" }) == MTP_INVALID);
    CHECK(std::strstr(text, "3 tokens, the other 2"));
    CHECK(compare({ "one", "tow", "three" }) == MTP_INVALID);
    CHECK(std::strstr(text, "token 1 ('two' and 'tow')"));
    CHECK(compare({ "one", "?", "three" }) == MTP_INVALID);  // the host has no text for it
    CHECK(mtp_compare_vocabularies(f.data(), n, &l, &words, nullptr, nullptr, 0, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_compare_vocabularies(f.data(), n, &l, &words, nullptr, nullptr, 0, nullptr, 0) == MTP_INVALID);
    CHECK(mtp_compare_vocabularies(nullptr, n, &l, &words, &words, nullptr, 0, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_compare_vocabularies(f.data(), n - 1, &l, &words, &words, nullptr, 0, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_compare_vocabularies(f.data(), n, nullptr, &words, &words, nullptr, 0, text, sizeof text) == MTP_INVALID);
    const auto pick = [&](const std::vector<std::string> & other, std::vector<int32_t> tokens) {
        return mtp_compare_vocabularies(f.data(), n, &l, &words, &other, tokens.data(), static_cast<int32_t>(tokens.size()), text,
                                        sizeof text);
    };
    CHECK(pick({ "three", "one" }, { 2, 0 }) == MTP_OK);
    CHECK(pick({ "three" }, { 2 }) == MTP_OK);  // alone it has other attributes
    CHECK(pick({ "three", "one" }, { 2, 1 }) == MTP_INVALID);
    CHECK(std::strstr(text, "token 1 ('two' and 'one')"));
    CHECK(pick({ "three" }, { 2, 0 }) == MTP_INVALID);
    CHECK(std::strstr(text, "2 tokens, the other 1"));
    CHECK(pick({ "three" }, { 3 }) == MTP_INVALID && pick({ "three" }, { -1 }) == MTP_INVALID);
}
