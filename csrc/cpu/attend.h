// One tile of query rows against all keys that it sees: the algorithm, in terms of vectors and products.
//
// Rows are taken in groups of `kRows`, as many as a product keeps in registers: all query heads of a key head for one
// position, then the next position. Block of keys by block of keys, and group by group, scores are made, turned into
// weights (suppression, masks, online softmax), and multiplied with the values. Scores exist for one group and one
// block at a time.

#pragma once

#include "packing.h"

namespace atman::cpu::ATMAN_ISA {

static_assert(kChunk * kElements == kBlockKeys, "a row of weights is one chunk of the second product");
static_assert(kColumns % (kElements * kUnitStep) == 0, "the second product reads no weights beyond a panel");
static_assert(kLanes <= kMostLanes, "a vector of factors reaches no further than their logarithms do");

struct Columns {
    int first, last;
    bool empty() const { return first >= last; }
};

// One row of a tile for one query head: what stays the same for all keys. Pointers are null where there is nothing.
struct Line {
    const Row* row;
    std::int64_t head;
    const float* factor;  // its row: ln c for log-additive suppression, else c
    const std::uint8_t* touched;
    const float* bias;
};

static Line describe_line(const AttentionParams& p, const FactorTable& table, std::int64_t batch, const Row& row,
                          std::int64_t head) {
    Line line{&row, head, nullptr, nullptr, nullptr};
    if (table.touched) {
        const std::int64_t factor_head = table.heads > 1 ? head : 0, at = row.variant * table.heads + factor_head;
        line.touched = table.touched + at * table.flags;
        line.factor = table.logs
                          ? table.logs + at * table.keys
                          : p.factor + row.variant * p.factor_strides.batch + factor_head * p.factor_strides.head;
    }
    if (p.position_bias)
        line.bias = p.position_bias + batch * p.bias_strides.batch + head * p.bias_strides.head +
                    row.bias_row * p.bias_strides.row;
    return line;
}

// Memory of one thread, for one tile. M is the number of the tile's rows over all heads, rounded up to groups.
struct Scratch {
    Line* lines;       // [M]
    Columns* visible;  // [kRows], what a group's rows see of the block at hand
    Unit* query;       // [M / kRows groups][chunks][kRows][kChunk]
    float* output;     // [M][value columns], the weighted values so far
    float* sum;        // [M][kLanes], of the weights so far, lane by lane
    float* maximum;    // [M], of the scores so far
    float* minimum;    // [M], of all visible scores: for shifted suppression
    float* scores;     // [kRows][kBlockKeys]
    Unit* weights;     // the same in units; floats stay where they are
    std::byte* block;  // one packed block
    std::size_t size;
};

static int query_chunks(const AttentionParams& p) { return static_cast<int>(round_up(head_units(p), kChunk)) / kChunk; }

static Scratch lay_out_scratch(const AttentionParams& p, std::byte* at) {
    const std::int64_t heads = p.query_heads / p.key_heads;
    const std::int64_t positions = kTileRows / heads > 0 ? kTileRows / heads : 1;
    const std::size_t rows = static_cast<std::size_t>(round_up(positions * heads, kRows));
    std::size_t size = 0;
    const auto take = [&](std::size_t bytes) {
        std::byte* here = at + size;
        size += aligned(bytes);
        return here;
    };
    Scratch s;
    s.lines = reinterpret_cast<Line*>(take(rows * sizeof(Line)));
    s.visible = reinterpret_cast<Columns*>(take(kRows * sizeof(Columns)));
    s.query = reinterpret_cast<Unit*>(take(rows * static_cast<std::size_t>(query_chunks(p)) * kChunk * sizeof(Unit)));
    s.output = reinterpret_cast<float*>(take(rows * static_cast<std::size_t>(value_columns(p)) * sizeof(float)));
    s.sum = reinterpret_cast<float*>(take(rows * kLanes * sizeof(float)));
    s.maximum = reinterpret_cast<float*>(take(rows * sizeof(float)));
    s.minimum = reinterpret_cast<float*>(take(rows * sizeof(float)));
    s.scores = reinterpret_cast<float*>(take(kRows * kBlockKeys * sizeof(float)));
    s.weights = kElements == 1 ? reinterpret_cast<Unit*>(s.scores)
                               : reinterpret_cast<Unit*>(take(kRows * kChunk * sizeof(Unit)));
    s.block = take(packed_sizes(p).block);
    s.size = size;
    return s;
}

static std::size_t scratch_size(const AttentionParams& p) { return lay_out_scratch(p, nullptr).size; }

// What everything below looks at.
struct Task {
    const Job& job;
    const AttentionParams& p;
    const Tile& tile;
    const Row* rows;
    std::int64_t key_head;
    int heads;  // query heads of the key head
    int count;  // rows over all heads
    Scratch scratch;
    float unit, units;  // what a score in memory is worth, see `score_unit`; and 1 / that

    const Line& line(int m) const { return scratch.lines[m]; }
    // Whether scores are scaled, capped and biased in memory.
    bool finishes() const { return unit != p.scale || p.softcap != 0.0f || p.position_bias; }
};

// A block of one key range, as a tile sees it.
struct Block {
    const KeyRange& range;
    Visible Row::* keys;  // which of a row's two ranges
    std::int64_t first;   // key
    const Unit *key, *value;
};

// What row m sees of a block.
ATMAN_INLINE Columns visible_columns(const Task& t, const Block& b, int m) {
    const Visible& keys = t.line(m).row->*b.keys;
    const std::int64_t first = keys.first - b.first, last = keys.last - b.first;
    return {static_cast<int>(first < 0            ? 0
                             : first > kBlockKeys ? kBlockKeys
                                                  : first),
            static_cast<int>(last < 0            ? 0
                             : last > kBlockKeys ? kBlockKeys
                                                 : last)};
}

// From the first to the last column that some row of a group sees.
static Columns group_columns(const Task& t, const Block& b, int group, int rows) {
    Columns all{kBlockKeys, 0};
    for (int i = 0; i < rows; ++i) {
        const Columns c = t.scratch.visible[i] = visible_columns(t, b, group * kRows + i);
        if (c.empty()) continue;
        all.first = c.first < all.first ? c.first : all.first;
        all.last = c.last > all.last ? c.last : all.last;
    }
    return all;
}

// What has to be computed for it: whole panels.
ATMAN_INLINE Columns whole_panels(Columns seen) {
    return {seen.first / kColumns * kColumns, (seen.last + kColumns - 1) / kColumns * kColumns};
}

static void multiply_scores(const Task& t, const Block& b, int group, int rows, Columns columns) {
    const int units = head_units(t.p);
    const Unit* query = t.scratch.query + static_cast<std::int64_t>(group) * query_chunks(t.p) * kRows * kChunk;
    for (int c = columns.first; c < columns.last; c += kColumns)
        multiply<kRows>(rows, query, b.key + static_cast<std::int64_t>(c / kColumns) * units * kColumns,
                        t.scratch.scores + c, kBlockKeys, 0, units, true);
}

static void multiply_values(const Task& t, const Block& b, int group, int rows, Columns seen) {
    constexpr int kStep = kElements * kUnitStep;
    const int width = value_columns(t.p), first = seen.first / kStep * kUnitStep;
    const int last = (seen.last + kStep - 1) / kStep * kUnitStep;
    float* output = t.scratch.output + static_cast<std::int64_t>(group) * kRows * width;
    for (int c = 0; c < width; c += kColumns)
        multiply<kRows>(rows, t.scratch.weights,
                        b.value + static_cast<std::int64_t>(c / kColumns) * kBlockUnits * kColumns, output + c, width,
                        first, last, false);
}

// --- scores of one row in one block ---
//
// Where there is neither softcap nor bias, scores stay as the product made them until they are exponentiated: adding
// ln c / scale to q.k, multiplying it with c, and the shifted transform are what they would be on scale * q.k.

// What one unit of a score in memory is worth.
static float score_unit(const AttentionParams& p) {
    const bool linear = p.softcap == 0.0f && !p.position_bias && p.scale > 1e-10f && p.scale < 1e10f;
    return linear ? p.scale : 1.0f;
}

// Everything beside the product that a row's scores depend on. Pointers are null where there is nothing to do.
struct RowScores {
    const AttentionParams& p;
    float* scores;  // column 0
    Columns computed, visible;
    float unit, units;
    const float* factor = nullptr;  // at its row; column c stands at factor_at + c
    const std::uint8_t* touched = nullptr;
    std::int64_t factor_at = 0, factor_size = 0;
    const float* bias = nullptr;
    std::int64_t bias_at = 0, bias_size = 0;
    const std::uint8_t* mask = nullptr;  // at column 0
    std::int64_t mask_size = 0;
    float minimum = 0.0f;
};

// The absolute position of a block's first key, as a row counts.
ATMAN_INLINE std::int64_t position_of(const Line& line, const Block& b) {
    return b.first + (line.row->*b.keys).to_position;
}

// Which flags stand for a row's columns. Those of other variants, which the row does not see, may be before position 0.
struct Flags {
    std::int64_t first, last;
    Flags(std::int64_t position, Columns columns, std::int64_t keys)
        : first(larger(0, position + columns.first) / kFlagKeys),
          last((smaller(position + columns.last, keys) + kFlagKeys - 1) / kFlagKeys) {}
};

ATMAN_INLINE RowScores describe_scores(const Task& t, const Block& b, int m, Columns computed) {
    const AttentionParams& p = t.p;
    const Line& line = t.line(m);
    RowScores s{p, t.scratch.scores + m % kRows * kBlockKeys, computed, t.scratch.visible[m % kRows], t.unit, t.units};
    const std::int64_t position = position_of(line, b);
    s.factor = line.factor;
    s.touched = line.touched;
    s.factor_at = position;
    s.factor_size = t.job.factors.keys;
    s.bias = line.bias;
    s.bias_at = position;
    s.bias_size = p.bias_keys;
    if (p.key_mask) {
        s.mask = p.key_mask + t.tile.batch * p.keys + b.first;
        s.mask_size = p.keys - b.first;
    }
    s.minimum = t.scratch.minimum[m];
    return s;
}

ATMAN_INLINE Vec bias_at(const RowScores& s, int column) {
    return s.p.bias_key_stride ? load_within(s.bias, s.bias_at + column, s.bias_size) : splat(*s.bias);
}

// Scale, softcap, bias, where scores do not stay as they are.
static void finish_row(const RowScores& s) {
    for (int c = s.computed.first; c < s.computed.last; c += kLanes) {
        Vec score = load(s.scores + c) * s.p.scale;
        if (s.p.softcap > 0.0f) score = s.p.softcap * hyperbolic_tangent(score / s.p.softcap);
        if (s.bias) score += bias_at(s, c);
        store(s.scores + c, score);
    }
}

// Suppression, where factors are not 1.
template <Mode kMode>
static void suppress_row(const RowScores& s) {
    const Flags flags(s.factor_at, s.computed, s.factor_size);
    int next = s.computed.first;  // columns before it are done
    for (std::int64_t i = flags.first; i < flags.last; ++i) {
        if (!s.touched[i]) continue;
        const std::int64_t first = i * kFlagKeys - s.factor_at, last = first + kFlagKeys;
        if (first > next) next = static_cast<int>(first) / kLanes * kLanes;
        for (; next < last && next < s.computed.last; next += kLanes) {
            const Vec score = load(s.scores + next);
            const Vec factor = load_within(s.factor, s.factor_at + next, s.factor_size);
            Vec suppressed;
            if constexpr (kMode == Mode::log_additive) suppressed = suppress_log_additive(score, factor * s.units);
            if constexpr (kMode == Mode::multiplicative) suppressed = suppress_multiplicative(score, factor);
            if constexpr (kMode == Mode::shifted) suppressed = suppress_shifted(score, factor, splat(s.minimum));
            store(s.scores + next, suppressed);
        }
    }
}

// Overwrites what the row does not see.
static void hide_row(const RowScores& s, float with) {
    for (int c = s.computed.first; c < s.visible.first && c < s.computed.last; c += kLanes)
        store(s.scores + c, lane_numbers() + c < s.visible.first ? splat(with) : load(s.scores + c));
    const int last = s.visible.last / kLanes * kLanes;
    for (int c = last > s.computed.first ? last : s.computed.first; c < s.computed.last; c += kLanes)
        store(s.scores + c, lane_numbers() + c >= s.visible.last ? splat(with) : load(s.scores + c));
    if (!s.mask && !s.bias) return;
    for (int c = s.computed.first; c < s.computed.last; c += kLanes) {
        IntVec hidden{};
        if (s.bias) hidden = bias_at(s, c) == kNegativeInfinity;
        if (s.mask) {
            for (int i = 0; i < kLanes; ++i) hidden[i] |= c + i < s.mask_size && s.mask[c + i] ? 0 : -1;
        }
        store(s.scores + c, hidden ? splat(with) : load(s.scores + c));
    }
}

// The weights of one panel's columns.
ATMAN_INLINE void store_weights(Unit* row, int column, const Vec (&weights)[kVectors]) {
#if defined(ATMAN_PAIRS)
    static_assert(kVectors == 2);
    const __m512bh narrow = _mm512_cvtne2ps_pbh((__m512)weights[1], (__m512)weights[0]);
    std::memcpy(row + column / kElements, &narrow, sizeof narrow);
#else
    for (int j = 0; j < kVectors; ++j) store(row + column + j * kLanes, weights[j]);
#endif
}

// 2^((score - top) powers); adds them up.
ATMAN_INLINE Vec exponentiate(const float* scores, Unit* weights, Columns columns, float top, float powers) {
    Vec sum[kVectors] = {};
    for (int c = columns.first; c < columns.last; c += kColumns) {
        Vec weight[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
            weight[j] = exponential2((load(scores + c + j * kLanes) - top) * powers);
            sum[j] += weight[j];
        }
        store_weights(weights, c, weight);
    }
    return sum[0] + sum[1];
}

static void shrink_output(const Task& t, int m, Vec by) {
    const int width = value_columns(t.p);
    float* output = t.scratch.output + static_cast<std::int64_t>(m) * width;
    for (int c = 0; c < width; c += kLanes) store(output + c, load(output + c) * by);
    float* sum = t.scratch.sum + static_cast<std::int64_t>(m) * kLanes;
    store(sum, load(sum) * by);
}

// The largest scores of a row, lane by lane.
ATMAN_INLINE Vec row_maxima(const float* scores, Columns columns) {
    Vec top[kVectors] = {splat(kNegativeInfinity), splat(kNegativeInfinity)};
    for (int c = columns.first; c < columns.last; c += kColumns)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) top[j] = maximum(top[j], load(scores + c + j * kLanes));
    return maximum(top[0], top[1]);
}

// Whether anything is to be done to a row's scores in a block: for most rows and blocks, nothing is.
ATMAN_INLINE bool changes_scores(const Task& t, const Block& b, int m, Columns computed) {
    const Columns visible = t.scratch.visible[m % kRows];
    if (t.finishes() || t.p.key_mask || visible.first > computed.first || visible.last < computed.last) return true;
    const Line& line = t.line(m);
    if (!line.touched) return false;
    const Flags flags(position_of(line, b), computed, t.job.factors.keys);
    for (std::int64_t i = flags.first; i < flags.last; ++i)
        if (line.touched[i]) return true;
    return false;
}

// A row's scores as the softmax sees them.
static void suppress_and_hide(const Task& t, const RowScores& s) {
    if (t.finishes()) finish_row(s);
    if (s.factor) {
        if (t.p.mode == Mode::log_additive) suppress_row<Mode::log_additive>(s);
        if (t.p.mode == Mode::multiplicative) suppress_row<Mode::multiplicative>(s);
        if (t.p.mode == Mode::shifted) suppress_row<Mode::shifted>(s);
    }
    hide_row(s, kNegativeInfinity);
}

// The online softmax of a group of rows, from scores to weights.
static void weigh_group(const Task& t, const Block& b, int group, int rows, Columns computed) {
    const int first = group * kRows;
    for (int i = 0; i < rows; ++i) {
        const int m = first + i;
        float& top = t.scratch.maximum[m];
        if (changes_scores(t, b, m, computed)) suppress_and_hide(t, describe_scores(t, b, m, computed));
        const Vec tops = row_maxima(t.scratch.scores + i * kBlockKeys, computed);
        const float candidate = exceeds(tops, top) ? largest(tops) : top;
        if (candidate > top) {  // beside a NaN it need not be
            const Vec fall = splat((top - candidate) * t.unit * kPerLn2);
            if (top != kNegativeInfinity) shrink_output(t, m, exponential2(fall));  // else there is nothing yet
            top = candidate;
        }
        // Nothing seen yet: exp(-inf + inf) would be NaN. A NaN, which the maximum passes over, makes its row one.
        const float from = top == kNegativeInfinity ? 0.0f : top;
        float* sum = t.scratch.sum + static_cast<std::int64_t>(m) * kLanes;
        store(sum, load(sum) + exponentiate(t.scratch.scores + i * kBlockKeys, t.scratch.weights + i * kChunk, computed,
                                            from, t.unit * kPerLn2));
    }
}

static void lower_minimum(const Task& t, const Block& b, int m, Columns computed) {
    const RowScores s = describe_scores(t, b, m, computed);
    if (t.finishes()) finish_row(s);
    hide_row(s, -kNegativeInfinity);
    Vec least = splat(-kNegativeInfinity);
    for (int c = computed.first; c < computed.last; c += kLanes) least = minimum(least, load(s.scores + c));
    float& lowest = t.scratch.minimum[m];
    const float found = smallest(least);
    if (found < lowest) lowest = found;
}

// --- a tile ---

template <class Visit>
static void visit_groups(const Task& t, const Block& b, Visit visit) {
    for (int group = 0; group * kRows < t.count; ++group) {
        const int rows = t.count - group * kRows < kRows ? t.count - group * kRows : kRows;
        const Columns seen = group_columns(t, b, group, rows);
        if (seen.empty()) continue;
        const Columns computed = whole_panels(seen);
        multiply_scores(t, b, group, rows, computed);
        visit(group, rows, seen, computed);
    }
}

// Calls `visit` with every block of a key range that some row of the tile sees.
template <class Visit>
static void visit_blocks(const Task& t, const KeyRange& range, Visible Row::* keys, Visit visit) {
    std::int64_t first = range.keys, last = 0;
    for (int m = 0; m < t.count; m += t.heads) {
        const Visible& seen = t.line(m).row->*keys;
        if (seen.empty()) continue;
        first = seen.first < first ? seen.first : first;
        last = seen.last > last ? seen.last : last;
    }
    const PackedSizes sizes = packed_sizes(t.p);
    const std::int64_t batch = t.p.key_batch > 1 ? t.tile.batch : 0;
    for (std::int64_t i = first / kBlockKeys; i * kBlockKeys < last; ++i) {
        const std::byte* at = t.scratch.block;
        if (range.blocks) {
            const std::int64_t index = (batch * t.p.key_heads + t.key_head) * range.num_blocks() + i;
            at = range.blocks + static_cast<std::size_t>(index) * sizes.block;
        } else {
            pack_block(t.p, range, batch, t.key_head, i, t.scratch.block);
        }
        const Unit *key = reinterpret_cast<const Unit*>(at), *value = reinterpret_cast<const Unit*>(at + sizes.key);
        visit(Block{range, keys, i * kBlockKeys, key, value});
    }
}

template <class Visit>
static void visit_keys(const Task& t, Visit visit) {
    visit_blocks(t, t.job.base, &Row::base, visit);
    visit_blocks(t, t.job.own, &Row::own, visit);
}

static void describe_lines(const Task& t) {
    for (int m = 0; m < t.count; ++m)
        t.scratch.lines[m] =
            describe_line(t.p, t.job.factors, t.tile.batch, t.rows[m / t.heads], t.key_head * t.heads + m % t.heads);
}

static void load_queries(const Task& t) {
    constexpr std::int64_t kSpan = kChunk * kElements;  // elements of a chunk
    const std::int64_t group_size = static_cast<std::int64_t>(query_chunks(t.p)) * kRows * kChunk;
    const std::int64_t units = head_units(t.p);
    with_storage(t.p.dtype, [&](auto storage) {
        typedef decltype(storage) Storage;
        for (int m = 0; m < t.count; ++m) {
            const auto* row =
                row_of<Storage>(t.p.query, t.p.query_strides, t.tile.batch, t.line(m).head, t.line(m).row->index);
            Unit* to = t.scratch.query + m / kRows * group_size + m % kRows * kChunk;
            for (std::int64_t d = 0; d < t.p.head_dim; d += kSpan, to += kRows * kChunk) {
                const std::int64_t elements = smaller(kSpan, t.p.head_dim - d), whole = elements / kElements;
                const std::int64_t padded = smaller(kChunk, units - d / kElements);
                std::memset(to + whole, 0, static_cast<std::size_t>(padded - whole) * sizeof(Unit));
                spread_row<Storage, 1>(row + d, elements, to);
            }
        }
    });
}

static void start_rows(const Task& t) {
    const std::size_t rows = static_cast<std::size_t>(t.count), width = static_cast<std::size_t>(value_columns(t.p));
    std::memset(t.scratch.output, 0, rows * width * sizeof(float));
    std::memset(t.scratch.sum, 0, rows * kLanes * sizeof(float));
    for (int m = 0; m < t.count; ++m) {
        t.scratch.maximum[m] = kNegativeInfinity;
        t.scratch.minimum[m] = -kNegativeInfinity;
    }
}

static void write_row(const Task& t, int m) {
    const float top = t.scratch.maximum[m] * t.unit;
    const float sum = total(load(t.scratch.sum + static_cast<std::int64_t>(m) * kLanes));
    const SoftmaxEnd end = t.p.sinks ? finish_softmax(top, sum, t.p.sinks[t.line(m).head]) : finish_softmax(top, sum);
    const std::int64_t index = t.line(m).row->index, head = t.line(m).head;
    if (t.p.lse) t.p.lse[(t.tile.batch * t.p.query_heads + head) * t.p.rows + index] = end.lse;
    const float* from = t.scratch.output + static_cast<std::int64_t>(m) * value_columns(t.p);
    with_storage(t.p.dtype, [&](auto storage) {
        typedef decltype(storage) Storage;
        const Strides& strides = t.p.output_strides;
        auto* to = static_cast<typename Storage::Stored*>(t.p.output) + t.tile.batch * strides.batch +
                   head * strides.head + index * strides.row;
        for (std::int64_t d = 0; d < t.p.value_dim; ++d) to[d] = Storage::write(from[d] * end.weight);
    });
}

static void run_tile(const Job& job, const Tile& tile, const Row* rows, std::int64_t key_head, std::byte* scratch) {
    const AttentionParams& p = *job.params;
    const int heads = static_cast<int>(p.query_heads / p.key_heads);
    const Task t{job,
                 p,
                 tile,
                 rows,
                 key_head,
                 heads,
                 static_cast<int>(tile.last_row - tile.first_row) * heads,
                 lay_out_scratch(p, scratch),
                 score_unit(p),
                 1.0f / score_unit(p)};
    describe_lines(t);
    load_queries(t);
    start_rows(t);
    if (p.mode == Mode::shifted && job.factors.touched) {
        visit_keys(t, [&](const Block& b) {
            visit_groups(t, b, [&](int group, int in_group, Columns, Columns computed) {
                for (int i = 0; i < in_group; ++i) lower_minimum(t, b, group * kRows + i, computed);
            });
        });
    }
    visit_keys(t, [&](const Block& b) {
        visit_groups(t, b, [&](int group, int in_group, Columns seen, Columns computed) {
            weigh_group(t, b, group, in_group, computed);
            multiply_values(t, b, group, in_group, seen);
        });
    });
    for (int m = 0; m < t.count; ++m) write_row(t, m);
}

}  // namespace atman::cpu::ATMAN_ISA
