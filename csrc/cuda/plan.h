// How the work of one call is cut for a GPU. Everything here runs on host and device, so that it can be tested without
// a GPU; nothing here reads a score.
//
// A *tile* is kTileRows rows of a product: as many rows of the query as fit with all query heads of a key head beside
// each other. Tiles take rows as they come, whatever variant they belong to; where a tile's keys begin and end, and
// where all its rows see all keys, is worked out on the device, since the pack's integers are there.

#pragma once

#include "../rows.h"

namespace atman::cuda {

constexpr std::int64_t kPlainDims = 1024;  // largest head dimension of the plain kernel
constexpr int kTileRows = 128;
constexpr int kFlagKeys = 64;    // one bit of a factor's flags says whether any of so many is not 1
constexpr int kMostSplits = 32;  // of one tile's keys
constexpr int kLeastSplitKeys = 256;

// The keys that some row of a tile sees, per key range (0: base, 1: own), and those that every row sees.
struct TileKeys {
    std::int32_t first[2], last[2];
    std::int32_t all_first[2], all_last[2];
};

ATMAN_INLINE std::int64_t group_size(const AttentionParams& p) { return p.query_heads / p.key_heads; }
// Rows of the query in a tile; 0 if not even one fits.
ATMAN_INLINE std::int64_t rows_per_tile(const AttentionParams& p) { return kTileRows / group_size(p); }
ATMAN_INLINE std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
ATMAN_INLINE std::int64_t tiles_per_entry(const AttentionParams& p) { return divide_up(p.rows, rows_per_tile(p)); }
ATMAN_INLINE std::int64_t count_tiles(const AttentionParams& p) { return p.batch * tiles_per_entry(p); }

struct TileRows {
    std::int64_t batch, first, last;
};

ATMAN_INLINE TileRows tile_rows(const AttentionParams& p, std::int64_t tile) {
    const std::int64_t first = tile % tiles_per_entry(p) * rows_per_tile(p);
    return {tile / tiles_per_entry(p), first, smaller(p.rows, first + rows_per_tile(p))};
}

ATMAN_INLINE void include_row(TileKeys& keys, int range, const Visible& seen) {
    if (seen.empty()) {
        keys.all_last[range] = 0;
        return;
    }
    const auto first = static_cast<std::int32_t>(seen.first), last = static_cast<std::int32_t>(seen.last);
    const bool none = keys.first[range] >= keys.last[range];
    keys.first[range] = none || first < keys.first[range] ? first : keys.first[range];
    keys.last[range] = none || last > keys.last[range] ? last : keys.last[range];
    keys.all_first[range] = first > keys.all_first[range] ? first : keys.all_first[range];
    keys.all_last[range] = last < keys.all_last[range] ? last : keys.all_last[range];
}

// The keys of two sets of rows together, in any order.
ATMAN_INLINE void include_keys(TileKeys& keys, const TileKeys& more) {
    for (int range = 0; range < 2; ++range) {
        if (more.first[range] < more.last[range]) {
            const bool none = keys.first[range] >= keys.last[range];
            keys.first[range] = none || more.first[range] < keys.first[range] ? more.first[range] : keys.first[range];
            keys.last[range] = none || more.last[range] > keys.last[range] ? more.last[range] : keys.last[range];
        }
        keys.all_first[range] =
            more.all_first[range] > keys.all_first[range] ? more.all_first[range] : keys.all_first[range];
        keys.all_last[range] =
            more.all_last[range] < keys.all_last[range] ? more.all_last[range] : keys.all_last[range];
    }
}

// What every `step`th row of a tile visits, from row `start` on. Keys between those of two rows may be seen by neither:
// they are masked.
ATMAN_INLINE TileKeys describe_tile(const AttentionParams& p, std::int64_t tile, int start = 0, int step = 1) {
    constexpr std::int32_t most = 0x7fffffff;
    TileKeys keys{{0, 0}, {0, 0}, {0, 0}, {most, most}};
    const TileRows rows = tile_rows(p, tile);
    for (std::int64_t i = rows.first + start; i < rows.last; i += step) {
        const Row row = describe_row(p, rows.batch, i);
        include_row(keys, 0, row.base);
        include_row(keys, 1, row.own);
    }
    return keys;
}

ATMAN_INLINE std::int32_t visited(const TileKeys& keys) {
    return keys.last[0] - keys.first[0] + keys.last[1] - keys.first[1];
}

// A block of keys of one range.
struct Block {
    std::int32_t range, first;
    bool masked;  // some row does not see all of it
};

ATMAN_INLINE std::int32_t blocks_in(const TileKeys& keys, int range, int block_keys) {
    return (keys.last[range] - keys.first[range] + block_keys - 1) / block_keys;
}

ATMAN_INLINE std::int32_t count_blocks(const TileKeys& keys, int block_keys) {
    return blocks_in(keys, 0, block_keys) + blocks_in(keys, 1, block_keys);
}

// The base first, then the own rows; blocks begin at the first key that is seen, at no multiple of anything.
// Written without an index that is known at run time only: the arrays stay in registers.
ATMAN_INLINE Block block_at(const TileKeys& keys, std::int32_t index, int block_keys) {
    const std::int32_t in_base = blocks_in(keys, 0, block_keys);
    const bool own = index >= in_base;
    const std::int32_t first =
        own ? keys.first[1] + (index - in_base) * block_keys : keys.first[0] + index * block_keys;
    const std::int32_t all_first = own ? keys.all_first[1] : keys.all_first[0];
    const std::int32_t all_last = own ? keys.all_last[1] : keys.all_last[0];
    return {own ? 1 : 0, first, first < all_first || first + block_keys > all_last};
}

// The blocks [first, last) of one of `splits` parts of a tile's keys.
struct BlockSpan {
    std::int32_t first, last;
};

ATMAN_INLINE BlockSpan split_span(std::int32_t blocks, int split, int splits) {
    return {static_cast<std::int32_t>(static_cast<std::int64_t>(blocks) * split / splits),
            static_cast<std::int32_t>(static_cast<std::int64_t>(blocks) * (split + 1) / splits)};
}

// Tiles are split over their keys only where there are fewer of them than multiprocessors. Known from shapes alone.
// "shifted" needs the minimum over all keys first, so its tiles stay whole.
ATMAN_INLINE int choose_splits(const AttentionParams& p, std::int64_t multiprocessors) {
    if (p.factor && p.mode == Mode::shifted) return 1;
    const std::int64_t pieces = count_tiles(p) * p.key_heads;
    if (pieces == 0 || pieces * 2 > multiprocessors) return 1;
    const std::int64_t most = smaller(kMostSplits, (p.keys + (p.variants ? p.rows : 0)) / kLeastSplitKeys);
    return static_cast<int>(larger(1, smaller(most, multiprocessors / pieces)));
}

// --- flags of the factors: 64 to a word ---

ATMAN_INLINE std::int64_t flag_words(const AttentionParams& p) {
    return divide_up(divide_up(p.factor_keys, kFlagKeys), 64);
}

// Whether a factor at positions [first, last), not empty, may differ from 1.
ATMAN_INLINE bool touches(const std::uint64_t* words, std::int64_t first, std::int64_t last) {
    const std::int64_t low = first / kFlagKeys, high = (last - 1) / kFlagKeys;
    for (std::int64_t word = low / 64; word <= high / 64; ++word) {
        std::uint64_t bits = words[word];
        if (word == low / 64) bits &= ~std::uint64_t{0} << (low % 64);
        if (word == high / 64) bits &= ~std::uint64_t{0} >> (63 - high % 64);
        if (bits) return true;
    }
    return false;
}

// --- the work space: what one launch leaves for the next ---

struct Workspace {
    std::int64_t tiles = 0, order = 0, flags = 0, partial = 0, partial_lse = 0;  // offsets in bytes
    std::int64_t bytes = 0;
};

ATMAN_INLINE std::int64_t take(Workspace& space, std::int64_t bytes) {
    const std::int64_t at = space.bytes;
    space.bytes += divide_up(bytes, 128) * 128;
    return at;
}

ATMAN_INLINE Workspace lay_out_workspace(const AttentionParams& p, int splits) {
    Workspace space;
    const std::int64_t rows = p.batch * p.query_heads * p.rows, parts = splits > 1 ? splits : 0;
    space.tiles = take(space, count_tiles(p) * static_cast<std::int64_t>(sizeof(TileKeys)));
    space.order = take(space, count_tiles(p) * 4);
    space.flags = take(space, p.factor ? (p.variants ? p.variants : p.batch) * p.factor_heads * flag_words(p) * 8 : 0);
    space.partial = take(space, parts * rows * p.value_dim * 4);
    space.partial_lse = take(space, parts * rows * 4);
    return space;
}

}  // namespace atman::cuda
