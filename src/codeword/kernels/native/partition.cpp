// The inner steps of optimal one-dimensional clustering: kernels/partition.py. All in double precision.
#include <limits>

#include "core.hpp"

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

struct Prefix {
    const double *s0, *s1, *s2;
};

struct Sums {
    double s0, s1, s2;
};

CW_INLINE Sums at(const Prefix& prefix, int64_t i) { return {prefix.s0[i], prefix.s1[i], prefix.s2[i]}; }

CW_INLINE double cost(const Sums& from, const Sums& to) {
    const double w = to.s0 - from.s0, first = to.s1 - from.s1, second = to.s2 - from.s2;
    const double cost = second - first * first / w;
    return w > 0 ? std::max(cost, 0.0) : 0.0;
}

// before and from say what the clusters so far cost and where they end; an interval may go from there to one of `to`.
struct Layer {
    const double* before;
    Prefix from, to;
    const int64_t* limit;  // the last `from` that does not lie behind `to`, or null where both are the same places
    double* best;
    int64_t* arg;
};

// The first i of [lower, upper] with the least before[i] + cost(i, to).
using Least = int64_t (*)(const Layer&, const Sums& to, int64_t lower, int64_t upper, double* value);

CW_INLINE int64_t least_from(
    const Layer& layer, const Sums& to, int64_t i, int64_t upper, double best, int64_t arg, double* value) {
    for (; i <= upper; ++i) {
        const double here = layer.before[i] + cost(at(layer.from, i), to);
        if (here < best) best = here, arg = i;
    }
    *value = best;
    return arg;
}

int64_t least(const Layer& layer, const Sums& to, int64_t lower, int64_t upper, double* value) {
    return least_from(layer, to, lower, upper, INF, lower, value);
}

#ifdef CW_X86
CW_AVX2 int64_t least_avx2(const Layer& layer, const Sums& to, int64_t lower, int64_t upper, double* value) {
    int64_t i = lower, arg = lower;
    double best = INF;
    if (upper - lower >= 7) {
        const auto& p = layer.from;
        const __m256d t0 = _mm256_set1_pd(to.s0), t1 = _mm256_set1_pd(to.s1), t2 = _mm256_set1_pd(to.s2);
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
    return least_from(layer, to, i, upper, best, arg, value);
}
#endif

Least least_for() {
#ifdef CW_X86
    if (cw::has_avx2()) return least_avx2;
#endif
    return least;
}

// All `to` of [left, right), whose best i lies in [low, high]: the middle one first, which bounds the others.
void solve(const Layer& layer, Least least, int64_t left, int64_t right, int64_t low, int64_t high) {
    while (left < right) {
        const int64_t mid = (left + right) / 2, limit = layer.limit ? layer.limit[mid] : mid;
        const int64_t upper = std::max<int64_t>(std::min(high, limit), 0), lower = std::min(low, upper);
        int64_t arg = lower;
        if (limit < 0)
            layer.best[mid] = INF;
        else
            arg = least(layer, at(layer.to, mid), lower, upper, layer.best + mid);
        layer.arg[mid] = arg;
        solve(layer, least, left, mid, low, arg);
        left = mid + 1;
        low = arg;
    }
}

// Prefix sums at some places, side by side.
struct Picked {
    std::vector<double> sums;
    int64_t width;
    explicit Picked(int64_t width) : sums(3 * width), width(width) {}
    void pick(const Prefix& prefix, const int64_t* places) {
        for (int64_t i = 0; i < width; ++i) {
            const Sums here = at(prefix, places[i]);
            sums[i] = here.s0, sums[width + i] = here.s1, sums[2 * width + i] = here.s2;
        }
    }
    Prefix prefix() const { return {sums.data(), sums.data() + width, sums.data() + 2 * width}; }
};

}  // namespace

// The best clusterings of size-1 bins into 1 to k: what they cost into curve (k,), the last one's edges (k+1,).
CW_EXPORT int64_t cw_best_partition(
    const double* prefix, int64_t size, int64_t k, double* curve, int64_t* edges) {
    return cw::guarded([&] {
        const Prefix sums{prefix, prefix + size, prefix + 2 * size};
        const Least run = least_for();
        const int64_t m = size - 1;
        std::vector<double> before(size), best(size);
        std::vector<int64_t> arg(size);
        std::vector<int32_t> back(std::max<int64_t>(k - 2, 0) * size);
        for (int64_t j = 0; j < size; ++j) best[j] = cost(at(sums, 0), at(sums, j));
        curve[0] = best[m];
        edges[0] = 0, edges[k] = m;
        for (int64_t layer = 1; layer < k; ++layer) {
            before.swap(best);
            const Layer here{before.data(), sums, sums, nullptr, best.data(), arg.data()};
            if (layer == k - 1) {  // of the last one nothing is wanted but the end
                edges[layer] = run(here, at(sums, m), 0, m, curve + layer);
                break;
            }
            solve(here, run, 0, size, 0, m);
            curve[layer] = best[m];
            std::copy(arg.begin(), arg.end(), back.begin() + (layer - 1) * size);
        }
        for (int64_t layer = k - 2; layer > 0; --layer) edges[layer] = back[(layer - 1) * size + edges[layer + 1]];
        return int64_t{0};
    });
}

// chosen (rows,): one of each row of candidates (rows, width), all in [0, size) and rising, such that the intervals
// between them cost least.
CW_EXPORT int64_t cw_best_path(
    const int64_t* candidates, int64_t rows, int64_t width, const double* prefix, int64_t size, int64_t* chosen) {
    return cw::guarded([&] {
        const Prefix sums{prefix, prefix + size, prefix + 2 * size};
        const Least run = least_for();
        std::vector<double> total(width), next(width);
        std::vector<int64_t> back(rows * width), limit(width);
        Picked from(width), to(width);
        to.pick(sums, candidates);
        for (int64_t j = 0; j < width; ++j) total[j] = cost(at(sums, 0), at(to.prefix(), j));
        for (int64_t row = 1; row < rows; ++row) {
            std::swap(from, to);
            const int64_t *ends = candidates + (row - 1) * width, *places = ends + width;
            to.pick(sums, places);
            for (int64_t j = 0, i = 0; j < width; ++j) {
                while (i < width && ends[i] <= places[j]) ++i;
                limit[j] = i - 1;
            }
            const Layer layer{
                total.data(), from.prefix(), to.prefix(), limit.data(), next.data(), back.data() + row * width};
            solve(layer, run, 0, width, 0, width - 1);
            total.swap(next);
        }
        const Layer last{total.data(), to.prefix(), sums, nullptr, nullptr, nullptr};
        double least_of_all;
        int64_t pick = run(last, at(sums, size - 1), 0, width - 1, &least_of_all);
        for (int64_t row = rows - 1; row >= 0; --row) {
            chosen[row] = candidates[row * width + pick];
            pick = back[row * width + pick];
        }
        return int64_t{0};
    });
}
