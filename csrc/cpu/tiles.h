// AMX: the product on tile registers, 16 rows of 64 bytes each. See `products.h` for the layouts of A, B and C.
//
// With ATMAN_EMULATE_AMX the registers are arrays: the tests check the arithmetic of the addresses on any processor
// with AVX-512. Tile numbers are literals, since the compilers' intrinsics paste them into the instruction.

#pragma once

namespace atman::cpu::ATMAN_ISA {

constexpr int kTileSize = 16;  // rows, and 4-byte columns

#if defined(ATMAN_EMULATE_AMX)
static thread_local float g_tiles[8][kTileSize][kTileSize];

static void emulated_load(int tile, const void* from, std::int64_t stride) {
    for (int i = 0; i < kTileSize; ++i)
        std::memcpy(g_tiles[tile][i], static_cast<const std::byte*>(from) + i * stride, sizeof g_tiles[tile][i]);
}
static void emulated_store(int tile, void* to, std::int64_t stride) {
    for (int i = 0; i < kTileSize; ++i)
        std::memcpy(static_cast<std::byte*>(to) + i * stride, g_tiles[tile][i], sizeof g_tiles[tile][i]);
}
// The instruction takes subnormal numbers for 0.
static float emulated_read(std::uint16_t x) { return (x & 0x7f80) == 0 ? 0.0f : from_bfloat16(x); }

static void emulated_multiply(int c, int a, int b) {
    for (int i = 0; i < kTileSize; ++i)
        for (int k = 0; k < kTileSize; ++k)
            for (int j = 0; j < kTileSize; ++j) {
                std::uint16_t left[2], right[2];
                std::memcpy(left, &g_tiles[a][i][k], sizeof left);
                std::memcpy(right, &g_tiles[b][k][j], sizeof right);
                for (int e = 0; e < 2; ++e) g_tiles[c][i][j] += emulated_read(left[e]) * emulated_read(right[e]);
            }
}
#define ATMAN_TILE_ZERO(tile) std::memset(g_tiles[tile], 0, sizeof g_tiles[tile])
#define ATMAN_TILE_LOAD emulated_load
#define ATMAN_TILE_STORE emulated_store
#define ATMAN_TILE_MULTIPLY emulated_multiply
static void begin_thread() {}
static void end_thread() {}
#else
#define ATMAN_TILE_ZERO _tile_zero
#define ATMAN_TILE_LOAD _tile_loadd
#define ATMAN_TILE_STORE _tile_stored
#define ATMAN_TILE_MULTIPLY _tile_dpbf16ps

// All eight registers at their full size: rows that are not needed hold anything, and spoil only rows of C
// that nobody reads.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// A constant, since GCC before 14 believes that _tile_loadconfig reads 8 bytes: of a local variable it stores no more
// (GCC bug 114098).
static void begin_thread() {
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
}
static void end_thread() { _tile_release(); }
#endif

// Two tiles of rows by two of columns: registers 0-3 are C, 4-5 A, 6-7 B. A's chunks have rows of `kLine` units and are
// `next` units apart.
template <int kLine>
static void multiply_group(int rows, const Unit* a, std::int64_t next, const Unit* b, float* c, std::int64_t c_row,
                           int first, int last, bool fresh) {
    static_assert(kRows == 2 * kTileSize && kColumns == 2 * kTileSize && kLine % kTileSize == 0);
    const bool lower = rows > kTileSize;
    const std::int64_t a_stride = kLine * sizeof(Unit), b_stride = kColumns * sizeof(Unit);
    const std::int64_t c_stride = c_row * static_cast<std::int64_t>(sizeof(float));
    float* const c_lower = c + kTileSize * c_row;
    // GCC's _tile_loadd does not say that it reads memory: what is stored in A, B and C must not move behind it.
    __asm__ volatile("" ::: "memory");
    if (fresh) {
        ATMAN_TILE_ZERO(0);
        ATMAN_TILE_ZERO(1);
        ATMAN_TILE_ZERO(2);
        ATMAN_TILE_ZERO(3);
    } else {
        ATMAN_TILE_LOAD(0, c, c_stride);
        ATMAN_TILE_LOAD(1, c + kTileSize, c_stride);
        if (lower) {
            ATMAN_TILE_LOAD(2, c_lower, c_stride);
            ATMAN_TILE_LOAD(3, c_lower + kTileSize, c_stride);
        }
    }
    for (int k = first; k < last; k += kTileSize) {
        const Unit* left = a + k / kLine * next + k % kLine;
        const Unit* right = b + static_cast<std::int64_t>(k) * kColumns;
        ATMAN_TILE_LOAD(6, right, b_stride);
        ATMAN_TILE_LOAD(7, right + kTileSize, b_stride);
        ATMAN_TILE_LOAD(4, left, a_stride);
        ATMAN_TILE_MULTIPLY(0, 4, 6);
        ATMAN_TILE_MULTIPLY(1, 4, 7);
        if (lower) {
            ATMAN_TILE_LOAD(5, left + kTileSize * kLine, a_stride);
            ATMAN_TILE_MULTIPLY(2, 5, 6);
            ATMAN_TILE_MULTIPLY(3, 5, 7);
        }
    }
    ATMAN_TILE_STORE(0, c, c_stride);
    ATMAN_TILE_STORE(1, c + kTileSize, c_stride);
    if (lower) {
        ATMAN_TILE_STORE(2, c_lower, c_stride);
        ATMAN_TILE_STORE(3, c_lower + kTileSize, c_stride);
    }
}

template <int kCount>
static void multiply(int rows, const Unit* a, const Unit* b, float* c, std::int64_t c_row, int first, int last,
                     bool fresh) {
    multiply_group<kChunk>(rows, a, kRows * kChunk, b, c, c_row, first, last, fresh);
}

}  // namespace atman::cpu::ATMAN_ISA
