// Weights to codes, and what the members of a codeword sum to: kernels/assign.py.
#include <limits>

#include "core.hpp"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// Thresholds as a complete binary tree, level by level: node i of level l stands at 2**l - 1 + i. A value goes right
// unless it is at or below the threshold, so after all levels its place is its code; what fills up the tree is
// infinite, and a NaN, which goes right for ever, is brought back to the last code as searchsorted does.
struct Tree {
    int levels = 0;
    uint32_t last;
    std::vector<float> nodes;
    Tree(const float* edges, int64_t k) : last(static_cast<uint32_t>(k - 1)) {
        while ((int64_t{1} << levels) < k) ++levels;
        nodes.assign(std::max<int64_t>(8, int64_t{1} << levels) + 8, INF);
        for (int level = 0; level < levels; ++level)
            for (int64_t i = 0; i < int64_t{1} << level; ++i) {
                const int64_t edge = (2 * i + 1) * (int64_t{1} << (levels - level - 1)) - 1;
                if (edge < k - 1) nodes[(int64_t{1} << level) - 1 + i] = edges[edge];
            }
    }
};

void places(const Tree& tree, const float* x, int64_t n, uint32_t* place) {
    for (int64_t i = 0; i < n; ++i) place[i] = 0;
    const float* level = tree.nodes.data();
    for (int l = 0; l < tree.levels; level += int64_t{1} << l++)
        for (int64_t i = 0; i < n; ++i) place[i] = 2 * place[i] + !(x[i] <= level[place[i]]);
}

#ifdef CW_X86
// Levels of up to 8 nodes lie in a register and are looked up by a permutation, the others are gathered.
template <int IN_REGISTERS>
CW_AVX2 void places_avx2(const Tree& tree, const float* x, int64_t n, uint32_t* place) {
    const float* nodes = tree.nodes.data();
    __m256 table[4];
    for (int l = 0; l < 4; ++l) table[l] = _mm256_loadu_ps(nodes + (1 << l) - 1);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        __m256i p = _mm256_setzero_si256(), q = p;
        for (int l = 0; l < IN_REGISTERS; ++l) {
            const __m256 s = _mm256_permutevar8x32_ps(table[l], p), t = _mm256_permutevar8x32_ps(table[l], q);
            const __m256i right = _mm256_castps_si256(_mm256_cmp_ps(a, s, _CMP_NLE_UQ));
            const __m256i also = _mm256_castps_si256(_mm256_cmp_ps(b, t, _CMP_NLE_UQ));
            p = _mm256_sub_epi32(_mm256_add_epi32(p, p), right);
            q = _mm256_sub_epi32(_mm256_add_epi32(q, q), also);
        }
        if (IN_REGISTERS == 4)
            for (int l = 4; l < tree.levels; ++l) {
                const float* level = nodes + (int64_t{1} << l) - 1;
                const __m256 s = _mm256_i32gather_ps(level, p, 4), t = _mm256_i32gather_ps(level, q, 4);
                const __m256i right = _mm256_castps_si256(_mm256_cmp_ps(a, s, _CMP_NLE_UQ));
                const __m256i also = _mm256_castps_si256(_mm256_cmp_ps(b, t, _CMP_NLE_UQ));
                p = _mm256_sub_epi32(_mm256_add_epi32(p, p), right);
                q = _mm256_sub_epi32(_mm256_add_epi32(q, q), also);
            }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + i), p);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + i + 8), q);
    }
    places(tree, x + i, n - i, place + i);
}
#endif

using Places = void (*)(const Tree&, const float*, int64_t, uint32_t*);

Places places_for([[maybe_unused]] const Tree& tree) {
#ifdef CW_X86
    if (cw::has_avx2()) switch (tree.levels) {
            case 0: return places;
            case 1: return places_avx2<1>;
            case 2: return places_avx2<2>;
            case 3: return places_avx2<3>;
            default: return places_avx2<4>;
        }
#endif
    return places;
}

template <class Code>
CW_INLINE void narrow_body(const uint32_t* from, int64_t n, uint32_t last, Code* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Code>(std::min(from[i], last));
}

template <class Code>
void narrow(const uint32_t* from, int64_t n, uint32_t last, Code* to) {
    narrow_body(from, n, last, to);
}

#ifdef CW_X86
template <class Code>
CW_AVX2 void narrow_avx2(const uint32_t* from, int64_t n, uint32_t last, Code* to) {
    narrow_body(from, n, last, to);
}
#endif

template <class Code>
auto narrow_for() {
#ifdef CW_X86
    if (cw::has_avx2()) return narrow_avx2<Code>;
#endif
    return narrow<Code>;
}

constexpr int64_t PIECE = 1 << 16;  // values of one task

template <class Code>
int64_t assign(
    const float* values, int64_t total, int64_t columns, const float* scale, const float* edges, int64_t k,
    int64_t threads, Code* codes) {
    const Tree tree(edges, k);
    const auto find = places_for(tree);
    const auto store = narrow_for<Code>();
    cw::parallel((total + PIECE - 1) / PIECE, threads, [&](cw::Tasks& tasks) {
        std::vector<float> buffer(cw::BLOCK);
        std::vector<uint32_t> place(cw::BLOCK);
        for (int64_t task; tasks.take(task);) {
            const int64_t end = std::min(total, (task + 1) * PIECE);
            for (int64_t at = task * PIECE; at < end; at += cw::BLOCK) {
                const int64_t n = std::min(cw::BLOCK, end - at);
                find(tree, cw::scaled(values, scale, columns, at, n, buffer.data()), n, place.data());
                store(place.data(), n, tree.last, codes + at);
            }
        }
    });
    return 0;
}

// For each value the code of least h * (x - word)**2 + price, the lower of equals; codes start at 0.
CW_INLINE void cheapest_body(
    const float* x, const float* h, int64_t n, const float* words, const float* prices, int64_t k, float* best,
    uint32_t* code) {
    for (int64_t i = 0; i < n; ++i) best[i] = INF, code[i] = 0;
    for (int64_t j = 0; j < k; ++j) {
        const float word = words[j], price = prices[j];
        for (int64_t i = 0; i < n; ++i) {
            const float distance = x[i] - word;
            const float cost = h[i] * (distance * distance) + price;
            const bool better = cost < best[i];
            code[i] = better ? static_cast<uint32_t>(j) : code[i];
            best[i] = better ? cost : best[i];
        }
    }
}

void cheapest(
    const float* x, const float* h, int64_t n, const float* words, const float* prices, int64_t k, float* best,
    uint32_t* code) {
    cheapest_body(x, h, n, words, prices, k, best, code);
}

#ifdef CW_X86
CW_AVX2 void cheapest_avx2(
    const float* x, const float* h, int64_t n, const float* words, const float* prices, int64_t k, float* best,
    uint32_t* code) {
    cheapest_body(x, h, n, words, prices, k, best, code);
}
#endif

template <class Code>
int64_t assign_weighted(
    const float* values, int64_t total, int64_t columns, const float* scale, const float* h, const float* words,
    const float* prices, int64_t k, int64_t threads, Code* codes) {
    constexpr int64_t FEW = 512;  // values, best costs and codes so far stay in the first cache
    constexpr int64_t STEP = 16 * FEW;
#ifdef CW_X86
    const auto find = cw::has_avx2() ? cheapest_avx2 : cheapest;
#else
    const auto find = cheapest;
#endif
    const auto store = narrow_for<Code>();
    cw::parallel((total + STEP - 1) / STEP, threads, [&](cw::Tasks& tasks) {
        std::vector<float> buffer(FEW), best(FEW);
        std::vector<uint32_t> code(FEW);
        for (int64_t task; tasks.take(task);) {
            const int64_t end = std::min(total, (task + 1) * STEP);
            for (int64_t at = task * STEP; at < end; at += FEW) {
                const int64_t n = std::min(FEW, end - at);
                const float* x = cw::scaled(values, scale, columns, at, n, buffer.data());
                find(x, h + at, n, words, prices, k, best.data(), code.data());
                store(code.data(), n, static_cast<uint32_t>(k - 1), codes + at);
            }
        }
    });
    return 0;
}

template <class Code, class H>
int64_t cluster_sums(
    const float* values, int64_t rows, int64_t columns, const float* scale, const H* importance, const Code* codes,
    int64_t k, int64_t chunk, int64_t threads, double* count, double* weight, double* first) {
    struct Sum {
        double first, weight;
        int64_t count;
    };
    const cw::Chunks chunks(rows, columns, chunk);
    cw::Turn turn;
    cw::parallel(chunks.count(), threads, [&](cw::Tasks& tasks) {
        std::vector<float> buffer(cw::BLOCK);
        std::vector<Sum> sums(k);
        for (int64_t task; tasks.take(task);) {
            std::fill(sums.begin(), sums.end(), Sum{});
            for (int64_t at = chunks.begin(task); at < chunks.end(task); at += cw::BLOCK) {
                const int64_t n = std::min(cw::BLOCK, chunks.end(task) - at);
                const float* x = cw::scaled(values, scale, columns, at, n, buffer.data());
                if (importance) {
                    for (int64_t i = 0; i < n; ++i) {
                        Sum& sum = sums[codes[at + i]];
                        const double h = importance[at + i];
                        ++sum.count;
                        sum.weight += h;
                        sum.first += x[i] * h;
                    }
                } else {
                    for (int64_t i = 0; i < n; ++i) {
                        Sum& sum = sums[codes[at + i]];
                        ++sum.count;
                        sum.first += x[i];
                    }
                }
            }
            turn.wait(task);
            for (int64_t j = 0; j < k; ++j) {
                count[j] += static_cast<double>(sums[j].count);
                weight[j] += importance ? sums[j].weight : static_cast<double>(sums[j].count);
                first[j] += sums[j].first;
            }
            turn.done();
        }
    });
    return 0;
}

template <class Code>
int64_t lookup16(const uint16_t* values, int64_t n, const Code* table, int64_t threads, Code* codes) {
    cw::parallel((n + PIECE - 1) / PIECE, threads, [&](cw::Tasks& tasks) {
        for (int64_t task; tasks.take(task);)
            for (int64_t i = task * PIECE; i < std::min(n, (task + 1) * PIECE); ++i) codes[i] = table[values[i]];
    });
    return 0;
}

// Calls with a null pointer of the type of codes: with(static_cast<uint8_t*>(nullptr)) for one byte, and so on.
template <class With>
int64_t by_code(int64_t itemsize, With with) {
    return cw::guarded([&] {
        if (itemsize == 1) return with(static_cast<uint8_t*>(nullptr));
        if (itemsize == 2) return with(static_cast<uint16_t*>(nullptr));
        return with(static_cast<uint32_t*>(nullptr));
    });
}

}  // namespace

// Codes of values (rows, columns), each row divided by scale (rows,) if that is not null; edges (k-1,) rising.
CW_EXPORT int64_t cw_assign(
    const float* values, int64_t rows, int64_t columns, const float* scale, const float* edges, int64_t k,
    int64_t threads, void* codes, int64_t itemsize) {
    return by_code(itemsize, [&](auto* type) {
        return assign(
            values, rows * columns, columns, scale, edges, k, threads, static_cast<decltype(type)>(codes));
    });
}

// codes[i] = table[values[i]] with table (2**16,).
CW_EXPORT int64_t cw_lookup16(
    const uint16_t* values, int64_t n, const void* table, int64_t threads, void* codes, int64_t itemsize) {
    return by_code(itemsize, [&](auto* type) {
        using Code = std::remove_pointer_t<decltype(type)>;
        return lookup16(values, n, static_cast<const Code*>(table), threads, static_cast<Code*>(codes));
    });
}

// importance (rows, columns); words and prices (k,).
CW_EXPORT int64_t cw_assign_weighted(
    const float* values, int64_t rows, int64_t columns, const float* scale, const float* importance,
    const float* words, const float* prices, int64_t k, int64_t threads, void* codes, int64_t itemsize) {
    return by_code(itemsize, [&](auto* type) {
        return assign_weighted(values, rows * columns, columns, scale, importance, words, prices, k, threads,
                               static_cast<decltype(type)>(codes));
    });
}

// Adds to count, weight and first (k,). importance is null, or of 4 or 8 bytes a value; codes below k.
CW_EXPORT int64_t cw_cluster_sums(
    const float* values, int64_t rows, int64_t columns, const float* scale, const void* importance,
    int64_t importance_itemsize, const void* codes, int64_t itemsize, int64_t k, int64_t chunk, int64_t threads,
    double* count, double* weight, double* first) {
    return by_code(itemsize, [&](auto* type) {
        const auto* z = static_cast<std::add_const_t<std::remove_pointer_t<decltype(type)>>*>(codes);
        if (importance_itemsize == 4)
            return cluster_sums(values, rows, columns, scale, static_cast<const float*>(importance), z, k, chunk,
                                threads, count, weight, first);
        return cluster_sums(values, rows, columns, scale, static_cast<const double*>(importance), z, k, chunk,
                            threads, count, weight, first);
    });
}
