#include "plan.h"

#include <algorithm>

namespace atman::cpu {
namespace {

Row dense_row(const AttentionParams& p, std::int64_t batch, std::int64_t index) {
    const std::int64_t position = index + p.keys - p.rows;  // the last query stands at the last key
    Row row;
    row.index = row.bias_row = index;
    row.variant = batch;
    row.base.last = p.keys;
    if (p.is_causal) row.base.last = std::min(p.keys, position + 1);
    if (p.sliding_window > 0) {
        row.base.first = std::max<std::int64_t>(0, position - p.sliding_window + 1);
        if (!p.is_causal) row.base.last = std::min(p.keys, position + p.sliding_window);
    }
    return row;
}

Row packed_row(const AttentionParams& p, std::int64_t variant, std::int64_t index) {
    const std::int64_t start = p.suffix_starts[variant], end = p.suffix_starts[variant + 1];
    const std::int64_t prefix = p.prefix_lengths[variant], base = p.base_starts[variant];
    const std::int64_t position = prefix + index - start;
    const std::int64_t lowest = p.sliding_window > 0 ? std::max<std::int64_t>(0, position - p.sliding_window + 1) : 0;
    Row row;
    row.index = index;
    row.variant = variant;
    row.bias_row = position;
    row.base = {base + lowest, base + prefix, -base};
    row.own = {start + std::max<std::int64_t>(0, lowest - prefix), p.is_causal ? index + 1 : end, prefix - start};
    if (!p.is_causal && p.sliding_window > 0) row.own.last = std::min(end, index + p.sliding_window);
    return row;
}

std::int64_t seen(const Visible& keys) { return std::max<std::int64_t>(0, keys.last - keys.first); }

// [first, last) in equal tiles of at most `limit` rows
void cut(std::int64_t batch, std::int64_t first, std::int64_t last, std::int64_t limit, std::vector<Tile>& tiles) {
    const std::int64_t rows = last - first, pieces = (rows + limit - 1) / limit;
    for (std::int64_t i = 0; i < pieces; ++i)
        tiles.push_back({batch, first + rows * i / pieces, first + rows * (i + 1) / pieces, 0});
}

// Variants with few rows share a tile, so that each block of the prefix is read once for all of them; a variant with
// many rows is cut on its own, since its own keys concern nobody else.
void cut_pack(const AttentionParams& p, std::int64_t limit, std::vector<Tile>& tiles) {
    for (std::int64_t v = 0; v < p.variants;) {
        const std::int64_t first = v, first_row = p.suffix_starts[v];
        for (++v; v < p.variants && p.suffix_starts[v + 1] - first_row <= limit; ++v)
            if (p.base_starts[v] != p.base_starts[first]) break;
        cut(0, first_row, p.suffix_starts[v], limit, tiles);
    }
}

}  // namespace

void describe_rows(const AttentionParams& p, const Tile& tile, Row* rows) {
    if (p.variants == 0) {
        for (std::int64_t i = tile.first_row; i < tile.last_row; ++i) *rows++ = dense_row(p, tile.batch, i);
        return;
    }
    const std::int32_t* end = p.suffix_starts + p.variants + 1;
    std::int64_t variant = std::upper_bound(p.suffix_starts, end, tile.first_row) - p.suffix_starts - 1;
    for (std::int64_t i = tile.first_row; i < tile.last_row; ++i) {
        while (p.suffix_starts[variant + 1] <= i) ++variant;  // passes over empty suffixes
        *rows++ = packed_row(p, variant, i);
    }
}

std::int64_t most_rows(const AttentionParams& p, std::int64_t tile_rows) {
    return std::max<std::int64_t>(1, tile_rows / (p.query_heads / p.key_heads));
}

Plan make_plan(const AttentionParams& p, std::int64_t tile_rows) {
    const std::int64_t limit = most_rows(p, tile_rows);
    Plan plan;
    if (p.variants > 0) {
        cut_pack(p, limit, plan.tiles);
    } else {
        for (std::int64_t b = 0; b < p.batch; ++b) cut(b, 0, p.rows, limit, plan.tiles);
    }
    std::vector<Row> rows(static_cast<std::size_t>(limit));
    for (Tile& tile : plan.tiles) {
        describe_rows(p, tile, rows.data());
        for (std::int64_t i = 0; i < tile.last_row - tile.first_row; ++i) {
            const Row& row = rows[static_cast<std::size_t>(i)];
            tile.work += seen(row.base) + seen(row.own);
        }
    }
    plan.reuses_base = static_cast<std::int64_t>(plan.tiles.size()) > p.key_batch;
    plan.reuses_own = plan.tiles.size() > 1;
    std::stable_sort(plan.tiles.begin(), plan.tiles.end(), [](const Tile& a, const Tile& b) {
        return a.batch != b.batch ? a.batch < b.batch : a.work > b.work;
    });
    return plan;
}

}  // namespace atman::cpu
