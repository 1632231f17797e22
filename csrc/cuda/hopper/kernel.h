// Attention for Hopper: a producer warp feeds blocks of keys and values through rings of shared memory, two consumer
// warpgroups multiply (wgmma) and weigh them. Thread blocks stay, and take tiles in the order of their work.
//
// Where a thread's numbers stand in a product of 64 rows: scores[4 * j + 2 * h + e] belongs to row
// 16 * warp + lane / 4 + 8 * h and column 8 * j + 2 * (lane % 4) + e. As a's operand of the next product the same
// numbers stand in the same order, two to a register.

#pragma once

#include "../elements.h"
#include "config.h"
// A model of the instructions for the host can stand in (checks/).
#if !defined(ATMAN_INSTRUCTIONS)
#define ATMAN_INSTRUCTIONS "instructions.h"
#endif
#include ATMAN_INSTRUCTIONS

namespace atman::cuda::hopper {

struct KernelParams {
    AttentionParams attention;
    const TileKeys* tiles;       // (tiles,)
    const std::int32_t* order;   // (tiles,)
    const std::uint64_t* flags;  // (factor lines, flag words)
    float* partial;              // (splits, batch, query_heads, rows, value_dim), with splits > 1
    float* partial_lse;          // (splits, batch, query_heads, rows)
    std::int32_t splits, items;
};

// What TMA reads and writes at once: 64 features of some places along the three other sides of a tensor.
struct Boxes {
    struct Side {
        std::int64_t size, stride;  // the stride in elements
        int box;
    };
    const void* data;
    std::int64_t features;
    Side sides[3];  // the first varies fastest in shared memory
};

struct Maps {
    CUtensorMap key[2], value[2];  // base, own
    CUtensorMap output;            // where stores_boxes
};

// Whether the rows of a warpgroup are all heads of some rows of the query, which then leave as one box.
ATMAN_INLINE bool stores_boxes(const AttentionParams& p) { return kConsumerRows % group_size(p) == 0; }

template <class C, class Make>
Maps make_maps(const AttentionParams& p, Make make) {
    const auto keys_of = [&](const void* data, const Strides& s, std::int64_t batch, std::int64_t keys) {
        return make(Boxes{data, C::kHeadDim, {{keys, s.row, C::kKeys}, {p.key_heads, s.head, 1}, {batch, s.batch, 1}}});
    };
    Maps maps{};
    for (int range = 0; range < 2; ++range) {
        // A map of nothing is not allowed; where there are no base keys or no own ones, no block names that map.
        const bool own = p.keys == 0 || (range == 1 && p.variants > 0);
        const std::int64_t batch = own ? 1 : p.key_batch, keys = own ? p.rows : p.keys;
        maps.key[range] = keys_of(own ? p.own_key : p.key, own ? p.own_key_strides : p.key_strides, batch, keys);
        maps.value[range] =
            keys_of(own ? p.own_value : p.value, own ? p.own_value_strides : p.value_strides, batch, keys);
    }
    if (stores_boxes(p)) {
        const Strides& s = p.output_strides;
        const auto heads = static_cast<int>(group_size(p));
        maps.output = make(
            Boxes{p.output,
                  C::kHeadDim,
                  {{p.query_heads, s.head, heads}, {p.rows, s.row, kConsumerRows / heads}, {p.batch, s.batch, 1}}});
    }
    return maps;
}

template <class C>
__device__ Item item_at(const KernelParams& k, std::int32_t index) {
    const auto key_heads = static_cast<std::int32_t>(k.attention.key_heads);
    const std::int32_t tile = k.order[index / (k.splits * key_heads)];
    Item item;
    item.split = index % k.splits;
    item.key_head = index / k.splits % key_heads;
    item.keys = k.tiles[tile];
    const TileRows rows = tile_rows(k.attention, tile);
    item.batch = static_cast<std::int32_t>(rows.batch);
    item.first_row = static_cast<std::int32_t>(rows.first);
    item.last_row = static_cast<std::int32_t>(rows.last);
    item.span = split_span(count_blocks(item.keys, C::kKeys), item.split, k.splits);
    return item;
}

__device__ __forceinline__ bool needs_minimum(const AttentionParams& p) { return p.factor && p.mode == Mode::shifted; }

// --- producer: one thread ---

template <class C>
struct Ring {
    Stage<C::kStages> key, value;
};

template <class C>
__device__ void load_block(const CUtensorMap& map, const Block& block, int head, int batch,
                           typename C::T (*to)[C::kKeys][kSlab], std::uint64_t* full, std::uint64_t* free,
                           std::uint32_t parity) {
    barrier_wait(free, parity ^ 1);
    barrier_expect(full, C::kBlockBytes);
#pragma unroll
    for (int slab = 0; slab < C::kSlabs; ++slab) load_box(to[slab], map, full, slab * kSlab, block.first, head, batch);
}

template <class C>
__device__ void produce(const KernelParams& k, const Maps& maps, typename C::Shared& shared) {
    for (int i = 0; i < 2; ++i) {
        prefetch_map(maps.key[i]);
        prefetch_map(maps.value[i]);
    }
    Ring<C> ring;
    const auto load_key = [&](const Item& item, const Block& block, int batch) {
        const std::uint32_t s = ring.key.index();
        load_block<C>(maps.key[block.range], block, item.key_head, batch, shared.key[s], &shared.key_full[s],
                      &shared.key_free[s], ring.key.parity());
        ++ring.key.count;
    };
    for (std::int32_t index = blockIdx.x; index < k.items; index += gridDim.x) {
        const Item item = item_at<C>(k, index);
        const int base_batch = k.attention.key_batch > 1 ? item.batch : 0;
        for (int pass = needs_minimum(k.attention) ? 0 : 1; pass < 2; ++pass) {
            for (std::int32_t i = item.span.first; i < item.span.last; ++i) {
                const Block block = block_at(item.keys, i, C::kKeys);
                const int batch = block.range ? 0 : base_batch;
                load_key(item, block, batch);
                if (pass == 0) continue;
                const std::uint32_t s = ring.value.index();
                load_block<C>(maps.value[block.range], block, item.key_head, batch, shared.value[s],
                              &shared.value_full[s], &shared.value_free[s], ring.value.parity());
                ++ring.value.count;
            }
        }
    }
}

// --- consumers ---

// To some 1e-7, not relative to the result: it is a score.
__device__ __forceinline__ float hyperbolic_tangent(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + exponential2(2.8853900817779268f * x));
}

template <class C>
__device__ __forceinline__ void multiply_scores(const typename C::Shared& shared, int group, std::uint32_t stage,
                                                float (&scores)[C::kKeys / 2]) {
    const std::uint64_t query = describe_matrix(shared.query[group], 16, 1024);
    const std::uint64_t key = describe_matrix(shared.key[stage], 16, 1024);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {  // 16 features
        const int slab = i / 4, inside = i % 4 * 32;
        multiply(scores, query + ((slab * kConsumerRows * 128 + inside) >> 4),
                 key + ((slab * C::kKeys * 128 + inside) >> 4), i > 0, typename C::T{});
    }
}

template <class C>
__device__ __forceinline__ void multiply_values(const typename C::Shared& shared, std::uint32_t stage,
                                                const std::uint32_t (&weights)[C::kKeys / 4],
                                                float (&output)[C::kHeadDim / 2]) {
    const std::uint64_t value = describe_matrix(shared.value[stage], C::kKeys * 128, 1024);
#pragma unroll
    for (int i = 0; i < C::kKeys / 16; ++i)  // 16 keys
        multiply(output, &weights[4 * i], value + (i * 2048 >> 4), typename C::T{});
}

// The two rows of a thread are rows[0] and rows[8].
__device__ __forceinline__ int half_of(int i) { return i / 2 % 2; }
__device__ __forceinline__ int column_of(int i) { return i / 4 * 8 + i % 2; }  // + 2 * (lane % 4)

__device__ __forceinline__ bool touched(const KernelParams& k, const RowKeys& row, const Block& block, int keys) {
    const int r = block.range;
    const std::int32_t first = max(block.first, row.first[r]), last = min(block.first + keys, row.last[r]);
    return first < last && touches(k.flags + row.flags_at, first + row.to_position[r], last + row.to_position[r]);
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Scores are held in a unit of their own: exp2(unit * score) is the softmax's numerator, unit > 0. Without a softcap a
// score is the product as it comes, and scaling is part of the exponent's multiply-add.
constexpr float kLeastScale = 1e-6f;  // below, and where it is negative, products are scaled
__device__ __forceinline__ float score_unit(const AttentionParams& p) {
    if (p.softcap > 0.0f) return p.softcap * kLog2E;
    return p.scale < kLeastScale ? kLog2E : p.scale * kLog2E;
}

template <int kCount>
__device__ __forceinline__ void suppress(const AttentionParams& p, const RowKeys* rows, const Block& block,
                                         float (&scores)[kCount], const float (&minimum)[2]) {
    const int key = block.first + 2 * (threadIdx.x % 4), range = block.range;
    const float in_units = fminf(1.0f / score_unit(p), 1e38f);  // finite: 0 times it is 0
    const float* factors[2] = {p.factor + rows[0].factor_at + rows[0].to_position[range],
                               p.factor + rows[8].factor_at + rows[8].to_position[range]};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const int h = half_of(i);
        if (!rows[8 * h].sees(range, key + column_of(i))) continue;
        const float factor = factors[h][key + column_of(i)];
        if (p.mode == Mode::log_additive) scores[i] = suppress_log_additive(scores[i], logarithm2(factor) * in_units);
        else if (p.mode == Mode::multiplicative) scores[i] = suppress_multiplicative(scores[i], factor);
        else scores[i] = suppress_shifted(scores[i], factor, minimum[h]);
    }
}

// Scores of keys that a row does not see become `with`.
template <int kCount>
__device__ __forceinline__ void hide(const RowKeys* rows, const Block& block, float (&scores)[kCount], float with) {
    const int key = block.first + 2 * (threadIdx.x % 4), range = block.range;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int first = rows[8 * h].first[range] - key, last = rows[8 * h].last[range] - key;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (half_of(i) != h) continue;
            if (column_of(i) < first || column_of(i) >= last) scores[i] = with;
        }
    }
}

// The same of keys that the key mask hides from all rows.
template <int kCount>
__device__ __forceinline__ void hide_masked(const AttentionParams& p, std::int64_t batch, const Block& block,
                                            float (&scores)[kCount], float with) {
    const int key = block.first + 2 * (threadIdx.x % 4);
    const std::uint8_t* mask = p.key_mask + batch * p.keys + key;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (key + 8 * j + e < p.keys && mask[8 * j + e]) continue;
            scores[4 * j + e] = scores[4 * j + 2 + e] = with;
        }
    }
}

// Products become scores, before suppression.
template <int kCount>
__device__ __forceinline__ void scale_scores(const AttentionParams& p, float (&scores)[kCount]) {
    if (p.softcap > 0.0f) {
        const float inside = p.scale / p.softcap;
#pragma unroll
        for (float& score : scores) score = hyperbolic_tangent(score * inside);
    } else if (p.scale < kLeastScale) {
#pragma unroll
        for (float& score : scores) score *= p.scale;
    }
}

struct Softmax {
    float maximum[2] = {kNegativeInfinity, kNegativeInfinity};  // of unit * score
    float sum[2] = {0.0f, 0.0f};                                // of this thread's columns

    // Scores become weights; `shrink` is what has been summed so far is to be multiplied with.
    template <int kCount>
    __device__ __forceinline__ void weigh(float (&scores)[kCount], float (&shrink)[2], float unit) {
        float from[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = kNegativeInfinity;
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (half_of(i) == h) top = fmaxf(top, scores[i]);
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            top = fmaxf(maximum[h], top * unit);
            from[h] = top == kNegativeInfinity ? 0.0f : top;  // nothing seen yet: -inf + inf would be NaN
            shrink[h] = exponential2(maximum[h] - from[h]);
            maximum[h] = top;
            sum[h] *= shrink[h];
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            scores[i] = exponential2(fmaf(scores[i], unit, -from[half_of(i)]));
            sum[half_of(i)] += scores[i];
        }
    }
};

// One tile's state in a consumer thread.
template <class C>
struct Consumer {
    using T = typename C::T;
    const KernelParams& k;
    const Maps& maps;
    typename C::Shared& shared;
    Ring<C> ring{};
    int group;   // warpgroup: 0 or 1
    int thread;  // in the warpgroup
    const RowKeys* rows;
    const Item& item;  // in shared memory

    __device__ Consumer(const KernelParams& params, const Maps& tensors, typename C::Shared& memory)
        : k(params),
          maps(tensors),
          shared(memory),
          group(static_cast<int>(threadIdx.x) / kWarpgroup - 1),
          thread(static_cast<int>(threadIdx.x) % kWarpgroup),
          rows(memory.rows + group * kConsumerRows + thread / 32 * 16 + thread % 32 / 4),
          item(memory.item[group]) {}

    // The thread's number anew: what is worked out from it is not kept in registers through the main loop.
    __device__ int thread_again() const {
        int again = thread;
        asm volatile("" : "+r"(again));
        return again;
    }

    __device__ void release(std::uint64_t* free) const {
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(free);
    }

    // --- turns: while one warpgroup issues products, the other does its softmax ---

    __device__ void take_turn() const {
        if constexpr (C::kOverlap == Overlap::between) named_sync<kConsumers * kWarpgroup>(kTurn + group);
    }
    __device__ void pass_turn() const {
        if constexpr (C::kOverlap == Overlap::between) named_arrive<kConsumers * kWarpgroup>(kTurn + 1 - group);
    }

    // --- a tile's beginning ---

    __device__ void describe_rows() const {
        if (thread >= kConsumerRows) return;
        const AttentionParams& p = k.attention;
        const auto heads = static_cast<std::int32_t>(group_size(p));
        const std::int32_t m = group * kConsumerRows + thread;
        RowKeys row{};
        row.head = -1;
        if (m / heads < item.last_row - item.first_row) {
            const Row full = describe_row(p, item.batch, item.first_row + m / heads);
            const Visible* seen[2] = {&full.base, &full.own};
#pragma unroll
            for (int range = 0; range < 2; ++range) {
                row.first[range] = static_cast<std::int32_t>(seen[range]->first);
                row.last[range] = static_cast<std::int32_t>(seen[range]->last);
                row.to_position[range] = static_cast<std::int32_t>(seen[range]->to_position);
            }
            row.index = static_cast<std::int32_t>(full.index);
            row.head = item.key_head * heads + m % heads;
            row.factor_at = full.variant * p.factor_strides.batch + row.head * p.factor_strides.head;
            row.flags_at = (full.variant * p.factor_heads + (p.factor_heads > 1 ? row.head : 0)) * flag_words(p);
        }
        shared.rows[m] = row;
    }

    // 16 bytes of row r of this warpgroup, in the layout of config.h
    __device__ uint4* chunk_at(int r, int chunk) const {
        return reinterpret_cast<uint4*>(&shared.query[group][chunk / 8][r][(chunk % 8 ^ r % 8) * 8]);
    }

    // A warpgroup reads kQueryStep rows at once, 16 bytes a thread, and kQueryLoads such groups of rows before it looks
    // at the first: they do not wait for each other.
    static constexpr int kQueryStep = kWarpgroup / (C::kHeadDim / 8), kQueryRounds = kConsumerRows / kQueryStep;
    static constexpr int kQueryLoads = kQueryRounds < 8 ? kQueryRounds : 8;

    __device__ void load_queries(int round, uint4 (&loaded)[kQueryLoads]) const {
        const AttentionParams& p = k.attention;
        const Strides& strides = p.query_strides;
        const auto heads = static_cast<std::int32_t>(group_size(p));
        const int self = thread_again(), chunk = self % (C::kHeadDim / 8);
        const T* from = static_cast<const T*>(p.query) + item.batch * strides.batch +
                        item.key_head * heads * strides.head + item.first_row * strides.row + chunk * 8;
#pragma unroll
        for (int i = 0; i < kQueryLoads; ++i) {
            const int m = group * kConsumerRows + self / (C::kHeadDim / 8) + (round + i) * kQueryStep;
            const int row = m / heads, head = m % heads;
            loaded[i] = uint4{0, 0, 0, 0};
            if (row < item.last_row - item.first_row)
                loaded[i] = __ldg(reinterpret_cast<const uint4*>(from + row * strides.row + head * strides.head));
        }
    }
    __device__ void keep_queries(int round, const uint4 (&loaded)[kQueryLoads]) const {
        const int self = thread_again(), chunk = self % (C::kHeadDim / 8);
#pragma unroll
        for (int i = 0; i < kQueryLoads; ++i)
            *chunk_at(self / (C::kHeadDim / 8) + (round + i) * kQueryStep, chunk) = loaded[i];
    }

    // --- scores ---

    __device__ void finish_scores(const Block& block, float (&scores)[C::kKeys / 2], const float (&minimum)[2]) const {
        const AttentionParams& p = k.attention;
        scale_scores(p, scores);
        if (p.factor) {
            const bool any = touched(k, rows[0], block, C::kKeys) || touched(k, rows[8], block, C::kKeys);
            if (__any_sync(0xffffffffu, any)) suppress(p, rows, block, scores, minimum);
        }
        if (block.masked) hide(rows, block, scores, kNegativeInfinity);
        if (p.key_mask) hide_masked(p, item.batch, block, scores, kNegativeInfinity);
    }

    __device__ void issue_scores(float (&scores)[C::kKeys / 2]) {
        barrier_wait(&shared.key_full[ring.key.index()], ring.key.parity());
        take_turn();
        products_begin();
        multiply_scores<C>(shared, group, ring.key.index(), scores);
        products_commit();
    }
    __device__ void release_key() {
        release(&shared.key_free[ring.key.index()]);
        ++ring.key.count;
    }
    __device__ void issue_values(const std::uint32_t (&weights)[C::kKeys / 4], float (&output)[C::kHeadDim / 2]) {
        barrier_wait(&shared.value_full[ring.value.index()], ring.value.parity());
        products_begin();
        multiply_values<C>(shared, ring.value.index(), weights, output);
        products_commit();
    }
    __device__ void release_value() {
        release(&shared.value_free[ring.value.index()]);
        ++ring.value.count;
    }

    // Smallest visible score of each row, over all of the item's blocks.
    __device__ void find_minimum(float (&minimum)[2]) {
        for (std::int32_t i = item.span.first; i < item.span.last; ++i) {
            float scores[C::kKeys / 2];
            issue_scores(scores);
            pass_turn();
            products_wait<0>();
            pin(scores);
            release_key();
            scale_scores(k.attention, scores);
            const Block block = block_at(item.keys, i, C::kKeys);
            hide(rows, block, scores, -kNegativeInfinity);
            if (k.attention.key_mask) hide_masked(k.attention, item.batch, block, scores, -kNegativeInfinity);
#pragma unroll
            for (int s = 0; s < C::kKeys / 2; ++s) minimum[half_of(s)] = fminf(minimum[half_of(s)], scores[s]);
        }
#pragma unroll
        for (float& least : minimum) {
            least = fminf(least, __shfl_xor_sync(0xffffffffu, least, 1));
            least = fminf(least, __shfl_xor_sync(0xffffffffu, least, 2));
        }
    }

    // --- a tile's end ---

    __device__ void finish(Softmax& softmax, float (&output)[C::kHeadDim / 2]) const {
        const AttentionParams& p = k.attention;
        const std::int64_t all_rows = p.batch * p.query_heads * p.rows;
        const int self = thread_again(), pair = self % 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = softmax.sum[h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const RowKeys& row = rows[8 * h];
            const float maximum = softmax.maximum[h] * kLn2;
            const bool with_sink = p.sinks && k.splits == 1 && row.head >= 0;
            const SoftmaxEnd end =
                with_sink ? finish_softmax(maximum, sum, p.sinks[row.head]) : finish_softmax(maximum, sum);
            const int r = self / 32 * 16 + self % 32 / 4 + 8 * h;
            const std::int64_t at = (item.batch * p.query_heads + row.head) * p.rows + row.index;
            float* lse = k.splits > 1 ? k.partial_lse + item.split * all_rows : p.lse;
            if (lse && row.head >= 0 && pair == 0) lse[at] = end.lse;
            float* partial = k.partial + (item.split * all_rows + at) * C::kHeadDim;
#pragma unroll
            for (int j = 0; j < C::kHeadDim / 8; ++j) {
                const float low = output[4 * j + 2 * h] * end.weight, high = output[4 * j + 2 * h + 1] * end.weight;
                if (k.splits == 1) reinterpret_cast<std::uint32_t*>(chunk_at(r, j))[pair] = pack_two<T>(low, high);
                else if (row.head >= 0) *reinterpret_cast<float2*>(partial + 8 * j + 2 * pair) = make_float2(low, high);
            }
        }
        if (k.splits == 1) store_output();
    }

    // From shared memory, so that a row's bytes leave together.
    __device__ void store_output() const {
        const AttentionParams& p = k.attention;
        if (stores_boxes(p)) {
            fence_async_proxy();
            named_sync<kWarpgroup>(kRows + group);
            if (thread == 0) {
                const auto heads = static_cast<int>(group_size(p));
                const int first =
                    item.first_row + group * kConsumerRows / heads;  // rows beyond the end are not written
#pragma unroll
                for (int slab = 0; slab < C::kSlabs; ++slab)
                    store_box(maps.output, shared.query[group][slab], slab * kSlab, item.key_head * heads, first,
                              item.batch);
                stores_commit();
            }
            return;
        }
        const Strides& strides = p.output_strides;
        named_sync<kWarpgroup>(kRows + group);
        const int self = thread_again(), chunk = self % (C::kHeadDim / 8);
#pragma unroll 1
        for (int r = self / (C::kHeadDim / 8); r < kConsumerRows; r += kWarpgroup / (C::kHeadDim / 8)) {
            const RowKeys& row = shared.rows[group * kConsumerRows + r];
            if (row.head < 0) continue;
            T* to = static_cast<T*>(p.output) + item.batch * strides.batch + row.head * strides.head +
                    row.index * strides.row;
            reinterpret_cast<uint4*>(to)[chunk] = *chunk_at(r, chunk);
        }
    }

    // Shared memory can be written again. Stores are thread 0's.
    __device__ void stores_read() const {
        if (thread == 0) stores_wait();
    }

    // --- a tile ---

    __device__ void begin(std::int32_t index) {
        stores_read();
        named_sync<kWarpgroup>(kRows + group);  // the last tile's item, rows and output have been read
        if (thread == 0) shared.item[group] = item_at<C>(k, index);
        named_sync<kWarpgroup>(kRows + group);
        uint4 queries[kQueryLoads];
        load_queries(0, queries);
        describe_rows();  // while they are under way
        keep_queries(0, queries);
#pragma unroll
        for (int round = kQueryLoads; round < kQueryRounds; round += kQueryLoads) {
            load_queries(round, queries);
            keep_queries(round, queries);
        }
        fence_async_proxy();
        named_sync<kWarpgroup>(kRows + group);
    }

    __device__ void attend(std::int32_t index) {
        begin(index);
        float minimum[2] = {-kNegativeInfinity, -kNegativeInfinity};
        if (needs_minimum(k.attention)) find_minimum(minimum);

        Softmax softmax;
        float output[C::kHeadDim / 2] = {}, scores[C::kKeys / 2], shrink[2];
        std::uint32_t weights[C::kKeys / 4] = {};
        const auto shrink_output = [&] {
#pragma unroll
            for (int i = 0; i < C::kHeadDim / 2; ++i) output[i] *= shrink[half_of(i)];
        };
        const auto round_weights = [&] {
#pragma unroll
            for (int i = 0; i < C::kKeys / 4; ++i) weights[i] = pack_two<T>(scores[2 * i], scores[2 * i + 1]);
        };
        const auto end_values = [&] {
            products_wait<0>();
            pin(output);
            pin(weights);
            release_value();
        };

        const auto weigh_block = [&](std::int32_t i) {
            pin(scores);
            release_key();
            finish_scores(block_at(item.keys, i, C::kKeys), scores, minimum);
            softmax.weigh(scores, shrink, score_unit(k.attention));
        };

        // The first block stands apart: a branch around products would make the compiler wait for each of them.
        const std::int32_t first = item.span.first, last = item.span.last;
        if (first < last) {
            issue_scores(scores);
            pass_turn();
            products_wait<0>();
            weigh_block(first);
            round_weights();
            for (std::int32_t i = first + 1; i < last; ++i) {
                if constexpr (C::kOverlap == Overlap::none) {
                    issue_values(weights, output);
                    end_values();
                    issue_scores(scores);
                    products_wait<0>();
                    weigh_block(i);
                } else {
                    issue_scores(scores);
                    issue_values(weights, output);
                    pass_turn();
                    products_wait<1>();
                    weigh_block(i);
                    end_values();
                }
                shrink_output();
                round_weights();
            }
            issue_values(weights, output);
            end_values();
        }
        finish(softmax, output);
    }
};

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    attend(const __grid_constant__ KernelParams k, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
    if (threadIdx.x == 0) {
        for (int s = 0; s < C::kStages; ++s) {
            barrier_init(&shared.key_full[s], 1);
            barrier_init(&shared.value_full[s], 1);
            barrier_init(&shared.key_free[s], kConsumers * kWarpgroup / 32);
            barrier_init(&shared.value_free[s], kConsumers * kWarpgroup / 32);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
        shrink_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce<C>(k, maps, shared);
    } else {
        grow_registers<kConsumerRegisters>();
        Consumer<C> consumer(k, maps, shared);
        if (consumer.group == 1) consumer.pass_turn();  // the first turn is warpgroup 0's
        for (std::int32_t index = blockIdx.x; index < k.items; index += gridDim.x) consumer.attend(index);
        consumer.stores_read();
        if (consumer.group == 0) consumer.take_turn();  // the one that warpgroup 1 passed last
    }
}

}  // namespace atman::cuda::hopper
