// Which instantiation takes a call.

#include "launch.h"

namespace atman::cuda {
namespace hopper {
namespace {

template <class T>
void attend_dim(const AttentionParams& p, const Launch& launch) {
    if (p.head_dim == 64) attend_instance<T, 64>(p, launch);
    else if (p.head_dim == 128) attend_instance<T, 128>(p, launch);
    else attend_instance<T, 256>(p, launch);
}

}  // namespace

}  // namespace hopper

void attend_hopper(const AttentionParams& p, const Launch& launch) {
    if (p.dtype == DType::bfloat16) hopper::attend_dim<__nv_bfloat16>(p, launch);
    else hopper::attend_dim<__half>(p, launch);
}

}  // namespace atman::cuda
