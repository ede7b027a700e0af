// x86-64 with AVX2 and F16C.
//
// 2 and 4 bits: `maddubs` multiplies unsigned bytes (the codes) by signed bytes (the activations) and adds pairs into
// int16, saturating. A pair is at most 2 * (2^N - 1) * 128 in size, so this many of them fit int16, and then `madd` with
// ones moves them to int32:
//
//     4 bits   3840 a pair     8 adds between flushes     4 blocks of 2 parts
//     2 bits    768 a pair    42 adds                    10 blocks of 4 parts
//
// 8 bits: a pair reaches 65280 and `maddubs` would saturate. The codes are seen as 16-bit lanes instead (even bytes, odd
// bytes), the activations are arranged as int16, and `madd` multiplies and adds pairs into int32 exactly.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matmul.hpp"

namespace bytelane::cpu {
namespace {

struct Avx2 {
    static constexpr int vector_bytes = 32;
    static constexpr int vector_rows = 1;
    static constexpr int tile_rows = 2;
    static constexpr int prefetch_bytes = 2048;

    using Vector = __m256i;

    static Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

    static Vector load_some(const void* p, int bytes) {
        alignas(32) std::uint8_t copy[vector_bytes] = {};
        std::memcpy(copy, p, static_cast<std::size_t>(bytes));
        return load(copy);
    }

    static std::int32_t total(__m256i wide) {
        __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
        return _mm_cvtsi128_si32(sum);
    }

    template <int Bits>
    struct Dot {
        using Lane = std::int8_t;
        static constexpr int parts = 8 / Bits;
        static constexpr int pair = 2 * ((1 << Bits) - 1) * 128;
        static constexpr int blocks_per_flush = 32767 / pair / parts;
        static_assert(Bits == 2 || Bits == 4);
        static_assert(pair * parts * blocks_per_flush <= 32767, "a narrow sum must not wrap");

        struct Sum {
            __m256i narrow, wide;
        };

        static void clear(Sum& s) { s.narrow = s.wide = _mm256_setzero_si256(); }

        static void flush(Sum& s) {
            s.wide = _mm256_add_epi32(s.wide, _mm256_madd_epi16(s.narrow, _mm256_set1_epi16(1)));
            s.narrow = _mm256_setzero_si256();
        }

        template <int P>
        static Vector part(Vector w) {
            if constexpr (P > 0) w = _mm256_srli_epi16(w, P * Bits);
            return _mm256_and_si256(w, _mm256_set1_epi8((1 << Bits) - 1));
        }

        static void add(Sum& s, Vector u, Vector q) {
            s.narrow = _mm256_add_epi16(s.narrow, _mm256_maddubs_epi16(u, q));
        }

        static std::int32_t total(const Sum& s) { return Avx2::total(s.wide); }
    };

    static void widen_half(const std::uint16_t* in, float* out) {
        for (int i = 0; i < kChunk; i += 8) {
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
        }
    }

    static void narrow_half(const float* in, std::uint16_t* out) {
        for (int i = 0; i < kChunk; i += 8) {
            const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
        }
    }
};

template <>
struct Avx2::Dot<8> {
    using Lane = std::int16_t;
    static constexpr int parts = 2;
    static constexpr int blocks_per_flush = 1 << 30;

    struct Sum {
        __m256i wide;
    };

    static void clear(Sum& s) { s.wide = _mm256_setzero_si256(); }
    static void flush(Sum&) {}

    template <int P>
    static Vector part(Vector w) {
        return P == 0 ? _mm256_and_si256(w, _mm256_set1_epi16(255)) : _mm256_srli_epi16(w, 8);
    }

    static void add(Sum& s, Vector u, Vector q) { s.wide = _mm256_add_epi32(s.wide, _mm256_madd_epi16(u, q)); }

    static std::int32_t total(const Sum& s) { return Avx2::total(s.wide); }
};

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernels avx2_kernels = {"avx2", supported, quantize<Avx2>, requantize<Avx2>, matmul<Avx2>};

}  // namespace bytelane::cpu
