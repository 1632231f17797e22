// The module `_cuda` for the host: the kernels themselves, run over a model of their instructions. For tests.

#define ATMAN_INSTRUCTIONS "../../checks/instructions_model.h"
#include "../cuda/attention.h"
#include "../cuda/hopper/kernel.h"
#include "../cuda/describe_tiles.h"
#include "../cuda/merge.h"
#include "../cuda/plain.h"

namespace atman::cuda::plain {
float shared[kWarps * 2 * kPlainDims];
}

namespace atman::cuda {
namespace {

CUtensorMap make_map(const hopper::Boxes& boxes) {
    model::Map map{static_cast<const std::uint16_t*>(boxes.data), {boxes.features}, {1}, {hopper::kSlab}};
    for (int i = 0; i < 3; ++i) {
        map.sizes[i + 1] = boxes.sides[i].size;
        map.strides[i + 1] = boxes.sides[i].stride;
        map.box[i + 1] = boxes.sides[i].box;
    }
    CUtensorMap bytes{};
    std::memcpy(static_cast<void*>(&bytes), &map, sizeof map);
    return bytes;
}

// What plan.cu leaves in the work space.
void make_plan(const AttentionParams& p, TileKeys* tiles, std::int32_t* order, std::uint64_t* flags) {
    const auto blocks = static_cast<unsigned>(divide_up(count_tiles(p) * 32, kDescribeThreads));
    for (unsigned block = 0; block < blocks; ++block)
        model::run_block(kDescribeThreads, {block}, {blocks}, [&] { describe_tiles(p, tiles); });
    for (std::int64_t t = 0; t < count_tiles(p); ++t) {
        const TileKeys row_by_row = describe_tile(p, t);
        if (std::memcmp(&tiles[t], &row_by_row, sizeof row_by_row) != 0)
            throw std::logic_error("the warp and its rows one by one disagree about tile " + std::to_string(t));
        order[t] = static_cast<std::int32_t>(t);
    }
    std::stable_sort(order, order + count_tiles(p),
                     [&](std::int32_t a, std::int32_t b) { return visited(tiles[a]) > visited(tiles[b]); });
    const std::int64_t lines = p.factor ? (p.variants ? p.variants : p.batch) * p.factor_heads : 0;
    for (std::int64_t line = 0; line < lines; ++line) {
        std::uint64_t* words = flags + line * flag_words(p);
        std::fill(words, words + flag_words(p), 0);
        const float* factor =
            p.factor + line / p.factor_heads * p.factor_strides.batch + line % p.factor_heads * p.factor_strides.head;
        for (std::int64_t i = 0; i < p.factor_keys; ++i)
            if (factor[i] != 1.0f) words[i / kFlagKeys / 64] |= std::uint64_t{1} << (i / kFlagKeys % 64);
    }
}

template <class T>
void merge(const AttentionParams& p, int splits, const float* partial, const float* partial_lse) {
    const std::int64_t rows = p.batch * p.query_heads * p.rows;
    for (std::int64_t row = 0; row < rows; ++row) {
        Merge merge;
        for (int s = 0; s < splits; ++s) merge.include(partial_lse[s * rows + row]);
        const SoftmaxEnd end = p.sinks ? finish_softmax(merge.maximum, merge.sum, p.sinks[row / p.rows % p.query_heads])
                                       : finish_softmax(merge.maximum, merge.sum);
        if (p.lse) p.lse[row] = end.lse;
        for (std::int64_t d = 0; d < p.value_dim; ++d) {
            float total = 0.0f;
            for (int s = 0; s < splits; ++s) {
                const float weight = merge.weight(partial_lse[s * rows + row]);
                if (weight != 0.0f) total += weight * partial[(s * rows + row) * p.value_dim + d];
            }
            static_cast<T*>(p.output)[row * p.value_dim + d] = T(total * end.weight);
        }
    }
}

template <class C>
void attend_with(const AttentionParams& p, std::byte* workspace, int multiprocessors) {
    const int splits = choose_splits(p, multiprocessors);
    const Workspace space = lay_out_workspace(p, splits);
    const auto at = [&](std::int64_t offset) { return static_cast<void*>(workspace + offset); };
    auto* tiles = static_cast<TileKeys*>(at(space.tiles));
    auto* order = static_cast<std::int32_t*>(at(space.order));
    auto* flags = static_cast<std::uint64_t*>(at(space.flags));
    make_plan(p, tiles, order, flags);
    const hopper::Maps maps = hopper::make_maps<C>(p, make_map);
    const auto items = static_cast<std::int32_t>(count_tiles(p) * p.key_heads * splits);
    const hopper::KernelParams params{
        p,      tiles, order, flags, static_cast<float*>(at(space.partial)), static_cast<float*>(at(space.partial_lse)),
        splits, items};
    const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(items, multiprocessors));
    for (unsigned block = 0; block < blocks; ++block) {
        std::memset(hopper::memory, 0xff, sizeof hopper::memory);  // NaN
        model::run_block(hopper::kThreads, {block}, {blocks}, [&] { hopper::attend<C>(params, maps); });
    }
    if (splits > 1) merge<typename C::T>(p, splits, params.partial, params.partial_lse);
}

template <class T>
void attend_type(const AttentionParams& p, std::byte* workspace, int multiprocessors) {
    if (p.head_dim == 64) attend_with<hopper::Config<T, 64>>(p, workspace, multiprocessors);
    else if (p.head_dim == 128) attend_with<hopper::Config<T, 128>>(p, workspace, multiprocessors);
    else attend_with<hopper::Config<T, 256>>(p, workspace, multiprocessors);
}

template <class T>
void attend_plain(const AttentionParams& p) {
    const auto blocks = static_cast<unsigned>(divide_up(p.batch * p.query_heads * p.rows, plain::kWarps));
    for (unsigned block = 0; block < blocks; ++block) {
        std::memset(plain::shared, 0xff, sizeof plain::shared);  // NaN
        model::run_block(plain::kWarps * 32, {block}, {blocks}, [&] { plain::attend_rows<T>(p); });
    }
}

}  // namespace

void attend(const AttentionParams& p, Kernel kernel, const Tensor& workspace, int, int multiprocessors,
            std::uintptr_t) {
    const std::string reason = refusal(p, kernel);
    if (!reason.empty()) throw std::invalid_argument("the kernel " + reason);
    if (kernel == Kernel::plain)
        return p.dtype == DType::bfloat16 ? attend_plain<__nv_bfloat16>(p) : attend_plain<__half>(p);
    auto* memory = reinterpret_cast<std::byte*>(workspace.address);
    if (p.dtype == DType::bfloat16) attend_type<__nv_bfloat16>(p, memory, multiprocessors);
    else attend_type<__half>(p, memory, multiprocessors);
}

std::string device_problem(int) { return "it runs on the host"; }
std::string architectures() { return "host"; }

}  // namespace atman::cuda
