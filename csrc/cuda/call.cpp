// Which calls a kernel takes, and what work space it needs: known from shapes alone.

#include <limits>
#include <stdexcept>

#include "attention.h"
#include "plan.h"

namespace atman::cuda {
namespace {

constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kAlignment = 16;  // bytes: what TMA and 16-byte loads ask for

bool aligned(const void* data, const Strides& strides, std::int64_t batch, std::int64_t heads, std::int64_t rows) {
    const auto fits = [](std::int64_t stride, std::int64_t size) {
        return size <= 1 || (stride > 0 && stride * 2 % kAlignment == 0);
    };
    if (!data) return true;  // nothing is there to be read
    return reinterpret_cast<std::uintptr_t>(data) % kAlignment == 0 && fits(strides.batch, batch) &&
           fits(strides.head, heads) && fits(strides.row, rows);
}

bool all_aligned(const AttentionParams& p) {
    return aligned(p.query, p.query_strides, p.batch, p.query_heads, p.rows) &&
           aligned(p.key, p.key_strides, p.key_batch, p.key_heads, p.keys) &&
           aligned(p.value, p.value_strides, p.key_batch, p.key_heads, p.keys) &&
           aligned(p.own_key, p.own_key_strides, 1, p.key_heads, p.rows) &&
           aligned(p.own_value, p.own_value_strides, 1, p.key_heads, p.rows) &&
           aligned(p.output, p.output_strides, p.batch, p.query_heads, p.rows);
}

}  // namespace

Kernel kernel_named(const std::string& name) {
    if (name == "plain") return Kernel::plain;
    if (name == "hopper") return Kernel::hopper;
    throw std::invalid_argument("kernel must be 'plain' or 'hopper', got '" + name + "'");
}

std::string refusal(const AttentionParams& p, Kernel kernel) {
    if (p.dtype == DType::float32) return "takes bfloat16 and float16, not float32";
    if (p.keys > kLargest || p.rows > kLargest || p.factor_keys > kLargest)
        return "takes fewer than 2^31 rows and keys";
    if (p.batch * p.query_heads * p.rows > kLargest)
        return "takes fewer than 2^31 rows, heads and batch entries counted";
    if (kernel == Kernel::plain) {
        if (p.head_dim <= kPlainDims && p.value_dim <= kPlainDims) return "";
        return "takes head dimensions up to " + std::to_string(kPlainDims);
    }
    if (p.head_dim != 64 && p.head_dim != 128 && p.head_dim != 256)
        return "takes head dimensions 64, 128 and 256, not " + std::to_string(p.head_dim);
    if (p.value_dim != p.head_dim)
        return "takes values of the keys' head dimension " + std::to_string(p.head_dim) + ", not " +
               std::to_string(p.value_dim);
    if (p.position_bias) return "takes no position_bias";
    if (group_size(p) > kTileRows)
        return "takes up to " + std::to_string(kTileRows) + " query heads to a key head, not " +
               std::to_string(group_size(p));
    if (!all_aligned(p)) return "takes tensors whose rows begin at multiples of 16 bytes";
    return "";
}

std::int64_t workspace_bytes(const AttentionParams& p, Kernel kernel, int multiprocessors) {
    if (kernel == Kernel::plain || !refusal(p, kernel).empty()) return 0;
    return lay_out_workspace(p, choose_splits(p, multiprocessors)).bytes;
}

}  // namespace atman::cuda
