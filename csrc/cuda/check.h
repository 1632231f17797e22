// CUDA's error codes become exceptions.

#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace atman::cuda {

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace atman::cuda
