// What the instructions of cuda/hopper/instructions.h do, said again in C++ for the host, from PTX's documentation: the
// layouts of wgmma's operands and of TMA's boxes, mbarriers, named barriers, warps. A thread of the GPU is a fiber; one
// that waits lets the others go on; when none can, the kernel hangs, and that is an error.
//
// Products and stores happen as late as they may, when they are waited for: a stage that is freed too early, or a
// register or an output that is overwritten too early, shows in the result; a store that nobody waits for is none. Timing and memory ordering between proxies are not modelled.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

namespace model {

struct Index {
    unsigned x = 0;
};

struct Product {
    std::function<void()> run;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    Index thread;
    std::vector<std::vector<Product>> groups;  // committed, the oldest first
    std::vector<Product> open;
    const std::uint32_t* published = nullptr;   // of the product being issued: a's registers
    std::vector<std::function<void()>> stores;  // to the tensor, not yet done
};

struct Warp {
    float values[2][32];
    int arrived = 0;
    unsigned generation = 0;
};

struct NamedBarrier {
    int arrived = 0;
    unsigned generation = 0;
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    NamedBarrier barriers[16];
    ucontext_t scheduler;
    Fiber* current = nullptr;
    std::uint64_t progress = 0;  // counts everything that another fiber may be waiting for
    Index block, grid;
};

inline Machine machine;
inline Index thread_index() { return machine.current->thread; }
inline Fiber& fiber() { return *machine.current; }
inline Warp& warp() { return machine.warps[thread_index().x / 32]; }
inline unsigned lane() { return thread_index().x % 32; }

template <class Condition>
void wait_until(Condition condition) {
    while (!condition()) swapcontext(&fiber().context, &machine.scheduler);
    ++machine.progress;
}

// All lanes bring a value; the result says what each brought.
inline const float* exchange(float value) {
    Warp& w = warp();
    const unsigned generation = w.generation;
    w.values[generation % 2][lane()] = value;
    ++machine.progress;
    if (++w.arrived == 32) {
        w.arrived = 0;
        ++w.generation;
    }
    wait_until([&] { return w.generation != generation; });
    return w.values[generation % 2];
}

inline void pass(NamedBarrier& barrier, int threads) {
    ++machine.progress;
    if (++barrier.arrived < threads) return;
    barrier.arrived = 0;
    ++barrier.generation;
}

inline void join(NamedBarrier& barrier, int threads) {
    const unsigned generation = barrier.generation;
    pass(barrier, threads);
    wait_until([&] { return barrier.generation != generation; });
}

inline std::function<void()> entry;
inline void begin_fiber() {
    entry();
    fiber().done = true;
    ++machine.progress;
    swapcontext(&fiber().context, &machine.scheduler);
}

// Runs `kernel` on every thread of one block.
inline void run_block(int threads, Index block, Index grid, std::function<void()> kernel) {
    constexpr std::size_t stack = 256 * 1024;
    machine.fibers.clear();
    machine.fibers.resize(static_cast<std::size_t>(threads));
    machine.warps.assign(static_cast<std::size_t>(threads / 32), Warp{});
    for (NamedBarrier& barrier : machine.barriers) barrier = NamedBarrier{};
    machine.block = block;
    machine.grid = grid;
    entry = std::move(kernel);
    for (int t = 0; t < threads; ++t) {
        Fiber& f = machine.fibers[static_cast<std::size_t>(t)];
        f.thread.x = static_cast<unsigned>(t);
        f.stack.reset(new char[stack]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = stack;
        f.context.uc_link = nullptr;
        makecontext(&f.context, begin_fiber, 0);
    }
    for (bool running = true; running;) {
        const std::uint64_t before = machine.progress;
        running = false;
        for (Fiber& f : machine.fibers) {
            if (f.done) continue;
            running = true;
            machine.current = &f;
            swapcontext(&machine.scheduler, &f.context);
        }
        if (running && machine.progress == before) throw std::runtime_error("the kernel hangs: every thread waits");
    }
}

struct Map {  // in a CUtensorMap's bytes
    const std::uint16_t* data;
    std::int64_t sizes[4], strides[4];  // in elements; features first
    int box[4];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

struct Mbarrier {  // in its 8 bytes
    std::uint16_t count;
    std::int16_t pending;
    std::int32_t bytes : 28;
    std::uint32_t phase : 1;
};
static_assert(sizeof(Mbarrier) == 8);

inline void settle(Mbarrier& barrier) {
    ++machine.progress;
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = static_cast<std::int16_t>(barrier.count);
}

}  // namespace model

#define threadIdx model::thread_index()
#define blockIdx model::machine.block
#define gridDim model::machine.grid
#define __launch_bounds__(...)
#define __grid_constant__
#define __syncthreads() model::join(model::machine.barriers[0], static_cast<int>(model::machine.fibers.size()))
#define __syncwarp() (void)model::exchange(0.0f)
#define __shared__

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return model::exchange(value)[model::lane() ^ static_cast<unsigned>(mask)];
}
inline std::int32_t __shfl_xor_sync(unsigned mask, std::int32_t value, int lanes) {
    float bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = __shfl_xor_sync(mask, bits, lanes);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __shfl_sync(unsigned, float value, int from) { return model::exchange(value)[from]; }
inline bool __any_sync(unsigned, bool value) {
    const float* all = model::exchange(value ? 1.0f : 0.0f);
    return std::any_of(all, all + 32, [](float x) { return x != 0.0f; });
}
template <class T>
T __ldg(const T* from) {
    return *from;
}
inline float __fdividef(float a, float b) { return a / b; }

namespace atman::cuda::hopper {

using std::max;
using std::min;

alignas(1024) inline unsigned char memory[227 * 1024];  // the block's shared memory

inline std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(static_cast<const unsigned char*>(pointer) - memory);
}
inline model::Mbarrier& mbarrier(std::uint64_t* at) { return *reinterpret_cast<model::Mbarrier*>(at); }

inline void barrier_init(std::uint64_t* barrier, int arrivals) {
    mbarrier(barrier) = {static_cast<std::uint16_t>(arrivals), static_cast<std::int16_t>(arrivals), 0, 0};
}
inline void barrier_init_done() {}
inline void barrier_arrive(std::uint64_t* barrier) {
    --mbarrier(barrier).pending;
    model::settle(mbarrier(barrier));
}
inline void barrier_expect(std::uint64_t* barrier, int bytes) {
    mbarrier(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
    model::wait_until([&] { return mbarrier(barrier).phase != parity; });
}
template <int kThreads>
void named_sync(int id) {
    model::join(model::machine.barriers[id], kThreads);
}
template <int kThreads>
void named_arrive(int id) {
    model::pass(model::machine.barriers[id], kThreads);
}
template <int>
void grow_registers() {}
template <int>
void shrink_registers() {}
inline void prefetch_map(const CUtensorMap&) {}
inline void fence_async_proxy() {}

inline std::uint32_t swizzled(std::uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Every element of a box: visit(its place in shared memory, its place in the tensor, or null beyond the tensor's end).
template <class Visit>
void walk_box(const model::Map& m, std::uint32_t start, const int (&from)[4], Visit visit) {
    std::uint32_t offset = start;
    for (int i3 = 0; i3 < m.box[3]; ++i3)
        for (int i2 = 0; i2 < m.box[2]; ++i2)
            for (int i1 = 0; i1 < m.box[1]; ++i1)
                for (int i0 = 0; i0 < m.box[0]; ++i0, offset += 2) {
                    const std::int64_t at[4] = {from[0] + i0, from[1] + i1, from[2] + i2, from[3] + i3};
                    std::int64_t element = 0;
                    bool inside = true;
                    for (int side = 0; side < 4; ++side) {
                        inside = inside && at[side] >= 0 && at[side] < m.sizes[side];
                        element += at[side] * m.strides[side];
                    }
                    visit(memory + swizzled(offset), inside ? m.data + element : nullptr);
                }
}

inline void load_box(void* to, const CUtensorMap& map, std::uint64_t* barrier, int feature, int key, int head,
                     int batch) {
    model::Map m;
    std::memcpy(&m, &map, sizeof m);
    walk_box(m, shared_address(to), {feature, key, head, batch},
             [](unsigned char* shared, const std::uint16_t* element) {
                 const std::uint16_t zero = 0;
                 std::memcpy(shared, element ? element : &zero, 2);
             });
    mbarrier(barrier).bytes -= m.box[1] * 128;
    model::settle(mbarrier(barrier));
}

inline void store_box(const CUtensorMap& map, const void* from, int feature, int head, int row, int batch) {
    model::Map m;
    std::memcpy(&m, &map, sizeof m);
    model::fiber().stores.push_back([=, start = shared_address(from)] {
        walk_box(m, start, {feature, head, row, batch}, [](const unsigned char* shared, const std::uint16_t* element) {
            if (element) std::memcpy(const_cast<std::uint16_t*>(element), shared, 2);
        });
    });
}
inline void stores_commit() {}
inline void stores_wait() {
    for (const auto& store : model::fiber().stores) store();
    model::fiber().stores.clear();
}

inline float exponential2(float x) { return std::exp2(x); }
inline float logarithm2(float x) { return std::log2(x); }

// --- wgmma ---

inline void products_begin() {}
inline void products_commit() {
    model::fiber().groups.push_back(std::move(model::fiber().open));
    model::fiber().open.clear();
}
template <int kPending>
void products_wait() {
    (void)model::exchange(0.0f);  // a's registers of other lanes are read: nobody has gone on
    auto& groups = model::fiber().groups;
    while (groups.size() > kPending) {
        for (const model::Product& product : groups.front()) product.run();
        groups.erase(groups.begin());
    }
    (void)model::exchange(0.0f);
}
template <class T>
void pin(T&) {}

inline std::uint64_t describe_matrix(const void* start, int near, int far) {
    return std::uint64_t{1} << 62 | static_cast<std::uint64_t>(far >> 4) << 32 |
           static_cast<std::uint64_t>(near >> 4) << 16 | (shared_address(start) & 0x3ffffu) >> 4;
}

struct Matrix {
    std::uint32_t start, near, far;
    explicit Matrix(std::uint64_t d)
        : start((d & 0x3fff) << 4), near((d >> 16 & 0x3fff) << 4), far((d >> 32 & 0x3fff) << 4) {
        if (d >> 62 != 1) throw std::runtime_error("not a 128-byte swizzle");
    }
    template <class T>
    float at(std::uint32_t offset) const {
        T element;
        std::memcpy(&element, memory + swizzled(start + offset), sizeof element);
        return static_cast<float>(element);
    }
    // Summed dimension contiguous: groups of 8 rows, `far` apart.
    template <class T>
    float row_major(int row, int k) const {
        return at<T>(static_cast<std::uint32_t>(row / 8) * far + static_cast<std::uint32_t>(row % 8 * 128 + k * 2));
    }
    // Columns contiguous: 64 to a slab, slabs `near` apart; groups of 8 of the summed dimension `far` apart.
    template <class T>
    float column_major(int column, int k) const {
        return at<T>(static_cast<std::uint32_t>(column / 64) * near + static_cast<std::uint32_t>(column % 64 * 2) +
                     static_cast<std::uint32_t>(k / 8) * far + static_cast<std::uint32_t>(k % 8 * 128));
    }
};

// Row and column of register i of an accumulator.
inline int row_of(unsigned thread, int i) {
    return static_cast<int>(thread % 128 / 32 * 16 + thread % 32 / 4) + 8 * (i / 2 % 2);
}
inline int column_of_register(unsigned thread, int i) { return i / 4 * 8 + static_cast<int>(thread % 4 * 2) + i % 2; }

template <class T, int kCount>
void multiply(float (&d)[kCount], std::uint64_t a, std::uint64_t b, int accumulate, T) {
    const unsigned thread = threadIdx.x;
    float* to = d;
    model::fiber().open.push_back({[=] {
        const Matrix left(a), right(b);
        for (int i = 0; i < kCount; ++i) {
            float sum = accumulate ? to[i] : 0.0f;
            for (int k = 0; k < 16; ++k)
                sum += left.row_major<T>(row_of(thread, i), k) * right.row_major<T>(column_of_register(thread, i), k);
            to[i] = sum;
        }
    }});
}

// a's registers: (row, k = 2 * (lane % 4)), (row + 8, same), (row, k + 8), (row + 8, k + 8), two k to a register
template <class T, int kCount>
void multiply(float (&d)[kCount], const std::uint32_t* a, std::uint64_t b, T) {
    const unsigned thread = threadIdx.x;
    float* to = d;
    model::Fiber* quad[4];  // the lanes that hold the same rows; the same product of theirs is at the same place
    for (unsigned q = 0; q < 4; ++q) quad[q] = &model::machine.fibers[thread / 4 * 4 + q];
    model::fiber().published = a;
    (void)model::exchange(0.0f);
    const std::uint32_t* registers[4];
    for (unsigned q = 0; q < 4; ++q) registers[q] = quad[q]->published;
    (void)model::exchange(0.0f);
    const std::vector<const std::uint32_t*> lanes(registers, registers + 4);
    model::fiber().open.push_back({[=] {
        const Matrix right(b);
        for (int i = 0; i < kCount; ++i) {
            const int h = i / 2 % 2;
            for (int k = 0; k < 16; ++k) {
                const std::uint32_t word = lanes[static_cast<std::size_t>(k % 8 / 2)][k / 8 * 2 + h];
                const auto bits = static_cast<std::uint16_t>(k % 2 ? word >> 16 : word & 0xffff);
                T weight;
                std::memcpy(&weight, &bits, 2);
                to[i] += static_cast<float>(weight) * right.column_major<T>(column_of_register(thread, i), k);
            }
        }
    }});
}

}  // namespace atman::cuda::hopper
