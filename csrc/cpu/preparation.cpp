#include "preparation.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "instruction_sets.h"
#include "parallel.h"

namespace atman::cpu {

// Sizes come from shapes whose elements may all be the same one (stride 0), so that their product can be anything.
Memory allocate(std::int64_t count, std::size_t size) {
    std::size_t bytes = 0;
    if (__builtin_mul_overflow(static_cast<std::size_t>(count), size, &bytes)) throw std::bad_alloc();
    return Memory(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{kAlignment})));
}

namespace {

// One line of the table: which factors do anything, and their logarithms, if `logs` is not null. Nearly all are 1: those
// are left out, except for the neighbours that a vector may reach.
void fill_line(const float* factor, std::int64_t keys, std::uint8_t* touched, float* logs) {
    std::int64_t done = 0;  // logarithms before it are there, or not wanted
    for (std::int64_t at = 0; at < keys; at += kFlagKeys) {
        const std::int64_t end = std::min(at + kFlagKeys, keys);
        int others = 0;  // counted, not looked for: compilers vectorize that
        for (std::int64_t i = at; i < end; ++i) others += factor[i] != 1.0f;
        touched[at / kFlagKeys] = others > 0;
        if (others == 0 || !logs) continue;
        const std::int64_t last = std::min(end + kMostLanes, keys);
        for (std::int64_t i = std::max(done, at - kMostLanes); i < last; ++i)
            logs[i] = factor[i] == 1.0f ? 0.0f : std::log(factor[i]);
        done = last;
    }
}

}  // namespace

Factors prepare_factors(const AttentionParams& p, int threads) {
    Factors result;
    if (!p.factor) return result;
    FactorTable& table = result.table;
    const std::int64_t rows = p.variants > 0 ? p.variants : p.batch;
    table.heads = p.factor_heads;
    table.keys = p.factor_keys;
    table.flags = (p.factor_keys + kFlagKeys - 1) / kFlagKeys;
    const std::int64_t lines = rows * table.heads, log_keys = p.mode == Mode::log_additive ? table.keys : 0;
    const std::size_t line_size = sizeof(float) * static_cast<std::size_t>(log_keys);
    result.memory = allocate(lines, line_size + static_cast<std::size_t>(table.flags));
    auto* logs = reinterpret_cast<float*>(result.memory.get());
    auto* touched = reinterpret_cast<std::uint8_t*>(logs + lines * log_keys);
    share(rows, threads, [&](auto next) {
        for (std::int64_t v; (v = next()) >= 0;)
            for (std::int64_t h = 0; h < table.heads; ++h) {
                const std::int64_t line = v * table.heads + h;
                fill_line(p.factor + v * p.factor_strides.batch + h * p.factor_strides.head, table.keys,
                          touched + line * table.flags, log_keys > 0 ? logs + line * log_keys : nullptr);
            }
    });
    table.touched = touched;
    if (log_keys > 0) table.logs = logs;
    return result;
}

const Kernel& find_kernel(DType dtype, const std::string& name) {
    for (const Kernel* kernel : usable_kernels(dtype))
        if (name == kernel->name) return *kernel;
    throw std::invalid_argument("instruction set '" + name + "' cannot run here");
}

}  // namespace atman::cpu
