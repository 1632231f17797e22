// Tiles, shared memory and barriers of the Hopper kernel, apart from its arithmetic.
//
// Matrices lie in shared memory as slabs of 64 features: [slab][row][64], 128 bytes a row, 128-byte swizzle, which is
// what TMA writes and wgmma reads. Of the two distances in a wgmma descriptor, for an operand whose rows are
//   summed over (queries, keys): far = 8 rows = 1024 bytes, near unused; 16 features further = 32 bytes further
//   the product's columns (values): far = 8 keys = 1024 bytes, near = from one slab to the next; 16 keys = 2048 bytes

#pragma once

#include <cstddef>
#include <cstdint>

#include "../plan.h"

namespace atman::cuda::hopper {

constexpr int kConsumers = 2;  // warpgroups, 64 rows of the tile each
constexpr int kWarpgroup = 128;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerRows = 64;
constexpr int kSlab = 64;                                         // features in 128 bytes
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of 64 K: 128 * (40 + 2 * 232)
constexpr std::size_t kSharedLimit = 227 * 1024;
static_assert(kConsumers * kConsumerRows == kTileRows);

struct Sizes {
    int keys, stages;  // of a block of keys; blocks in flight
};

// Pure: the head dimension decides.
constexpr Sizes sizes_for(int head_dim) {
    if (head_dim == 64) return {128, 4};
    if (head_dim == 128) return {128, 2};
    return {64, 2};
}

// A row of the tile in 32 bits, kept in shared memory for the softmax.
struct RowKeys {
    std::int32_t first[2], last[2];
    std::int32_t to_position[2];
    std::int32_t index, head;  // of the query; head < 0: no such row
    std::int64_t factor_at;    // of position 0
    std::int64_t flags_at;     // in words

    ATMAN_INLINE_MEMBER bool sees(int range, std::int32_t key) const {
        return key >= first[range] && key < last[range];
    }
};

// Part of a tile for one key head.
struct Item {
    TileKeys keys;
    std::int32_t batch, first_row, last_row;  // of the query
    std::int32_t key_head, split;
    BlockSpan span;
};

// What runs beside the softmax: nothing; the warpgroup's own next products; and those of the other warpgroup, by turns.
enum class Overlap { none, within, between };

template <class Element, int kDim, Overlap kOverlapping = Overlap::between>
struct Config {
    static constexpr Overlap kOverlap = kOverlapping;
    using T = Element;
    static constexpr int kHeadDim = kDim, kSlabs = kDim / kSlab;
    static constexpr int kKeys = sizes_for(kDim).keys, kStages = sizes_for(kDim).stages;
    static constexpr int kBlockBytes = kKeys * kDim * 2;  // of keys, and of values

    struct Shared {
        alignas(1024) T query[kConsumers][kSlabs][kConsumerRows][kSlab];  // later the output
        alignas(1024) T key[kStages][kSlabs][kKeys][kSlab];
        alignas(1024) T value[kStages][kSlabs][kKeys][kSlab];
        RowKeys rows[kTileRows];
        Item item[kConsumers];
        std::uint64_t key_full[kStages], key_free[kStages], value_full[kStages], value_free[kStages];
    };
    static_assert(sizeof(Shared) <= kSharedLimit);
};

// Where a ring of stages stands: one number, since registers are what there is least of.
template <int kStages>
struct Stage {
    std::uint32_t count = 0;
    static_assert((kStages & (kStages - 1)) == 0);
    ATMAN_INLINE_MEMBER std::uint32_t index() const { return count % kStages; }
    ATMAN_INLINE_MEMBER std::uint32_t parity() const { return count / kStages % 2; }
};

// Named barriers. kTurn + g: warpgroup g may issue its products; kRows + g: the warpgroup among itself.
enum Barrier { kTurn = 1, kRows = kTurn + kConsumers };

}  // namespace atman::cuda::hopper
