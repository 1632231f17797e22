// Queries, keys and values in the layouts of the products (`products.h`), whatever type they are stored in.
//
// A block holds `kBlockKeys` keys of one key head, zeros after the last:
//   keys    [kBlockKeys / kColumns panels][head_dim / kElements units][kColumns keys]
//   values  [value_dim / kColumns panels][kBlockKeys / kElements units][kColumns features]
// Units and columns are padded with zeros to what the products need.

#pragma once

#include "kernel.h"
#include "products.h"

namespace atman::cpu::ATMAN_ISA {

ATMAN_INLINE std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

static int head_units(const AttentionParams& p) {
    return static_cast<int>(round_up(p.head_dim, kElements * kUnitStep) / kElements);
}
static int value_columns(const AttentionParams& p) { return static_cast<int>(round_up(p.value_dim, kColumns)); }
constexpr int kBlockUnits = kBlockKeys / kElements;

static PackedSizes packed_sizes(const AttentionParams& p) {
    const std::size_t key = aligned(sizeof(Unit) * kBlockKeys * static_cast<std::size_t>(head_units(p)));
    const std::size_t value = aligned(sizeof(Unit) * kBlockUnits * static_cast<std::size_t>(value_columns(p)));
    return {key, key + value};
}

// --- storage types ---

struct Float32 {
    typedef float Stored;
    static float read(Stored x) { return x; }
    static Stored write(float x) { return x; }
};
struct BFloat16 {
    typedef std::uint16_t Stored;
    static float read(Stored x) { return from_bfloat16(x); }
    static Stored write(float x) { return to_bfloat16(x); }
};
struct Float16 {
    typedef std::uint16_t Stored;
    static float read(Stored x) { return from_float16(x); }
    static Stored write(float x) { return to_float16(x); }
};

template <class Use>
ATMAN_INLINE void with_storage(DType dtype, Use use) {
#if defined(ATMAN_PAIRS)
    (void)dtype;
    use(BFloat16{});  // the only type that is multiplied in pairs
#else
    if (dtype == DType::float32) use(Float32{});
    if (dtype == DType::bfloat16) use(BFloat16{});
    if (dtype == DType::float16) use(Float16{});
#endif
}

// The unit made of elements `first` (and `second`); null reads as zero.
template <class Storage>
ATMAN_INLINE Unit make_unit(const typename Storage::Stored* first, const typename Storage::Stored* second) {
#if defined(ATMAN_PAIRS)
    return static_cast<Unit>(*first) | (second ? static_cast<Unit>(*second) << 16 : 0);
#else
    (void)second;
    return Storage::read(*first);
#endif
}

template <class Storage>
static const typename Storage::Stored* row_of(const void* data, const Strides& strides, std::int64_t batch,
                                              std::int64_t head, std::int64_t row) {
    return static_cast<const typename Storage::Stored*>(data) + batch * strides.batch + head * strides.head +
           row * strides.row;
}

// A row's units, `kStep` apart.
template <class Storage, int kStep>
ATMAN_INLINE void spread_row(const typename Storage::Stored* row, std::int64_t elements, Unit* to) {
    const std::int64_t units = elements / kElements;
    if constexpr (kStep == 1 && sizeof(Unit) == kElements * sizeof(typename Storage::Stored)) {
        std::memcpy(to, row, static_cast<std::size_t>(units) * sizeof(Unit));
    } else {
        for (std::int64_t i = 0; i < units; ++i)
            to[i * kStep] = make_unit<Storage>(row + i * kElements, row + i * kElements + 1);
    }
    if (units * kElements < elements) to[units * kStep] = make_unit<Storage>(row + units * kElements, nullptr);
}

// `count` rows as columns of B: [panels][units][kColumns]. row_at(n) is a pointer to row n.
template <class Storage, class RowAt>
ATMAN_INLINE void pack_columns(RowAt row_at, int count, std::int64_t elements, int units, Unit* to) {
    for (int n = 0; n < count; ++n)
        spread_row<Storage, kColumns>(row_at(n), elements,
                                      to + static_cast<std::int64_t>(n / kColumns) * units * kColumns + n % kColumns);
}

// `count` rows as the inner dimension of B: [elements / kColumns panels][units][kColumns].
template <class Storage, class RowAt>
ATMAN_INLINE void pack_lines(RowAt row_at, int count, std::int64_t elements, int units, Unit* to) {
    const int columns = static_cast<int>(elements);
    for (int n = 0; n < count; n += kElements) {
        const auto* row = row_at(n);
        const auto* next = kElements > 1 && n + 1 < count ? row_at(n + 1) : nullptr;
        for (int c = 0; c < columns; c += kColumns) {
            Unit* line = to + (static_cast<std::int64_t>(c / kColumns) * units + n / kElements) * kColumns;
            const int width = columns - c < kColumns ? columns - c : kColumns;
            if (kElements == 1 || next == nullptr) {
                for (int i = 0; i < width; ++i) line[i] = make_unit<Storage>(row + c + i, nullptr);
            } else {
                for (int i = 0; i < width; ++i) line[i] = make_unit<Storage>(row + c + i, next + c + i);
            }
        }
    }
}

// Zeros wherever a product with `count` keys reads.
static void clear_block(const AttentionParams& p, int count, std::byte* block) {
    const std::size_t line = kColumns * sizeof(Unit), value_panel = kBlockUnits * line;
    const auto key_lines = static_cast<std::size_t>(round_up(count, kColumns) / kColumns * head_units(p));
    const auto value_lines = static_cast<std::size_t>(round_up(count, kElements * kUnitStep) / kElements);
    std::memset(block, 0, key_lines * line);
    std::byte* values = block + packed_sizes(p).key;
    for (int c = 0; c < value_columns(p); c += kColumns, values += value_panel)
        std::memset(values, 0, value_lines * line);
}

static void pack_block(const AttentionParams& p, const KeyRange& range, std::int64_t batch, std::int64_t head,
                       std::int64_t block, std::byte* to) {
    const std::int64_t first = block * kBlockKeys;
    const int count = static_cast<int>(range.keys - first < kBlockKeys ? range.keys - first : kBlockKeys);
    const PackedSizes sizes = packed_sizes(p);
    const bool full = count == kBlockKeys && p.head_dim == head_units(p) * kElements && p.value_dim % kColumns == 0;
    if (!full) clear_block(p, count, to);
    with_storage(p.dtype, [&](auto storage) {
        typedef decltype(storage) Storage;
        const auto key = [&](int n) { return row_of<Storage>(range.key, range.key_strides, batch, head, first + n); };
        const auto value = [&](int n) {
            return row_of<Storage>(range.value, range.value_strides, batch, head, first + n);
        };
        pack_columns<Storage>(key, count, p.head_dim, head_units(p), reinterpret_cast<Unit*>(to));
        pack_lines<Storage>(value, count, p.value_dim, kBlockUnits, reinterpret_cast<Unit*>(to + sizes.key));
    });
}

}  // namespace atman::cpu::ATMAN_ISA
