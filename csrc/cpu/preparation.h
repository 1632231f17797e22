// What a call needs before its tiles: memory, a kernel, what is worked out about the factors.

#pragma once

#include <memory>
#include <new>
#include <string>

#include "kernel.h"

namespace atman::cpu {

struct Free {
    void operator()(std::byte* memory) const { ::operator delete[](memory, std::align_val_t{kAlignment}); }
};
using Memory = std::unique_ptr<std::byte[], Free>;

// Room for `count` items. Throws std::bad_alloc.
Memory allocate(std::int64_t count, std::size_t size);

struct Factors {
    Memory memory;
    FactorTable table;
};

Factors prepare_factors(const AttentionParams& params, int threads);

// Throws std::invalid_argument if it cannot run here.
const Kernel& find_kernel(DType dtype, const std::string& name);

}  // namespace atman::cpu
