// How the work of one call is cut: tiles of query rows, and for each row the keys that it can see.
//
// Nothing here depends on the instruction set or on the number of threads, so neither do the results.

#pragma once

#include <cstdint>
#include <vector>

#include "../params.h"
#include "../rows.h"

namespace atman::cpu {

// Consecutive rows of one batch entry that visit the same blocks of keys.
struct Tile {
    std::int64_t batch = 0;
    std::int64_t first_row = 0, last_row = 0;
    std::int64_t work = 0;  // visible keys of all rows
};

struct Plan {
    std::vector<Tile> tiles;   // within each batch entry: much work first
    bool reuses_base = false;  // whether some block of base keys is visited by more than one tile
    bool reuses_own = false;
};

// At most this many rows, all query heads of a key head counted, share a tile.
Plan make_plan(const AttentionParams& params, std::int64_t tile_rows);

// Writes tile.last_row - tile.first_row rows.
void describe_rows(const AttentionParams& params, const Tile& tile, Row* rows);

// The most rows that a tile of `make_plan` has.
std::int64_t most_rows(const AttentionParams& params, std::int64_t tile_rows);

}  // namespace atman::cpu
