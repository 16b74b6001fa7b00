// Weights to codes, column after column, each taking up the errors before it: kernels/compensate.py.
// Rows are independent: a thread takes LANES of them and keeps a tile of columns transposed, so that loops run over rows.
#include <cmath>
#include <limits>

#include "thresholds.hpp"

namespace {

constexpr int64_t LANES = 128, TILE = 64;
constexpr float INF = std::numeric_limits<float>::infinity();

struct Problem {
    const float *values, *scale, *importance, *steps, *words, *middle, *slope, *gaps, *prices;
    int64_t rows, columns, kernel, k;
};

// What a thread needs for LANES rows; arrays (TILE, LANES) have a column of the weights in each row.
struct Room {
    cw::Thresholds<LANES> thresholds;
    std::vector<float> x, root, gained;
    std::vector<uint32_t> code;
    alignas(64) float in_kernel[LANES], in_row[LANES], wanted[LANES], best[LANES];
    explicit Room(int64_t k) : thresholds(k), x(TILE * LANES), root(TILE * LANES), gained(k), code(TILE * LANES) {}
};

CW_INLINE void load(const Problem& p, Room& room, int64_t row, int64_t lanes, int64_t column, int64_t count) {
    for (int64_t r = 0; r < lanes; ++r) {
        const float* from = p.values + (row + r) * p.columns + column;
        const float by = p.scale ? p.scale[row + r] : 1;  // to divide by 1 changes nothing
        for (int64_t i = 0; i < count; ++i) room.x[i * LANES + r] = from[i] / by;
        if (!p.importance) continue;
        const float* h = p.importance + (row + r) * p.columns + column;
        for (int64_t i = 0; i < count; ++i) room.root[i * LANES + r] = std::sqrt(h[i]);
    }
}

// The code of each row for one column without importance.
CW_INLINE void by_thresholds(const Problem& p, Room& room, float gain, const float* x, uint32_t* code) {
    room.thresholds.codes(p.middle, p.slope, p.gaps, gain, room.wanted, code);
    for (int64_t r = 0; r < LANES; ++r) {
        const float error = p.words[static_cast<int32_t>(code[r])] - x[r];
        room.in_kernel[r] += error;
        room.in_row[r] += error;
    }
}

// The same with importance: every codeword is tried, the lower of equals wins.
CW_INLINE void by_trial(
    const Problem& p, Room& room, float gain, const float* x, const float* weight, uint32_t* code) {
    for (int64_t j = 0; j < p.k; ++j) room.gained[j] = gain * p.prices[j];
    for (int64_t r = 0; r < LANES; ++r) code[r] = 0, room.best[r] = INF;
    for (int64_t j = 0; j < p.k; ++j) {
        const float word = p.words[j], price = room.gained[j];
        for (int64_t r = 0; r < LANES; ++r) {
            const float distance = weight[r] * (room.wanted[r] - word);
            const float cost = distance * distance + price;
            const bool better = cost < room.best[r];
            code[r] = better ? static_cast<uint32_t>(j) : code[r];
            room.best[r] = better ? cost : room.best[r];
        }
    }
    for (int64_t r = 0; r < LANES; ++r) {
        const float error = weight[r] * (p.words[static_cast<int32_t>(code[r])] - x[r]);
        room.in_kernel[r] += error;
        room.in_row[r] += error;
    }
}

template <class Code>
CW_INLINE void rows_body(const Problem& p, Room& room, int64_t row, Code* codes) {
    const int64_t lanes = std::min(LANES, p.rows - row);
    for (int64_t r = 0; r < LANES; ++r) room.in_kernel[r] = room.in_row[r] = 0;
    for (int64_t column = 0; column < p.columns; column += TILE) {
        const int64_t count = std::min(TILE, p.columns - column);
        load(p, room, row, lanes, column, count);
        for (int64_t i = 0; i < count; ++i) {
            if ((column + i) % p.kernel == 0)
                for (int64_t r = 0; r < LANES; ++r) room.in_kernel[r] = 0;
            const float* step = p.steps + 3 * (column + i);
            const float shift_kernel = step[0], shift_row = step[1], gain = step[2];
            const float* x = room.x.data() + i * LANES;
            uint32_t* code = room.code.data() + i * LANES;
            if (p.importance) {
                float* weight = room.root.data() + i * LANES;
                for (int64_t r = 0; r < LANES; ++r) {
                    weight[r] = std::max(weight[r], 1e-12f);
                    const float shift = shift_kernel * room.in_kernel[r] + shift_row * room.in_row[r];
                    room.wanted[r] = x[r] - shift / weight[r];
                }
                by_trial(p, room, gain, x, weight, code);
            } else {
                for (int64_t r = 0; r < LANES; ++r) {
                    const float shift = shift_kernel * room.in_kernel[r] + shift_row * room.in_row[r];
                    room.wanted[r] = x[r] - shift;
                }
                by_thresholds(p, room, gain, x, code);
            }
        }
        for (int64_t r = 0; r < lanes; ++r) {
            Code* to = codes + (row + r) * p.columns + column;
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Code>(room.code[i * LANES + r]);
        }
    }
}

template <class Code>
void some_rows(const Problem& p, Room& room, int64_t row, Code* codes) {
    rows_body(p, room, row, codes);
}

#ifdef CW_X86
template <class Code>
CW_AVX2 void some_rows_avx2(const Problem& p, Room& room, int64_t row, Code* codes) {
    rows_body(p, room, row, codes);
}
#endif

template <class Code>
int64_t all_rows(const Problem& p, int64_t threads, Code* codes) {
    auto run = some_rows<Code>;
#ifdef CW_X86
    if (cw::has_avx2()) run = some_rows_avx2<Code>;
#endif
    return cw::by_lanes<LANES>(
        p.rows, threads, [&] { return Room(p.k); }, [&](Room& room, int64_t row) { run(p, room, row, codes); });
}

}  // namespace

// Codes of values (rows, columns), each row divided by scale (rows,) if not null; importance (rows, columns) or null;
// steps (columns, 3): what kernel and row add to a column, and its gain; words and prices (k,); middle, slope and gaps
// (k-1,).
CW_EXPORT int64_t cw_assign_compensated(
    const float* values, int64_t rows, int64_t columns, const float* scale, const float* importance, int64_t kernel,
    const float* steps, const float* words, const float* middle, const float* slope, const float* gaps,
    const float* prices, int64_t k, int64_t threads, void* codes, int64_t itemsize) {
    const Problem p{values, scale, importance, steps, words, middle, slope, gaps, prices, rows, columns, kernel, k};
    return cw::guarded([&] {
        if (itemsize == 1) return all_rows(p, threads, static_cast<uint8_t*>(codes));
        if (itemsize == 2) return all_rows(p, threads, static_cast<uint16_t*>(codes));
        return all_rows(p, threads, static_cast<uint32_t*>(codes));
    });
}
