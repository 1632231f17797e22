// The CUDA entry point. Nothing here needs a CUDA header.

#pragma once

#include <cstdint>
#include <string>

#include "../tensor.h"

namespace atman::cuda {

enum class Kernel { plain, hopper };

Kernel kernel_named(const std::string& name);

// Why `kernel` cannot do a call, as the end of a sentence that begins with its name; empty if it can.
std::string refusal(const AttentionParams& params, Kernel kernel);

std::int64_t workspace_bytes(const AttentionParams& params, Kernel kernel, int multiprocessors);

// Puts the call on the stream. Throws std::invalid_argument if it cannot be done, std::runtime_error if CUDA refuses.
void attend(const AttentionParams& params, Kernel kernel, const Tensor& workspace, int device, int multiprocessors,
            std::uintptr_t stream);

// Why this binary cannot run on a device: the driver is too old, or there is no code for that GPU. Empty if it can.
std::string device_problem(int device);

// What it was compiled for, such as "80,90a".
std::string architectures();

}  // namespace atman::cuda
