// The inner steps of optimal one-dimensional clustering: kernels/partition.py. All in double precision.
#include <limits>

#include "core.hpp"

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

struct Prefix {
    const double *s0, *s1, *s2;
    CW_INLINE double cost(int64_t i, int64_t j) const {
        const double w = s0[j] - s0[i], first = s1[j] - s1[i], second = s2[j] - s2[i];
        const double cost = second - first * first / w;
        return w > 0 ? std::max(cost, 0.0) : 0.0;
    }
};

struct Layer {
    const double* before;
    Prefix prefix;
    double* best;
    int64_t* arg;
};

// The first i of [lower, upper] with the least before[i] + cost(i, j).
using Least = int64_t (*)(const Layer&, int64_t j, int64_t lower, int64_t upper, double* value);

int64_t least(const Layer& layer, int64_t j, int64_t lower, int64_t upper, double* value) {
    double best = layer.before[lower] + layer.prefix.cost(lower, j);
    int64_t arg = lower;
    for (int64_t i = lower + 1; i <= upper; ++i) {
        const double here = layer.before[i] + layer.prefix.cost(i, j);
        if (here < best) best = here, arg = i;
    }
    *value = best;
    return arg;
}

#ifdef CW_X86
CW_AVX2 int64_t least_avx2(const Layer& layer, int64_t j, int64_t lower, int64_t upper, double* value) {
    int64_t i = lower, arg = lower;
    double best = INF;
    if (upper - lower >= 7) {
        const auto& p = layer.prefix;
        const __m256d t0 = _mm256_set1_pd(p.s0[j]), t1 = _mm256_set1_pd(p.s1[j]), t2 = _mm256_set1_pd(p.s2[j]);
        const __m256d zero = _mm256_setzero_pd(), four = _mm256_set1_pd(4);
        __m256d bests = _mm256_set1_pd(INF), at = _mm256_setr_pd(0, 1, 2, 3), args = at;  // indices from lower on
        for (; i + 3 <= upper; i += 4) {
            const __m256d w = _mm256_sub_pd(t0, _mm256_loadu_pd(p.s0 + i));
            const __m256d first = _mm256_sub_pd(t1, _mm256_loadu_pd(p.s1 + i));
            const __m256d second = _mm256_sub_pd(t2, _mm256_loadu_pd(p.s2 + i));
            __m256d cost = _mm256_sub_pd(second, _mm256_div_pd(_mm256_mul_pd(first, first), w));
            cost = _mm256_and_pd(_mm256_max_pd(cost, zero), _mm256_cmp_pd(w, zero, _CMP_GT_OQ));
            const __m256d here = _mm256_add_pd(_mm256_loadu_pd(layer.before + i), cost);
            const __m256d better = _mm256_cmp_pd(here, bests, _CMP_LT_OQ);
            bests = _mm256_blendv_pd(bests, here, better);
            args = _mm256_blendv_pd(args, at, better);
            at = _mm256_add_pd(at, four);
        }
        double of[4], from[4];
        _mm256_storeu_pd(of, bests);
        _mm256_storeu_pd(from, args);
        best = of[0];
        int64_t first = static_cast<int64_t>(from[0]);
        for (int lane = 1; lane < 4; ++lane) {
            const int64_t here = static_cast<int64_t>(from[lane]);
            if (of[lane] < best || (of[lane] == best && here < first)) best = of[lane], first = here;
        }
        arg = lower + first;
    }
    for (; i <= upper; ++i) {
        const double here = layer.before[i] + layer.prefix.cost(i, j);
        if (here < best) best = here, arg = i;
    }
    *value = best;
    return arg;
}
#endif

// All j of [left, right), whose best i lies in [low, high]: the middle one first, which bounds the others.
void solve(const Layer& layer, Least least, int64_t left, int64_t right, int64_t low, int64_t high) {
    while (left < right) {
        const int64_t mid = (left + right) / 2, upper = std::min(high, mid), lower = std::min(low, upper);
        const int64_t arg = least(layer, mid, lower, upper, layer.best + mid);
        layer.arg[mid] = arg;
        solve(layer, least, left, mid, low, arg);
        left = mid + 1;
        low = arg;
    }
}

}  // namespace

// best and arg (m+1,) from before (m+1,) and prefix (3, m+1): one layer of the dynamic program.
CW_EXPORT int64_t cw_next_layer(
    const double* before, const double* prefix, int64_t size, double* best, int64_t* arg) {
    const Layer layer{before, {prefix, prefix + size, prefix + 2 * size}, best, arg};
    Least run = least;
#ifdef CW_X86
    if (cw::has_avx2()) run = least_avx2;
#endif
    solve(layer, run, 0, size, 0, size - 1);
    return 0;
}

// chosen (rows,): one of each row of candidates (rows, width), all in [0, size), such that the intervals between them
// cost least.
CW_EXPORT int64_t cw_best_path(
    const int64_t* candidates, int64_t rows, int64_t width, const double* prefix, int64_t size, int64_t* chosen) {
    return cw::guarded([&] {
        const Prefix sums{prefix, prefix + size, prefix + 2 * size};
        std::vector<double> total(width), next(width);
        std::vector<int64_t> back(rows * width);
        for (int64_t j = 0; j < width; ++j) total[j] = sums.cost(0, candidates[j]);
        for (int64_t row = 1; row < rows; ++row) {
            const int64_t *from = candidates + (row - 1) * width, *to = from + width;
            for (int64_t b = 0; b < width; ++b) {
                double best = INF;
                int64_t arg = 0;
                for (int64_t a = 0; a < width; ++a) {
                    if (from[a] > to[b]) continue;
                    const double here = total[a] + sums.cost(from[a], to[b]);
                    if (here < best) best = here, arg = a;
                }
                next[b] = best;
                back[row * width + b] = arg;
            }
            total.swap(next);
        }
        int64_t pick = 0;
        double best = INF;
        for (int64_t j = 0; j < width; ++j) {
            const double here = total[j] + sums.cost(candidates[(rows - 1) * width + j], size - 1);
            if (here < best) best = here, pick = j;
        }
        for (int64_t row = rows - 1; row >= 0; --row) {
            chosen[row] = candidates[row * width + pick];
            pick = back[row * width + pick];
        }
        return int64_t{0};
    });
}
