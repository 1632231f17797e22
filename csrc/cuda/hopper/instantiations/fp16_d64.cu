#include "../launch.h"

namespace atman::cuda::hopper {

template <>
void attend_instance<__half, 64>(const AttentionParams& params, const Launch& launch) {
    launch_attend<Config<__half, 64>>(params, launch);
}

}  // namespace atman::cuda::hopper
