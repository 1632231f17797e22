// A tensor as the binding receives it: plain numbers, checked here because nobody else can.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "params.h"

namespace atman {

enum class ElementType : std::int32_t { float32 = 0, bfloat16 = 1, float16 = 2, int32 = 3, boolean = 4 };

struct Tensor {
    std::uintptr_t address = 0;
    std::int64_t bytes = 0;  // readable from `address` on
    ElementType type = ElementType::float32;
    std::vector<std::int64_t> shape, strides;  // strides in elements

    // Throws std::invalid_argument if the type is unknown, shape and strides do not match, a number is negative, the
    // address is null or misaligned, or an element lies outside of `bytes`.
    static Tensor checked(std::uintptr_t address, std::int64_t bytes, std::int64_t type,
                          std::vector<std::int64_t> shape, std::vector<std::int64_t> strides);
    bool empty() const;
    template <class T>
    T* as() const {
        return empty() ? nullptr : reinterpret_cast<T*>(address);
    }
};

// Everything that a call takes beside where and with what it is to run.
struct AttentionArguments {
    Tensor query, key, value, output;
    std::optional<Tensor> lse, own_key, own_value, suffix_starts, prefix_lengths, base_starts;
    std::optional<Tensor> row_variant;  // what follows from suffix_starts, for those who look it up
    std::optional<Tensor> factor, key_mask, sinks, position_bias;
    std::string mode;
    bool is_causal = false;
    double scale = 1.0;
    std::int64_t sliding_window = 0;
    double softcap = 0.0;
};

// What a backward takes beside the call, whose `output` is the gradient by the output, `lse` what the forward gave.
struct GradientArguments {
    Tensor delta;
    std::optional<Tensor> grad_query, grad_key, grad_value, grad_own_key, grad_own_value, grad_factor;
};

enum class Memory { host, device };

// Throws std::invalid_argument that names the argument. In host memory the pack's integers are read and checked too.
AttentionParams make_params(const AttentionArguments& arguments, Memory memory = Memory::host);
GradientParams make_gradient_params(const AttentionParams& call, const GradientArguments& arguments);

}  // namespace atman
