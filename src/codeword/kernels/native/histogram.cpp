// Weights into bins: kernels/histogram.py says what a bin is. Without importance all sums are integers, so threads may
// add in any order; with it they are floats, added chunk by chunk in the order of the array.
#include "core.hpp"

namespace {

constexpr int LOW_BITS = 12;
constexpr int64_t BINS = int64_t{1} << (32 - LOW_BITS);
constexpr int PAGE_BITS = 6;  // 64 bins: what is noted as touched, so that few bins cost little
constexpr int64_t PAGES = BINS >> PAGE_BITS;
constexpr int64_t FLUSH = int64_t{1} << 22;

CW_INLINE uint32_t key_of(uint32_t bits) {
    const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;
    return (bits ^ flip) >> LOW_BITS;
}

CW_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Memory that the system hands out as zeros, page by page when it is touched.
template <class T>
class Zeros {
   public:
    explicit Zeros(int64_t n) : data_(static_cast<T*>(std::calloc(n, sizeof(T)))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Zeros() { std::free(data_); }
    Zeros(const Zeros&) = delete;
    Zeros& operator=(const Zeros&) = delete;
    T* data() { return data_; }

   private:
    T* data_;
};

// A table of bins that knows which of them were touched.
template <class Bin>
class Table {
   public:
    Table() : bins_(BINS), touched_(PAGES) {}
    CW_INLINE Bin& at(uint32_t key) {
        touched_.data()[key >> PAGE_BITS] = 1;
        return bins_.data()[key];
    }
    template <class Add>
    void flush(Add add) {
        for (int64_t page = 0; page < PAGES; ++page) {
            if (!touched_.data()[page]) continue;
            touched_.data()[page] = 0;
            for (int64_t bin = page << PAGE_BITS; bin < (page + 1) << PAGE_BITS; ++bin) {
                add(bin, bins_.data()[bin]);
                bins_.data()[bin] = Bin{};
            }
        }
    }

   private:
    Zeros<Bin> bins_;
    Zeros<uint8_t> touched_;
};

struct Whole {
    uint64_t count_low;  // count << 40 | sum of the low bits: no overflow within 2**28 values
    uint64_t square;     // sum of the low bits squared
};

struct Weighted {
    double weight, first, second, count;
};

template <class H>
void weighted(
    const float* values, int64_t rows, int64_t columns, const float* scale, const H* importance, int64_t chunk,
    int64_t threads, double* counts, double* weight, double* first, double* second) {
    const cw::Chunks chunks(rows, columns, chunk);
    cw::Turn turn;
    cw::parallel(chunks.count(), threads, [&](cw::Tasks& tasks) {
        Table<Weighted> table;
        std::vector<float> buffer(cw::BLOCK);
        for (int64_t task; tasks.take(task);) {
            for (int64_t at = chunks.begin(task); at < chunks.end(task); at += cw::BLOCK) {
                const int64_t n = std::min(cw::BLOCK, chunks.end(task) - at);
                const float* x = cw::scaled(values, scale, columns, at, n, buffer.data());
                for (int64_t i = 0; i < n; ++i) {
                    Weighted& bin = table.at(key_of(bits_of(x[i])));
                    const double value = x[i], h = importance[at + i], moment = value * h;
                    bin.count += 1;
                    bin.weight += h;
                    bin.first += moment;
                    bin.second += moment * value;
                }
            }
            turn.wait(task);
            table.flush([&](int64_t bin, const Weighted& part) {
                counts[bin] += part.count;
                weight[bin] += part.weight;
                first[bin] += part.first;
                second[bin] += part.second;
            });
            turn.done();
        }
    });
}

}  // namespace

// Adds to counts, low and square (2**20,): see `_whole_sums`.
CW_EXPORT int64_t cw_histogram(
    const float* values, int64_t rows, int64_t columns, const float* scale, int64_t threads, int64_t* counts,
    int64_t* low, int64_t* square) {
    return cw::guarded([&] {
        const int64_t total = rows * columns, step = std::min(FLUSH, (total / threads / cw::BLOCK + 1) * cw::BLOCK);
        std::mutex adding;
        cw::parallel((total + step - 1) / step, threads, [&](cw::Tasks& tasks) {
            Table<Whole> table;
            std::vector<float> buffer(cw::BLOCK);
            for (int64_t task; tasks.take(task);) {
                const int64_t end = std::min(total, (task + 1) * step);
                for (int64_t at = task * step; at < end; at += cw::BLOCK) {
                    const int64_t n = std::min(cw::BLOCK, end - at);
                    const float* x = cw::scaled(values, scale, columns, at, n, buffer.data());
                    for (int64_t i = 0; i < n; ++i) {
                        const uint32_t bits = bits_of(x[i]);
                        const uint64_t rest = bits & ((1u << LOW_BITS) - 1);
                        Whole& bin = table.at(key_of(bits));
                        bin.count_low += uint64_t{1} << 40 | rest;
                        bin.square += rest * rest;
                    }
                }
                std::lock_guard<std::mutex> lock(adding);
                table.flush([&](int64_t bin, const Whole& part) {
                    counts[bin] += static_cast<int64_t>(part.count_low >> 40);
                    low[bin] += static_cast<int64_t>(part.count_low & ((uint64_t{1} << 40) - 1));
                    square[bin] += static_cast<int64_t>(part.square);
                });
            }
        });
        return int64_t{0};
    });
}

// Adds to counts, weight, first and second (2**20,). importance (rows, columns) of 4 or 8 bytes a value.
CW_EXPORT int64_t cw_histogram_weighted(
    const float* values, int64_t rows, int64_t columns, const float* scale, const void* importance, int64_t itemsize,
    int64_t chunk, int64_t threads, double* counts, double* weight, double* first, double* second) {
    return cw::guarded([&] {
        if (itemsize == 4)
            weighted(values, rows, columns, scale, static_cast<const float*>(importance), chunk, threads, counts,
                     weight, first, second);
        else
            weighted(values, rows, columns, scale, static_cast<const double*>(importance), chunk, threads, counts,
                     weight, first, second);
        return int64_t{0};
    });
}

// Adds to counts (2**16,): how often each bit pattern of 16 bits stands in values (n,).
CW_EXPORT int64_t cw_count16(const uint16_t* values, int64_t n, int64_t threads, int64_t* counts) {
    return cw::guarded([&] {
        constexpr int64_t PATTERNS = 1 << 16;
        const int64_t step = std::min(FLUSH, n / threads + 1);
        std::mutex adding;
        cw::parallel((n + step - 1) / step, threads, [&](cw::Tasks& tasks) {
            std::vector<uint32_t> even(PATTERNS), odd(PATTERNS);  // equal neighbours do not wait for each other
            for (int64_t task; tasks.take(task);) {
                const int64_t end = std::min(n, (task + 1) * step);
                int64_t i = task * step;
                for (; i + 4 <= end; i += 4) {
                    uint64_t four;
                    std::memcpy(&four, values + i, 8);
                    ++even[four & 0xFFFF];
                    ++odd[four >> 16 & 0xFFFF];
                    ++even[four >> 32 & 0xFFFF];
                    ++odd[four >> 48];
                }
                for (; i < end; ++i) ++even[values[i]];
                std::lock_guard<std::mutex> lock(adding);
                for (int64_t pattern = 0; pattern < PATTERNS; ++pattern) {
                    counts[pattern] += int64_t{even[pattern]} + odd[pattern];
                    even[pattern] = odd[pattern] = 0;
                }
            }
        });
        return int64_t{0};
    });
}
