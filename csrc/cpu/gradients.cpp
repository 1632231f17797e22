#include "gradients.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "preparation.h"

namespace atman::cpu {
namespace {

// Parts into which a call is cut if it has the tiles: enough for many threads, and few enough that their sums stay small.
constexpr std::int64_t kParts = 16;

std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

// Whole blocks around what the rows of a part see in one key range.
void widen(KeySums& sums, const Visible& seen, std::int64_t block_keys) {
    if (seen.empty()) return;
    const std::int64_t first = seen.first / block_keys * block_keys, last = round_up(seen.last, block_keys);
    sums.first = sums.last == 0 ? first : std::min(sums.first, first);
    sums.last = std::max(sums.last, last);
}

struct Parts {
    std::vector<Tile> tiles;  // in the order of their rows
    std::vector<Part> parts;  // of all tiles of a key batch and head, one after the other
    Memory sums;
};

// What the rows of a part see, and which lines of the factors are theirs.
void measure_part(const AttentionParams& p, const Kernel& kernel, const std::vector<Tile>& tiles,
                  std::vector<Row>& rows, Part& part) {
    bool begun = false;
    for (std::int64_t i = part.first_tile; i < part.last_tile; ++i) {
        const Tile& tile = tiles[static_cast<std::size_t>(i)];
        describe_rows(p, tile, rows.data());
        for (std::int64_t r = 0; r < tile.last_row - tile.first_row; ++r) {
            const Row& row = rows[static_cast<std::size_t>(r)];
            widen(part.base, row.base, kernel.block_keys);
            widen(part.own, row.own, kernel.block_keys);
            part.first_variant = begun ? std::min(part.first_variant, row.variant) : row.variant;
            part.last_variant = begun ? std::max(part.last_variant, row.variant) : row.variant;
            begun = true;
        }
    }
}

// Cuts the tiles [first, last) of one key batch into stretches of about equal work, for every key head.
void cut_tiles(const AttentionParams& p, const Kernel& kernel, std::int64_t key_batch, std::int64_t first,
               std::int64_t last, std::vector<Row>& rows, Parts& to) {
    const std::int64_t wanted = (kParts + p.key_batch * p.key_heads - 1) / (p.key_batch * p.key_heads);
    std::int64_t work = 0, done = 0;
    for (std::int64_t i = first; i < last; ++i) work += to.tiles[static_cast<std::size_t>(i)].work + 1;
    std::vector<Part> pieces;
    for (std::int64_t i = first, begin = first; i < last; ++i) {
        done += to.tiles[static_cast<std::size_t>(i)].work + 1;
        if (i + 1 < last && done * wanted < work * static_cast<std::int64_t>(pieces.size() + 1)) continue;
        Part part;
        part.key_batch = key_batch;
        part.first_tile = begin;
        part.last_tile = begin = i + 1;
        measure_part(p, kernel, to.tiles, rows, part);
        pieces.push_back(part);
    }
    for (std::int64_t head = 0; head < p.key_heads; ++head)
        for (Part part : pieces) {
            part.key_head = head;
            to.parts.push_back(part);
        }
}

// Gives every part the memory for its sums.
void allocate_sums(const GradientParams& g, const Kernel& kernel, Parts& to) {
    const AttentionParams& p = g.forward;
    const std::int64_t head_columns = round_up(p.head_dim, kernel.columns);
    const std::int64_t value_columns = round_up(p.value_dim, kernel.columns);
    const std::int64_t heads = p.factor_heads > 1 ? p.query_heads / p.key_heads : 1;
    for (const bool counting : {true, false}) {
        std::int64_t floats = 0;
        const auto take = [&](float*& at, bool wanted, std::int64_t count) {
            if (!wanted || count == 0) return;
            if (!counting) at = reinterpret_cast<float*>(to.sums.get()) + floats;
            floats += round_up(count, kAlignment / sizeof(float));
        };
        for (Part& part : to.parts) {
            take(part.base.key, g.grad_key, (part.base.last - part.base.first) * head_columns);
            take(part.base.value, g.grad_value, (part.base.last - part.base.first) * value_columns);
            take(part.own.key, g.grad_own_key, (part.own.last - part.own.first) * head_columns);
            take(part.own.value, g.grad_own_value, (part.own.last - part.own.first) * value_columns);
            take(part.factor, g.grad_factor, (part.last_variant - part.first_variant + 1) * heads * p.factor_keys);
        }
        if (counting) to.sums = allocate(floats, sizeof(float));
    }
}

Parts make_parts(const GradientParams& g, const Kernel& kernel) {
    const AttentionParams& p = g.forward;
    Parts to;
    to.tiles = make_plan(p, kernel.tile_rows).tiles;
    std::sort(to.tiles.begin(), to.tiles.end(), [](const Tile& a, const Tile& b) {
        return a.batch != b.batch ? a.batch < b.batch : a.first_row < b.first_row;
    });
    std::vector<Row> rows(static_cast<std::size_t>(most_rows(p, kernel.tile_rows)));
    const auto count = static_cast<std::int64_t>(to.tiles.size());
    for (std::int64_t first = 0, last = 0; first < count; first = last) {
        const std::int64_t batch = to.tiles[static_cast<std::size_t>(first)].batch;
        while (last < count && (p.key_batch == 1 || to.tiles[static_cast<std::size_t>(last)].batch == batch)) ++last;
        cut_tiles(p, kernel, p.key_batch == 1 ? 0 : batch, first, last, rows, to);
    }
    allocate_sums(g, kernel, to);
    return to;
}

Memory pack_range(const Kernel& kernel, const AttentionParams& p, KeyRange& range, std::int64_t batch, int threads) {
    const std::int64_t blocks = range.num_blocks(), items = batch * p.key_heads * blocks;
    const std::size_t size = kernel.gradient_block_size(p);
    Memory memory = allocate(items, size);
    std::byte* to = memory.get();
    share(items, threads, [&](auto next) {
        for (std::int64_t i; (i = next()) >= 0;)
            kernel.pack_gradient_block(p, range, i / blocks / p.key_heads, i / blocks % p.key_heads, i % blocks,
                                       to + size * static_cast<std::size_t>(i));
    });
    range.blocks = to;
    return memory;
}

// Each thread's list of what it adds up: one entry for every part at most. Made beforehand, since threads must not throw.
class Lists {
  public:
    Lists(std::size_t parts, int threads) : parts_(parts), memory_(parts * static_cast<std::size_t>(threads)) {}
    const float** take() { return memory_.data() + parts_ * taken_.fetch_add(1); }

  private:
    std::size_t parts_;
    std::vector<const float*> memory_;
    std::atomic<std::size_t> taken_{0};
};

// Adds the parts' sums up, in their order, and writes them: (batch, key_heads, keys, width).
void write_keys(const Kernel& kernel, const AttentionParams& p, const Parts& all, KeySums Part::* range,
                float* KeySums::* which, std::int64_t batch, std::int64_t keys, std::int64_t width, float scale,
                void* to, int threads) {
    if (!to) return;
    constexpr std::int64_t kStretch = 64;
    const std::int64_t columns = round_up(width, kernel.columns), stretches = (keys + kStretch - 1) / kStretch;
    const std::int64_t bytes = p.dtype == DType::float32 ? 4 : 2;
    Lists all_lists(all.parts.size(), threads);
    share(batch * p.key_heads * stretches, threads, [&](auto next) {
        const float** lists = all_lists.take();
        for (std::int64_t item; (item = next()) >= 0;) {
            const std::int64_t b = item / stretches / p.key_heads, head = item / stretches % p.key_heads;
            const std::int64_t first = item % stretches * kStretch;
            for (std::int64_t key = first; key < std::min(keys, first + kStretch); ++key) {
                int found = 0;
                for (const Part& part : all.parts) {
                    const KeySums& sums = part.*range;
                    if (part.key_batch != b || part.key_head != head || key < sums.first || key >= sums.last) continue;
                    lists[found++] = sums.*which + (key - sums.first) * columns;
                }
                void* row = static_cast<std::byte*>(to) + ((b * p.key_heads + head) * keys + key) * width * bytes;
                kernel.write_sums(p.dtype, lists, found, width, scale, row);
            }
        }
    });
}

// The same for the factors. Those of "log_additive" still have to be divided by c, but where that is 0.
void write_factors(const GradientParams& g, const Parts& all, int threads) {
    const AttentionParams& p = g.forward;
    if (!g.grad_factor) return;
    const std::int64_t heads = p.query_heads / p.key_heads, per_part = p.factor_heads > 1 ? heads : 1;
    const std::int64_t lines = (p.variants > 0 ? p.variants : p.batch) * p.factor_heads;
    Lists all_lists(all.parts.size(), threads);
    share(lines, threads, [&](auto next) {
        const float** lists = all_lists.take();
        for (std::int64_t line; (line = next()) >= 0;) {
            const std::int64_t variant = line / p.factor_heads, head = line % p.factor_heads;
            int found = 0;
            for (const Part& part : all.parts) {
                if (variant < part.first_variant || variant > part.last_variant) continue;
                if (p.factor_heads > 1 && head / heads != part.key_head) continue;
                const std::int64_t at = (variant - part.first_variant) * per_part + head % per_part;
                lists[found++] = part.factor + at * p.factor_keys;
            }
            float* to = g.grad_factor + line * p.factor_keys;
            std::fill(to, to + p.factor_keys, 0.0f);
            for (int list = 0; list < found; ++list)
                for (std::int64_t k = 0; k < p.factor_keys; ++k) to[k] += lists[list][k];
            if (p.mode != Mode::log_additive) continue;
            const float* factor = p.factor + variant * p.factor_strides.batch + head * p.factor_strides.head;
            for (std::int64_t k = 0; k < p.factor_keys; ++k) to[k] /= factor[k] == 0.0f ? 1.0f : factor[k];
        }
    });
}

}  // namespace

void differentiate(const GradientParams& g, const std::string& instruction_set, int threads) {
    const AttentionParams& p = g.forward;
    const Kernel& kernel = find_kernel(p.dtype, instruction_set);
    if (p.batch == 0 || p.rows == 0) return;  // the other sizes need not be real then
    const Parts all = make_parts(g, kernel);
    GradientJob job;
    job.params = &g;
    job.tiles = all.tiles.data();
    job.base = {p.key, p.value, p.key_strides, p.value_strides, p.keys, kernel.block_keys, nullptr};
    job.own = {p.own_key,         p.own_value, p.own_key_strides, p.own_value_strides, p.variants > 0 ? p.rows : 0,
               kernel.block_keys, nullptr};
    const Factors factors = prepare_factors(p, threads);
    job.factors = factors.table;
    const Memory base = pack_range(kernel, p, job.base, p.key_batch, threads);
    const Memory own = pack_range(kernel, p, job.own, 1, threads);

    const auto items = static_cast<std::int64_t>(all.parts.size());
    const std::size_t rows_size = aligned(sizeof(Row) * static_cast<std::size_t>(most_rows(p, kernel.tile_rows)));
    const std::size_t scratch_size = rows_size + aligned(kernel.gradient_scratch_size(g));
    const int used = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, items)));
    const Memory scratch = allocate(used, scratch_size);  // here, since threads must not throw
    std::atomic<int> started{0};
    share(items, used, [&](auto next) {
        std::byte* mine = scratch.get() + scratch_size * static_cast<std::size_t>(started.fetch_add(1));
        if (kernel.begin_thread) kernel.begin_thread();
        for (std::int64_t i; (i = next()) >= 0;)
            kernel.run_part(job, all.parts[static_cast<std::size_t>(i)], reinterpret_cast<Row*>(mine),
                            mine + rows_size);
        if (kernel.end_thread) kernel.end_thread();
    });
    const std::int64_t rows = job.own.keys;
    write_keys(kernel, p, all, &Part::base, &KeySums::key, p.key_batch, p.keys, p.head_dim, p.scale, g.grad_key,
               threads);
    write_keys(kernel, p, all, &Part::base, &KeySums::value, p.key_batch, p.keys, p.value_dim, 1.0f, g.grad_value,
               threads);
    write_keys(kernel, p, all, &Part::own, &KeySums::key, 1, rows, p.head_dim, p.scale, g.grad_own_key, threads);
    write_keys(kernel, p, all, &Part::own, &KeySums::value, 1, rows, p.value_dim, 1.0f, g.grad_own_value, threads);
    write_factors(g, all, threads);
}

}  // namespace atman::cpu
