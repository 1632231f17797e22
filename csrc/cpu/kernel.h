// The interface between the driver, compiled once, and the kernels, compiled once per instruction set.

#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "plan.h"

namespace atman::cpu {

// One range of keys, laid out for the kernel (see `packing.h`). `blocks` is null if every block is wanted only once:
// then the tile that wants it packs it itself, into its scratch memory.
struct KeyRange {
    const void* key = nullptr;
    const void* value = nullptr;
    Strides key_strides, value_strides;
    std::int64_t keys = 0, block_keys = 1;
    std::byte* blocks = nullptr;  // [batch][key_heads][blocks] of `PackedSizes::block` bytes each
    std::int64_t num_blocks() const { return (keys + block_keys - 1) / block_keys; }
};

// What is worked out about the factors, one line per (variant or batch entry, head or all heads).
struct FactorTable {
    const std::uint8_t* touched = nullptr;  // for every `kFlagKeys` positions: whether some factor is not 1; null: none
    const float* logs =
        nullptr;  // ln c, for log-additive suppression: in touched stretches and `kMostLanes` around them
    std::int64_t keys = 0, flags = 0, heads = 1;
};
constexpr int kFlagKeys = 64;
constexpr int kMostLanes = 16;  // of any instruction set's vectors

struct Job {
    const AttentionParams* params = nullptr;
    KeyRange base, own;
    FactorTable factors;
};

// A stretch of one key range and its sums so far, whole blocks; null where nothing is wanted.
struct KeySums {
    std::int64_t first = 0, last = 0;
    float* key = nullptr;    // [last - first][round_up(head_dim, Kernel::columns)]
    float* value = nullptr;  // [last - first][round_up(value_dim, Kernel::columns)]
};

// Tiles whose gradients one thread adds up, one after the other: those of one key head, a stretch of them.
struct Part {
    std::int64_t key_batch = 0, key_head = 0;
    std::int64_t first_tile = 0, last_tile = 0;
    std::int64_t first_variant = 0, last_variant = 0;  // rows of the factors, the last one included
    KeySums base, own;
    float* factor = nullptr;  // [variants][1 | query heads of the key head][factor_keys]; null: not wanted
};

struct GradientJob {
    const GradientParams* params = nullptr;
    KeyRange base, own;  // all blocks laid out for the backward
    FactorTable factors;
    const Tile* tiles = nullptr;
};

struct PackedSizes {
    std::size_t key = 0, block = 0;  // bytes of a block's keys, and of keys and values together
};

// One instruction set and one type of product.
struct Kernel {
    const char* name;
    int tile_rows, block_keys;
    PackedSizes (*packed_sizes)(const AttentionParams&);
    void (*pack_block)(const AttentionParams&, const KeyRange&, std::int64_t batch, std::int64_t head,
                       std::int64_t block, std::byte* to);
    std::size_t (*scratch_size)(const AttentionParams&);
    // `rows`: what `describe_rows` says of the tile
    void (*run_tile)(const Job&, const Tile&, const Row* rows, std::int64_t key_head, std::byte* scratch);
    // The backward: a block takes `gradient_block_size` bytes, `rows` has room for those of a tile.
    int columns;
    std::size_t (*gradient_block_size)(const AttentionParams&);
    void (*pack_gradient_block)(const AttentionParams&, const KeyRange&, std::int64_t batch, std::int64_t head,
                                std::int64_t block, std::byte* to);
    std::size_t (*gradient_scratch_size)(const GradientParams&);
    void (*run_part)(const GradientJob&, const Part&, Row* rows, std::byte* scratch);
    // Writes `count` numbers, each the sum of one from every list times `scale`.
    void (*write_sums)(DType, const float* const* lists, int num_lists, std::int64_t count, float scale, void* to);
    void (*begin_thread)();  // null: nothing to do
    void (*end_thread)();
};

constexpr std::size_t kAlignment = 64;
constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace atman::cpu
