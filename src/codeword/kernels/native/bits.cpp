// Bit packing at any width, least significant bit first: kernels/bits.py.
#include "core.hpp"

namespace {

constexpr int64_t PIECE = 1 << 16;  // values of one task, a multiple of 8: a task begins and ends on a byte

CW_INLINE uint64_t below(int64_t width) { return width == 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1; }

template <class T>
void pack(const T* values, int64_t n, int64_t width, uint8_t* to) {
    uint64_t open = 0;
    int64_t filled = 0;  // bits in open, below 8 between values
    const auto put = [&](uint64_t bits, int64_t count) {
        open |= bits << filled;
        for (filled += count; filled >= 8; filled -= 8, open >>= 8) *to++ = static_cast<uint8_t>(open);
    };
    const uint64_t mask = below(width);
    for (int64_t i = 0; i < n; ++i) {
        const uint64_t value = values[i] & mask;
        put(value & 0xFFFFFFFF, std::min<int64_t>(width, 32));
        if (width > 32) put(value >> 32, width - 32);
    }
    if (filled) *to = static_cast<uint8_t>(open);
}

template <class T>
void unpack(const uint8_t* from, int64_t nbytes, int64_t n, int64_t width, T* values) {
    const uint64_t mask = below(width);
    for (int64_t i = 0, bit = 0; i < n; ++i, bit += width) {
        const int64_t byte = bit >> 3, shift = bit & 7;
        uint64_t bits = 0;
        if (byte + 8 <= nbytes) {
            for (int64_t j = 0; j < 8; ++j) bits |= uint64_t{from[byte + j]} << 8 * j;  // one load where bytes allow it
        } else {
            for (int64_t j = 0; byte + j < nbytes; ++j) bits |= uint64_t{from[byte + j]} << 8 * j;
        }
        bits >>= shift;
        if (shift + width > 64) bits |= uint64_t{from[byte + 8]} << (64 - shift);
        values[i] = static_cast<T>(bits & mask);
    }
}

template <class T>
int64_t pack_all(const T* values, int64_t n, int64_t width, int64_t threads, uint8_t* to) {
    cw::parallel((n + PIECE - 1) / PIECE, threads, [&](cw::Tasks& tasks) {
        for (int64_t task; tasks.take(task);) {
            const int64_t at = task * PIECE;
            pack(values + at, std::min(PIECE, n - at), width, to + at / 8 * width);
        }
    });
    return 0;
}

template <class T>
int64_t unpack_all(const uint8_t* from, int64_t n, int64_t width, int64_t threads, T* values) {
    cw::parallel((n + PIECE - 1) / PIECE, threads, [&](cw::Tasks& tasks) {
        for (int64_t task; tasks.take(task);) {
            const int64_t at = task * PIECE, count = std::min(PIECE, n - at);
            unpack(from + at / 8 * width, (count * width + 7) / 8, count, width, values + at);
        }
    });
    return 0;
}

}  // namespace

// values (n,) of itemsize bytes, their lowest width bits (1..64) into data ((n * width + 7) / 8,).
CW_EXPORT int64_t cw_pack_bits(
    const void* values, int64_t itemsize, int64_t n, int64_t width, int64_t threads, uint8_t* data) {
    return cw::guarded([&] {
        if (itemsize == 1) return pack_all(static_cast<const uint8_t*>(values), n, width, threads, data);
        if (itemsize == 2) return pack_all(static_cast<const uint16_t*>(values), n, width, threads, data);
        if (itemsize == 4) return pack_all(static_cast<const uint32_t*>(values), n, width, threads, data);
        return pack_all(static_cast<const uint64_t*>(values), n, width, threads, data);
    });
}

// The inverse; width at most 8 * itemsize.
CW_EXPORT int64_t cw_unpack_bits(
    const uint8_t* data, int64_t n, int64_t width, int64_t threads, void* values, int64_t itemsize) {
    return cw::guarded([&] {
        if (itemsize == 1) return unpack_all(data, n, width, threads, static_cast<uint8_t*>(values));
        if (itemsize == 2) return unpack_all(data, n, width, threads, static_cast<uint16_t*>(values));
        if (itemsize == 4) return unpack_all(data, n, width, threads, static_cast<uint32_t*>(values));
        return unpack_all(data, n, width, threads, static_cast<uint64_t*>(values));
    });
}
