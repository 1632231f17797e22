#include "../launch.h"

namespace atman::cuda::hopper {

template <>
void attend_instance<__nv_bfloat16, 128>(const AttentionParams& params, const Launch& launch) {
    launch_attend<Config<__nv_bfloat16, 128>>(params, launch);
}

}  // namespace atman::cuda::hopper
