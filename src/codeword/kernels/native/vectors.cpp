// Vectors to the nearest of codewords, and what the members of a codeword sum to: kernels/vectors.py.
// A lane is a vector: its entries stay in registers while the codewords go by, each entry of a codeword for all lanes.
#include <limits>

#include "core.hpp"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t GROUP = 64;  // vectors turned on their side at once
constexpr int64_t SMALL = 1 << 20;  // multiplications that are no work for a second thread

// Vectors of LANES floats that the compiler maps to whatever registers the target has.
template <int LANES>
struct Lanes;
template <>
struct Lanes<4> {
    typedef float Float __attribute__((vector_size(16), aligned(4), may_alias));
    typedef int32_t Int __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct Lanes<8> {
    typedef float Float __attribute__((vector_size(32), aligned(4), may_alias));
    typedef int32_t Int __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Lanes<16> {
    typedef float Float __attribute__((vector_size(64), aligned(4), may_alias));
    typedef int32_t Int __attribute__((vector_size(64), aligned(4), may_alias));
};

struct Problem {
    const float *x, *h;  // (n, d); h may be null
    int64_t n, d;
    const float *table, *bias;  // (k, d), (k,)
    int64_t k;
};

struct Room {
    std::vector<float> x, h;  // (d, GROUP)
    alignas(64) float score[GROUP];
    alignas(64) int32_t code[GROUP];
    Room(int64_t d, bool weighted) : x(d * GROUP), h(weighted ? d * GROUP : 0) {}
};

// from (count, d) to (d, GROUP); lanes past the last vector repeat zeros.
template <int D>
CW_INLINE void turn(const float* from, int64_t count, int64_t dims, float* to) {
    const int64_t d = D ? D : dims;
    for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < d; ++i) to[i * GROUP + r] = from[r * d + i];
    for (int64_t r = count; r < GROUP; ++r)
        for (int64_t i = 0; i < d; ++i) to[i * GROUP + r] = 0;
}

// A reference: vectors wider than the default target's registers are no arguments and no results.
template <int LANES>
CW_INLINE const typename Lanes<LANES>::Float& lanes(const std::vector<float>& from, int64_t entry, int64_t lane) {
    return *reinterpret_cast<const typename Lanes<LANES>::Float*>(from.data() + entry * GROUP + lane);
}

// Of each of `count` vectors from `at` on: the code of the least bias + sum of x * t or, with h, of h * (x - t)**2, and
// that score; the lower of equals. D: the dimension, 0 for any.
template <int LANES, int D, bool WEIGHTED>
CW_INLINE void group_body(const Problem& p, Room& room, int64_t at, int64_t count) {
    using Float = typename Lanes<LANES>::Float;
    using Int = typename Lanes<LANES>::Int;
    // Of few entries the comparison is what takes time, and each waits for the last: two at once.
    constexpr int SIDE = D && D * (WEIGHTED ? 2 : 1) <= 6 ? 2 : 1;
    const int64_t d = D ? D : p.d;
    turn<D>(p.x + at * d, count, d, room.x.data());
    if (WEIGHTED) turn<D>(p.h + at * d, count, d, room.h.data());
    for (int64_t lane = 0; lane < count; lane += SIDE * LANES) {
        Float x[SIDE][D ? D : 1], h[SIDE][D && WEIGHTED ? D : 1];
        for (int side = 0; side < SIDE; ++side)
            for (int i = 0; i < D; ++i) {
                x[side][i] = lanes<LANES>(room.x, i, lane + side * LANES);
                if (WEIGHTED) h[side][i] = lanes<LANES>(room.h, i, lane + side * LANES);
            }
        Float best[SIDE];
        Int code[SIDE], now = Int{};
        for (int side = 0; side < SIDE; ++side) best[side] = Float{} + INF, code[side] = Int{};
        const float* t = p.table;
        for (int64_t j = 0; j < p.k; ++j, t += d, now += 1)
            for (int side = 0; side < SIDE; ++side) {
                Float score = Float{} + p.bias[j];
                for (int64_t i = 0; i < d; ++i) {
                    const Float here = D ? x[side][i] : lanes<LANES>(room.x, i, lane + side * LANES);
                    if (WEIGHTED) {
                        const Float weight = D ? h[side][i] : lanes<LANES>(room.h, i, lane + side * LANES), distance = here - t[i];
                        score += weight * (distance * distance);
                    } else {
                        score += here * t[i];
                    }
                }
                const Int better = score < best[side];
                best[side] = better ? score : best[side];
                code[side] = better ? now : code[side];
            }
        for (int side = 0; side < SIDE; ++side) {
            *reinterpret_cast<Float*>(room.score + lane + side * LANES) = best[side];
            *reinterpret_cast<Int*>(room.code + lane + side * LANES) = code[side];
        }
    }
}

template <int D, bool WEIGHTED>
void group(const Problem& p, Room& room, int64_t at, int64_t count) {
    group_body<4, D, WEIGHTED>(p, room, at, count);
}

#ifdef CW_X86
template <int D, bool WEIGHTED>
CW_AVX2 void group_avx2(const Problem& p, Room& room, int64_t at, int64_t count) {
    group_body<8, D, WEIGHTED>(p, room, at, count);
}

template <int D, bool WEIGHTED>
CW_AVX512 void group_avx512(const Problem& p, Room& room, int64_t at, int64_t count) {
    group_body<16, D, WEIGHTED>(p, room, at, count);
}
#endif

using Group = void (*)(const Problem&, Room&, int64_t, int64_t);

template <int D, bool WEIGHTED>
Group by_machine() {
#ifdef CW_X86
    if (cw::has_avx512()) return group_avx512<D, WEIGHTED>;
    if (cw::has_avx2()) return group_avx2<D, WEIGHTED>;
#endif
    return group<D, WEIGHTED>;
}

template <bool WEIGHTED>
Group by_dimension(int64_t d) {
    switch (d) {
        case 2: return by_machine<2, WEIGHTED>();
        case 3: return by_machine<3, WEIGHTED>();
        case 4: return by_machine<4, WEIGHTED>();
        case 5: return by_machine<5, WEIGHTED>();
        case 6: return by_machine<6, WEIGHTED>();
        case 8: return by_machine<8, WEIGHTED>();
        case 9: return by_machine<9, WEIGHTED>();
        case 12: return by_machine<12, WEIGHTED>();
        case 16: return by_machine<16, WEIGHTED>();
        default: return by_machine<0, WEIGHTED>();
    }
}

// sum: members, their errors, first moments (d,) and, with h, masses (d,).
void add_member(const Problem& p, int64_t at, float error, double* sum) {
    const float* x = p.x + at * p.d;
    sum[0] += 1;
    sum[1] += error;
    double* const first = sum + 2;
    if (!p.h) {
        for (int64_t i = 0; i < p.d; ++i) first[i] += x[i];
        return;
    }
    const float* h = p.h + at * p.d;
    for (int64_t i = 0; i < p.d; ++i) {
        first[i] += static_cast<double>(x[i]) * h[i];
        first[p.d + i] += h[i];
    }
}

float error_of(const Problem& p, int64_t at, const float* word) {
    const float* x = p.x + at * p.d;
    const float* h = p.h ? p.h + at * p.d : nullptr;
    float error = 0;
    for (int64_t i = 0; i < p.d; ++i) {
        const float distance = x[i] - word[i];
        const float square = distance * distance;
        error += h ? h[i] * square : square;
    }
    return error;
}

template <class Code>
int64_t nearest(
    const Problem& p, const float* words, int64_t step, int64_t threads, Code* codes, float* costs, double* sums) {
    const auto find = p.h ? by_dimension<true>(p.d) : by_dimension<false>(p.d);
    const int64_t width = sums ? 2 + p.d * (p.h ? 2 : 1) : 0;
    if (p.n * p.k * p.d < SMALL) threads = 1;
    cw::Turn in_order;
    cw::parallel((p.n + step - 1) / step, threads, [&](cw::Tasks& tasks) {
        Room room(p.d, p.h);
        std::vector<double> part(p.k * width);
        for (int64_t task; tasks.take(task);) {
            std::fill(part.begin(), part.end(), 0.0);
            const int64_t end = std::min(p.n, (task + 1) * step);
            for (int64_t at = task * step; at < end; at += GROUP) {
                const int64_t count = std::min(GROUP, end - at);
                find(p, room, at, count);
                for (int64_t r = 0; r < count; ++r) {
                    const int64_t code = room.code[r];
                    codes[at + r] = static_cast<Code>(code);
                    const float cost = words ? error_of(p, at + r, words + code * p.d) : room.score[r];
                    costs[at + r] = cost;
                    if (sums) add_member(p, at + r, cost, part.data() + code * width);
                }
            }
            if (!sums) continue;
            in_order.wait(task);
            for (int64_t i = 0; i < p.k * width; ++i) sums[i] += part[i];
            in_order.done();
        }
    });
    return 0;
}

}  // namespace

// Codes and costs (n,) of vectors x (n, d): the least of bias + sum of x * t over the table (k, d) or, with h (n, d), of
// bias + sum of h * (x - t)**2. The cost is that or, with words (k, d), the squared error under the word, times h if any.
// Adds to sums (k, 2 + d) or, with h, (k, 2 + 2 d), if not null, in pieces of `step` vectors.
CW_EXPORT int64_t cw_nearest(
    const float* x, const float* h, int64_t n, int64_t d, const float* table, const float* bias, const float* words,
    int64_t k, int64_t step, int64_t threads, void* codes, int64_t itemsize, float* costs, double* sums) {
    const Problem p{x, h, n, d, table, bias, k};
    return cw::guarded([&] {
        if (itemsize == 1) return nearest(p, words, step, threads, static_cast<uint8_t*>(codes), costs, sums);
        if (itemsize == 2) return nearest(p, words, step, threads, static_cast<uint16_t*>(codes), costs, sums);
        return nearest(p, words, step, threads, static_cast<uint32_t*>(codes), costs, sums);
    });
}
