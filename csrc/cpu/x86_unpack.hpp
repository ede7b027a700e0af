// 32 codes to 32 bytes with AVX2, for the widths 2..7; also used by the AVX-512 object.
//
// Eight codes are N whole bytes and go to the eight 16-bit lanes of one 128-bit half. A code of at most 7 bits that
// starts inside a byte ends inside the next one, so two bytes hold it whole:
//
//     shuffle     lane i = bytes i*N/8, i*N/8 + 1       the code at bit i*N%8, its neighbours around it
//     multiply    by 2^(16 - N - i*N%8)                 the code at the top of the lane, what was above it gone
//     shift       right by 16 - N                       the code
//
// The halves are loaded crosswise, so that packing the lanes to bytes leaves the codes in natural order.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bytelane::cpu {
namespace {

template <int Bits>
struct SpreadTables {
    alignas(32) std::int8_t bytes[32] = {};
    alignas(32) std::int8_t both[32] = {};  // the same where both halves see the bytes of all 16 codes
    alignas(32) std::int16_t factors[16] = {};

    constexpr SpreadTables() {
        for (int i = 0; i < 16; ++i) {
            const int bit = i % 8 * Bits;
            bytes[2 * i] = static_cast<std::int8_t>(bit / 8);
            bytes[2 * i + 1] = static_cast<std::int8_t>(bit / 8 + 1);
            both[2 * i] = static_cast<std::int8_t>(bytes[2 * i] + i / 8 * Bits);
            both[2 * i + 1] = static_cast<std::int8_t>(bytes[2 * i + 1] + i / 8 * Bits);
            factors[i] = static_cast<std::int16_t>(1 << (16 - Bits - bit % 8));
        }
    }
};

template <int Bits>
inline constexpr SpreadTables<Bits> kSpread{};

// 8 + 8 codes, from two places, in 16-bit lanes.
template <int Bits>
inline __m256i spread_16(const std::uint8_t* low, const std::uint8_t* high) {
    const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(low));
    const __m128i second = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high));
    const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread<Bits>.bytes));
    const __m256i factors = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread<Bits>.factors));
    const __m256i windows = _mm256_shuffle_epi8(_mm256_set_m128i(second, first), bytes);
    return _mm256_srli_epi16(_mm256_mullo_epi16(windows, factors), 16 - Bits);
}

template <int Bits>
inline void spread_32(const std::uint8_t* codes, std::uint8_t* out) {
    static_assert(Bits >= 2 && Bits <= 7);
    const __m256i even = spread_16<Bits>(codes, codes + 2 * Bits);
    const __m256i odd = spread_16<Bits>(codes + Bits, codes + 3 * Bits);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_packus_epi16(even, odd));
}

}  // namespace
}  // namespace bytelane::cpu
