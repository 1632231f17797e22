// Tensor maps, shared memory, grid.

#pragma once

#include "../check.h"
#include "../kernels.h"
#include "kernel.h"

namespace atman::cuda::hopper {

// Of (batch, heads, keys, features), read in boxes of `box_keys` keys and 64 features.
CUtensorMap make_map(DType dtype, const void* data, const Strides& strides, std::int64_t batch, std::int64_t heads,
                     std::int64_t keys, std::int64_t features, int box_keys);

template <class C>
void launch_attend(const AttentionParams& p, const Launch& launch) {
    Maps maps;
    for (int range = 0; range < 2; ++range) {
        // A map of nothing is not allowed; where there are no base keys or no own ones, no block names that map.
        const bool own = p.keys == 0 || (range == 1 && p.variants > 0);
        const std::int64_t batch = own ? 1 : p.key_batch, keys = own ? p.rows : p.keys;
        maps.key[range] = make_map(p.dtype, own ? p.own_key : p.key, own ? p.own_key_strides : p.key_strides, batch,
                                   p.key_heads, keys, p.head_dim, C::kKeys);
        maps.value[range] = make_map(p.dtype, own ? p.own_value : p.value, own ? p.own_value_strides : p.value_strides,
                                     batch, p.key_heads, keys, p.value_dim, C::kKeys);
    }
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
    check(cudaFuncSetAttribute(attend<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory of attend");
    const auto blocks = static_cast<unsigned>(smaller(items, launch.multiprocessors));
    attend<C><<<blocks, kThreads, shared, launch.stream>>>(params, maps);
    check_launch("attend");
}

// One instantiation per file.
template <class T, int kDim>
void attend_instance(const AttentionParams& params, const Launch& launch);

}  // namespace atman::cuda::hopper
