// Codes of many rows at once for one column, where a bit costs the same in all: compensate.cpp, moments.cpp.
#pragma once

#include <limits>

#include "core.hpp"

namespace cw {

// The thresholds between k codewords, for LANES rows at once.
template <int64_t LANES>
class Thresholds {
   public:
    explicit Thresholds(int64_t k) : k_(k) {
        while (places_ < k) places_ *= 2;
        values_.assign(places_, std::numeric_limits<float>::infinity());
        pools_.resize(k);
    }

    // The first threshold of middle + gain * slope (k-1,), made to rise, that is not below what is wanted; gaps (k-1,)
    // lie between the codewords.
    CW_INLINE void codes(
        const float* middle, const float* slope, const float* gaps, float gain, const float* wanted, uint32_t* code) {
        float* const values = values_.data();
        bool rising = true;
        for (int64_t j = 0; j < k_ - 1; ++j) values[j] = middle[j] + gain * slope[j];
        for (int64_t j = 1; j < k_ - 1; ++j) rising &= values[j] >= values[j - 1];
        if (!rising) pool(gaps);
        for (int64_t r = 0; r < LANES; ++r) code[r] = 0;
        if (k_ <= 16) {
            for (int64_t j = 0; j < k_ - 1; ++j) {
                const float threshold = values[j];
                for (int64_t r = 0; r < LANES; ++r) code[r] += !(wanted[r] <= threshold);
            }
        } else {
            for (int64_t step = places_ / 2; step; step /= 2)
                for (int64_t r = 0; r < LANES; ++r)
                    code[r] += wanted[r] <= values[static_cast<int32_t>(code[r] + step - 1)] ? 0 : step;
            for (int64_t r = 0; r < LANES; ++r) code[r] = std::min(code[r], static_cast<uint32_t>(k_ - 1));  // of a NaN
        }
    }

   private:
    struct Pool {
        float value, total, gap;
        int64_t count;
    };

    // Thresholds that fall become one, the mean by their gaps: the codewords between are nowhere cheapest.
    void pool(const float* gaps) {
        int64_t n = 0;
        for (int64_t j = 0; j < k_ - 1; ++j) {
            Pool pool{values_[j], values_[j] * gaps[j], gaps[j], 1};
            for (; n && pools_[n - 1].value > pool.value; --n) {
                const Pool& other = pools_[n - 1];
                const float total = other.total + pool.total, gap = other.gap + pool.gap;
                pool = {total / gap, total, gap, other.count + pool.count};
            }
            pools_[n++] = pool;
        }
        for (int64_t i = 0, j = 0; i < n; j += pools_[i++].count)
            std::fill_n(values_.begin() + j, pools_[i].count, pools_[i].value);
    }

    int64_t k_, places_ = 1;  // of the thresholds and what fills them up to a power of two, less one
    std::vector<float> values_;
    std::vector<Pool> pools_;
};

// Runs run(room, row) for each LANES rows, on up to `threads` threads, each with a room that make() gives.
template <int64_t LANES, class Make, class Run>
int64_t by_lanes(int64_t rows, int64_t threads, Make make, Run run) {
    parallel((rows + LANES - 1) / LANES, threads, [&](Tasks& tasks) {
        auto room = make();
        for (int64_t task; tasks.take(task);) run(room, task * LANES);
    });
    return 0;
}

}  // namespace cw
