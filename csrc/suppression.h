// The suppression transform and the online softmax, each once, for host and device, scalars and vectors.

#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define ATMAN_INLINE static __host__ __device__ __forceinline__
#define ATMAN_INLINE_MEMBER __host__ __device__ __forceinline__
#else
// Always inlined: translation units built for different instruction sets must not share a copy.
#define ATMAN_INLINE static inline __attribute__((always_inline))
#define ATMAN_INLINE_MEMBER inline __attribute__((always_inline))
#endif

namespace atman {

// s + ln c; c = 0 removes the key
template <class F>
ATMAN_INLINE F suppress_log_additive(F score, F log_factor) {
    return score + log_factor;
}

// c * s
template <class F>
ATMAN_INLINE F suppress_multiplicative(F score, F factor) {
    return score * factor;
}

// m + c * (s - m), m the row's smallest visible score; written so that c = 1 gives s bit for bit
template <class F>
ATMAN_INLINE F suppress_shifted(F score, F factor, F row_minimum) {
    return score + (factor - 1.0f) * (score - row_minimum);
}

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Raises a row's running maximum; what was summed so far is to be multiplied by the result.
ATMAN_INLINE float raise_maximum(float& maximum, float candidate) {
    const float before = maximum;
    maximum = candidate;
    return before == kNegativeInfinity ? 0.0f : std::exp(before - candidate);
}

// End of a row: what its weighted values are to be multiplied by, and the log of the softmax denominator.
struct SoftmaxEnd {
    float weight, lse;
};

// `sum` is that of exp(score - maximum): at least 1, or 0 if the row saw nothing. Then weight 0 and lse = -inf.
ATMAN_INLINE SoftmaxEnd finish_softmax(float maximum, float sum) {
    if (sum == 0.0f) return {0.0f, kNegativeInfinity};
    return {1.0f / sum, maximum + std::log(sum)};
}

// The same with a sink: one more score that takes part in the denominator and carries no value.
ATMAN_INLINE SoftmaxEnd finish_softmax(float maximum, float sum, float sink) {
    const float top = maximum > sink ? maximum : sink;
    if (top == kNegativeInfinity) return finish_softmax(maximum, sum);
    const float shrink = maximum == kNegativeInfinity ? 0.0f : std::exp(maximum - top);
    const float total = sum * shrink + std::exp(sink - top);
    return {shrink / total, top + std::log(total)};
}

}  // namespace atman
