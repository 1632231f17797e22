// The backward: the rows of one tile against all keys that they see, for every tile of a part.
//
// Everything is turned over: scores are made with keys for rows and queries for columns, so that what the softmax left
// (weights, and the gradients by the scores) lies as three more products read it, without being transposed:
//
//   scores  [keys, rows]  = K Qᵀ          rises [keys, rows] = V dOᵀ, what each weight would bring
//   sums of dV [keys, value_dim] += weights dO      of dK [keys, head_dim] += slopes Q
//   of dQᵀ [head_dim, rows] += Kᵀ slopes            with slopes = the gradients by q·k
//
// Weights are made anew, as exp(score - lse). The rows of a tile are its columns here, in panels of `kColumns`, so that
// one vector holds one key's scores with several queries.

#pragma once

#include "attend.h"

namespace atman::cpu::ATMAN_ISA {

constexpr int kHalf = kChunk / 2;                  // units in a row of A where it is as long as a head
constexpr int kPanelUnits = kColumns / kElements;  // units of a panel's rows, as an inner dimension
constexpr int kBlockGroups = (kBlockKeys + kRows - 1) / kRows;
static_assert(kTileRows % kColumns == 0 && kPanelUnits % kUnitStep == 0);

static int value_units(const AttentionParams& p) {
    return static_cast<int>(round_up(p.value_dim, kElements * kUnitStep) / kElements);
}
static int halves(int units) { return (units + kHalf - 1) / kHalf; }
static int head_columns(const AttentionParams& p) { return static_cast<int>(round_up(p.head_dim, kColumns)); }

// --- a block of keys: three times A ---

struct BlockLayout {
    std::int64_t value, across, units;  // where each begins, and the end
};

// keys [groups][halves][kRows keys][kHalf], values likewise, and keys across [groups of features][kRows features][kChunk]
static BlockLayout block_layout(const AttentionParams& p) {
    BlockLayout layout;
    layout.value = static_cast<std::int64_t>(kBlockGroups) * halves(head_units(p)) * kRows * kHalf;
    layout.across = layout.value + static_cast<std::int64_t>(kBlockGroups) * halves(value_units(p)) * kRows * kHalf;
    layout.units = layout.across + round_up(p.head_dim, kRows) * kChunk;
    return layout;
}

static std::size_t gradient_block_size(const AttentionParams& p) {
    return aligned(static_cast<std::size_t>(block_layout(p).units) * sizeof(Unit));
}

// Rows as rows of A: [groups][halves][kRows][kHalf].
template <class Storage, class RowAt>
ATMAN_INLINE void pack_rows(RowAt row_at, int count, std::int64_t elements, int units, Unit* to) {
    constexpr std::int64_t kSpan = kHalf * kElements;
    for (int n = 0; n < count; ++n) {
        Unit* line = to + static_cast<std::int64_t>(n / kRows) * halves(units) * kRows * kHalf + n % kRows * kHalf;
        for (std::int64_t d = 0; d < elements; d += kSpan, line += kRows * kHalf)
            spread_row<Storage, 1>(row_at(n) + d, smaller(kSpan, elements - d), line);
    }
}

// The same turned over: a feature's row is as long as a block.
template <class Storage, class RowAt>
ATMAN_INLINE void pack_across(RowAt row_at, int count, std::int64_t elements, Unit* to) {
    for (int n = 0; n < count; n += kElements) {
        const auto* row = row_at(n);
        const auto* next = kElements > 1 && n + 1 < count ? row_at(n + 1) : nullptr;
        for (std::int64_t d = 0; d < elements; ++d)
            to[d * kChunk + n / kElements] = make_unit<Storage>(row + d, next ? next + d : nullptr);
    }
}

static void pack_gradient_block(const AttentionParams& p, const KeyRange& range, std::int64_t batch, std::int64_t head,
                                std::int64_t block, std::byte* to) {
    const std::int64_t first = block * kBlockKeys;
    const int count = static_cast<int>(smaller(range.keys - first, kBlockKeys));
    const BlockLayout layout = block_layout(p);
    Unit* units = reinterpret_cast<Unit*>(to);
    const bool full = count == kBlockKeys && p.head_dim == head_units(p) * kElements &&
                      p.value_dim == value_units(p) * kElements && p.head_dim % kRows == 0;
    if (!full) std::memset(to, 0, static_cast<std::size_t>(layout.units) * sizeof(Unit));
    with_storage(p.dtype, [&](auto storage) {
        typedef decltype(storage) Storage;
        const auto key = [&](int n) { return row_of<Storage>(range.key, range.key_strides, batch, head, first + n); };
        const auto value = [&](int n) {
            return row_of<Storage>(range.value, range.value_strides, batch, head, first + n);
        };
        pack_rows<Storage>(key, count, p.head_dim, head_units(p), units);
        pack_rows<Storage>(value, count, p.value_dim, value_units(p), units + layout.value);
        pack_across<Storage>(key, count, p.head_dim, units + layout.across);
    });
}

// --- memory of one thread, for one tile of M rows over all heads, rounded up to panels ---

struct GradientScratch {
    Line* lines;                      // [M]
    Unit *query, *grad;               // Q and dO with rows as columns: [panels][units][kColumns]
    Unit *query_lines, *grad_lines;   // with rows as the inner dimension: [panels of features][M units][kColumns]
    float *scores, *rises;            // [panels][kBlockKeys][kColumns]
    Unit *weights, *slopes;           // the same in pairs along the rows; floats stay where they are
    Unit* slopes_across;              // slopes in pairs along the keys: [panels][kBlockUnits][kColumns]
    float* query_sum;                 // [round_up(head_dim, kRows)][M]
    float *lse, *delta;               // [M]; lse is +inf where a row has no weights
    float *minimum, *ties, *through;  // [M], for shifted suppression, see `Lanes` in `weigh_panel`
    std::int32_t *first, *last;       // [M], what a row sees of the block at hand
    float* factors;                   // of the block: [kBlockKeys], or [panels][kBlockKeys][kColumns]
    float* bias;                      // [panels][kBlockKeys][kColumns]
    Columns* seen;                    // [panels], keys of the block that some row of a panel sees, whole groups
    std::size_t size;
};

static GradientScratch lay_out_gradient_scratch(const GradientParams& g, std::byte* at) {
    const AttentionParams& p = g.forward;
    const std::int64_t heads = p.query_heads / p.key_heads;
    const std::int64_t positions = kTileRows / heads > 0 ? kTileRows / heads : 1;
    const auto rows = static_cast<std::size_t>(round_up(positions * heads, kColumns)), panels = rows / kColumns;
    const std::size_t block = panels * kBlockKeys * kColumns;
    std::size_t size = 0;
    const auto take = [&](auto*& to, std::size_t count) {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(at + size);
        size += aligned(count * sizeof *to);
    };
    GradientScratch s;
    take(s.lines, rows);
    take(s.query, panels * static_cast<std::size_t>(head_units(p)) * kColumns);
    take(s.grad, panels * static_cast<std::size_t>(value_units(p)) * kColumns);
    take(s.query_lines, static_cast<std::size_t>(head_columns(p)) * panels * kPanelUnits);
    take(s.grad_lines, static_cast<std::size_t>(value_columns(p)) * panels * kPanelUnits);
    take(s.scores, block);
    take(s.rises, block);
    if (kElements == 1) {
        s.weights = reinterpret_cast<Unit*>(s.scores);
        s.slopes = s.slopes_across = reinterpret_cast<Unit*>(s.rises);
    } else {
        take(s.weights, block / kElements);
        take(s.slopes, block / kElements);
        take(s.slopes_across, block / kElements);
    }
    take(s.query_sum, static_cast<std::size_t>(round_up(p.head_dim, kRows)) * rows);
    for (float** line : {&s.lse, &s.delta, &s.minimum, &s.ties, &s.through}) take(*line, rows);
    take(s.first, rows);
    take(s.last, rows);
    take(s.factors, p.factor ? block : 0);
    take(s.bias, p.position_bias ? block : 0);
    take(s.seen, panels);
    s.size = size;
    return s;
}

static std::size_t gradient_scratch_size(const GradientParams& g) { return lay_out_gradient_scratch(g, nullptr).size; }

// --- what everything below looks at ---

enum class FactorsOf {
    none,
    tile,
    rows
};  // a block's factors: all 1, one per key for the whole tile, or one per score

struct GradientTask {
    const GradientJob& job;
    const GradientParams& g;
    const AttentionParams& p;
    const Part& part;
    const Tile& tile;
    int heads, count, panels;  // query heads of the key head; rows over all heads, and panels of them
    GradientScratch scratch;
    bool of_query, of_key, of_value, of_factor;

    bool of_scores() const { return of_query || of_key || of_factor; }
    int rows() const { return panels * kColumns; }
    const Line& line(int m) const { return scratch.lines[m]; }
    float* score_at(float* of, int panel, int key) const {
        return of + (static_cast<std::int64_t>(panel) * kBlockKeys + key) * kColumns;
    }
    // Where the sums of a row's line of factors begin.
    float* factor_sums(int m) const {
        const std::int64_t per_variant = p.factor_heads > 1 ? heads : 1;
        const std::int64_t head = p.factor_heads > 1 ? m % heads : 0;
        return part.factor + ((line(m).row->variant - part.first_variant) * per_variant + head) * p.factor_keys;
    }
};

struct GradientBlock {
    const KeyRange& range;
    Visible Row::* keys;
    const KeySums& sums;
    std::int64_t first;  // key
    const Unit *key, *value, *across;
};

ATMAN_INLINE std::int64_t position_of(const Line& line, const GradientBlock& b) {
    return b.first + (line.row->*b.keys).to_position;
}

// --- a tile's rows ---

template <class Storage>
static void load_tile_rows(const GradientTask& t) {
    const AttentionParams& p = t.p;
    const GradientScratch& s = t.scratch;
    const Strides strides{p.query_heads * p.rows * p.value_dim, p.rows * p.value_dim, p.value_dim};
    const auto query = [&](int m) {
        return row_of<Storage>(p.query, p.query_strides, t.tile.batch, t.line(m).head, t.line(m).row->index);
    };
    const auto grad = [&](int m) {
        return row_of<Storage>(t.g.grad_output, strides, t.tile.batch, t.line(m).head, t.line(m).row->index);
    };
    const int units = t.panels * kPanelUnits;
    const std::int64_t columns = static_cast<std::int64_t>(t.panels) * kColumns;
    if (t.count < t.rows() || p.head_dim % kColumns || p.value_dim % kColumns) {
        std::memset(s.query, 0, static_cast<std::size_t>(columns * head_units(p)) * sizeof(Unit));
        std::memset(s.grad, 0, static_cast<std::size_t>(columns * value_units(p)) * sizeof(Unit));
        std::memset(s.query_lines, 0,
                    static_cast<std::size_t>(head_columns(p)) * static_cast<std::size_t>(units) * sizeof(Unit));
        std::memset(s.grad_lines, 0,
                    static_cast<std::size_t>(value_columns(p)) * static_cast<std::size_t>(units) * sizeof(Unit));
    }
    pack_columns<Storage>(query, t.count, p.head_dim, head_units(p), s.query);
    if (t.of_scores()) pack_columns<Storage>(grad, t.count, p.value_dim, value_units(p), s.grad);
    if (t.of_key) pack_lines<Storage>(query, t.count, p.head_dim, units, s.query_lines);
    if (t.of_value) pack_lines<Storage>(grad, t.count, p.value_dim, units, s.grad_lines);
}

static void begin_tile(const GradientTask& t, const Row* rows) {
    const AttentionParams& p = t.p;
    const GradientScratch& s = t.scratch;
    for (int m = 0; m < t.count; ++m) {
        s.lines[m] =
            describe_line(p, t.job.factors, t.tile.batch, rows[m / t.heads], t.part.key_head * t.heads + m % t.heads);
        const Line& line = s.lines[m];
        const std::int64_t at = (t.tile.batch * p.query_heads + line.head) * p.rows + line.row->index;
        s.lse[m] = t.g.lse[at] == kNegativeInfinity ? -kNegativeInfinity : t.g.lse[at];
        s.delta[m] = t.g.delta[at];
    }
    for (int m = t.count; m < t.rows(); ++m) {  // columns that stand for no row: they weigh nothing
        s.lse[m] = -kNegativeInfinity;
        s.delta[m] = 0.0f;
        s.first[m] = s.last[m] = 0;
    }
    for (int m = 0; m < t.rows(); ++m) {
        s.minimum[m] = -kNegativeInfinity;
        s.ties[m] = s.through[m] = 0.0f;
    }
    with_storage(p.dtype, [&](auto storage) { load_tile_rows<decltype(storage)>(t); });
    if (t.of_query)
        std::memset(s.query_sum, 0, static_cast<std::size_t>(round_up(p.head_dim, kRows) * t.rows()) * sizeof(float));
}

static void write_query_rows(const GradientTask& t) {
    const AttentionParams& p = t.p;
    with_storage(p.dtype, [&](auto storage) {
        typedef decltype(storage) Storage;
        for (int m = 0; m < t.count; ++m) {
            const std::int64_t row = (t.tile.batch * p.query_heads + t.line(m).head) * p.rows + t.line(m).row->index;
            auto* to = static_cast<typename Storage::Stored*>(t.g.grad_query) + row * p.head_dim;
            const float* from = t.scratch.query_sum + m;
            for (std::int64_t d = 0; d < p.head_dim; ++d) to[d] = Storage::write(from[d * t.rows()] * p.scale);
        }
    });
}

// --- a block's rows, factors and biases ---

// What every row sees of a block, and each panel, in whole groups of keys. Returns what any row sees.
static Columns find_visible(const GradientTask& t, const GradientBlock& b) {
    const GradientScratch& s = t.scratch;
    Columns all{kBlockKeys, 0};
    for (int panel = 0; panel < t.panels; ++panel) {
        Columns seen{kBlockKeys, 0};
        for (int m = panel * kColumns; m < (panel + 1) * kColumns && m < t.count; ++m) {
            const Visible& keys = t.line(m).row->*b.keys;
            s.first[m] = static_cast<std::int32_t>(larger(0, smaller(keys.first - b.first, kBlockKeys)));
            s.last[m] = static_cast<std::int32_t>(larger(0, smaller(keys.last - b.first, kBlockKeys)));
            if (s.first[m] >= s.last[m]) continue;
            seen.first = s.first[m] < seen.first ? s.first[m] : seen.first;
            seen.last = s.last[m] > seen.last ? s.last[m] : seen.last;
        }
        if (!seen.empty()) {
            const int last = (seen.last + kRows - 1) / kRows * kRows;
            seen = {seen.first / kRows * kRows, last < kBlockKeys ? last : kBlockKeys};
            all.first = seen.first < all.first ? seen.first : all.first;
            all.last = seen.last > all.last ? seen.last : all.last;
        }
        s.seen[panel] = seen;
    }
    return all;
}

// A line's factors at the block's keys, `step` apart: ln c for log-additive suppression, else c.
static void fill_factors(const GradientTask& t, const GradientBlock& b, const Line& line, Columns keys, float* to,
                         int step) {
    const std::int64_t position = position_of(line, b);
    const bool logs = t.p.mode == Mode::log_additive;
    for (int n = keys.first; n < keys.last; ++n) {
        const std::int64_t at = position + n;
        const bool touched = at >= 0 && at < t.job.factors.keys && line.touched[at / kFlagKeys];
        to[n * step] = touched ? line.factor[at] : logs ? 0.0f : 1.0f;
    }
}

static bool one_line(const GradientTask& t) {
    return t.p.factor_heads == 1 && t.line(0).row->variant == t.line(t.count - 1).row->variant;
}

static bool touches(const GradientTask& t, const GradientBlock& b, int m) {
    const Line& line = t.line(m);
    const Flags flags(position_of(line, b), {t.scratch.first[m], t.scratch.last[m]}, t.job.factors.keys);
    for (std::int64_t i = flags.first; i < flags.last; ++i)
        if (line.touched[i]) return true;
    return false;
}

static FactorsOf find_factors(const GradientTask& t, const GradientBlock& b, Columns keys) {
    if (!t.job.factors.touched) return FactorsOf::none;
    bool touched = t.of_factor || t.p.mode == Mode::shifted;
    for (int m = 0; m < t.count && !touched; ++m) touched = t.scratch.first[m] < t.scratch.last[m] && touches(t, b, m);
    if (!touched) return FactorsOf::none;
    if (one_line(t)) {
        fill_factors(t, b, t.line(0), keys, t.scratch.factors, 1);
        return FactorsOf::tile;
    }
    for (int m = 0; m < t.count; ++m)
        fill_factors(t, b, t.line(m), keys, t.score_at(t.scratch.factors, m / kColumns, 0) + m % kColumns, kColumns);
    for (int m = t.count; m < t.rows(); ++m)  // columns that stand for no row
        for (int n = keys.first; n < keys.last; ++n)
            t.score_at(t.scratch.factors, m / kColumns, n)[m % kColumns] = t.p.mode == Mode::log_additive ? 0.0f : 1.0f;
    return FactorsOf::rows;
}

static void find_bias(const GradientTask& t, const GradientBlock& b, Columns keys) {
    for (int m = 0; m < t.rows(); ++m) {
        float* to = t.score_at(t.scratch.bias, m / kColumns, 0) + m % kColumns;
        const float* from = m < t.count ? t.line(m).bias : nullptr;
        const std::int64_t position = from ? position_of(t.line(m), b) : 0;
        for (int n = keys.first; n < keys.last; ++n) {
            const std::int64_t at = t.p.bias_key_stride ? position + n : 0;
            const bool within = from && (t.p.bias_key_stride == 0 || (at >= 0 && at < t.p.bias_keys));
            to[static_cast<std::int64_t>(n) * kColumns] = within ? from[at] : 0.0f;
        }
    }
}

// --- scores into weights and slopes ---

// The lanes of one vector: rows of a panel.
struct RowLanes {
    Vec lse, delta, minimum, ties, through;
    IntVec first, last;

    RowLanes(const GradientScratch& s, int m)
        : lse(load(s.lse + m)),
          delta(load(s.delta + m)),
          minimum(load(s.minimum + m)),
          ties(load(s.ties + m)),
          through(load(s.through + m)) {
        std::memcpy(&first, s.first + m, sizeof first);
        std::memcpy(&last, s.last + m, sizeof last);
    }
    IntVec sees(int key) const { return (IntVec)(first <= key) & (IntVec)(last > key); }
};

// A score as suppression finds it, and what it grows by with q·k.
struct Score {
    Vec value, slope;
    IntVec hidden;
};

template <bool kFinish>
ATMAN_INLINE Score finish_score(const GradientTask& t, int panel, int key, int vector) {
    Score s{load(t.score_at(t.scratch.scores, panel, key) + vector * kLanes) * t.p.scale, splat(1.0f), IntVec{}};
    if constexpr (kFinish) {
        if (t.p.softcap > 0.0f) {
            const Vec bent = hyperbolic_tangent(s.value / t.p.softcap);
            s.value = t.p.softcap * bent;
            s.slope = 1.0f - bent * bent;
        }
        if (t.p.position_bias) {
            const Vec bias = load(t.score_at(t.scratch.bias, panel, key) + vector * kLanes);
            s.value += bias;
            s.hidden = bias == kNegativeInfinity;
        }
    }
    return s;
}

ATMAN_INLINE bool masked(const GradientTask& t, const GradientBlock& b, int key) {
    return t.p.key_mask && (b.first + key >= t.p.keys || !t.p.key_mask[t.tile.batch * t.p.keys + b.first + key]);
}

template <FactorsOf kFactors>
ATMAN_INLINE Vec factor_at(const GradientTask& t, int panel, int key, int vector) {
    if constexpr (kFactors == FactorsOf::tile) return splat(t.scratch.factors[key]);
    return load(t.score_at(t.scratch.factors, panel, key) + vector * kLanes);
}

// Weights and slopes of one panel. `kThrough`: only what goes through the row's minimum is added up.
template <Mode kMode, FactorsOf kFactors, bool kFinish, bool kThrough>
static void weigh_panel(const GradientTask& t, const GradientBlock& b, int panel, Columns keys) {
    const bool of_scores = t.of_scores();
    float* sums = kFactors == FactorsOf::tile && t.of_factor && !kThrough ? t.factor_sums(0) : nullptr;
    const std::int64_t position = position_of(t.line(0), b);
    RowLanes lanes[kVectors] = {RowLanes(t.scratch, panel * kColumns), RowLanes(t.scratch, panel * kColumns + kLanes)};
    for (int n = keys.first; n < keys.last; ++n) {
        const bool key_hidden = masked(t, b, n);
        Vec by_factor{};  // sum over the rows
        for (int j = 0; j < kVectors; ++j) {
            RowLanes& l = lanes[j];
            const Score score = finish_score<kFinish>(t, panel, n, j);
            IntVec seen = l.sees(n) & ~score.hidden;
            if (key_hidden) seen = IntVec{};
            Vec suppressed = score.value, factor = splat(1.0f), above{};
            IntVec removed{};
            if constexpr (kFactors != FactorsOf::none) {
                factor = factor_at<kFactors>(t, panel, n, j);
                if constexpr (kMode == Mode::log_additive) {
                    removed = factor == kNegativeInfinity;
                    suppressed = suppress_log_additive(score.value, removed ? Vec{} : factor);
                }
                if constexpr (kMode == Mode::multiplicative) suppressed = suppress_multiplicative(score.value, factor);
                if constexpr (kMode == Mode::shifted) {
                    above = score.value - l.minimum;
                    suppressed = suppress_shifted(score.value, factor, l.minimum);
                }
            }
            const Vec power = (suppressed - l.lse) * kPerLn2;
            // beyond 2^128 there is infinity: the weight that a removed key would have may be that large
            Vec weight = exponential2(power > 128.0f ? splat(128.0f) : power);
            weight = seen ? weight : Vec{};
            float* const weight_to = t.score_at(t.scratch.scores, panel, n) + j * kLanes;
            float* const slope_to = t.score_at(t.scratch.rises, panel, n) + j * kLanes;
            if (of_scores) {
                Vec slope = weight * (load(slope_to) - l.delta);
                slope = seen ? slope : Vec{};
                if constexpr (kThrough) {
                    l.through += (1.0f - factor) * slope;
                    continue;
                }
                if constexpr (kFactors != FactorsOf::none) {
                    Vec by = slope;  // times 1 / c, or 1 where c = 0, in the end
                    if constexpr (kMode == Mode::multiplicative) by = slope * score.value;
                    if constexpr (kMode == Mode::shifted) by = seen ? slope * above : Vec{};
                    if constexpr (kFactors == FactorsOf::tile) by_factor += by;
                    if constexpr (kFactors == FactorsOf::rows)
                        store(t.score_at(t.scratch.factors, panel, n) + j * kLanes, by);
                    if constexpr (kMode == Mode::log_additive) {
                        weight = removed ? Vec{} : weight;
                        slope = removed ? Vec{} : slope;
                    } else {
                        slope *= factor;
                    }
                    if constexpr (kMode == Mode::shifted)
                        slope += (IntVec)(score.value == l.minimum) & seen ? l.through / l.ties : Vec{};
                }
                store(slope_to, kFinish ? slope * score.slope : slope);
            } else if constexpr (kMode == Mode::log_additive) {
                weight = removed ? Vec{} : weight;
            }
            store(weight_to, weight);
        }
        if (sums && position + n >= 0 && position + n < t.p.factor_keys) sums[position + n] += total(by_factor);
    }
    if constexpr (kThrough)
        for (int j = 0; j < kVectors; ++j) store(t.scratch.through + panel * kColumns + j * kLanes, lanes[j].through);
}

// The smallest score of each row, and how many keys have it.
template <bool kFinish>
static void lower_minima(const GradientTask& t, const GradientBlock& b, int panel, Columns keys) {
    for (int j = 0; j < kVectors; ++j) {
        const int m = panel * kColumns + j * kLanes;
        RowLanes l(t.scratch, m);
        for (int n = keys.first; n < keys.last; ++n) {
            if (masked(t, b, n)) continue;
            const Score score = finish_score<kFinish>(t, panel, n, j);
            const Vec value = (IntVec)(l.sees(n) & ~score.hidden) ? score.value : splat(-kNegativeInfinity);
            l.ties = value < l.minimum ? splat(1.0f) : value == l.minimum ? l.ties + 1.0f : l.ties;
            l.minimum = minimum(value, l.minimum);
        }
        store(t.scratch.minimum + m, l.minimum);
        store(t.scratch.ties + m, l.ties);
    }
}

template <bool kFinish, bool kThrough>
static void weigh(const GradientTask& t, const GradientBlock& b, int panel, Columns keys, FactorsOf factors) {
    const auto with = [&](auto mode) {
        constexpr Mode kMode = decltype(mode)::value;
        if (factors == FactorsOf::tile) weigh_panel<kMode, FactorsOf::tile, kFinish, kThrough>(t, b, panel, keys);
        else weigh_panel<kMode, FactorsOf::rows, kFinish, kThrough>(t, b, panel, keys);
    };
    if constexpr (kThrough) return with(std::integral_constant<Mode, Mode::shifted>{});
    if (factors == FactorsOf::none)
        return weigh_panel<Mode::log_additive, FactorsOf::none, kFinish, false>(t, b, panel, keys);
    if (t.p.mode == Mode::log_additive) with(std::integral_constant<Mode, Mode::log_additive>{});
    if (t.p.mode == Mode::multiplicative) with(std::integral_constant<Mode, Mode::multiplicative>{});
    if (t.p.mode == Mode::shifted) with(std::integral_constant<Mode, Mode::shifted>{});
}

// --- the products ---

static void multiply_to_scores(const GradientTask& t, const Unit* left, const Unit* right, int units, int panel,
                               Columns keys, float* to) {
    const std::int64_t next = kRows * kHalf, group = halves(units) * next;
    for (int n = keys.first; n < keys.last; n += kRows)
        multiply_group<kHalf>(keys.last - n < kRows ? keys.last - n : kRows, left + n / kRows * group, next,
                              right + static_cast<std::int64_t>(panel) * units * kColumns, t.score_at(to, panel, n),
                              kColumns, 0, units, true);
}

// Sums over the rows of a tile: C[keys, features] += A[keys, rows] B[rows, features].
static void multiply_to_keys(const GradientTask& t, const Unit* left, const Unit* right, int width, Columns keys,
                             float* to) {
    const std::int64_t next = static_cast<std::int64_t>(kBlockKeys) * kPanelUnits, units = t.panels * kPanelUnits;
    for (int n = keys.first; n < keys.last; n += kRows) {
        const int rows = keys.last - n < kRows ? keys.last - n : kRows;
        int first = t.panels, last = 0;  // panels that see the group
        for (int panel = 0; panel < t.panels; ++panel) {
            const Columns seen = t.scratch.seen[panel];
            if (seen.empty() || seen.last <= n || seen.first >= n + rows) continue;
            first = panel < first ? panel : first;
            last = panel + 1;
        }
        for (int c = 0; c < width && first < last; c += kColumns)
            multiply_group<kPanelUnits>(rows, left + n * kPanelUnits, next, right + c / kColumns * units * kColumns,
                                        to + static_cast<std::int64_t>(n) * width + c, width, first * kPanelUnits,
                                        last * kPanelUnits, false);
    }
}

static void multiply_to_queries(const GradientTask& t, const GradientBlock& b) {
    constexpr int kStep = kElements * kUnitStep;
    for (int panel = 0; panel < t.panels; ++panel) {
        const Columns seen = t.scratch.seen[panel];
        if (seen.empty()) continue;
        const int first = seen.first / kStep * kUnitStep, last = (seen.last + kStep - 1) / kStep * kUnitStep;
        for (std::int64_t d = 0; d < t.p.head_dim; d += kRows)
            multiply_group<kChunk>(static_cast<int>(smaller(t.p.head_dim - d, kRows)), b.across + d * kChunk,
                                   kRows * kChunk,
                                   t.scratch.slopes_across + static_cast<std::int64_t>(panel) * kBlockUnits * kColumns,
                                   t.scratch.query_sum + d * t.rows() + panel * kColumns, t.rows(), first, last, false);
    }
}

#if defined(ATMAN_PAIRS)
ATMAN_INLINE __m512i narrow_pair(const float* low, const float* high) {
    static_assert(kLanes == 16);
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(high), (__m512)load(low));
}

// Weights and slopes as pairs of bfloat16 numbers: along the rows, and slopes along the keys as well.
static void narrow_panel(const GradientTask& t, int panel, Columns keys) {
    const GradientScratch& s = t.scratch;
    // numbers 0, 16, 1, 17, … of 32: those of two keys for the same row come to lie side by side
    alignas(64) std::uint16_t places[32];
    for (int i = 0; i < 32; ++i) places[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 16);
    const __m512i turned = _mm512_load_si512(places);
    const std::int64_t at = static_cast<std::int64_t>(panel) * kBlockKeys;
    for (int n = keys.first; n < keys.last; n += 2) {
        for (int i = 0; i < 2; ++i) {
            const float *weights = t.score_at(s.scores, panel, n + i), *slopes = t.score_at(s.rises, panel, n + i);
            if (t.of_value)
                _mm512_storeu_si512(s.weights + (at + n + i) * kPanelUnits, narrow_pair(weights, weights + kLanes));
            if (t.of_key)
                _mm512_storeu_si512(s.slopes + (at + n + i) * kPanelUnits, narrow_pair(slopes, slopes + kLanes));
        }
        if (!t.of_query) continue;
        const float *even = t.score_at(s.rises, panel, n), *odd = t.score_at(s.rises, panel, n + 1);
        Unit* to = s.slopes_across + (at + n) / 2 * kColumns;
        for (int j = 0; j < kVectors; ++j)
            _mm512_storeu_si512(to + j * kLanes,
                                _mm512_permutexvar_epi16(turned, narrow_pair(even + j * kLanes, odd + j * kLanes)));
    }
}
#endif

// Zeros where another panel sees keys that this one does not: products read both.
static void clear_panel(const GradientTask& t, int panel, Columns keys) {
    if (keys.empty()) return;
    const std::size_t count = static_cast<std::size_t>(keys.last - keys.first);
    const std::int64_t at = static_cast<std::int64_t>(panel) * kBlockKeys + keys.first;
    std::memset(t.scratch.weights + at * kPanelUnits, 0, count * kPanelUnits * sizeof(Unit));
    std::memset(t.scratch.slopes + at * kPanelUnits, 0, count * kPanelUnits * sizeof(Unit));
}

// Adds what `weigh_panel` left of every score's factor to the line of its row.
static void add_factors(const GradientTask& t, const GradientBlock& b) {
    for (int m = 0; m < t.count; ++m) {
        const int first = t.scratch.first[m], last = t.scratch.last[m];
        if (first >= last) continue;
        float* to = t.factor_sums(m) + position_of(t.line(m), b);
        const float* from = t.score_at(t.scratch.factors, m / kColumns, 0) + m % kColumns;
        for (int n = first; n < last; ++n) to[n] += from[static_cast<std::int64_t>(n) * kColumns];
    }
}

// --- passes over a tile's keys ---

enum class Pass { minima, through, gradients };

template <Pass kPass, bool kFinish>
static void visit_block(const GradientTask& t, const GradientBlock& b) {
    const GradientScratch& s = t.scratch;
    const AttentionParams& p = t.p;
    const Columns all = find_visible(t, b);
    if (all.empty()) return;
    if (p.position_bias) find_bias(t, b, all);
    const FactorsOf factors = kPass == Pass::minima ? FactorsOf::none : find_factors(t, b, all);
    for (int panel = 0; panel < t.panels; ++panel) {
        const Columns seen = s.seen[panel];
        if (seen.empty()) {
            if (kPass == Pass::gradients) clear_panel(t, panel, all);
            continue;
        }
        multiply_to_scores(t, b.key, s.query, head_units(p), panel, seen, s.scores);
        if constexpr (kPass == Pass::minima) {
            lower_minima<kFinish>(t, b, panel, seen);
            continue;
        }
        if (t.of_scores()) multiply_to_scores(t, b.value, s.grad, value_units(p), panel, seen, s.rises);
        weigh<kFinish, kPass == Pass::through>(t, b, panel, seen, factors);
        if constexpr (kPass == Pass::through) continue;
#if defined(ATMAN_PAIRS)
        narrow_panel(t, panel, seen);
#endif
        clear_panel(t, panel, {all.first, seen.first});
        clear_panel(t, panel, {seen.last, all.last});
    }
    if constexpr (kPass != Pass::gradients) return;
    const std::int64_t at = b.first - b.sums.first;
    if (b.sums.value)
        multiply_to_keys(t, s.weights, s.grad_lines, value_columns(p), all, b.sums.value + at * value_columns(p));
    if (b.sums.key)
        multiply_to_keys(t, s.slopes, s.query_lines, head_columns(p), all, b.sums.key + at * head_columns(p));
    if (t.of_query) multiply_to_queries(t, b);
    if (t.of_factor && factors == FactorsOf::rows) add_factors(t, b);
}

template <Pass kPass>
static void visit_range(const GradientTask& t, const KeyRange& range, Visible Row::* keys, const KeySums& sums) {
    std::int64_t first = range.keys, last = 0;
    for (int m = 0; m < t.count; m += t.heads) {
        const Visible& seen = t.line(m).row->*keys;
        if (seen.empty()) continue;
        first = smaller(first, seen.first);
        last = larger(last, seen.last);
    }
    const BlockLayout layout = block_layout(t.p);
    const std::size_t size = gradient_block_size(t.p);
    const std::int64_t batch = t.p.key_batch > 1 ? t.tile.batch : 0;
    const bool finishes = t.p.softcap > 0.0f || t.p.position_bias;
    for (std::int64_t i = first / kBlockKeys; i * kBlockKeys < last; ++i) {
        const std::int64_t index = (batch * t.p.key_heads + t.part.key_head) * range.num_blocks() + i;
        const Unit* at = reinterpret_cast<const Unit*>(range.blocks + static_cast<std::size_t>(index) * size);
        const GradientBlock b{range, keys, sums, i * kBlockKeys, at, at + layout.value, at + layout.across};
        if (finishes) visit_block<kPass, true>(t, b);
        else visit_block<kPass, false>(t, b);
    }
}

template <Pass kPass>
static void visit_tile(const GradientTask& t) {
    visit_range<kPass>(t, t.job.base, &Row::base, t.part.base);
    visit_range<kPass>(t, t.job.own, &Row::own, t.part.own);
}

// --- a part ---

static void clear_sums(const AttentionParams& p, const KeySums& sums) {
    const std::size_t keys = static_cast<std::size_t>(sums.last - sums.first) * sizeof(float);
    if (sums.key) std::memset(sums.key, 0, keys * static_cast<std::size_t>(head_columns(p)));
    if (sums.value) std::memset(sums.value, 0, keys * static_cast<std::size_t>(value_columns(p)));
}

static void run_part(const GradientJob& job, const Part& part, Row* rows, std::byte* scratch) {
    const GradientParams& g = *job.params;
    const AttentionParams& p = g.forward;
    const int heads = static_cast<int>(p.query_heads / p.key_heads);
    clear_sums(p, part.base);
    clear_sums(p, part.own);
    if (part.factor) {
        const std::int64_t lines = (part.last_variant - part.first_variant + 1) * (p.factor_heads > 1 ? heads : 1);
        std::memset(part.factor, 0, static_cast<std::size_t>(lines * p.factor_keys) * sizeof(float));
    }
    for (std::int64_t i = part.first_tile; i < part.last_tile; ++i) {
        const Tile& tile = job.tiles[i];
        const int count = static_cast<int>(tile.last_row - tile.first_row) * heads;
        const GradientTask t{job,
                             g,
                             p,
                             part,
                             tile,
                             heads,
                             count,
                             (count + kColumns - 1) / kColumns,
                             lay_out_gradient_scratch(g, scratch),
                             g.grad_query != nullptr,
                             part.base.key || part.own.key,
                             part.base.value || part.own.value,
                             part.factor != nullptr};
        describe_rows(p, tile, rows);
        begin_tile(t, rows);
        if (p.mode == Mode::shifted && job.factors.touched) {
            visit_tile<Pass::minima>(t);
            if (t.of_query || t.of_key) visit_tile<Pass::through>(t);
        }
        visit_tile<Pass::gradients>(t);
        if (t.of_query) write_query_rows(t);
    }
}

static void write_sums(DType dtype, const float* const* lists, int num_lists, std::int64_t count, float scale,
                       void* to) {
    with_storage(dtype, [&](auto storage) {
        typedef decltype(storage) Storage;
        auto* out = static_cast<typename Storage::Stored*>(to);
        for (std::int64_t i = 0; i < count; ++i) {
            float sum = 0.0f;
            for (int list = 0; list < num_lists; ++list) sum += lists[list][i];
            out[i] = Storage::write(sum * scale);
        }
    });
}

}  // namespace atman::cpu::ATMAN_ISA
