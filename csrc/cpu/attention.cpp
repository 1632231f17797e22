#include "attention.h"

#include <algorithm>

#include "instruction_sets.h"
#include "parallel.h"
#include "preparation.h"

namespace atman::cpu {
namespace {

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
    job.own = {p.own_key,         p.own_value, p.own_key_strides, p.own_value_strides, p.variants > 0 ? p.rows : 0,
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
