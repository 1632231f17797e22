// What the attention kernel looks up instead of working it out per block: the keys of each tile, the order of the
// tiles, and which factors are 1.

#include "check.h"
#include "describe_tiles.h"
#include "kernels.h"

namespace atman::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kOrderThreads = 1024;
constexpr int kBuckets = 256;

__device__ int bucket_of(const TileKeys& keys, std::int32_t most) {  // 0: the most work
    return kBuckets - 1 - static_cast<int>(static_cast<std::int64_t>(visited(keys)) * (kBuckets - 1) / most);
}

// Tiles with much work come first, by a counting sort. One thread block.
__global__ void __launch_bounds__(kOrderThreads) order_tiles(const TileKeys* tiles, std::int32_t* order, int count) {
    __shared__ std::int32_t most, starts[kBuckets];
    if (threadIdx.x == 0) most = 1;
    for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) starts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) atomicMax(&most, visited(tiles[i]));
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) atomicAdd(&starts[bucket_of(tiles[i], most)], 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        std::int32_t sum = 0;
        for (std::int32_t& start : starts) {
            const std::int32_t in_bucket = start;
            start = sum;
            sum += in_bucket;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) order[atomicAdd(&starts[bucket_of(tiles[i], most)], 1)] = i;
}

// One warp per word of 64 flags: lanes look at neighbouring factors, the warp votes.
__global__ void flag_factors(AttentionParams p, std::int64_t words, std::uint64_t* flags) {
    const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (warp >= words) return;
    const std::int64_t line = warp / flag_words(p), word = warp % flag_words(p);
    const float* factor =
        p.factor + line / p.factor_heads * p.factor_strides.batch + line % p.factor_heads * p.factor_strides.head;
    std::uint64_t bits = 0;
    for (int flag = 0; flag < 64; ++flag) {
        const std::int64_t at = (word * 64 + flag) * kFlagKeys + threadIdx.x % 32;
        bool touched = false;
        for (int i = 0; i < kFlagKeys; i += 32) touched |= at + i < p.factor_keys && factor[at + i] != 1.0f;
        if (__any_sync(0xffffffffu, touched)) bits |= std::uint64_t{1} << flag;
    }
    if (threadIdx.x % 32 == 0) flags[warp] = bits;
}

}  // namespace

void make_plan(const AttentionParams& p, const Launch& launch) {
    const std::int64_t tiles = count_tiles(p);
    auto* keys = launch.at<TileKeys>(launch.space.tiles);
    const auto blocks = static_cast<unsigned>(divide_up(tiles * 32, kDescribeThreads));
    describe_tiles<<<blocks, kDescribeThreads, 0, launch.stream>>>(p, keys);
    check_launch("describe_tiles");
    order_tiles<<<1, kOrderThreads, 0, launch.stream>>>(keys, launch.at<std::int32_t>(launch.space.order),
                                                        static_cast<int>(tiles));
    check_launch("order_tiles");
    if (!p.factor) return;
    const std::int64_t words = (p.variants ? p.variants : p.batch) * p.factor_heads * flag_words(p);
    flag_factors<<<static_cast<unsigned>(divide_up(words * 32, kThreads)), kThreads, 0, launch.stream>>>(
        p, words, launch.at<std::uint64_t>(launch.space.flags));
    check_launch("flag_factors");
}

}  // namespace atman::cuda
