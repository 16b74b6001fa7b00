// What all kernels share. Rules of this core: plain C ABI, every argument a pointer or an int64; a kernel returns 0 or
// more, -1 if memory ran out; the same floating-point operations in the same order as the NumPy reference beside it, so
// that both return the same bits; no state between calls; threads end with the call and never change the result.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#define CW_EXPORT extern "C" __attribute__((visibility("default")))
#define CW_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define CW_X86 1
#define CW_AVX2 __attribute__((target("avx2,fma")))
#define CW_AVX512 __attribute__((target("avx512f")))
#define CW_AVX512BW __attribute__((target("avx512f,avx512bw")))
#include <immintrin.h>
#endif

namespace cw {

constexpr int64_t NO_MEMORY = -1;

inline bool has_avx2() {
#ifdef CW_X86
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

inline bool has_avx512() {
#ifdef CW_X86
    return __builtin_cpu_supports("avx512f");
#else
    return false;
#endif
}

inline bool has_avx512bw() {
#ifdef CW_X86
    return has_avx512() && __builtin_cpu_supports("avx512bw");
#else
    return false;
#endif
}

// Runs work, which may throw for want of memory; nothing is thrown through the C ABI.
template <class Work>
int64_t guarded(Work work) {
    try {
        return work();
    } catch (...) {
        return NO_MEMORY;
    }
}

class Tasks {
   public:
    explicit Tasks(int64_t count) : count_(count) {}
    bool take(int64_t& task) {
        task = next_.fetch_add(1, std::memory_order_relaxed);
        return task < count_;
    }
    bool left() const { return next_.load() < count_; }

   private:
    std::atomic<int64_t> next_{0};
    const int64_t count_;
};

// Runs worker(tasks) on up to `threads` threads. A worker allocates before it takes a task and does not throw after;
// one that finds no memory leaves the tasks to the others.
template <class Worker>
void parallel(int64_t count, int64_t threads, Worker worker) {
    Tasks tasks(count);
    auto run = [&] {
        try {
            worker(tasks);
        } catch (...) {
        }
    };
    std::vector<std::thread> pool;
    try {
        for (int64_t i = 1; i < std::min(threads, count); ++i) pool.emplace_back(run);
    } catch (...) {  // no more threads to be had: those that run will do
    }
    run();
    for (auto& thread : pool) thread.join();
    if (tasks.left()) throw std::bad_alloc();
}

// Lets workers add up their parts in the order of the tasks.
class Turn {
   public:
    void wait(int64_t task) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return now_ == task; });
    }
    void done() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ++now_;
        }
        changed_.notify_all();
    }

   private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int64_t now_ = 0;
};

// The pieces that kernels/chunks.py walks over, of an array (rows, columns) in C order; each is a range of it.
struct Chunks {
    int64_t total, step, columns, per_row;  // per_row: pieces of one long row, or 0 if a piece is whole rows
    Chunks(int64_t rows, int64_t columns, int64_t chunk) : total(rows * columns), columns(columns) {
        step = columns > chunk ? chunk : std::max<int64_t>(1, chunk / std::max<int64_t>(columns, 1)) * columns;
        per_row = columns > chunk ? (columns + chunk - 1) / chunk : 0;
    }
    int64_t count() const {
        if (!total) return 0;
        return per_row ? total / columns * per_row : (total + step - 1) / step;
    }
    int64_t begin(int64_t i) const { return per_row ? i / per_row * columns + i % per_row * step : i * step; }
    int64_t end(int64_t i) const {
        return per_row ? std::min(begin(i) + step, (i / per_row + 1) * columns) : std::min(total, begin(i) + step);
    }
};

constexpr int64_t BLOCK = 4096;  // values a kernel works on at once

// `count` values from `begin` on, divided by the scale of their rows; buffer (count,) is used if there is a scale.
inline const float* scaled(
    const float* values, const float* scale, int64_t columns, int64_t begin, int64_t count, float* buffer) {
    if (!scale) return values + begin;
    int64_t row = begin / columns, left = columns - begin % columns;
    for (int64_t at = 0; at < count; ++row, left = columns) {
        const int64_t here = std::min(left, count - at);
        const float by = scale[row];
        for (int64_t i = 0; i < here; ++i) buffer[at + i] = values[begin + at + i] / by;
        at += here;
    }
    return buffer;
}

}  // namespace cw
