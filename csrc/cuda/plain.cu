// Launches of the plain kernel.

#include "plain.h"

#include "check.h"
#include "kernels.h"

namespace atman::cuda {

void attend_plain(const AttentionParams& p, const Launch& launch) {
    const auto blocks = static_cast<unsigned>(divide_up(p.batch * p.query_heads * p.rows, plain::kWarps));
    const auto shared = static_cast<std::size_t>(plain::kWarps * (p.head_dim + p.value_dim)) * sizeof(float);
    if (p.dtype == DType::bfloat16)
        plain::attend_rows<__nv_bfloat16><<<blocks, plain::kWarps * 32, shared, launch.stream>>>(p);
    else plain::attend_rows<__half><<<blocks, plain::kWarps * 32, shared, launch.stream>>>(p);
    check_launch("attend_rows");
}

bool has_code() {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, plain::attend_rows<__half>);
    if (status == cudaSuccess) return true;
    cudaGetLastError();  // it is answered here
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) return false;
    check(status, "cudaFuncGetAttributes");
    return false;
}

}  // namespace atman::cuda
