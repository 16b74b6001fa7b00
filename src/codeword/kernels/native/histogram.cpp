// Weights into bins: kernels/histogram.py says what a bin is. Without importance all sums are integers, so threads may
// add in any order; with it they are floats, added chunk by chunk in the order of the array.
#include <cmath>
#include <memory>

#include "core.hpp"
#if defined(__unix__) || defined(__APPLE__)
#define CW_MMAP 1
#include <sys/mman.h>
#endif

namespace {

constexpr int KEY_BITS = 20;
constexpr int LOW_BITS = 32 - KEY_BITS;
constexpr int64_t BINS = int64_t{1} << KEY_BITS;
constexpr int PAGE_BITS = 6;  // 64 bins: what is noted as touched, so that few bins cost little
constexpr int64_t PAGES = BINS >> PAGE_BITS;
constexpr int64_t PIECE = 1 << 16;  // values of one task

CW_INLINE uint32_t key_of(uint32_t bits) {
    const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;
    return (bits ^ flip) >> LOW_BITS;
}

CW_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Memory that the system hands out as zeros, page by page when it is touched. Not by calloc where that can be helped: it
// may hand out what was freed before, and fill all of it.
template <class T>
class Zeros {
   public:
    explicit Zeros(int64_t n) : bytes_(n * sizeof(T)) {
#ifdef CW_MMAP
        void* found = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        data_ = found == MAP_FAILED ? nullptr : static_cast<T*>(found);
#else
        data_ = static_cast<T*>(std::calloc(n, sizeof(T)));
#endif
        if (!data_) throw std::bad_alloc();
    }
    ~Zeros() {
#ifdef CW_MMAP
        munmap(data_, bytes_);
#else
        std::free(data_);
#endif
    }
    Zeros(const Zeros&) = delete;
    Zeros& operator=(const Zeros&) = delete;
    T* data() { return data_; }

   private:
    T* data_;
    size_t bytes_;
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

// Bins of integers, a word each, so that more of them stay in the cache. From the top: a flag that the word is full, 9
// bits of count, 21 of the sum of the low bits, 33 of the sum of their squares; none overflows before the flag is set.
// Full words go to a wider table.
class Packed {
   public:
    static constexpr int STRETCH_BITS = 9;  // bins of one page of memory

    Packed() : words_(BINS), full_(BINS * 3), touched_(BINS >> STRETCH_BITS) {}

    void add(const float* x, int64_t n) {
        uint64_t* const words = words_.data();
        uint8_t* const touched = touched_.data();
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = bits_of(x[i]), key = key_of(bits);
            const uint64_t low = bits & ((1u << LOW_BITS) - 1);
            touched[key >> STRETCH_BITS] = 1;
            const uint64_t word = words[key] + (ONE | low << LOW_AT | low * low);
            words[key] = word;
            if (static_cast<int64_t>(word) < 0) empty(key);
        }
    }

    bool touched(int64_t stretch) { return touched_.data()[stretch]; }

    // Adds what bin key holds to sums: count, low bits, their squares.
    CW_INLINE void add_to(int64_t* sums, int64_t key) {
        unpack(words_.data()[key], sums);
        if (any_full_)
            for (int i = 0; i < 3; ++i) sums[i] += full_.data()[3 * key + i];
    }

   private:
    static constexpr int COUNT_AT = 54, LOW_AT = 33;
    static constexpr uint64_t ONE = uint64_t{1} << COUNT_AT;

    static CW_INLINE void unpack(uint64_t word, int64_t* sums) {
        sums[0] += static_cast<int64_t>(word >> COUNT_AT);
        sums[1] += static_cast<int64_t>(word >> LOW_AT & ((uint64_t{1} << (COUNT_AT - LOW_AT)) - 1));
        sums[2] += static_cast<int64_t>(word & ((uint64_t{1} << LOW_AT) - 1));
    }

    __attribute__((noinline)) void empty(int64_t key) {
        any_full_ = true;
        unpack(words_.data()[key], full_.data() + 3 * key);
        words_.data()[key] = 0;
    }

    Zeros<uint64_t> words_;
    Zeros<int64_t> full_;  // (BINS, 3)
    Zeros<uint8_t> touched_;
    bool any_full_ = false;
};

// Key, count, low and square of the occupied bins, as rows of found (m, 4); returns m.
int64_t occupied(const std::vector<std::unique_ptr<Packed>>& tables, int64_t* found) {
    constexpr int64_t STRETCHES = BINS >> Packed::STRETCH_BITS;
    int64_t* row = found;
    std::vector<Packed*> here;
    here.reserve(tables.size());
    for (int64_t stretch = 0; stretch < STRETCHES; ++stretch) {
        here.clear();
        for (const auto& table : tables)
            if (table->touched(stretch)) here.push_back(table.get());
        if (here.empty()) continue;
        for (int64_t key = stretch << Packed::STRETCH_BITS; key < (stretch + 1) << Packed::STRETCH_BITS; ++key) {
            int64_t sums[3] = {0, 0, 0};
            for (Packed* table : here) table->add_to(sums, key);
            if (!sums[0]) continue;
            row[0] = key, row[1] = sums[0], row[2] = sums[1], row[3] = sums[2];
            row += 4;
        }
    }
    return (row - found) / 4;
}

constexpr int64_t PATTERNS = 1 << 16, PIECE16 = 1 << 18;

// How often each pattern of 16 bits was seen. Counters of one byte, of which those in use fit the first cache, and how
// often each overflowed.
class Patterns {
   public:
    Patterns() : few_(PATTERNS), many_(PATTERNS) {}
    // Two tables by turns, so that equal neighbours do not wait for each other.
    static void count(const uint16_t* values, int64_t n, Patterns& even, Patterns& odd) {
        uint8_t *const a = even.few_.data(), *const b = odd.few_.data();
        uint32_t *const above_a = even.many_.data(), *const above_b = odd.many_.data();
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) {
            uint64_t four;
            std::memcpy(&four, values + i, 8);
            const uint64_t w = four & 0xFFFF, x = four >> 16 & 0xFFFF, y = four >> 32 & 0xFFFF, z = four >> 48;
            if (!++a[w]) ++above_a[w];
            if (!++b[x]) ++above_b[x];
            if (!++a[y]) ++above_a[y];
            if (!++b[z]) ++above_b[z];
        }
        for (; i < n; ++i)
            if (!++a[values[i]]) ++above_a[values[i]];
    }
    int64_t seen(int64_t pattern) const { return int64_t{many_[pattern]} * 256 + few_[pattern]; }

   private:
    std::vector<uint8_t> few_;
    std::vector<uint32_t> many_;
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

// The occupied bins of values: rows of key, count, low and square (see `whole_sums_numpy`) into found, which has room for
// one for each value or each bin. Returns how many.
CW_EXPORT int64_t cw_histogram(
    const float* values, int64_t rows, int64_t columns, const float* scale, int64_t threads, int64_t* found) {
    return cw::guarded([&] {
        const int64_t total = rows * columns;
        std::vector<std::unique_ptr<Packed>> tables;
        tables.reserve(threads);
        std::mutex adding;
        cw::parallel((total + PIECE - 1) / PIECE, threads, [&](cw::Tasks& tasks) {
            auto table = std::make_unique<Packed>();
            std::vector<float> buffer(cw::BLOCK);
            for (int64_t task; tasks.take(task);) {
                const int64_t end = std::min(total, (task + 1) * PIECE);
                for (int64_t at = task * PIECE; at < end; at += cw::BLOCK) {
                    const int64_t n = std::min(cw::BLOCK, end - at);
                    table->add(cw::scaled(values, scale, columns, at, n, buffer.data()), n);
                }
            }
            std::lock_guard<std::mutex> lock(adding);
            tables.push_back(std::move(table));
        });
        return occupied(tables, found);
    });
}

// sums (3, m): counts, first and second moments of bins found (m, 4), the rows that cw_histogram writes.
CW_EXPORT int64_t cw_whole_sums(const int64_t* found, int64_t m, double* sums) {
    double *counts = sums, *first = sums + m, *second = sums + 2 * m;
    for (int64_t i = 0; i < m; ++i, found += 4) {
        const uint32_t key = static_cast<uint32_t>(found[0]);
        const bool positive = key >> (KEY_BITS - 1);
        const uint32_t upper = (positive ? key : ~key) << LOW_BITS & 0x7FFFFFFFu;
        float base_of;
        std::memcpy(&base_of, &upper, 4);
        const double base = base_of, unit = std::ldexp(1.0, static_cast<int>(std::max(upper >> 23, 1u)) - 150);
        const double n = static_cast<double>(found[1]), low = static_cast<double>(found[2]);
        const double sum = n * base + low * unit;
        counts[i] = n;
        first[i] = positive ? sum : -sum;
        second[i] = n * (base * base) + 2 * (base * unit) * low + unit * unit * static_cast<double>(found[3]);
    }
    return 0;
}

// Prefix sums (rows, m+1) of parts (rows, m), which run outwards from anchor.
CW_EXPORT int64_t cw_prefixes(const double* parts, int64_t rows, int64_t m, int64_t anchor, double* prefixes) {
    for (int64_t row = 0; row < rows; ++row, parts += m, prefixes += m + 1) {
        double right = -0.0, left = -0.0;  // which leave a first part as it is, be it a negative zero
        prefixes[anchor] = 0;
        for (int64_t i = anchor; i < m; ++i) prefixes[i + 1] = right += parts[i];
        for (int64_t i = anchor; i-- > 0;) prefixes[i] = -(left += parts[i]);
    }
    return 0;
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
        std::mutex adding;
        cw::parallel((n + PIECE16 - 1) / PIECE16, threads, [&](cw::Tasks& tasks) {
            Patterns even, odd;
            for (int64_t task; tasks.take(task);) {
                const int64_t at = task * PIECE16;
                Patterns::count(values + at, std::min(PIECE16, n - at), even, odd);
            }
            std::lock_guard<std::mutex> lock(adding);
            for (int64_t pattern = 0; pattern < PATTERNS; ++pattern)
                counts[pattern] += even.seen(pattern) + odd.seen(pattern);
        });
        return int64_t{0};
    });
}
