// A loop over independent items, on OpenMP where the compiler has it, else on std::thread.
//
// ThreadSanitizer does not understand OpenMP's barriers, so its build uses std::thread (ATMAN_STD_THREADS). So does
// Clang, whose OpenMP calls a library of its own, which nobody has loaded.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if (!defined(_OPENMP) || defined(__clang__)) && !defined(ATMAN_STD_THREADS)
#define ATMAN_STD_THREADS
#endif
#if defined(ATMAN_STD_THREADS)
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace atman::cpu {

// Runs `thread(next)` on every thread; next() hands out 0 .. items - 1 in order, then -1. `thread` must not throw.
template <class Thread>
void share(std::int64_t items, int threads, Thread thread) {
    std::atomic<std::int64_t> counter{0};
    const auto next = [&]() -> std::int64_t {
        const std::int64_t item = counter.fetch_add(1, std::memory_order_relaxed);
        return item < items ? item : -1;
    };
    threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, items)));
    if (threads == 1) return thread(next);
#if !defined(ATMAN_STD_THREADS)
#pragma omp parallel num_threads(threads)
    thread(next);
#else
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(threads - 1));
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back([&] { thread(next); });
    } catch (const std::system_error&) {
    }  // those that could be started share the items
    thread(next);
    for (std::thread& other : others) other.join();
#endif
}

}  // namespace atman::cpu
