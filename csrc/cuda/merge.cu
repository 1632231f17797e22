// Partial results over parts of the keys become one: weighted by what each part's softmax denominator is of the whole.

#include "check.h"
#include "elements.h"
#include "kernels.h"
#include "merge.h"

namespace atman::cuda {
namespace {

constexpr int kWarps = 4;

// One warp per row and head; `rows` counts both.
template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    merge_rows(AttentionParams p, int splits, std::int64_t rows, const float* partial, const float* partial_lse) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (row >= rows) return;
    Merge merge;
    for (int s = 0; s < splits; ++s) merge.include(partial_lse[s * rows + row]);
    const std::int64_t head = row / p.rows % p.query_heads;
    const SoftmaxEnd end =
        p.sinks ? finish_softmax(merge.maximum, merge.sum, p.sinks[head]) : finish_softmax(merge.maximum, merge.sum);
    if (p.lse && threadIdx.x % 32 == 0) p.lse[row] = end.lse;
    T* output = static_cast<T*>(p.output) + row * p.value_dim;
    for (std::int64_t d = threadIdx.x % 32; d < p.value_dim; d += 32) {
        float total = 0.0f;
        for (int s = 0; s < splits; ++s) {
            const float weight = merge.weight(partial_lse[s * rows + row]);
            if (weight != 0.0f) total += weight * partial[(s * rows + row) * p.value_dim + d];
        }
        output[d] = from_float<T>(total * end.weight);
    }
}

}  // namespace

void merge_splits(const AttentionParams& p, const Launch& launch) {
    const std::int64_t rows = p.batch * p.query_heads * p.rows;
    const auto blocks = static_cast<unsigned>(divide_up(rows, kWarps));
    const auto* partial = launch.at<const float>(launch.space.partial);
    const auto* lse = launch.at<const float>(launch.space.partial_lse);
    if (p.dtype == DType::bfloat16)
        merge_rows<__nv_bfloat16><<<blocks, kWarps * 32, 0, launch.stream>>>(p, launch.splits, rows, partial, lse);
    else merge_rows<__half><<<blocks, kWarps * 32, 0, launch.stream>>>(p, launch.splits, rows, partial, lse);
    check_launch("merge_rows");
}

}  // namespace atman::cuda
