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

// Members of a codeword that lie in the same bin of the histogram as the threshold above it: how many, and the sum of
// their low bits.
struct Part {
    int64_t count, low;
};

constexpr int LOW_BITS = 12;

// Thresholds by code, as bits; beyond the last one a pattern that no finite value shares a bin with.
struct Edges {
    std::vector<uint32_t> bits;
    uint32_t last;
    Edges(const float* edges, int64_t k, int levels)
        : bits(std::max<int64_t>(16, int64_t{1} << levels), 0x7FFFFFFFu), last(static_cast<uint32_t>(k - 1)) {
        if (k > 1) std::memcpy(bits.data(), edges, (k - 1) * sizeof(float));
    }
};

CW_INLINE void add_part(const Edges& edges, const float* x, uint32_t place, Part* parts) {
    uint32_t bits;
    std::memcpy(&bits, x, 4);
    Part& part = parts[std::min(place, edges.last)];
    ++part.count;
    part.low += bits & ((1u << LOW_BITS) - 1);
}

void find_parts(const Edges& edges, const float* x, const uint32_t* place, int64_t n, Part* parts) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        if (!((bits ^ edges.bits[place[i]]) >> LOW_BITS)) add_part(edges, x + i, place[i], parts);
    }
}

#ifdef CW_X86
// REGISTERS that hold the thresholds: 1 for up to 8 codes, 2 for up to 16, 0 if there are more and they are gathered.
template <int REGISTERS>
CW_AVX2 void find_parts_avx2(const Edges& edges, const float* x, const uint32_t* place, int64_t n, Part* parts) {
    const auto* bits = reinterpret_cast<const int*>(edges.bits.data());
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + 8));
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place + i));
        __m256i edge;
        if (REGISTERS == 0) {
            edge = _mm256_i32gather_epi32(bits, p, 4);
        } else {
            edge = _mm256_permutevar8x32_epi32(low, p);
            if (REGISTERS == 2) {
                const __m256i above = _mm256_permutevar8x32_epi32(high, p), which = _mm256_slli_epi32(p, 28);
                edge = _mm256_castps_si256(_mm256_blendv_ps(
                    _mm256_castsi256_ps(edge), _mm256_castsi256_ps(above), _mm256_castsi256_ps(which)));
            }
        }
        const __m256i apart = _mm256_xor_si256(edge, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
        const __m256i same = _mm256_cmpeq_epi32(_mm256_srli_epi32(apart, LOW_BITS), _mm256_setzero_si256());
        for (unsigned found = _mm256_movemask_ps(_mm256_castsi256_ps(same)); found; found &= found - 1) {
            const int64_t at = i + __builtin_ctz(found);
            add_part(edges, x + at, place[at], parts);
        }
    }
    find_parts(edges, x + i, place + i, n - i, parts);
}
#endif

using FindParts = void (*)(const Edges&, const float*, const uint32_t*, int64_t, Part*);

FindParts find_parts_for([[maybe_unused]] const Tree& tree) {
#ifdef CW_X86
    if (cw::has_avx2())
        return tree.levels <= 3 ? find_parts_avx2<1> : tree.levels == 4 ? find_parts_avx2<2> : find_parts_avx2<0>;
#endif
    return find_parts;
}

constexpr int64_t PIECE = 1 << 16;  // values of one task

template <class Code>
int64_t assign(
    const float* values, int64_t total, int64_t columns, const float* scale, const float* edges, int64_t k,
    int64_t threads, Code* codes, int64_t* parts) {
    const Tree tree(edges, k);
    const Edges bits(edges, k, tree.levels);
    const auto find = places_for(tree);
    const auto find_parts = find_parts_for(tree);
    const auto store = narrow_for<Code>();
    std::mutex adding;
    cw::parallel((total + PIECE - 1) / PIECE, threads, [&](cw::Tasks& tasks) {
        std::vector<float> buffer(cw::BLOCK);
        std::vector<uint32_t> place(cw::BLOCK);
        std::vector<Part> mine(parts ? k : 0);
        for (int64_t task; tasks.take(task);) {
            const int64_t end = std::min(total, (task + 1) * PIECE);
            for (int64_t at = task * PIECE; at < end; at += cw::BLOCK) {
                const int64_t n = std::min(cw::BLOCK, end - at);
                const float* x = cw::scaled(values, scale, columns, at, n, buffer.data());
                find(tree, x, n, place.data());
                store(place.data(), n, tree.last, codes + at);
                if (parts) find_parts(bits, x, place.data(), n, mine.data());
            }
        }
        if (!parts) return;
        std::lock_guard<std::mutex> lock(adding);
        for (int64_t j = 0; j < k - 1; ++j) parts[2 * j] += mine[j].count, parts[2 * j + 1] += mine[j].low;
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

// The number of tops below the key of each value, where a key is a pattern of 16 bits put in the order of its value;
// last if it is below bottom, which only a NaN is.
CW_INLINE void rank16_body(
    const uint16_t* values, int64_t n, const int16_t* tops, int64_t last, int16_t bottom, uint8_t* codes) {
    for (int64_t i = 0; i < n; ++i) {
        const int16_t bits = static_cast<int16_t>(values[i]);
        const int16_t key = static_cast<int16_t>(bits ^ ((bits >> 15) & 0x7FFF));
        uint8_t code = 0;
        for (int64_t j = 0; j < last; ++j) code += key > tops[j];
        codes[i] = key < bottom ? static_cast<uint8_t>(last) : code;
    }
}

void rank16(const uint16_t* values, int64_t n, const int16_t* tops, int64_t last, int16_t bottom, uint8_t* codes) {
    rank16_body(values, n, tops, last, bottom, codes);
}

#ifdef CW_X86
CW_AVX2 void rank16_avx2(
    const uint16_t* values, int64_t n, const int16_t* tops, int64_t last, int16_t bottom, uint8_t* codes) {
    const __m256i magnitude = _mm256_set1_epi16(0x7FFF), below = _mm256_set1_epi16(bottom);
    const __m256i end = _mm256_set1_epi16(static_cast<int16_t>(last));
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i + 16));
        const __m256i x = _mm256_xor_si256(a, _mm256_and_si256(_mm256_srai_epi16(a, 15), magnitude));
        const __m256i y = _mm256_xor_si256(b, _mm256_and_si256(_mm256_srai_epi16(b, 15), magnitude));
        __m256i p = _mm256_setzero_si256(), q = p;
        for (int64_t j = 0; j < last; ++j) {
            const __m256i top = _mm256_set1_epi16(tops[j]);
            p = _mm256_sub_epi16(p, _mm256_cmpgt_epi16(x, top));
            q = _mm256_sub_epi16(q, _mm256_cmpgt_epi16(y, top));
        }
        p = _mm256_blendv_epi8(p, end, _mm256_cmpgt_epi16(below, x));
        q = _mm256_blendv_epi8(q, end, _mm256_cmpgt_epi16(below, y));
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi16(p, q), 0xD8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), both);
    }
    rank16_body(values + i, n - i, tops, last, bottom, codes + i);
}

// Half an interval at a time, in 32 values at once: a probe is a permutation of the tops, which fit a register. Codes
// go past the caches: at the sizes where this matters they would only be fetched to be written over.
template <int LEVELS>
CW_AVX512BW void rank16_avx512(
    const uint16_t* values, int64_t n, const int16_t* tops, int64_t last, int16_t bottom, uint8_t* codes) {
    alignas(64) int16_t padded[32];
    std::fill(padded, padded + 32, INT16_MAX);  // above which no key is
    std::copy(tops, tops + last, padded);
    __m512i probes[LEVELS];  // probes[l] at i: the top that parts what is left in halves, were i tops below so far
    for (int level = 0, step = 1 << (LEVELS - 1); level < LEVELS; ++level, step >>= 1) {
        alignas(64) int16_t shifted[32];
        for (int i = 0; i < 32; ++i) shifted[i] = padded[std::min(i + step - 1, 31)];
        probes[level] = _mm512_load_si512(shifted);
    }
    const __m512i magnitude = _mm512_set1_epi16(0x7FFF), below = _mm512_set1_epi16(bottom);
    const __m512i end = _mm512_set1_epi16(static_cast<int16_t>(last));
    const bool stream = n >= PIECE && reinterpret_cast<uintptr_t>(codes) % 32 == 0;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m512i bits = _mm512_loadu_si512(values + i);
        const __m512i x = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi16(bits, 15), magnitude));
        __m512i code = _mm512_setzero_si512();
        for (int level = 0; level < LEVELS; ++level) {
            const __m512i probe = _mm512_permutexvar_epi16(code, probes[level]);
            const __m512i step = _mm512_set1_epi16(static_cast<int16_t>(1 << (LEVELS - 1 - level)));
            code = _mm512_mask_add_epi16(code, _mm512_cmpgt_epi16_mask(x, probe), code, step);
        }
        code = _mm512_mask_mov_epi16(code, _mm512_cmpgt_epi16_mask(below, x), end);
        const __m256i bytes = _mm512_cvtepi16_epi8(code);
        if (stream)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(codes + i), bytes);
        else
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), bytes);
    }
    if (stream) _mm_sfence();  // before another thread is told that the codes are there
    rank16_body(values + i, n - i, tops, last, bottom, codes + i);
}
#endif

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

// Codes of values (rows, columns), each row divided by scale (rows,) if that is not null; edges (k-1,) rising. Adds to
// parts (k-1, 2), if that is not null, what `Part` says of each edge.
CW_EXPORT int64_t cw_assign(
    const float* values, int64_t rows, int64_t columns, const float* scale, const float* edges, int64_t k,
    int64_t threads, void* codes, int64_t itemsize, int64_t* parts) {
    return by_code(itemsize, [&](auto* type) {
        return assign(
            values, rows * columns, columns, scale, edges, k, threads, static_cast<decltype(type)>(codes), parts);
    });
}

// codes (n,) from tops (last,): `last` is the last code.
CW_EXPORT int64_t cw_rank16(
    const uint16_t* values, int64_t n, const int16_t* tops, int64_t last, int64_t bottom, int64_t threads,
    uint8_t* codes) {
    return cw::guarded([&] {
        auto run = rank16;
#ifdef CW_X86
        if (cw::has_avx512bw() && last < 32)
            run = last < 16 ? rank16_avx512<4> : rank16_avx512<5>;
        else if (cw::has_avx2())
            run = rank16_avx2;
#endif
        cw::parallel((n + PIECE - 1) / PIECE, threads, [&](cw::Tasks& tasks) {
            for (int64_t task; tasks.take(task);) {
                const int64_t at = task * PIECE;
                run(values + at, std::min(PIECE, n - at), tops, last, static_cast<int16_t>(bottom), codes + at);
            }
        });
        return int64_t{0};
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
