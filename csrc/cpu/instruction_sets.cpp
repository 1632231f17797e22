#include "instruction_sets.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace atman::cpu {

namespace plain {
extern const Kernel kernel;
}
#if defined(ATMAN_HAS_AVX2)
namespace avx2 {
extern const Kernel kernel;
}
#endif
#if defined(ATMAN_HAS_AVX512)
namespace avx512 {
extern const Kernel kernel;
}
#endif
#if defined(ATMAN_HAS_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernel kernel;
}
#endif
#if defined(ATMAN_HAS_AMX)
namespace amx {
extern const Kernel kernel;
}
#endif

namespace {

#if defined(__x86_64__)
// Every processor with AVX2 and FMA converts half precision (F16C) too.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(ATMAN_HAS_AMX)
#if defined(ATMAN_EMULATE_AMX)
bool has_amx() { return has_avx512_bf16(); }
#else
// Linux hands out the tile registers only to processes that ask: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool has_amx() {
    if (!has_avx512_bf16()) return false;
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
#if defined(ATMAN_ASSUME_AMX)
    if ((d & bf16) == 0 || (d & tile) == 0) return true;  // the instructions trap: see csrc/checks/amx_trap.c
#endif
    if ((d & bf16) == 0 || (d & tile) == 0) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif
#endif

}  // namespace

std::vector<const Kernel*> usable_kernels(DType dtype) {
    std::vector<const Kernel*> found;
    const bool pairs = dtype == DType::bfloat16;
    (void)pairs;
#if defined(ATMAN_HAS_AMX)
    static const bool amx_runs = has_amx();
    if (pairs && amx_runs) found.push_back(&amx::kernel);
#endif
#if defined(ATMAN_HAS_AVX512_BF16)
    if (pairs && has_avx512_bf16()) found.push_back(&avx512_bf16::kernel);
#endif
#if defined(ATMAN_HAS_AVX512)
    if (has_avx512()) found.push_back(&avx512::kernel);
#endif
#if defined(ATMAN_HAS_AVX2)
    if (has_avx2()) found.push_back(&avx2::kernel);
#endif
    found.push_back(&plain::kernel);
    return found;
}

}  // namespace atman::cpu
