// wgmma, TMA and mbarriers as functions: PTX with names. The layouts they expect are in config.h.
// Source of the encodings: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "mbarrier".

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace atman::cuda::hopper {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- mbarriers: `parity` is 0 for the first phase, 1 for the second, 0 again … ---

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(std::uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// --- named barriers: 0 is __syncthreads ---

template <int kThreads>
__device__ __forceinline__ void named_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void named_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- TMA: a box of a tensor to shared memory, with zeros beyond its end, or from there, but for what is beyond ---

__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, std::uint64_t* barrier, int feature, int key,
                                         int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
            "r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(feature), "r"(key), "r"(head), "r"(batch)
        : "memory");
}
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int feature, int head, int row,
                                          int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(shared_address(from)), "r"(feature), "r"(head), "r"(row), "r"(batch)
                 : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until what this thread stores has been read from shared memory.
__device__ __forceinline__ void stores_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Ordinary writes to shared memory become visible to wgmma and TMA.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- approximations ---

__device__ __forceinline__ float exponential2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float logarithm2(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// --- wgmma ---

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler knows nothing of registers that are written later: no use of them may move across this.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(std::uint32_t (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// A matrix in shared memory, rows of 128 bytes, 16-byte chunks exclusive-ored with the row's number modulo 8
// (128-byte swizzle): `near` and `far` as in config.h, in bytes.
// Worked out anew at each use: kept through a loop, a descriptor for every step would fill the registers.
__device__ __forceinline__ std::uint64_t describe_matrix(const void* start, int near, int far) {
    constexpr std::uint64_t swizzle_128 = std::uint64_t{1} << 62;
    std::uint32_t address = shared_address(start);
    asm volatile("" : "+r"(address));
    return swizzle_128 | (static_cast<std::uint64_t>(far >> 4) << 32) | (static_cast<std::uint64_t>(near >> 4) << 16) |
           ((address & 0x3ffffu) >> 4);
}

// clang-format off

#define ATMAN_D32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATMAN_D64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ATMAN_D128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" ", " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ATMAN_R8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ATMAN_R32(i) ATMAN_R8(i), ATMAN_R8(i + 8), ATMAN_R8(i + 16), ATMAN_R8(i + 24)
#define ATMAN_R64(i) ATMAN_R32(i), ATMAN_R32(i + 32)
#define ATMAN_R128(i) ATMAN_R64(i), ATMAN_R64(i + 64)

// d = a * b (+ d): 64 rows, both operands in shared memory with the summed dimension contiguous
#define ATMAN_MULTIPLY_SHARED(N, R, TYPE, TEXT, A, B, P)                                                             \
    __device__ __forceinline__ void multiply(float (&d)[R], std::uint64_t a, std::uint64_t b, int accumulate, TYPE) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TEXT "." TEXT " {" ATMAN_D##R "}, %" A ", %" B  \
                     ", p, 1, 1, 0, 0;\n}\n" : ATMAN_R##R(0) : "l"(a), "l"(b), "r"(accumulate));                    \
    }

// d += a * b: a in registers, b in shared memory with its columns contiguous
#define ATMAN_MULTIPLY_REGISTERS(N, R, TYPE, TEXT, A0, A1, A2, A3, B)                                                \
    __device__ __forceinline__ void multiply(float (&d)[R], const std::uint32_t* a, std::uint64_t b, TYPE) {          \
        asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                       \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TEXT "." TEXT " {" ATMAN_D##R "}, {%" A0 ", %" \
                     A1 ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, 1;\n}\n"                                               \
                     : ATMAN_R##R(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
    }

ATMAN_MULTIPLY_SHARED(64, 32, __nv_bfloat16, "bf16", "32", "33", "34")
ATMAN_MULTIPLY_SHARED(128, 64, __nv_bfloat16, "bf16", "64", "65", "66")
ATMAN_MULTIPLY_REGISTERS(64, 32, __nv_bfloat16, "bf16", "32", "33", "34", "35", "36")
ATMAN_MULTIPLY_REGISTERS(128, 64, __nv_bfloat16, "bf16", "64", "65", "66", "67", "68")
ATMAN_MULTIPLY_REGISTERS(256, 128, __nv_bfloat16, "bf16", "128", "129", "130", "131", "132")
ATMAN_MULTIPLY_SHARED(64, 32, __half, "f16", "32", "33", "34")
ATMAN_MULTIPLY_SHARED(128, 64, __half, "f16", "64", "65", "66")
ATMAN_MULTIPLY_REGISTERS(64, 32, __half, "f16", "32", "33", "34", "35", "36")
ATMAN_MULTIPLY_REGISTERS(128, 64, __half, "f16", "64", "65", "66", "67", "68")
ATMAN_MULTIPLY_REGISTERS(256, 128, __half, "f16", "128", "129", "130", "131", "132")

#undef ATMAN_MULTIPLY_SHARED
#undef ATMAN_MULTIPLY_REGISTERS
// clang-format on

}  // namespace atman::cuda::hopper
