// What a kernel is given: sizes, and pointers with their shapes beside them. Plain data, no torch, host or device.
//
// A dense call is `batch` sequences of `rows` queries over `keys` keys. A packed call has batch 1: the rows are the
// suffixes of all variants, one after the other, `keys` counts the shared base, and the rows bring keys of their own.

#pragma once

#include <cstdint>

namespace atman {

enum class DType : std::int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Mode : std::int32_t { log_additive = 0, multiplicative = 1, shifted = 2 };

// In elements. The last dimension of every tensor is contiguous unless said otherwise.
struct Strides {
    std::int64_t batch = 0, head = 0, row = 0;
};

struct AttentionParams {
    std::int64_t batch = 1, key_batch = 1;  // key_batch: 1 (shared by all) or batch
    std::int64_t query_heads = 0, key_heads = 0;
    std::int64_t rows = 0, keys = 0;
    std::int64_t head_dim = 0, value_dim = 0;
    DType dtype = DType::float32;  // of query, keys, values and output

    const void* query = nullptr;  // (batch, query_heads, rows, head_dim)
    const void* key = nullptr;    // (key_batch, key_heads, keys, head_dim)
    const void* value = nullptr;  // (key_batch, key_heads, keys, value_dim)
    void* output = nullptr;       // (batch, query_heads, rows, value_dim)
    float* lse = nullptr;         // (batch, query_heads, rows) contiguous, or null
    Strides query_strides, key_strides, value_strides, output_strides;

    // Packed calls only; variants == 0 means dense.
    std::int64_t variants = 0;
    const void* own_key = nullptr;    // (key_heads, rows, head_dim)
    const void* own_value = nullptr;  // (key_heads, rows, value_dim)
    Strides own_key_strides, own_value_strides;
    const std::int32_t* suffix_starts = nullptr;   // (variants + 1,)
    const std::int32_t* prefix_lengths = nullptr;  // (variants,)
    const std::int32_t* base_starts = nullptr;     // (variants,)
    const std::int32_t* row_variant = nullptr;     // (rows,), or null: it follows from suffix_starts

    // All optional.
    const float* factor = nullptr;           // (batch | variants, 1 | query_heads, factor_keys)
    std::int64_t factor_keys = 0;            // dense: keys; packed: over absolute positions
    std::int64_t factor_heads = 1;           // 1 or query_heads
    Strides factor_strides;                  // batch: per sequence or variant
    const std::uint8_t* key_mask = nullptr;  // (batch, keys) contiguous, dense only; 0 hides
    const float* sinks = nullptr;            // (query_heads,)
    const float* position_bias = nullptr;    // (batch, query_heads, rows | positions, keys | positions)
    std::int64_t bias_rows = 0, bias_keys = 0;
    Strides bias_strides;              // 0 where it is broadcast
    std::int64_t bias_key_stride = 1;  // 0 or 1

    Mode mode = Mode::log_additive;
    bool is_causal = false;
    float scale = 1.0f;
    std::int64_t sliding_window = 0;  // 0: none
    float softcap = 0.0f;             // 0: none
};

// A backward: the forward's call, without its output, and what came of that. All contiguous.
struct GradientParams {
    AttentionParams forward;
    const void* grad_output = nullptr;  // (batch, query_heads, rows, value_dim)
    const float* lse = nullptr;         // (batch, query_heads, rows): log of the softmax denominator, -inf: saw nothing
    const float* delta = nullptr;       // (batch, query_heads, rows): dO . o - d lse

    // What is wanted; null: not.
    void* grad_query = nullptr;    // as query
    void* grad_key = nullptr;      // as key
    void* grad_value = nullptr;    // as value
    void* grad_own_key = nullptr;  // packed calls only
    void* grad_own_value = nullptr;
    float* grad_factor = nullptr;  // (batch | variants, factor_heads, factor_keys)
};

}  // namespace atman
