// x86-64 with AVX2, FMA and F16C.
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

#include "attention.hpp"
#include "dense.hpp"
#include "embedding.hpp"
#include "float_ops.hpp"
#include "limits.hpp"
#include "matmul.hpp"
#include "weight_digits.hpp"
#include "x86_floats.hpp"
#include "x86_unpack.hpp"

namespace bytelane::cpu {
namespace {

struct Avx2 {
    static constexpr int vector_bytes = 32;
    static constexpr bool spreads_in_registers = true;
    static constexpr int sums = 4;
    static constexpr int quad_channels = 2;
    static constexpr int quad_rows = 6;
    static constexpr int few_rows = 2;
    static constexpr int few_channels = 4;
    static constexpr int most_quad_rows = 48;
    static constexpr int most_spread_rows = 8;
    static constexpr int group_panel_rows = 5;
    static constexpr int prefetch_bytes = 2048;
    static constexpr int fetches_ahead = 2048;  // bytes, of a row of 4 or 8 bits
    static constexpr int table_rows = 2;

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

    static void total_4(__m256i a, __m256i b, __m256i c, __m256i d, std::int32_t* out) {
        const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
        const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sums);
    }

    // Four vectors, one of each row, to sums of four lanes: half i is what the halves i of the four have in them.
    template <class Sum, int MR>
    static __m256i fold_halves(const Sum (&s)[4][MR], int m) {
        const __m256i a = s[0][m].wide, b = s[1][m].wide, c = s[2][m].wide, d = s[3][m].wide;
        const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    }

    // See groups.hpp: the sums of four weight rows and activation row m, `Groups` in a vector, to [groups][4].
    template <int Groups, int Units, class Sum, int MR>
    [[gnu::always_inline]] static void fold(const Sum (&s)[Units][4][MR], int m, std::int32_t* out) {
        auto* to = reinterpret_cast<__m256i*>(out);
        if constexpr (Groups == 1) {
            const __m256i a = fold_halves(s[0], m), b = fold_halves(s[1], m);
            const __m256i low = _mm256_permute2x128_si256(a, b, 0x20), high = _mm256_permute2x128_si256(a, b, 0x31);
            _mm256_store_si256(to, _mm256_add_epi32(low, high));
        } else if constexpr (Groups == 2) {
            _mm256_store_si256(to, fold_halves(s[0], m));
        } else {
            const __m256 x = _mm256_castsi256_ps(_mm256_hadd_epi32(s[0][0][m].wide, s[0][1][m].wide));
            const __m256 y = _mm256_castsi256_ps(_mm256_hadd_epi32(s[0][2][m].wide, s[0][3][m].wide));
            const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88));
            const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd));
            _mm256_store_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
            _mm256_store_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
        }
    }

    // The sum stays in its register. Of the intrinsic GCC makes a sum in the product's register and, in every step, a copy.
    static void add_16(__m256i& sum, __m256i product) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product)); }
    static void add_32(__m256i& sum, __m256i product) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product)); }

    static constexpr int unpack_codes = 32;

    template <int Bits>
    static void unpack_step(const std::uint8_t* codes, std::uint8_t* out) {
        spread_32<Bits>(codes, out);
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

        static Vector load(const std::uint8_t* w) { return Avx2::load(w); }
        static Vector load_some(const std::uint8_t* w, int bytes) { return Avx2::load_some(w, bytes); }
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

        template <int P>
        static Vector part_in_place(Vector w) {
            return part<P>(w);
        }

        template <int P>
        static void settle(Sum& total, Sum part) {
            total.wide = _mm256_add_epi32(total.wide, part.wide);
        }

        static void add(Sum& s, Vector u, Vector q) {
            add_16(s.narrow, _mm256_maddubs_epi16(u, q));
        }
    };

    // Other widths: 16 codes, two bytes for each bit of their width, to int16 lanes, which `madd` takes as they are. See
    // x86_unpack.hpp for the steps; one load of 16 bytes shows both halves of a vector what they need.
    template <int Bits>
    struct SpreadDot {
        using Lane = std::int16_t;
        static constexpr int parts = 1;
        static constexpr int reach = 16;
        static constexpr int blocks_per_flush = kNeverFlush;

        struct Sum {
            __m256i wide;
        };

        static Vector spread(__m128i packed) {
            const auto& tables = kSpread<Bits>;
            const __m256i both = _mm256_broadcastsi128_si256(packed);
            const __m256i windows = _mm256_shuffle_epi8(both, Avx2::load(tables.both));
            return _mm256_srli_epi16(_mm256_mullo_epi16(windows, Avx2::load(tables.factors)), 16 - Bits);
        }

        static Vector load(const std::uint8_t* w) { return spread(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))); }
        static Vector load_some(const std::uint8_t* w, int bytes) {
            alignas(16) std::uint8_t copy[16] = {};
            std::memcpy(copy, w, static_cast<std::size_t>(bytes));
            return load(copy);
        }
        static void clear(Sum& s) { s.wide = _mm256_setzero_si256(); }
        static void flush(Sum&) {}

        template <int P>
        static Vector part(Vector w) {
            return w;
        }
        template <int P>
        static Vector part_in_place(Vector w) {
            return w;
        }
        template <int P>
        static void settle(Sum& total, Sum part) {
            total.wide = _mm256_add_epi32(total.wide, part.wide);
        }

        static void add(Sum& s, Vector u, Vector q) { add_32(s.wide, _mm256_madd_epi16(u, q)); }
    };

    // What the two tiles of a panel share: vectors of 8 channels, 2 of them.
    struct Channels {
        using Words = __m256i;
        static constexpr int lanes = 8, vectors = 2;

        static constexpr std::int32_t offset(int bits) { return 1 << (bits - 1); }

        static Words load_words(const std::uint8_t* p) { return load(p); }
        static Words load_words(const std::uint8_t* p, int bytes) { return load_some(p, bytes); }
        static void store_step(std::uint8_t* p, Words w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w); }

        template <int Bits, int P>
        static Words part(Words w) {
            if constexpr (Bits == 8) return w;
            if constexpr (P > 0) w = _mm256_srli_epi16(w, P * Bits);
            return _mm256_and_si256(w, _mm256_set1_epi8(static_cast<char>((1 << Bits) - 1)));
        }

        // 8 rows of 8 words: pairs and quads within 16-byte halves, then the halves.
        static void transpose(Words (&w)[8]) {
            __m256i pair[8];
            for (int i = 0; i < 8; i += 2) {
                pair[i] = _mm256_unpacklo_epi32(w[i], w[i + 1]);
                pair[i + 1] = _mm256_unpackhi_epi32(w[i], w[i + 1]);
            }
            __m256i quad[8];
            for (int i = 0; i < 8; i += 4) {
                quad[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
                quad[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
                quad[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
                quad[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
            }
            for (int i = 0; i < 4; ++i) {
                w[i] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20);
                w[i + 4] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31);
            }
        }

        static __m256i broadcast(const std::uint8_t* p) {
            std::int32_t word;
            std::memcpy(&word, p, sizeof word);
            return _mm256_set1_epi32(word);
        }
    };

    // Codes of up to 7 bits: `maddubs`, and narrow sums as in `Dot`.
    struct Tile : Channels {
        using Element = std::int8_t;
        using Weights = __m256i;
        static constexpr int rows = 5;
        static constexpr std::int64_t q_step = 4;
        static constexpr std::int64_t step_bytes = lanes * 4;

        struct Sum {
            __m256i narrow, wide;
        };

        static constexpr std::int64_t flush_steps(int bits) { return 32767 / (2 * ((1 << bits) - 1) * 128); }
        static_assert(2 * ((1 << 7) - 1) * 128 <= 32767, "a pair of the widest codes must not saturate");

        static Weights weights(const std::uint8_t* p) { return load(p); }
        static __m256i activations(const std::uint8_t* p) { return broadcast(p); }

        static void clear(Sum& s) { s.narrow = s.wide = _mm256_setzero_si256(); }
        static void start(Sum& s, std::int32_t value) { s = {_mm256_setzero_si256(), _mm256_set1_epi32(value)}; }
        static void restore(Sum& s, const std::int32_t* p) { s = {_mm256_setzero_si256(), load(p)}; }
        static void save(const Sum& s, std::int32_t* p) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s.wide);
        }
        static __m256i lanes_of(const Sum& s) { return s.wide; }
        static void flush(Sum& s) {
            s.wide = _mm256_add_epi32(s.wide, _mm256_madd_epi16(s.narrow, _mm256_set1_epi16(1)));
            s.narrow = _mm256_setzero_si256();
        }
        static void hold(Sum&) {}
        static void add(Sum& s, Weights w, __m256i q) {
            add_16(s.narrow, _mm256_maddubs_epi16(w, q));
        }
    };

    // 8 bits: the even and the odd codes of a step as int16, apart in the panel already, and the activations too.
    struct Tile8 : Channels {
        using Element = std::int16_t;
        using Sum = __m256i;
        static constexpr int rows = 4;
        static constexpr std::int64_t q_step = 8;
        static constexpr std::int64_t step_bytes = 2 * lanes * 4;

        struct Weights {
            __m256i even, odd;
        };
        struct Activations {
            __m256i even, odd;
        };

        static constexpr std::int64_t flush_steps(int) { return kNeverFlush; }

        static void store_step(std::uint8_t* p, Words w) {
            Channels::store_step(p, _mm256_and_si256(w, _mm256_set1_epi16(255)));
            Channels::store_step(p + 32, _mm256_srli_epi16(w, 8));
        }

        static Weights weights(const std::uint8_t* p) { return {load(p), load(p + 32)}; }
        static Activations activations(const std::uint8_t* p) { return {broadcast(p), broadcast(p + 4)}; }

        static void clear(Sum& s) { s = _mm256_setzero_si256(); }
        static void start(Sum& s, std::int32_t value) { s = _mm256_set1_epi32(value); }
        static void restore(Sum& s, const std::int32_t* p) { s = load(p); }
        static void save(const Sum& s, std::int32_t* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s); }
        static __m256i lanes_of(const Sum& s) { return s; }
        static void flush(Sum&) {}
        static void hold(Sum&) {}
        static void add(Sum& s, const Weights& w, const Activations& q) {
            add_32(s, _mm256_madd_epi16(w.even, q.even));
            add_32(s, _mm256_madd_epi16(w.odd, q.odd));
        }
    };

    // Sixteen float32 lanes.
    struct Floats {
        __m256 low, high;
    };

    static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, Floats v) {
        _mm256_storeu_ps(p, v.low);
        _mm256_storeu_ps(p + 8, v.high);
    }
    static void add_product(Floats& sum, Floats a, Floats b) {
        sum.low = _mm256_fmadd_ps(a.low, b.low, sum.low);
        sum.high = _mm256_fmadd_ps(a.high, b.high, sum.high);
    }
    static void add_rounded(Floats& sum, Floats a, Floats b) {
        sum.low = _mm256_add_ps(sum.low, _mm256_mul_ps(a.low, b.low));
        sum.high = _mm256_add_ps(sum.high, _mm256_mul_ps(a.high, b.high));
    }
    static Floats broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }

    static Floats load_int8(const std::int8_t* p) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
    }

    // Eight-bit codes, stored with 128 added.
    static __m256 codes_8(const std::uint8_t* p) {
        const __m256i stored = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(stored, _mm256_set1_epi32(128)));
    }
    static Floats load_codes(const std::uint8_t* p) { return {codes_8(p), codes_8(p + 8)}; }

    static Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }

    // clamp(rne(v), -128, 127), NaN to 127. `min` takes its second operand if one is NaN; packing saturates, and what is
    // too low for an int32 becomes the lowest.
    static __m256i rounded_8(__m256 v) { return _mm256_cvtps_epi32(_mm256_min_ps(v, _mm256_set1_ps(127.0f))); }
    static void store_codes(Floats v, std::int8_t* q) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(rounded_8(v.low), rounded_8(v.high)), 0xd8);
        const __m128i codes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q), codes);
    }

    // Of eight totals: see requantize.hpp.
    static __m256 clamp_lanes(__m256 v) {
        return _mm256_max_ps(_mm256_min_ps(v, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-128.0f));
    }

    static __m256 round_bfloat_8(__m256 v) {  // round_to_bfloat of every lane
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i rounded = _mm256_and_si256(sum, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
        const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
        return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    static Floats round_bfloat(Floats v) { return {round_bfloat_8(v.low), round_bfloat_8(v.high)}; }

    static __m256 bfloat_8(const std::uint16_t* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static Floats load_bfloat(const std::uint16_t* p) { return {bfloat_8(p), bfloat_8(p + 8)}; }

    static __m256 half_8(const std::uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static Floats load_half(const std::uint16_t* p) { return {half_8(p), half_8(p + 8)}; }

    // Lanes l and l + 8, then l and l + 4, l and l + 2, l and l + 1.
    static float sum(Floats v) { return sum_8(_mm256_add_ps(v.low, v.high)); }

    // The values of sixteen codes. A shuffle looks at the lowest bits of a lane only, so the codes of one 32-bit word
    // need a shift each and no mask.
    template <int Bits>
    struct Table;

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
struct Avx2::Dot<3> : Avx2::SpreadDot<3> {};
template <>
struct Avx2::Dot<5> : Avx2::SpreadDot<5> {};
template <>
struct Avx2::Dot<6> : Avx2::SpreadDot<6> {};
template <>
struct Avx2::Dot<7> : Avx2::SpreadDot<7> {};

template <>
struct Avx2::Dot<8> {
    using Lane = std::int16_t;
    static constexpr int parts = 2;
    static constexpr int blocks_per_flush = kNeverFlush;

    struct Sum {
        __m256i wide;
    };

    static Vector load(const std::uint8_t* w) { return Avx2::load(w); }
    static Vector load_some(const std::uint8_t* w, int bytes) { return Avx2::load_some(w, bytes); }
    static void clear(Sum& s) { s.wide = _mm256_setzero_si256(); }
    static void flush(Sum&) {}

    template <int P>
    static Vector part(Vector w) {
        return P == 0 ? _mm256_and_si256(w, _mm256_set1_epi16(255)) : _mm256_srli_epi16(w, 8);
    }

    template <int P>
    static Vector part_in_place(Vector w) {
        return part<P>(w);
    }

    template <int P>
    static void settle(Sum& total, Sum part) {
        total.wide = _mm256_add_epi32(total.wide, part.wide);
    }

    static void add(Sum& s, Vector u, Vector q) { add_32(s.wide, _mm256_madd_epi16(u, q)); }
};

inline __m256i shifted_word(const std::uint8_t* codes, __m256i shifts) {
    std::int32_t word;
    std::memcpy(&word, codes, sizeof word);
    return _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
}

template <>
struct Avx2::Table<3> {
    static constexpr int bits = 3;
    __m256 values;

    explicit Table(const float* v) : values(_mm256_loadu_ps(v)) {}

    Floats at(const std::uint8_t* codes) const {  // six bytes: the second word starts a byte early
        const __m256i low = shifted_word(codes, _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21));
        const __m256i high = shifted_word(codes + 2, _mm256_setr_epi32(8, 11, 14, 17, 20, 23, 26, 29));
        return {_mm256_permutevar8x32_ps(values, low), _mm256_permutevar8x32_ps(values, high)};
    }
};

template <>
struct Avx2::Table<4> {
    static constexpr int bits = 4;
    __m256 low, high;

    explicit Table(const float* v) : low(_mm256_loadu_ps(v)), high(_mm256_loadu_ps(v + 8)) {}

    __m256 half(const std::uint8_t* codes) const {
        const __m256i at = shifted_word(codes, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // the fourth bit, as a sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), upper);
    }

    Floats at(const std::uint8_t* codes) const { return {half(codes), half(codes + 4)}; }
};

}  // namespace

#ifndef BYTELANE_WITHOUT_AVX2_TABLE  // isa_avxvnni.cpp starts from this source and has its own table
namespace {

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernels avx2_kernels = {"avx2",          supported,         quantize<Avx2>,  requantize<Avx2>, make_group_scales,
                              matmul<Avx2>,    weight_only<Avx2>, embedding<Avx2>, norm_rows<Avx2>,
                              head_rows<Avx2>, gate_rows<Avx2>,   add_rows<Avx2>,  store_codes<Avx2>,
                              attention<Avx2>, dense<Avx2>, peak_dots<Avx2>, read_all<Avx2>};
#endif

}  // namespace bytelane::cpu
