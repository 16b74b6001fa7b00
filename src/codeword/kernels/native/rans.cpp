// Interleaved rANS with an adaptive order-0 model: kernels/rans.py says what and why. All integers.
#include "core.hpp"

namespace {

constexpr int PRECISION = 14;
constexpr uint32_t SLOTS = 1u << PRECISION, MASK = SLOTS - 1, LOWER = 1u << 16;
constexpr int64_t FIRST_BLOCK = 32, LAST_BLOCK = 1 << 14, WEIGHT = 2;

struct Block {
    int64_t start = 0, end = 0;
};

// The schedule of `block_ends`.
class Schedule {
   public:
    Schedule(int64_t n, int64_t lanes) : n_(n), size_(std::max(FIRST_BLOCK, lanes)) {}
    bool next(Block& block) {
        if (start_ >= n_) return false;
        block = {start_, std::min(start_ + size_, n_)};
        start_ += size_;
        size_ = std::min(std::max(size_, start_), LAST_BLOCK);
        return true;
    }

   private:
    int64_t n_, start_ = 0, size_;
};

class Model {
   public:
    Model(int64_t alphabet, int64_t limit)
        : alphabet_(alphabet), limit_(std::max(limit, 2 * alphabet)), total_(alphabet), counts_(alphabet, 1),
          seen_(4 * alphabet) {}

    template <class F>
    void frequencies(F* freq) const {
        int64_t left = SLOTS, most = 0;
        const int64_t spread = SLOTS - alphabet_;
        for (int64_t s = 0; s < alphabet_; ++s) {
            const int64_t f = 1 + counts_[s] * spread / total_;
            freq[s] = static_cast<F>(f);
            left -= f;
            if (counts_[s] > counts_[most]) most = s;
        }
        freq[most] = static_cast<F>(freq[most] + left);
    }

    template <class S>
    void update(const S* symbols, int64_t n) {
        uint32_t* seen = seen_.data();  // four tables, so that equal neighbours do not wait for each other
        int64_t i = 0;
        for (; i + 4 <= n; i += 4)
            for (int64_t j = 0; j < 4; ++j) ++seen[4 * symbols[i + j] + j];
        for (; i < n; ++i) ++seen[4 * symbols[i]];
        for (int64_t s = 0; s < alphabet_; ++s) counts_[s] += WEIGHT * last(s);
        std::fill(seen_.begin(), seen_.end(), 0);
        total_ += WEIGHT * n;
        while (total_ > limit_) {
            total_ = 0;
            for (auto& count : counts_) total_ += count = (count + 1) >> 1;
        }
    }

   private:
    int64_t last(int64_t s) const {
        const uint32_t* seen = seen_.data() + 4 * s;
        return int64_t{seen[0]} + seen[1] + seen[2] + seen[3];
    }
    int64_t alphabet_, limit_, total_;
    std::vector<int64_t> counts_;
    std::vector<uint32_t> seen_;
};

template <class S>
int64_t cost(const S* symbols, int64_t n, int64_t alphabet, int64_t lanes, int64_t limit, const int64_t* price) {
    Model model(alphabet, limit);
    Schedule schedule(n, lanes);
    std::vector<int64_t> freq(alphabet);
    int64_t sum = 0;
    for (Block block; schedule.next(block);) {
        model.frequencies(freq.data());
        for (auto& f : freq) f = price[f];
        for (int64_t i = block.start; i < block.end; ++i) sum += freq[symbols[i]];
        model.update(symbols + block.start, block.end - block.start);
    }
    return sum;
}

// Words fill `words` (n,) from its end; returns how many.
template <class S>
int64_t encode(
    const S* symbols, int64_t n, int64_t alphabet, int64_t lanes, int64_t limit, uint32_t* states, uint16_t* words) {
    std::vector<Block> blocks;
    std::vector<uint16_t> freqs;
    {
        Model model(alphabet, limit);
        Schedule schedule(n, lanes);
        for (Block block; schedule.next(block);) {
            blocks.push_back(block);
            freqs.resize(freqs.size() + alphabet);
            model.frequencies(freqs.data() + freqs.size() - alphabet);
            model.update(symbols + block.start, block.end - block.start);
        }
    }
    std::fill(states, states + lanes, LOWER);
    std::vector<uint32_t> begin(alphabet);
    uint16_t* word = words + n;
    for (int64_t b = static_cast<int64_t>(blocks.size()) - 1; b >= 0; --b) {
        const uint16_t* freq = freqs.data() + b * alphabet;
        uint32_t sum = 0;
        for (int64_t s = 0; s < alphabet; ++s) begin[s] = sum, sum += freq[s];
        const auto [start, end] = blocks[b];
        for (int64_t at = start + (end - start - 1) / lanes * lanes; at >= start; at -= lanes)
            for (int64_t i = std::min(lanes, end - at) - 1; i >= 0; --i) {
                const S s = symbols[at + i];
                const uint32_t f = freq[s];
                uint32_t x = states[i];
                // Without branches, which nobody could foretell; a word not used is written over.
                const uint32_t full = x >= static_cast<uint64_t>(f) << (32 - PRECISION);
                word[-1] = static_cast<uint16_t>(x);
                word -= full;
                x >>= 16 * full;
                states[i] = ((x / f) << PRECISION) + x % f + begin[s];
            }
    }
    return words + n - word;
}

// 0, or 1 + the first symbol of the row at which the stream ends early; *left is the number of words not read.
template <class S>
int64_t decode(
    uint32_t* states, int64_t lanes, const uint16_t* words, int64_t m, S* out, int64_t n, int64_t alphabet,
    int64_t limit, int64_t* left) {
    Model model(alphabet, limit);
    Schedule schedule(n, lanes);
    std::vector<uint32_t> freq(alphabet), entry(alphabet);  // entry: frequency << 16 | first slot
    std::vector<S> symbol_of(SLOTS);
    int64_t p = 0;
    for (Block block; schedule.next(block);) {
        model.frequencies(freq.data());
        uint32_t sum = 0;
        for (int64_t s = 0; s < alphabet; ++s) {
            std::fill_n(symbol_of.data() + sum, freq[s], static_cast<S>(s));
            entry[s] = freq[s] << 16 | (sum & MASK);
            sum += freq[s];
        }
        const S* symbols = symbol_of.data();
        const uint32_t* entries = entry.data();
        for (int64_t at = block.start; at < block.end; at += lanes) {
            const int64_t count = std::min(lanes, block.end - at);
            const bool near_end = p + count > m;
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t slot = states[i] & MASK;
                const S s = symbols[slot];
                const uint32_t e = entries[s];
                const uint32_t x = (e >> 16) * (states[i] >> PRECISION) + slot - (e & 0xFFFF);
                const uint32_t low = x < LOWER;
                out[at + i] = s;
                if (near_end) {
                    if (low && p >= m) return 1 + at;
                    states[i] = low ? x << 16 | words[p] : x;
                } else {
                    states[i] = x << 16 * low | (words[p] & (0u - low));  // nobody could foretell a branch
                }
                p += low;
            }
        }
        model.update(out + block.start, block.end - block.start);
    }
    *left = m - p;
    return 0;
}

}  // namespace



CW_EXPORT int64_t cw_rans_cost(
    const void* symbols, int64_t itemsize, int64_t n, int64_t alphabet, int64_t lanes, int64_t limit,
    const int64_t* price) {
    return cw::guarded([&] {
        return itemsize == 1 ? cost(static_cast<const uint8_t*>(symbols), n, alphabet, lanes, limit, price)
                             : cost(static_cast<const uint16_t*>(symbols), n, alphabet, lanes, limit, price);
    });
}

CW_EXPORT int64_t cw_rans_encode(
    const void* symbols, int64_t itemsize, int64_t n, int64_t alphabet, int64_t lanes, int64_t limit, uint32_t* states,
    uint16_t* words) {
    return cw::guarded([&] {
        return itemsize == 1 ? encode(static_cast<const uint8_t*>(symbols), n, alphabet, lanes, limit, states, words)
                             : encode(static_cast<const uint16_t*>(symbols), n, alphabet, lanes, limit, states, words);
    });
}

CW_EXPORT int64_t cw_rans_decode(
    uint32_t* states, int64_t lanes, const uint16_t* words, int64_t m, void* out, int64_t itemsize, int64_t n,
    int64_t alphabet, int64_t limit, int64_t* left) {
    return cw::guarded([&] {
        return itemsize == 1 ? decode(states, lanes, words, m, static_cast<uint8_t*>(out), n, alphabet, limit, left)
                             : decode(states, lanes, words, m, static_cast<uint16_t*>(out), n, alphabet, limit, left);
    });
}
