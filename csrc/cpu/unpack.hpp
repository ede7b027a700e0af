// A canonical row spread to one byte a code, in natural order, for every width.
//
//     eight codes are N whole bytes        h g f e d c b a        (N bits each, a lowest)
//     halve    64-bit word as 2 x 32       h g f e     d c b a
//     halve    4 x 16                      h g   f e   d c   b a
//     halve    8 x 8                       h  g  f  e  d  c  b  a
//
// Each step moves the upper half of every lane up, so three of them serve any width.
//
// Source: any alignment, read up to its last byte and no further. Output: `count` bytes, rounded up to 8.
#pragma once

#include <cstdint>
#include <cstring>

namespace bytelane::cpu {
namespace {

// Moves the upper half of every `2 * codes`-code lane up to the middle of a lane twice as wide.
template <int Bits, int Codes>
inline std::uint64_t halve(std::uint64_t word) {
    constexpr std::uint64_t lanes = Codes == 4 ? 1 : Codes == 2 ? 0x0000000100000001ull : 0x0001000100010001ull;
    constexpr std::uint64_t low = ((1ull << (Codes * Bits)) - 1) * lanes;
    return (word & low) | (word << (8 - Bits) * Codes & low << 8 * Codes);
}

template <int Bits>
inline std::uint64_t spread(std::uint64_t word) {
    if constexpr (Bits == 8) return word;
    return halve<Bits, 1>(halve<Bits, 2>(halve<Bits, 4>(word)));
}

// Codes `start .. start + count` of a row of `row_bytes` bytes.
template <int Bits>
void unpack_bits(const std::uint8_t* row, std::int64_t row_bytes, std::int64_t start, std::int64_t count,
                 std::uint8_t* out) {
    const int shift = static_cast<int>(start * Bits % 8);
    std::int64_t at = start * Bits / 8;
    std::int64_t i = 0;
    const auto store = [&](std::uint64_t window) {
        if constexpr (Bits < 8) window &= (1ull << (8 * Bits)) - 1;
        window = spread<Bits>(window);
        std::memcpy(out + i, &window, sizeof window);
    };
    // shift + 8 * Bits <= 7 + 56 bits for a width below 8, and a shift of 0 at 8: one 64-bit window is enough.
    for (; i < count && at + 8 <= row_bytes; i += 8, at += Bits) {
        std::uint64_t window;
        std::memcpy(&window, row + at, sizeof window);
        store(window >> shift);
    }
    for (; i < count; i += 8, at += Bits) {
        std::uint64_t window = 0;
        std::memcpy(&window, row + at, larger(smaller(8, row_bytes - at), 0));
        store(window >> shift);
    }
}

inline void unpack(int bits, const std::uint8_t* row, std::int64_t row_bytes, std::int64_t start, std::int64_t count,
                   std::uint8_t* out) {
    switch (bits) {
        case 2: return unpack_bits<2>(row, row_bytes, start, count, out);
        case 3: return unpack_bits<3>(row, row_bytes, start, count, out);
        case 4: return unpack_bits<4>(row, row_bytes, start, count, out);
        case 5: return unpack_bits<5>(row, row_bytes, start, count, out);
        case 6: return unpack_bits<6>(row, row_bytes, start, count, out);
        case 7: return unpack_bits<7>(row, row_bytes, start, count, out);
        default: return unpack_bits<8>(row, row_bytes, start, count, out);
    }
}

}  // namespace
}  // namespace bytelane::cpu
