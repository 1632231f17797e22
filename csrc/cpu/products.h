// The matrix product that both halves of attention are made of: C += A B, C in float32.
//
// The unit of the inner dimension is a float, or a pair of bfloat16 numbers that one instruction multiplies and adds.
//   A: `kChunk` units of every row, then the next `kChunk` units:  [chunk][kRows][kChunk]
//   B: panels of `kColumns` columns, units down, columns across:   [panel][units][kColumns]
//   C: row-major, leading dimension given
// A's constant row length keeps all of a row group's addresses at fixed offsets from one pointer.

#pragma once

#include "plan.h"
#include "simd.h"

namespace atman::cpu::ATMAN_ISA {

#if defined(ATMAN_PAIRS)
typedef std::uint32_t Unit;  // the lower half is the even element
constexpr int kElements = 2;

ATMAN_INLINE Vec multiply_add(Vec sum, Unit a, const Unit* b) {
    const __m512i left = _mm512_set1_epi32(static_cast<int>(a)), right = _mm512_loadu_si512(b);
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
#else
typedef float Unit;
constexpr int kElements = 1;

ATMAN_INLINE Vec multiply_add(Vec sum, Unit a, const Unit* b) { return sum + a * load(b); }
#endif

// Keys are laid out and visited in blocks of this many. With fast products, what is done once per row and block counts.
#if defined(ATMAN_PAIRS)
constexpr int kBlockKeys = 256;
#else
constexpr int kBlockKeys = 128;
#endif
constexpr int kVectors = 2;                  // per panel
constexpr int kColumns = kVectors * kLanes;  // of a panel
constexpr int kRows = ATMAN_ROWS;            // of a row group: as many as keep all sums in registers
constexpr int kChunk = kBlockKeys / kElements;
constexpr int kTileRows = 96;               // of a tile: 8 groups of 12, 16 of 6, 3 of 32
constexpr int kUnitStep = ATMAN_UNIT_STEP;  // the inner dimension is padded to a multiple of this many units

#if !defined(ATMAN_TILES)
// C[rows, one panel] = (C +) A[rows, first:last] B[first:last, one panel], units counted; all in one chunk of A, whose
// rows are `kLine` units apart.
template <int kCount, bool kFresh, int kLine>
static void multiply_rows(const Unit* a, const Unit* b, float* c, std::int64_t c_row, unsigned units) {
    Vec sum[kCount][kVectors];
#pragma GCC unroll 32
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = kFresh ? Vec{} : load(c + i * c_row + j * kLanes);
    for (const Unit* end = a + units; a != end; ++a, b += kColumns)
#pragma GCC unroll 32
        for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(sum[i][j], a[i * kLine], b + j * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) store(c + i * c_row + j * kLanes, sum[i][j]);
}

// The same over any number of chunks of `kLine` units, `next` units apart. `fresh`: C's old values do not count.
template <int kCount, int kLine>
static void multiply_chunks(const Unit* a, std::int64_t next, const Unit* b, float* c, std::int64_t c_row, int first,
                            int last, bool fresh) {
    for (int k = first; k < last; fresh = false) {
        const int within = k % kLine, count = last - k < kLine - within ? last - k : kLine - within;
        const Unit* left = a + k / kLine * next + within;
        const Unit* right = b + static_cast<std::int64_t>(k) * kColumns;
        if (fresh) {
            multiply_rows<kCount, true, kLine>(left, right, c, c_row, static_cast<unsigned>(count));
        } else {
            multiply_rows<kCount, false, kLine>(left, right, c, c_row, static_cast<unsigned>(count));
        }
        k += count;
    }
}

// The same for 1 .. kCount rows, each number compiled.
template <int kCount>
static void multiply(int rows, const Unit* a, const Unit* b, float* c, std::int64_t c_row, int first, int last,
                     bool fresh) {
    if constexpr (kCount > 1) {
        if (rows < kCount) return multiply<kCount - 1>(rows, a, b, c, c_row, first, last, fresh);
    }
    multiply_chunks<kCount, kChunk>(a, kRows * kChunk, b, c, c_row, first, last, fresh);
}

// The same for a third, two thirds or all of `kRows` rows, whichever is enough: A and C have room for that.
template <int kLine>
static void multiply_group(int rows, const Unit* a, std::int64_t next, const Unit* b, float* c, std::int64_t c_row,
                           int first, int last, bool fresh) {
    constexpr int kThird = kRows / 3;
    static_assert(kThird * 3 == kRows && kBlockKeys % kRows % kThird == 0);
    if (rows <= kThird) return multiply_chunks<kThird, kLine>(a, next, b, c, c_row, first, last, fresh);
    if (rows <= 2 * kThird) return multiply_chunks<2 * kThird, kLine>(a, next, b, c, c_row, first, last, fresh);
    multiply_chunks<kRows, kLine>(a, next, b, c, c_row, first, last, fresh);
}
#endif

}  // namespace atman::cpu::ATMAN_ISA

#if defined(ATMAN_TILES)
#include "tiles.h"
#endif
