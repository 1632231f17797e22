// The keys of each tile: a warp per tile, whose lanes look at different rows. A model of the warp can stand in (checks/).

#pragma once

#include "plan.h"

namespace atman::cuda {

constexpr int kDescribeThreads = 256;

__device__ __forceinline__ TileKeys keys_of_lane(const TileKeys& keys, int distance) {
    TileKeys other;
    for (int range = 0; range < 2; ++range) {
        other.first[range] = __shfl_xor_sync(0xffffffffu, keys.first[range], distance);
        other.last[range] = __shfl_xor_sync(0xffffffffu, keys.last[range], distance);
        other.all_first[range] = __shfl_xor_sync(0xffffffffu, keys.all_first[range], distance);
        other.all_last[range] = __shfl_xor_sync(0xffffffffu, keys.all_last[range], distance);
    }
    return other;
}

__global__ void __launch_bounds__(kDescribeThreads) describe_tiles(AttentionParams p, TileKeys* tiles) {
    const std::int64_t tile = (static_cast<std::int64_t>(blockIdx.x) * kDescribeThreads + threadIdx.x) / 32;
    if (tile >= count_tiles(p)) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    TileKeys keys = describe_tile(p, tile, lane, 32);
    for (int distance = 16; distance > 0; distance /= 2) include_keys(keys, keys_of_lane(keys, distance));
    if (lane == 0) tiles[tile] = keys;
}

}  // namespace atman::cuda
