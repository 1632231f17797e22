// The reference on the device: one warp per query row and head, lanes over keys for the scores and over features for
// the values. Every feature, any head dimension; nothing clever.

#pragma once

#include "elements.h"
#include "plan.h"

namespace atman::cuda::plain {

constexpr int kWarps = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

struct RowTask {
    Row row;
    std::int64_t batch, head, key_head, key_batch;
    const float* query;  // (head_dim,) in shared memory
};

__device__ float warp_max(float x) {
    for (int step = 16; step; step /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, x, step);
        x = !(other <= x) ? other : x;  // NaN gets through
    }
    return x;
}

__device__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

// The score of one key before suppression; -inf in `bias` hides it.
template <class T>
__device__ float score_of(const AttentionParams& p, const RowTask& t, const T* key, std::int64_t position,
                          bool& hidden) {
    float score = 0.0f;
    for (std::int64_t d = 0; d < p.head_dim; ++d) score += t.query[d] * to_float(key[d]);
    score *= p.scale;
    if (p.softcap > 0.0f) score = p.softcap * tanhf(score / p.softcap);
    if (!p.position_bias) return score;
    const float bias = p.position_bias[t.batch * p.bias_strides.batch + t.head * p.bias_strides.head +
                                       t.row.bias_row * p.bias_strides.row + position * p.bias_key_stride];
    hidden |= bias == kNegativeInfinity;
    return hidden ? score : score + bias;
}

__device__ float suppressed(const AttentionParams& p, const RowTask& t, float score, std::int64_t position,
                            float minimum) {
    if (!p.factor) return score;
    const float factor = p.factor[t.row.variant * p.factor_strides.batch + t.head * p.factor_strides.head + position];
    if (p.mode == Mode::log_additive) return suppress_log_additive(score, logf(factor));
    if (p.mode == Mode::multiplicative) return suppress_multiplicative(score, factor);
    return suppress_shifted(score, factor, minimum);
}

// Calls `visit(key index of lane 0, position, score, hidden, values)` for 32 keys at a time, own rows after the base.
template <class T, class Visit>
__device__ void visit_keys(const AttentionParams& p, const RowTask& t, Visit visit) {
    for (int range = 0; range < 2; ++range) {
        const Visible& seen = range ? t.row.own : t.row.base;
        const Strides& ks = range ? p.own_key_strides : p.key_strides;
        const Strides& vs = range ? p.own_value_strides : p.value_strides;
        const std::int64_t batch = range ? 0 : t.key_batch;
        const T* keys = static_cast<const T*>(range ? p.own_key : p.key) + batch * ks.batch + t.key_head * ks.head;
        const T* values =
            static_cast<const T*>(range ? p.own_value : p.value) + batch * vs.batch + t.key_head * vs.head;
        for (std::int64_t first = seen.first; first < seen.last; first += 32) {
            const std::int64_t key = first + threadIdx.x % 32, position = key + seen.to_position;
            bool hidden = key >= seen.last || (p.key_mask && !p.key_mask[t.batch * p.keys + key]);
            const float score = hidden ? 0.0f : score_of(p, t, keys + key * ks.row, position, hidden);
            const int count = static_cast<int>(smaller(32, seen.last - first));
            visit(position, score, hidden, values + first * vs.row, vs.row, count);
        }
    }
}

template <class T>
__device__ void attend_row(const AttentionParams& p, const RowTask& t, float* values_sum) {  // (value_dim,)
    const int lane = threadIdx.x % 32;
    float minimum = -kNegativeInfinity;
    if (p.factor && p.mode == Mode::shifted) {
        visit_keys<T>(p, t, [&](std::int64_t, float score, bool hidden, const T*, std::int64_t, int) {
            if (!hidden && score < minimum) minimum = score;
        });
        minimum = -warp_max(-minimum);
    }
    float maximum = kNegativeInfinity, sum = 0.0f;
    visit_keys<T>(
        p, t, [&](std::int64_t position, float score, bool hidden, const T* values, std::int64_t stride, int count) {
            score = hidden ? kNegativeInfinity : suppressed(p, t, score, position, minimum);
            const float top = warp_max(score);
            float shrink = 1.0f;
            if (!(top <= maximum)) shrink = raise_maximum(maximum, top);
            const float weight = expf(score - (maximum == kNegativeInfinity ? 0.0f : maximum));
            sum = sum * shrink + warp_sum(weight);
            for (std::int64_t d = lane; d < divide_up(p.value_dim, 32) * 32; d += 32) {  // all lanes, for the shuffles
                float total = d < p.value_dim ? values_sum[d] * shrink : 0.0f;
                for (int i = 0; i < count; ++i) {
                    const float w = __shfl_sync(kAllLanes, weight, i);
                    if (d < p.value_dim && w != 0.0f) total += w * to_float(values[i * stride + d]);
                }
                if (d < p.value_dim) values_sum[d] = total;
            }
        });
    const SoftmaxEnd end = p.sinks ? finish_softmax(maximum, sum, p.sinks[t.head]) : finish_softmax(maximum, sum);
    if (p.lse && lane == 0) p.lse[(t.batch * p.query_heads + t.head) * p.rows + t.row.index] = end.lse;
    T* output = static_cast<T*>(p.output) + t.batch * p.output_strides.batch + t.head * p.output_strides.head +
                t.row.index * p.output_strides.row;
    for (std::int64_t d = lane; d < p.value_dim; d += 32) output[d] = from_float<T>(values_sum[d] * end.weight);
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32) attend_rows(AttentionParams p) {
    extern __shared__ float shared[];  // per warp: query (head_dim,), sums of values (value_dim,)
    const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (item >= p.batch * p.query_heads * p.rows) return;  // whole warps; there is no barrier below
    RowTask t;
    t.batch = item / p.rows / p.query_heads;
    t.head = item / p.rows % p.query_heads;
    t.key_head = t.head / group_size(p);
    t.key_batch = p.key_batch > 1 ? t.batch : 0;
    t.row = describe_row(p, t.batch, item % p.rows);
    float* query = shared + threadIdx.x / 32 * (p.head_dim + p.value_dim);
    const T* from = static_cast<const T*>(p.query) + t.batch * p.query_strides.batch + t.head * p.query_strides.head +
                    t.row.index * p.query_strides.row;
    for (std::int64_t d = threadIdx.x % 32; d < p.head_dim; d += 32) query[d] = to_float(from[d]);
    for (std::int64_t d = threadIdx.x % 32; d < p.value_dim; d += 32) query[p.head_dim + d] = 0.0f;
    __syncwarp();
    t.query = query;
    attend_row<T>(p, t, query + p.head_dim);
}

}  // namespace atman::cuda::plain
