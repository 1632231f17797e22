#include "../launch.h"

namespace atman::cuda::hopper {

template <>
void attend_instance<__half, 256>(const AttentionParams& params, const Launch& launch) {
    launch_attend<Config<__half, 256>>(params, launch);
}

}  // namespace atman::cuda::hopper
