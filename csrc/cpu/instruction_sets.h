// Which of the compiled kernels this processor can run.

#pragma once

#include "kernel.h"

namespace atman::cpu {

// The kernels for a dtype, fastest first. All of them can run here.
std::vector<const Kernel*> usable_kernels(DType dtype);

}  // namespace atman::cpu
