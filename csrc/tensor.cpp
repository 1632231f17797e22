#include "tensor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace atman {
namespace {

constexpr std::int64_t kMostFeatures = 1 << 14;               // of head_dim and value_dim
constexpr std::int64_t kLargestSize = std::int64_t{1} << 40;  // of any other axis: products of two stay in range

[[noreturn]] void fail(const std::string& name, const std::string& what) {
    throw std::invalid_argument(name + " " + what);
}

std::string listed(const std::vector<std::int64_t>& numbers) {
    std::ostringstream text;
    text << "(";
    for (std::size_t i = 0; i < numbers.size(); ++i) text << (i ? ", " : "") << numbers[i];
    text << ")";
    return text.str();
}

std::int64_t element_size(ElementType type) {
    switch (type) {
        case ElementType::float32:
        case ElementType::int32: return 4;
        case ElementType::bfloat16:
        case ElementType::float16: return 2;
        case ElementType::boolean: return 1;
    }
    fail("dtype code", "is unknown: " + std::to_string(static_cast<std::int32_t>(type)));
}

void expect_shape(const char* name, const Tensor& tensor, const std::vector<std::int64_t>& shape) {
    if (tensor.shape != shape) fail(name, "must have shape " + listed(shape) + ", got " + listed(tensor.shape));
}

void expect_rank(const char* name, const Tensor& tensor, std::size_t rank) {
    if (tensor.shape.size() != rank)
        fail(name, "must have " + std::to_string(rank) + " dimensions, got shape " + listed(tensor.shape));
}

void expect_type(const char* name, const Tensor& tensor, ElementType type) {
    if (tensor.type != type)
        fail(name, "has dtype code " + std::to_string(static_cast<std::int32_t>(tensor.type)) + ", expected " +
                       std::to_string(static_cast<std::int32_t>(type)));
}

void expect_packed_rows(const char* name, const Tensor& tensor) {
    if (!tensor.empty() && tensor.shape.back() > 1 && tensor.strides.back() != 1)
        fail(name, "must be contiguous in its last dimension");
}

// Row-major without gaps; the stride of an axis of size 1 means nothing.
void expect_contiguous(const char* name, const Tensor& tensor) {
    if (tensor.empty()) return;
    std::int64_t expected = 1;
    for (std::size_t i = tensor.shape.size(); i-- > 0;) {
        if (tensor.shape[i] > 1 && tensor.strides[i] != expected) fail(name, "must be contiguous");
        expected *= std::max<std::int64_t>(1, tensor.shape[i]);
    }
}

// Of a tensor whose last axes are (heads, rows, features), with or without a batch axis before them.
Strides strides_of(const Tensor& tensor) {
    const std::size_t first = tensor.shape.size() - 3;
    return {first > 0 ? tensor.strides[0] : 0, tensor.strides[first], tensor.strides[first + 1]};
}

void read_shapes(const AttentionArguments& a, AttentionParams& p) {
    if (a.query.type > ElementType::float16) fail("query", "must hold float32, bfloat16 or float16");
    for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"query", a.query},
                                       {"key", a.key},
                                       {"value", a.value},
                                       {"output", a.output}}) {
        expect_rank(name, tensor, 4);
        expect_type(name, tensor, a.query.type);
        expect_packed_rows(name, tensor);
    }
    p.dtype = static_cast<DType>(a.query.type);
    p.batch = a.query.shape[0];
    p.query_heads = a.query.shape[1];
    p.rows = a.query.shape[2];
    p.head_dim = a.query.shape[3];
    p.key_batch = a.key.shape[0];
    p.key_heads = a.key.shape[1];
    p.keys = a.key.shape[2];
    p.value_dim = a.value.shape[3];
    if (p.key_batch != 1 && p.key_batch != p.batch) fail("key", "must have batch 1 or the query's");
    if (p.key_heads < 1 || p.query_heads % p.key_heads != 0 || p.query_heads < 1)
        fail("query", "must have a multiple of key's heads, got " + std::to_string(p.query_heads) + " and " +
                          std::to_string(p.key_heads));
    if (p.head_dim < 1 || p.head_dim > kMostFeatures) fail("query", "must have a head dimension from 1 to 16384");
    if (p.value_dim < 1 || p.value_dim > kMostFeatures) fail("value", "must have a head dimension from 1 to 16384");
    expect_shape("key", a.key, {p.key_batch, p.key_heads, p.keys, p.head_dim});
    expect_shape("value", a.value, {p.key_batch, p.key_heads, p.keys, p.value_dim});
    expect_shape("output", a.output, {p.batch, p.query_heads, p.rows, p.value_dim});
    expect_contiguous("output", a.output);
    p.query = a.query.as<const void>();
    p.key = a.key.as<const void>();
    p.value = a.value.as<const void>();
    p.output = a.output.as<void>();
    p.query_strides = strides_of(a.query);
    p.key_strides = strides_of(a.key);
    p.value_strides = strides_of(a.value);
    p.output_strides = strides_of(a.output);
    if (!a.lse) return;
    expect_shape("lse", *a.lse, {p.batch, p.query_heads, p.rows});
    expect_type("lse", *a.lse, ElementType::float32);
    expect_contiguous("lse", *a.lse);
    p.lse = a.lse->as<float>();
}

void check_variants(const AttentionArguments& a, const AttentionParams& p) {
    if (p.suffix_starts[0] != 0 || p.suffix_starts[p.variants] != p.rows)
        fail("suffix_starts", "must begin with 0 and end with the number of rows");
    for (std::int64_t v = 0; v < p.variants; ++v) {
        if (p.suffix_starts[v] > p.suffix_starts[v + 1]) fail("suffix_starts", "must not decrease");
        const std::int64_t prefix = p.prefix_lengths[v], base = p.base_starts[v];
        if (prefix < 0) fail("prefix_lengths", "must be >= 0, got " + std::to_string(prefix));
        if (base < 0) fail("base_starts", "must be >= 0, got " + std::to_string(base));
        if (base + prefix > p.keys)
            fail("key", "holds " + std::to_string(p.keys) + " keys, but a variant reaches to key " +
                            std::to_string(base + prefix));
        const std::int64_t reach = prefix + p.suffix_starts[v + 1] - p.suffix_starts[v];
        if (a.factor && reach > p.factor_keys) fail("factor", "is shorter than a variant");
        if (a.position_bias && ((p.bias_rows != 1 && reach > p.bias_rows) || (p.bias_keys != 1 && reach > p.bias_keys)))
            fail("position_bias", "is shorter than a variant");
    }
}

void read_pack(const AttentionArguments& a, AttentionParams& p) {
    const bool packed = a.suffix_starts.has_value();
    for (const auto* other : {&a.own_key, &a.own_value, &a.prefix_lengths, &a.base_starts})
        if (other->has_value() != packed)
            fail("own_key, own_value, suffix_starts, prefix_lengths and base_starts", "go together");
    if (a.row_variant && !packed) fail("row_variant", "is for packs");
    if (!packed) return;
    if (p.batch != 1) fail("query", "must have batch 1 with a pack");
    if (a.key_mask) fail("key_mask", "is for dense calls");
    expect_rank("suffix_starts", *a.suffix_starts, 1);
    p.variants = a.suffix_starts->shape[0] - 1;
    if (p.variants < 1) fail("suffix_starts", "must have one entry more than there are variants");
    expect_shape("prefix_lengths", *a.prefix_lengths, {p.variants});
    expect_shape("base_starts", *a.base_starts, {p.variants});
    for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"suffix_starts", *a.suffix_starts},
                                       {"prefix_lengths", *a.prefix_lengths},
                                       {"base_starts", *a.base_starts}}) {
        expect_type(name, tensor, ElementType::int32);
        expect_contiguous(name, tensor);
    }
    expect_shape("own_key", *a.own_key, {p.key_heads, p.rows, p.head_dim});
    expect_shape("own_value", *a.own_value, {p.key_heads, p.rows, p.value_dim});
    for (const auto& [name, tensor] :
         {std::pair<const char*, const Tensor&>{"own_key", *a.own_key}, {"own_value", *a.own_value}}) {
        expect_type(name, tensor, a.query.type);
        expect_packed_rows(name, tensor);
    }
    p.own_key = a.own_key->as<const void>();
    p.own_value = a.own_value->as<const void>();
    p.own_key_strides = strides_of(*a.own_key);
    p.own_value_strides = strides_of(*a.own_value);
    p.suffix_starts = a.suffix_starts->as<const std::int32_t>();
    p.prefix_lengths = a.prefix_lengths->as<const std::int32_t>();
    p.base_starts = a.base_starts->as<const std::int32_t>();
    if (!a.row_variant) return;
    expect_shape("row_variant", *a.row_variant, {p.rows});
    expect_type("row_variant", *a.row_variant, ElementType::int32);
    expect_contiguous("row_variant", *a.row_variant);
    p.row_variant = a.row_variant->as<const std::int32_t>();
}

void read_extras(const AttentionArguments& a, AttentionParams& p) {
    if (a.factor) {  // (batch | variants, 1 | query_heads, keys)
        const Tensor& t = *a.factor;
        expect_rank("factor", t, 3);
        expect_type("factor", t, ElementType::float32);
        expect_packed_rows("factor", t);
        const std::int64_t lines = p.variants > 0 ? p.variants : p.batch;
        if (t.shape[0] != lines || (t.shape[1] != 1 && t.shape[1] != p.query_heads) ||
            (p.variants == 0 && t.shape[2] != p.keys))
            fail("factor", "has shape " + listed(t.shape));
        p.factor = t.as<const float>();
        p.factor_keys = t.shape[2];
        p.factor_strides = {t.strides[0], t.shape[1] > 1 ? t.strides[1] : 0, 0};
        p.factor_heads = t.shape[1];
    }
    if (a.key_mask) {
        expect_shape("key_mask", *a.key_mask, {p.batch, p.keys});
        expect_type("key_mask", *a.key_mask, ElementType::boolean);
        expect_contiguous("key_mask", *a.key_mask);
        p.key_mask = a.key_mask->as<const std::uint8_t>();
    }
    if (a.sinks) {
        expect_shape("sinks", *a.sinks, {p.query_heads});
        expect_type("sinks", *a.sinks, ElementType::float32);
        expect_contiguous("sinks", *a.sinks);
        p.sinks = a.sinks->as<const float>();
    }
    if (a.position_bias) {  // (1 | batch, 1 | query_heads, 1 | rows, 1 | keys)
        const Tensor& t = *a.position_bias;
        expect_rank("position_bias", t, 4);
        expect_type("position_bias", t, ElementType::float32);
        expect_packed_rows("position_bias", t);
        const std::int64_t full[] = {p.batch, p.query_heads, p.rows, p.keys};
        for (std::size_t i = 0; i < (p.variants > 0 ? 2 : 4); ++i)
            if (t.shape[i] != 1 && t.shape[i] != full[i]) fail("position_bias", "has shape " + listed(t.shape));
        const auto stride = [&](std::size_t i) { return t.shape[i] > 1 ? t.strides[i] : 0; };
        p.position_bias = t.as<const float>();
        p.bias_rows = t.shape[2];
        p.bias_keys = t.shape[3];
        p.bias_strides = {stride(0), stride(1), stride(2)};
        p.bias_key_stride = t.shape[3] > 1 ? 1 : 0;
    }
}

Mode read_mode(const std::string& name) {
    if (name == "log_additive") return Mode::log_additive;
    if (name == "multiplicative") return Mode::multiplicative;
    if (name == "shifted") return Mode::shifted;
    fail("mode", "is unknown: '" + name + "'");
}

}  // namespace

bool Tensor::empty() const { return std::find(shape.begin(), shape.end(), 0) != shape.end(); }

Tensor Tensor::checked(std::uintptr_t address, std::int64_t bytes, std::int64_t type, std::vector<std::int64_t> shape,
                       std::vector<std::int64_t> strides) {
    if (type < 0 || type > static_cast<std::int64_t>(ElementType::boolean))
        fail("dtype code", "is unknown: " + std::to_string(type));
    const auto element_type = static_cast<ElementType>(type);
    const std::int64_t size = element_size(element_type);
    if (shape.size() != strides.size())
        fail("tensor", "has shape " + listed(shape) + " but strides " + listed(strides));
    if (bytes < 0) fail("tensor", "has a negative number of bytes");
    __int128 last = 0;  // index of the last element
    bool empty = false;
    for (std::size_t i = 0; i < shape.size(); ++i) {
        if (shape[i] < 0 || shape[i] > kLargestSize) fail("tensor", "has shape " + listed(shape));
        if (strides[i] < 0) fail("tensor", "has negative strides " + listed(strides));
        empty |= shape[i] == 0;
        last += static_cast<__int128>(shape[i] - 1) * strides[i];
    }
    if (!empty) {
        if (address == 0) fail("tensor", "of shape " + listed(shape) + " has a null address");
        if (address % static_cast<std::uintptr_t>(size) != 0) fail("tensor", "is not aligned to its elements");
        if ((last + 1) * size > bytes)
            fail("tensor", "of shape " + listed(shape) + " and strides " + listed(strides) + " reaches beyond its " +
                               std::to_string(bytes) + " bytes");
    }
    return {address, bytes, element_type, std::move(shape), std::move(strides)};
}

AttentionParams make_params(const AttentionArguments& a, Memory memory) {
    AttentionParams p;
    read_shapes(a, p);
    read_pack(a, p);
    read_extras(a, p);
    if (p.variants > 0 && memory == Memory::host) check_variants(a, p);
    p.mode = read_mode(a.mode);
    p.is_causal = a.is_causal;
    constexpr double most = std::numeric_limits<float>::max();
    if (!(std::abs(a.scale) <= most)) fail("scale", "must be finite in float32, got " + std::to_string(a.scale));
    p.scale = static_cast<float>(a.scale);
    if (a.sliding_window < 0) fail("sliding_window", "must be >= 0, 0 for none");
    p.sliding_window = std::min(a.sliding_window, kLargestSize);
    if (!(a.softcap >= 0.0 && a.softcap <= most)) fail("softcap", "must be >= 0 and finite in float32, 0 for none");
    p.softcap = static_cast<float>(a.softcap);
    if (a.softcap > 0.0 && p.softcap == 0.0f) fail("softcap", "is too small for float32");  // 0 would mean none
    return p;
}

GradientParams make_gradient_params(const AttentionParams& call, const GradientArguments& a) {
    GradientParams g;
    AttentionParams& p = g.forward = call;
    if (!p.lse && p.batch > 0 && p.rows > 0) fail("lse", "is needed for gradients");
    g.grad_output = p.output;
    g.lse = p.lse;
    p.output = nullptr;
    p.lse = nullptr;
    expect_shape("delta", a.delta, {p.batch, p.query_heads, p.rows});
    expect_type("delta", a.delta, ElementType::float32);
    expect_contiguous("delta", a.delta);
    g.delta = a.delta.as<const float>();
    const auto wanted = [](const char* name, const std::optional<Tensor>& tensor, ElementType type,
                           const std::vector<std::int64_t>& shape) -> void* {
        if (!tensor) return nullptr;
        expect_shape(name, *tensor, shape);
        expect_type(name, *tensor, type);
        expect_contiguous(name, *tensor);
        return tensor->as<void>();
    };
    const auto type = static_cast<ElementType>(p.dtype);
    g.grad_query = wanted("grad_query", a.grad_query, type, {p.batch, p.query_heads, p.rows, p.head_dim});
    g.grad_key = wanted("grad_key", a.grad_key, type, {p.key_batch, p.key_heads, p.keys, p.head_dim});
    g.grad_value = wanted("grad_value", a.grad_value, type, {p.key_batch, p.key_heads, p.keys, p.value_dim});
    if ((a.grad_own_key || a.grad_own_value) && p.variants == 0)
        fail("grad_own_key and grad_own_value", "are for packs");
    g.grad_own_key = wanted("grad_own_key", a.grad_own_key, type, {p.key_heads, p.rows, p.head_dim});
    g.grad_own_value = wanted("grad_own_value", a.grad_own_value, type, {p.key_heads, p.rows, p.value_dim});
    if (a.grad_factor) {
        if (!p.factor && !a.grad_factor->empty()) fail("grad_factor", "is for calls with a factor");
        const std::int64_t lines = p.variants > 0 ? p.variants : p.batch;
        g.grad_factor = static_cast<float*>(
            wanted("grad_factor", a.grad_factor, ElementType::float32, {lines, p.factor_heads, p.factor_keys}));
    }
    return g;
}

}  // namespace atman
