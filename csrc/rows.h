// Which keys a query row sees: two intervals, one in the base and one among the pack's own rows. Causality, windows,
// prefix lengths and variants all come down to their ends. One definition for every kernel, on host and device.

#pragma once

#include <cstdint>

#include "params.h"
#include "suppression.h"

namespace atman {

// The keys that one row sees in one key range (the base, or the pack's own rows): [first, last), and what must be
// added to a key's index to get its absolute position.
struct Visible {
    std::int64_t first = 0, last = 0, to_position = 0;
    ATMAN_INLINE_MEMBER bool empty() const { return first >= last; }
};

// One query row: where its factors and biases are found, and what it sees.
struct Row {
    std::int64_t index = 0;     // in the query
    std::int64_t variant = 0;   // row of the factors: variant, or batch entry
    std::int64_t bias_row = 0;  // row of the position bias
    Visible base, own;
};

ATMAN_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
ATMAN_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

ATMAN_INLINE Row dense_row(const AttentionParams& p, std::int64_t batch, std::int64_t index) {
    const std::int64_t position = index + p.keys - p.rows;  // the last query stands at the last key
    Row row;
    row.index = row.bias_row = index;
    row.variant = batch;
    row.base.last = p.keys;
    if (p.is_causal) row.base.last = smaller(p.keys, position + 1);
    if (p.sliding_window > 0) {
        row.base.first = larger(0, position - p.sliding_window + 1);
        if (!p.is_causal) row.base.last = smaller(p.keys, position + p.sliding_window);
    }
    return row;
}

ATMAN_INLINE Row packed_row(const AttentionParams& p, std::int64_t variant, std::int64_t index) {
    const std::int64_t start = p.suffix_starts[variant], end = p.suffix_starts[variant + 1];
    const std::int64_t prefix = p.prefix_lengths[variant], base = p.base_starts[variant];
    const std::int64_t position = prefix + index - start;
    const std::int64_t lowest = p.sliding_window > 0 ? larger(0, position - p.sliding_window + 1) : 0;
    Row row;
    row.index = index;
    row.variant = variant;
    row.bias_row = position;
    row.base = {base + lowest, base + prefix, -base};
    row.own = {start + larger(0, lowest - prefix), p.is_causal ? index + 1 : end, prefix - start};
    if (!p.is_causal && p.sliding_window > 0) row.own.last = smaller(end, index + p.sliding_window);
    return row;
}

// The variant that a row of the pack belongs to; empty suffixes are passed over.
ATMAN_INLINE std::int64_t variant_of(const AttentionParams& p, std::int64_t index) {
    if (p.row_variant) return p.row_variant[index];
    std::int64_t low = 0, high = p.variants;  // suffix_starts[low] <= index < suffix_starts[high]
    while (high - low > 1) {
        const std::int64_t middle = (low + high) / 2;
        if (p.suffix_starts[middle] <= index) low = middle;
        else high = middle;
    }
    return low;
}

ATMAN_INLINE Row describe_row(const AttentionParams& p, std::int64_t batch, std::int64_t index) {
    return p.variants == 0 ? dense_row(p, batch, index) : packed_row(p, variant_of(p, index), index);
}

}  // namespace atman
