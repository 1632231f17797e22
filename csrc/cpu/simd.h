// Vectors of floats, in the vector extensions that GCC and Clang share: one source for every instruction set.
//
// A translation unit defines ATMAN_ISA, the namespace of everything it compiles, and ATMAN_LANES, floats per vector,
// before it includes this file.

#pragma once

#include <cstdint>
#include <cstring>

#include "../suppression.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace atman::cpu::ATMAN_ISA {

constexpr int kLanes = ATMAN_LANES;
typedef float Vec __attribute__((vector_size(4 * ATMAN_LANES)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * ATMAN_LANES)));
typedef std::uint32_t BitVec __attribute__((vector_size(4 * ATMAN_LANES)));
typedef std::uint16_t HalfVec __attribute__((vector_size(2 * ATMAN_LANES)));

ATMAN_INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0 is x; 0 + x would turn -0 into 0

ATMAN_INLINE Vec load(const float* from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

ATMAN_INLINE void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

ATMAN_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
ATMAN_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }

ATMAN_INLINE IntVec lane_numbers() {
    IntVec x;
    for (int i = 0; i < kLanes; ++i) x[i] = i;
    return x;
}

template <int kCount>
struct Lanes {
    typedef float type __attribute__((vector_size(4 * kCount)));
};

// Folds a vector in halves, so the order is the same wherever vectors have this length.
template <int kCount, class Combine>
ATMAN_INLINE float fold(typename Lanes<kCount>::type x, Combine combine) {
    if constexpr (kCount == 1) {
        return x[0];
    } else {
        typename Lanes<kCount / 2>::type half[2];
        std::memcpy(half, &x, sizeof x);
        return fold<kCount / 2>(combine(half[0], half[1]), combine);
    }
}

ATMAN_INLINE float total(Vec x) {
    return fold<kLanes>(x, [](auto a, auto b) { return a + b; });
}
ATMAN_INLINE float largest(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    return fold<kLanes>(x, [](auto a, auto b) { return a > b ? a : b; });
#endif
}
// Whether some lane is larger; a NaN is not.
ATMAN_INLINE bool exceeds(Vec x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
    return largest(x) > limit;
#endif
}
ATMAN_INLINE float smallest(Vec x) {
    return fold<kLanes>(x, [](auto a, auto b) { return a < b ? a : b; });
}

// from[index .. index + kLanes), 0 where that is outside [0, size)
ATMAN_INLINE Vec load_within(const float* from, std::int64_t index, std::int64_t size) {
    if (index >= 0 && index + kLanes <= size) return load(from + index);
    Vec x{};
    for (int i = 0; i < kLanes; ++i)
        if (index + i >= 0 && index + i < size) x[i] = from[index + i];
    return x;
}

constexpr float kPerLn2 = 1.44269504f;  // 1 / ln 2

// 2^x within 2 ulp for x < 128; 0 below -126, or where floats end. x is split as n + r, |r| <= 1/2; the polynomial for
// 2^r has the smallest largest relative error (2e-7) of its degree.
ATMAN_INLINE Vec exponential2(Vec x) {
#if defined(__AVX512DQ__)
    const Vec r = (Vec)_mm512_reduce_ps((__m512)x, 0);  // 0 of -inf
#else
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the lowest bits
    const Vec shifted = x + magic;
    const Vec r = x - (shifted - magic);
#endif
    Vec p = r * 1.3276472454890609e-3f + 9.675541892647743e-3f;
    p = p * r + 5.550713092088699e-2f;
    p = p * r + 2.4022120237350464e-1f;
    p = p * r + 6.931469440460205e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512DQ__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)(x - r));
#else
    const Vec power = (Vec)(((BitVec)shifted + 127u) << 23);  // 2^n
    return x < -126.0f ? Vec{} : p * power;                   // -inf has become NaN on the way; a NaN stays one
#endif
}

// tanh within 3 ulp; the coefficients are those of tanhf in the Cephes library
ATMAN_INLINE Vec hyperbolic_tangent(Vec x) {
    const Vec size = x < 0.0f ? -x : x;
    // small arguments: an odd polynomial; 1 - 2 / (e^2x + 1) would cancel there
    const Vec z = x * x;
    Vec p = z * -5.70498872e-3f + 2.06390887e-2f;
    p = p * z - 5.37397155e-2f;
    p = p * z + 1.33314422e-1f;
    p = p * z - 3.33332819e-1f;
    const Vec small = p * z * x + x;
    const Vec capped = size > 10.0f ? splat(10.0f) : size;
    const Vec large = 1.0f - 2.0f / (exponential2(capped * (2.0f * kPerLn2)) + 1.0f);
    const Vec with_sign = x < 0.0f ? -large : large;
    return size >= 0.625f ? with_sign : small;  // of a NaN: small, a NaN
}

// --- 16-bit floats ---

ATMAN_INLINE float from_bfloat16(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Round to nearest even; a NaN stays one.
ATMAN_INLINE std::uint16_t to_bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
    return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__F16C__)
ATMAN_INLINE float from_float16(std::uint16_t x) { return _cvtsh_ss(x); }
ATMAN_INLINE std::uint16_t to_float16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
ATMAN_INLINE float from_float16(std::uint16_t x) {
    const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000) << 16, rest = x & 0x7fff;
    std::uint32_t bits = rest << 13;
    float result;
    if (rest >= 0x7c00) {
        bits += 0x70000000;  // infinity and NaN: all ones in the exponent
    } else if (rest >= 0x0400) {
        bits += 0x38000000;  // 15 -> 127 as the exponent's bias
    } else {                 // subnormal: rest * 2^-24
        result = static_cast<float>(rest) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &result, sizeof bits);
    }
    bits |= sign;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

ATMAN_INLINE std::uint16_t to_float16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7e00);   // NaN
    if (size >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);  // rounds to 65536 or is infinite
    if (size < 0x38800000) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
        float rounded;
        std::memcpy(&rounded, &size, sizeof rounded);
        rounded += 0.5f;
        std::memcpy(&bits, &rounded, sizeof bits);
        return static_cast<std::uint16_t>(sign | (bits - 0x3f000000));
    }
    return static_cast<std::uint16_t>(sign | ((size - 0x38000000 + 0x0fff + ((size >> 13) & 1)) >> 13));
}
#endif

}  // namespace atman::cpu::ATMAN_ISA
