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

CUtensorMap make_map(DType dtype, const Boxes& boxes) {
    static const Encode encode = find_encode();
    cuuint64_t sizes[4] = {static_cast<cuuint64_t>(boxes.features)}, steps[3];
    cuuint32_t box[4] = {kSlab};
    const cuuint32_t every[] = {1, 1, 1, 1};
    for (int i = 0; i < 3; ++i) {
        const Boxes::Side& side = boxes.sides[i];
        sizes[i + 1] = static_cast<cuuint64_t>(side.size);
        steps[i] = static_cast<cuuint64_t>(side.size > 1 ? side.stride * 2 : 16);  // the stride of one means nothing
        box[i + 1] = static_cast<cuuint32_t>(side.box);
    }
    CUtensorMap map;
    const CUresult result =
        encode(&map, dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
               const_cast<void*>(boxes.data), sizes, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
    return map;
}

}  // namespace atman::cuda::hopper
