// The launches: each puts its kernels on `stream` of the current device, allocates nothing and waits for nothing.

#pragma once

#include <cuda_runtime.h>

#include "plan.h"

namespace atman::cuda {

struct Launch {
    cudaStream_t stream = nullptr;
    int multiprocessors = 0;
    int splits = 1;
    std::byte* workspace = nullptr;
    Workspace space;

    template <class T>
    T* at(std::int64_t offset) const {
        return reinterpret_cast<T*>(workspace + offset);
    }
};

// One warp per row and head, every feature, any head dimension up to kPlainDims (plan.h): slow and plain.
void attend_plain(const AttentionParams& params, const Launch& launch);
// Whether there is code for the current device.
bool has_code();

// Fills tiles, order and flags of the work space.
void make_plan(const AttentionParams& params, const Launch& launch);
// Reads them; writes the output, or partial results where there are splits.
void attend_hopper(const AttentionParams& params, const Launch& launch);
// Partial results become the output.
void merge_splits(const AttentionParams& params, const Launch& launch);

}  // namespace atman::cuda
