// Runs all tests, or those whose name contains the argument.
#include "test.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <utility>
#include <vector>

namespace test {

namespace {

std::vector<std::pair<const char *, void (*)()>> & all() {
    static std::vector<std::pair<const char *, void (*)()>> tests;
    return tests;
}

int n_failures = 0;

}  // namespace

thread_local std::string values;
thread_local int64_t     failing_allocation = 0;

registration::registration(const char * name, void (*function)()) {
    all().emplace_back(name, function);
}

void fail(const char * file, int line, const char * condition) {
    ++n_failures;
    std::printf("%s:%d: %s%s%s\n", file, line, condition, values.empty() ? "" : ", with ", values.c_str());
    std::fflush(stdout);  // a check in a destructor ends the program here
    values.clear();
    throw failed{};
}

// True when no check failed, neither in the test nor inside the host's functions that the engine called.
static bool passes(void (*function)()) {
    n_failures = 0;
    try {
        function();
    } catch (const failed &) {
    } catch (const std::exception & e) {
        ++n_failures;
        std::printf("an exception left the test: %s\n", e.what());
    }
    return n_failures == 0;
}

}  // namespace test

void * operator new(size_t n) {
    if (test::failing_allocation > 0 && --test::failing_allocation == 0) {
        throw std::bad_alloc();
    }
    if (void * p = std::malloc(std::max<size_t>(n, 1))) {
        return p;
    }
    throw std::bad_alloc();
}

void operator delete(void * p) noexcept {
    std::free(p);
}

void operator delete(void * p, size_t) noexcept {
    std::free(p);
}

int main(int argc, char ** argv) {
    int n_passed = 0, n_failed = 0;
    for (const auto & [name, function] : test::all()) {
        if (argc > 1 && std::string(name).find(argv[1]) == std::string::npos) {
            continue;
        }
        std::printf("%s\n", name);
        std::fflush(stdout);
        ++(test::passes(function) ? n_passed : n_failed);
    }
    std::printf("%d passed, %d failed\n", n_passed, n_failed);
    std::fflush(stdout);
    if (n_failed > 0 || n_passed == 0) {
        std::_Exit(1);  // not through the leak check: a test that ended early closed no session
    }
    return 0;
}
