// A test registers itself by its name; a check that fails ends its test and says where, what, and with which values.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <type_traits>

#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wparentheses"   // CHECK(a == b) becomes first_of{} << a == b
#pragma GCC diagnostic ignored "-Wsign-compare"  // and a literal becomes a variable on the way
#endif

namespace test {

struct failed {};

// The values of the first comparison of this thread's check, where it is false.
extern thread_local std::string values;

// Counts the failure, then throws: it counts even if the engine swallows what the fake host throws.
[[noreturn]] void fail(const char * file, int line, const char * condition);

// The n-th allocation of this thread from now on fails, outside of the fake host; 0: none.
extern thread_local int64_t failing_allocation;

// While it lives nothing fails for want of memory.
struct memory_for_all {
    memory_for_all() : left(failing_allocation) { failing_allocation = 0; }
    ~memory_for_all() { failing_allocation = left; }
    const int64_t left;
};

struct registration {
    registration(const char * name, void (*function)());
};

template <typename T> std::string text_of(const T & value) {
    std::ostringstream out;
    if constexpr (std::is_enum_v<T>) {
        out << static_cast<long long>(value);
    } else if constexpr (std::is_arithmetic_v<T>) {
        out << +value;  // a byte as a number
    } else if constexpr (std::is_null_pointer_v<T>) {
        out << "NULL";
    } else if constexpr (std::is_convertible_v<T, std::string>) {
        out << '"' << std::string(value) << '"';
    } else {
        out << "...";
    }
    return out.str();
}

template <typename A, typename B> bool compared(bool right, const A & a, const char * sign, const B & b) {
    if (!right) {
        values = text_of(a) + sign + text_of(b);
    }
    return right;
}

template <typename A> struct operand {
    const A & a;

    explicit operator bool() const { return static_cast<bool>(a); }
    template <typename B> bool operator==(const B & b) const { return compared(a == b, a, " == ", b); }
    template <typename B> bool operator!=(const B & b) const { return compared(a != b, a, " != ", b); }
    template <typename B> bool operator<(const B & b) const { return compared(a < b, a, " < ", b); }
    template <typename B> bool operator<=(const B & b) const { return compared(a <= b, a, " <= ", b); }
    template <typename B> bool operator>(const B & b) const { return compared(a > b, a, " > ", b); }
    template <typename B> bool operator>=(const B & b) const { return compared(a >= b, a, " >= ", b); }
};

struct first_of {
    template <typename A> operand<A> operator<<(const A & a) const { return { a }; }
};

}  // namespace test

#define TEST(name)                                                        \
    static void                     name();                               \
    static const test::registration name##_is_registered(#name, name);    \
    static void                     name()

#define CHECK(...)                                                        \
    do {                                                                  \
        if (!(test::first_of{} << __VA_ARGS__)) {                         \
            test::fail(__FILE__, __LINE__, #__VA_ARGS__);                 \
        }                                                                 \
        test::values.clear();                                             \
    } while (0)
