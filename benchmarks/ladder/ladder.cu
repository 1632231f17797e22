// The way from the plain kernel to the fastest one, step by step: each step is held against the first, then timed.
//
//   ladder [variants suffix prefix query_heads key_heads]        head dimension 128, bfloat16, causal
//
// A step that is wrong has no time. README.md says how to build this, and what was expected of each step.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "../../csrc/cuda/hopper/launch.h"

namespace {

using namespace atman;
using namespace atman::cuda;
using T = __nv_bfloat16;
using hopper::Config;
using hopper::Overlap;

constexpr int kDim = 128, kRepeats = 20;
constexpr float kTolerance = 0.02f;  // of values around 1, in bfloat16

template <class E>
class Buffer {
  public:
    explicit Buffer(std::size_t size) : size_(size) {
        check(cudaMalloc(&data_, std::max<std::size_t>(1, size) * sizeof(E)), "cudaMalloc");
    }
    explicit Buffer(const std::vector<E>& from) : Buffer(from.size()) {
        check(cudaMemcpy(data_, from.data(), size_ * sizeof(E), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    E* get() const { return data_; }
    std::vector<E> read() const {
        std::vector<E> to(size_);
        check(cudaMemcpy(to.data(), data_, size_ * sizeof(E), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return to;
    }

  private:
    E* data_ = nullptr;
    std::size_t size_;
};

std::vector<T> noise(std::size_t size, unsigned seed) {  // uniform in [-1.7, 1.7], variance 1
    std::vector<T> values(size);
    for (T& value : values) {
        seed = seed * 1664525u + 1013904223u;
        value = __float2bfloat16_rn((static_cast<float>(seed >> 8) / 8388608.0f - 1.0f) * 1.732f);
    }
    return values;
}

struct Shape {
    std::int64_t variants = 512, suffix = 8, prefix = 8192, query_heads = 32, key_heads = 8;
};

struct Problem {
    Shape shape;
    std::int64_t rows = shape.variants * shape.suffix, reach = shape.prefix + shape.suffix;
    Buffer<T> query{noise(static_cast<std::size_t>(shape.query_heads * rows * kDim), 1)};
    Buffer<T> base_key{noise(static_cast<std::size_t>(shape.key_heads * shape.prefix * kDim), 2)};
    Buffer<T> base_value{noise(static_cast<std::size_t>(shape.key_heads * shape.prefix * kDim), 3)};
    Buffer<T> own_key{noise(static_cast<std::size_t>(shape.key_heads * rows * kDim), 4)};
    Buffer<T> own_value{noise(static_cast<std::size_t>(shape.key_heads * rows * kDim), 5)};
    Buffer<T> output{static_cast<std::size_t>(shape.query_heads * rows * kDim)};
    Buffer<std::int32_t> starts{ramp(shape.suffix)}, prefixes{constant(shape.prefix)}, bases{constant(0)};
    Buffer<float> factor{factors()};

    std::vector<std::int32_t> ramp(std::int64_t step) const {
        std::vector<std::int32_t> values;
        for (std::int64_t v = 0; v <= shape.variants; ++v) values.push_back(static_cast<std::int32_t>(v * step));
        return values;
    }
    std::vector<std::int32_t> constant(std::int64_t value) const {
        return std::vector<std::int32_t>(static_cast<std::size_t>(shape.variants), static_cast<std::int32_t>(value));
    }
    std::vector<float> factors() const {  // each variant turns one key down
        std::vector<float> values(static_cast<std::size_t>(shape.variants * reach), 1.0f);
        for (std::int64_t v = 0; v < shape.variants; ++v)
            values[static_cast<std::size_t>(v * reach + v % reach)] = 0.1f;
        return values;
    }
    AttentionParams params() const {
        AttentionParams p;
        p.query_heads = shape.query_heads;
        p.key_heads = shape.key_heads;
        p.rows = rows;
        p.keys = shape.prefix;
        p.head_dim = p.value_dim = kDim;
        p.dtype = DType::bfloat16;
        p.query = query.get();
        p.key = base_key.get();
        p.value = base_value.get();
        p.own_key = own_key.get();
        p.own_value = own_value.get();
        p.output = output.get();
        p.query_strides = p.output_strides = {0, rows * kDim, kDim};
        p.key_strides = p.value_strides = {0, shape.prefix * kDim, kDim};
        p.own_key_strides = p.own_value_strides = {0, rows * kDim, kDim};
        p.variants = shape.variants;
        p.suffix_starts = starts.get();
        p.prefix_lengths = prefixes.get();
        p.base_starts = bases.get();
        p.factor = factor.get();
        p.factor_keys = reach;
        p.factor_strides = {reach, 0, 0};
        p.is_causal = true;
        p.scale = 0.0883883476f;
        return p;
    }
    double operations() const {  // of both products
        const double seen = static_cast<double>(shape.prefix) + (static_cast<double>(shape.suffix) + 1) / 2;
        return 4.0 * static_cast<double>(shape.query_heads * rows * kDim) * seen;
    }
};

float milliseconds(const std::function<void()>& run) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<float> times;
    run();
    for (int i = 0; i < kRepeats; ++i) {
        check(cudaEventRecord(begin), "cudaEventRecord");
        run();
        check(cudaEventRecord(end), "cudaEventRecord");
        check(cudaEventSynchronize(end), "cudaEventSynchronize");
        times.push_back(0.0f);
        check(cudaEventElapsedTime(&times.back(), begin, end), "cudaEventElapsedTime");
    }
    check(cudaEventDestroy(begin), "cudaEventDestroy");
    check(cudaEventDestroy(end), "cudaEventDestroy");
    std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
    return times[kRepeats / 2];
}

float largest_difference(const std::vector<T>& a, const std::vector<T>& b) {
    float largest = 0.0f;
    for (std::size_t i = 0; i < a.size(); ++i) {
        const float difference = std::fabs(__bfloat162float(a[i]) - __bfloat162float(b[i]));
        if (!(difference <= largest)) largest = difference;  // NaN too
    }
    return largest;
}

template <class C>
void attend_with(const AttentionParams& p, const Launch& launch) {
    make_plan(p, launch);
    hopper::launch_attend<C>(p, launch);
    if (launch.splits > 1) merge_splits(p, launch);
}

int climb(const Shape& shape) {
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "cudaDeviceGetAttribute");
    const Problem problem{shape};
    const AttentionParams p = problem.params();
    const int splits = choose_splits(p, multiprocessors);
    const Buffer<std::byte> workspace(static_cast<std::size_t>(lay_out_workspace(p, splits).bytes));
    const auto launch = [&](int parts) {
        return Launch{nullptr, multiprocessors, parts, workspace.get(), lay_out_workspace(p, parts)};
    };
    struct Step {
        const char* name;
        std::function<void()> run;
    };
    const Step steps[] = {
        {"plain: a warp per row", [&] { attend_plain(p, launch(1)); }},
        {"wgmma and TMA, nothing overlaps", [&] { attend_with<Config<T, kDim, Overlap::none>>(p, launch(1)); }},
        {"softmax beside the next products", [&] { attend_with<Config<T, kDim, Overlap::within>>(p, launch(1)); }},
        {"two warpgroups by turns", [&] { attend_with<Config<T, kDim, Overlap::between>>(p, launch(1)); }},
        {"keys split over thread blocks", [&] { attend_with<Config<T, kDim, Overlap::between>>(p, launch(splits)); }},
    };
    std::vector<T> expected;
    int wrong = 0;
    std::printf("%lld variants of %lld rows over %lld keys, %lld/%lld heads, %d part(s)\n",
                static_cast<long long>(shape.variants), static_cast<long long>(shape.suffix),
                static_cast<long long>(shape.prefix), static_cast<long long>(shape.query_heads),
                static_cast<long long>(shape.key_heads), splits);
    for (const Step& step : steps) {
        check(cudaMemset(problem.output.get(), 0xff,
                         static_cast<std::size_t>(shape.query_heads * problem.rows * kDim) * 2),
              "cudaMemset");
        step.run();
        check(cudaDeviceSynchronize(), step.name);
        const std::vector<T> output = problem.output.read();
        if (expected.empty()) expected = output;
        const float difference = largest_difference(output, expected);
        if (!(difference <= kTolerance)) {
            std::printf("%-36s WRONG by %g\n", step.name, static_cast<double>(difference));
            ++wrong;
            continue;
        }
        const double time = static_cast<double>(milliseconds(step.run));
        std::printf("%-36s %9.3f ms %7.1f TFLOP/s\n", step.name, time, problem.operations() / time * 1e-9);
    }
    return wrong;
}

}  // namespace

int main(int count, char** words) {
    Shape shape;
    std::int64_t* fields[] = {&shape.variants, &shape.suffix, &shape.prefix, &shape.query_heads, &shape.key_heads};
    for (int i = 1; i < count && i <= 5; ++i) *fields[i - 1] = std::atoll(words[i]);
    try {
        return climb(shape) ? 1 : 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
