// A canonical row spread to one byte a code, in natural order, for every width.
//
//     eight codes are N whole bytes        h g f e d c b a        (N bits each, a lowest)
//     halve    64-bit word as 2 x 32       h g f e     d c b a
//     halve    4 x 16                      h g   f e   d c   b a
//     halve    8 x 8                       h  g  f  e  d  c  b  a
//
// Each step moves the upper half of every lane up, so three of them serve any width. An instruction set that can do
// better says so with `unpack_codes` (0: it cannot) and `unpack_step`: see x86_unpack.hpp.
//
// Source: any alignment, `readable` bytes of it and no further; what lies between the row's last code and there may
// come out past the last code. Output: `count` bytes, rounded up to 8.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"

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
    return halve<Bits, 1>(halve<Bits, 2>(halve<Bits, 4>(word)));
}

// Codes `start .. start + count` of a row.
template <class Isa, int Bits>
void unpack_bits(const std::uint8_t* row, std::int64_t readable, std::int64_t start, std::int64_t count,
                 std::uint8_t* out) {
    if constexpr (Bits == 8) {
        const std::int64_t whole = ceil_div(count, 8) * 8, there = smaller(whole, readable - start);
        std::memcpy(out, row + start, there);
        std::memset(out + there, 0, whole - there);
        return;
    }
    const int shift = static_cast<int>(start * Bits % 8);
    std::int64_t at = start * Bits / 8;
    std::int64_t i = 0;
    if constexpr (Isa::unpack_codes > 0 && Bits < 8) {
        constexpr std::int64_t step_bytes = Isa::unpack_codes * Bits / 8;
        constexpr std::int64_t reach = step_bytes - Bits + 8;  // the last eight codes are read as eight bytes
        if (shift == 0) {
            for (; i + Isa::unpack_codes <= count && at + reach <= readable; i += Isa::unpack_codes, at += step_bytes) {
                Isa::template unpack_step<Bits>(row + at, out + i);
            }
        }
    }
    const auto store = [&](std::uint64_t window) {
        window = spread<Bits>(window & ((1ull << (Bits % 8 * 8)) - 1));
        std::memcpy(out + i, &window, sizeof window);
    };
    // shift + 8 * Bits <= 7 + 56 bits: one 64-bit window is enough.
    for (; i < count && at + 8 <= readable; i += 8, at += Bits) {
        std::uint64_t window;
        std::memcpy(&window, row + at, sizeof window);
        store(window >> shift);
    }
    for (; i < count; i += 8, at += Bits) {
        std::uint64_t window = 0;
        std::memcpy(&window, row + at, larger(smaller(8, readable - at), 0));
        store(window >> shift);
    }
}

template <class Isa>
void unpack(int bits, const std::uint8_t* row, std::int64_t readable, std::int64_t start, std::int64_t count,
            std::uint8_t* out) {
    switch (bits) {
        case 2: return unpack_bits<Isa, 2>(row, readable, start, count, out);
        case 3: return unpack_bits<Isa, 3>(row, readable, start, count, out);
        case 4: return unpack_bits<Isa, 4>(row, readable, start, count, out);
        case 5: return unpack_bits<Isa, 5>(row, readable, start, count, out);
        case 6: return unpack_bits<Isa, 6>(row, readable, start, count, out);
        case 7: return unpack_bits<Isa, 7>(row, readable, start, count, out);
        default: return unpack_bits<Isa, 8>(row, readable, start, count, out);
    }
}

}  // namespace
}  // namespace bytelane::cpu
