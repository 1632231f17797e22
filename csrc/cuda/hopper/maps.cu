// How TMA is told of a tensor.

#include "launch.h"

namespace atman::cuda::hopper {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Asked of the driver at run time, so that nothing has to be linked.
Encode find_encode() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
    if (status != cudaDriverEntryPointSuccess || !found)
        throw std::runtime_error("cuTensorMapEncodeTiled: the driver does not have it");
    return reinterpret_cast<Encode>(found);
}

}  // namespace

CUtensorMap make_map(DType dtype, const void* data, const Strides& strides, std::int64_t batch, std::int64_t heads,
                     std::int64_t keys, std::int64_t features, int box_keys) {
    static const Encode encode = find_encode();
    const auto bytes = [](std::int64_t stride, std::int64_t size) {  // the stride of one element means nothing
        return static_cast<cuuint64_t>(size > 1 ? stride * 2 : 16);
    };
    const cuuint64_t shape[] = {static_cast<cuuint64_t>(features), static_cast<cuuint64_t>(keys),
                                static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
    const cuuint64_t steps[] = {bytes(strides.row, keys), bytes(strides.head, heads), bytes(strides.batch, batch)};
    const cuuint32_t box[] = {kSlab, static_cast<cuuint32_t>(box_keys), 1, 1}, every[] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult result = encode(
        &map, dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
        const_cast<void*>(data), shape, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
    return map;
}

}  // namespace atman::cuda::hopper
