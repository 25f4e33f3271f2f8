// Elements of four types as the float32 that the arithmetic is done in, a strip at a time.

#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define UNALIASED __restrict__

namespace lfq {
namespace {

constexpr int STRIP = 256;  // elements of other dtypes that are converted at a time

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

INLINE uint32_t bits_of(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
INLINE float float_of(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }

INLINE float load(float v) { return v; }
INLINE float load(double v) { return static_cast<float>(v); }
INLINE float load(BFloat v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
INLINE float load(Half v) {
    const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
    const float scaled = float_of(magnitude) * 0x1p112f;                   // exact, subnormals included
    return float_of(bits_of(scaled) | special | static_cast<uint32_t>(v.bits & 0x8000u) << 16);
}

INLINE void store(float& to, float v) { to = v; }
INLINE void store(double& to, float v) { to = static_cast<double>(v); }
// The low 16 bits of a word. NaN is not looked for in BFloat: all that can reach here has a payload of at most 7 bits,
// which rounding leaves alone.
template <typename T>
uint32_t encoded(float v);
template <>
INLINE uint32_t encoded<BFloat>(float v) { return (bits_of(v) + 0x7fffu + ((bits_of(v) >> 16) & 1u)) >> 16; }
template <>
INLINE uint32_t encoded<Half>(float v) {
    const uint32_t sign = bits_of(v) & 0x80000000u;
    const int32_t u = static_cast<int32_t>(bits_of(v) ^ sign);  // signed: vectors compare no other integers
    const int32_t subnormal = static_cast<int32_t>(bits_of(float_of(u) + 0.5f)) - 0x3f000000;  // rounds to 2^-24
    const int32_t normal = (u - 0x37fff001 + ((u >> 13) & 1)) >> 13;
    const int32_t special = u > 0x7f800000 ? 0x7e00 : 0x7c00;
    const int32_t finite = u < 0x38800000 ? subnormal : normal;
    return static_cast<uint32_t>(u >= 0x47800000 ? special : finite) | sign >> 16;
}
INLINE void store(BFloat& to, float v) { to.bits = static_cast<uint16_t>(encoded<BFloat>(v)); }
INLINE void store(Half& to, float v) { to.bits = static_cast<uint16_t>(encoded<Half>(v)); }

// ---- strips ---------------------------------------------------------------------------------------------------------

// Strips of `n` elements as float32: in place, or converted in loops of their own, which vectorise where one loop over
// two widths would not.
template <typename T>
struct Strip {
    float space[STRIP];
    INLINE const float* read(const T* from, int n) {
        for (int j = 0; j < n; ++j) space[j] = load(from[j]);
        return space;
    }
    INLINE float* target(T*) { return space; }
    INLINE void write(T* to, int n) const {
        for (int j = 0; j < n; ++j) store(to[j], space[j]);
    }
};
template <>
struct Strip<float> {
    INLINE const float* read(const float* from, int) { return from; }
    INLINE float* target(float* to) { return to; }
    INLINE void write(float*, int) const {}
};

// Strips of 16-bit elements in another order, two neighbours as one word, so that none is moved to another lane.
template <typename T>
struct Pairs {
    float space[STRIP];
    INLINE const float* read(const T* from, int n) {
        const int half = n / 2;
        for (int j = 0; j < half; ++j) {
            uint32_t pair;
            std::memcpy(&pair, from + 2 * j, 4);
            space[j] = load(T{static_cast<uint16_t>(pair)});
            space[half + j] = load(T{static_cast<uint16_t>(pair >> 16)});
        }
        if (n % 2) space[n - 1] = load(from[n - 1]);
        return space;
    }
    INLINE float* target(T*) { return space; }
    INLINE void write(T* to, int n) const {
        const int half = n / 2;
        for (int j = 0; j < half; ++j) {
            const uint32_t pair = encoded<T>(space[j]) | encoded<T>(space[half + j]) << 16;
            std::memcpy(to + 2 * j, &pair, 4);
        }
        if (n % 2) store(to[n - 1], space[n - 1]);
    }
};

// Strips whose elements may come in any order, which those of a run may.
template <typename T>
struct Unordered : Strip<T> {};
template <>
struct Unordered<Half> : Pairs<Half> {};
template <>
struct Unordered<BFloat> : Pairs<BFloat> {};

}  // namespace
}  // namespace lfq
