// Weights to codes, column after column, errors made up for as measured second moments say: kernels/moments.py.
// Rows are independent: a thread takes LANES of them, transposed, so that loops run over rows. The errors of TILE columns
// go to the columns beyond them together, each sum in the order of the columns.
#include "thresholds.hpp"

namespace {

constexpr int64_t LANES = 64, TILE = 32;

struct Problem {
    const float *values, *scale, *factor, *words, *middle, *slope, *gaps;
    int64_t rows, columns, k;
};

// What a thread needs for LANES rows; arrays (columns, LANES) have a column of the weights in each row.
struct Room {
    cw::Thresholds<LANES> thresholds;
    std::vector<float> x, errors;
    std::vector<uint32_t> code;
    Room(int64_t k, int64_t columns) : thresholds(k), x(columns * LANES), errors(TILE * LANES), code(columns * LANES) {}
};

// x[j] -= factor[i][j] * error of column i, for the columns first..last of a tile and j from..to.
CW_INLINE void pass_on(const Problem& p, Room& room, int64_t first, int64_t last, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j) {
        float* const x = room.x.data() + j * LANES;
        for (int64_t i = first; i < last; ++i) {
            const float share = p.factor[i * p.columns + j];
            const float* const error = room.errors.data() + i % TILE * LANES;
            for (int64_t r = 0; r < LANES; ++r) x[r] -= share * error[r];
        }
    }
}

template <class Code>
CW_INLINE void rows_body(const Problem& p, Room& room, int64_t row, Code* codes) {
    const int64_t lanes = std::min(LANES, p.rows - row);
    for (int64_t r = 0; r < lanes; ++r) {
        const float* from = p.values + (row + r) * p.columns;
        const float by = p.scale ? p.scale[row + r] : 1;  // to divide by 1 changes nothing
        for (int64_t i = 0; i < p.columns; ++i) room.x[i * LANES + r] = from[i] / by;
    }
    for (int64_t first = 0; first < p.columns; first += TILE) {
        const int64_t last = std::min(first + TILE, p.columns);
        for (int64_t i = first; i < last; ++i) {
            const float own = p.factor[i * p.columns + i];
            const float* const x = room.x.data() + i * LANES;
            uint32_t* const code = room.code.data() + i * LANES;
            room.thresholds.codes(p.middle, p.slope, p.gaps, own * own, x, code);
            float* const error = room.errors.data() + i % TILE * LANES;
            for (int64_t r = 0; r < LANES; ++r) error[r] = (x[r] - p.words[static_cast<int32_t>(code[r])]) / own;
            pass_on(p, room, i, i + 1, i + 1, last);
        }
        pass_on(p, room, first, last, last, p.columns);
    }
    for (int64_t r = 0; r < lanes; ++r)
        for (int64_t i = 0; i < p.columns; ++i)
            codes[(row + r) * p.columns + i] = static_cast<Code>(room.code[i * LANES + r]);
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
        p.rows, threads, [&] { return Room(p.k, p.columns); }, [&](Room& room, int64_t row) { run(p, room, row, codes); });
}

}  // namespace

// Codes of values (rows, columns), each row divided by scale (rows,) if not null; factor (columns, columns), upper
// triangular; words (k,), middle, slope and gaps (k-1,).
CW_EXPORT int64_t cw_assign_moments(
    const float* values, int64_t rows, int64_t columns, const float* scale, const float* factor, const float* words,
    const float* middle, const float* slope, const float* gaps, int64_t k, int64_t threads, void* codes,
    int64_t itemsize) {
    const Problem p{values, scale, factor, words, middle, slope, gaps, rows, columns, k};
    return cw::guarded([&] {
        if (itemsize == 1) return all_rows(p, threads, static_cast<uint8_t*>(codes));
        if (itemsize == 2) return all_rows(p, threads, static_cast<uint16_t*>(codes));
        return all_rows(p, threads, static_cast<uint32_t*>(codes));
    });
}
