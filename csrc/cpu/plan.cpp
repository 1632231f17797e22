#include "plan.h"

#include <algorithm>

namespace atman::cpu {
namespace {

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
    for (std::int64_t i = tile.first_row; i < tile.last_row; ++i) *rows++ = describe_row(p, tile.batch, i);
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
