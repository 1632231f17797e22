// Tensor maps, shared memory, grid.

#pragma once

#include "../check.h"
#include "../kernels.h"
#include "kernel.h"

namespace atman::cuda::hopper {

CUtensorMap make_map(DType dtype, const Boxes& boxes);

template <class C>
void launch_attend(const AttentionParams& p, const Launch& launch) {
    const Maps maps = make_maps<C>(p, [&](const Boxes& boxes) { return make_map(p.dtype, boxes); });
    const std::int64_t items = count_tiles(p) * p.key_heads * launch.splits;
    const KernelParams params{p,
                              launch.at<const TileKeys>(launch.space.tiles),
                              launch.at<const std::int32_t>(launch.space.order),
                              launch.at<const std::uint64_t>(launch.space.flags),
                              launch.at<float>(launch.space.partial),
                              launch.at<float>(launch.space.partial_lse),
                              launch.splits,
                              static_cast<std::int32_t>(items)};
    constexpr auto shared = static_cast<int>(sizeof(typename C::Shared));
    check(cudaFuncSetAttribute(attend<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "shared memory of attend");
    const auto blocks = static_cast<unsigned>(smaller(items, launch.multiprocessors));
    attend<C><<<blocks, kThreads, shared, launch.stream>>>(params, maps);
    check_launch("attend");
}

// One instantiation per file.
template <class T, int kDim>
void attend_instance(const AttentionParams& params, const Launch& launch);

}  // namespace atman::cuda::hopper
