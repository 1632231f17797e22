#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "instruction_sets.h"
#include "parallel.h"

namespace atman::cpu {
namespace {

struct Free {
    void operator()(std::byte* memory) const { ::operator delete[](memory, std::align_val_t{kAlignment}); }
};
using Memory = std::unique_ptr<std::byte[], Free>;

// Room for `count` items. Sizes come from shapes whose elements may all be the same one (stride 0), so that their
// product can be anything.
Memory allocate(std::int64_t count, std::size_t size) {
    std::size_t bytes = 0;
    if (__builtin_mul_overflow(static_cast<std::size_t>(count), size, &bytes)) throw std::bad_alloc();
    return Memory(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{kAlignment})));
}

struct Factors {
    Memory memory;
    FactorTable table;
};

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

// Packs every block of a range for all tiles, unless each is wanted only once.
Memory pack_range(const Kernel& kernel, const AttentionParams& p, KeyRange& range, std::int64_t batch, int threads) {
    const std::int64_t blocks = range.num_blocks(), items = batch * p.key_heads * blocks;
    const std::size_t size = kernel.packed_sizes(p).block;
    Memory memory = allocate(items, size);
    std::byte* to = memory.get();
    share(items, threads, [&](auto next) {
        for (std::int64_t i; (i = next()) >= 0;)
            kernel.pack_block(p, range, i / blocks / p.key_heads, i / blocks % p.key_heads, i % blocks,
                              to + size * static_cast<std::size_t>(i));
    });
    range.blocks = to;
    return memory;
}

const Kernel& find_kernel(DType dtype, const std::string& name) {
    for (const Kernel* kernel : usable_kernels(dtype))
        if (name == kernel->name) return *kernel;
    throw std::invalid_argument("instruction set '" + name + "' cannot run here");
}

}  // namespace

std::vector<std::string> instruction_sets(DType dtype) {
    std::vector<std::string> names;
    for (const Kernel* kernel : usable_kernels(dtype)) names.emplace_back(kernel->name);
    return names;
}

void attend(const AttentionParams& p, const std::string& instruction_set, int threads) {
    const Kernel& kernel = find_kernel(p.dtype, instruction_set);
    if (p.batch == 0 || p.rows == 0) return;  // the other sizes need not be real then
    const Plan plan = make_plan(p, kernel.tile_rows);
    Job job;
    job.params = &p;
    job.base = {p.key, p.value, p.key_strides, p.value_strides, p.keys, kernel.block_keys, nullptr};
    job.own = {p.own_key, p.own_value, p.own_key_strides, p.own_value_strides, p.variants > 0 ? p.rows : 0,
               kernel.block_keys, nullptr};
    const Factors factors = prepare_factors(p, threads);
    job.factors = factors.table;
    Memory base, own;
    if (plan.reuses_base) base = pack_range(kernel, p, job.base, p.key_batch, threads);
    if (plan.reuses_own) own = pack_range(kernel, p, job.own, 1, threads);

    const std::int64_t tiles = static_cast<std::int64_t>(plan.tiles.size()), items = tiles * p.key_heads;
    const std::size_t rows_size = aligned(sizeof(Row) * static_cast<std::size_t>(most_rows(p, kernel.tile_rows)));
    const std::size_t scratch_size = rows_size + aligned(kernel.scratch_size(p));
    const int used = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, items)));
    const Memory scratch = allocate(used, scratch_size);  // here, since threads must not throw
    std::atomic<int> started{0};
    share(items, used, [&](auto next) {
        std::byte* mine = scratch.get() + scratch_size * static_cast<std::size_t>(started.fetch_add(1));
        Row* rows = reinterpret_cast<Row*>(mine);
        if (kernel.begin_thread) kernel.begin_thread();
        for (std::int64_t i; (i = next()) >= 0;) {
            const Tile& tile = plan.tiles[static_cast<std::size_t>(i % tiles)];
            describe_rows(p, tile, rows);
            kernel.run_tile(job, tile, rows, i / tiles, mine + rows_size);
        }
        if (kernel.end_thread) kernel.end_thread();
    });
}

}  // namespace atman::cpu
