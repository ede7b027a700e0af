// x86-64 with AVX-512 F, BW, VL, DQ and VNNI, and once more with VBMI (isa_avx512vbmi.cpp), which spreads the codes of any
// width in registers.
//
// `dpbusd` multiplies unsigned bytes (the codes) by signed bytes (the activations) and adds four products to an int32
// lane. It is the form that does not saturate (`dpbusds` does), so it is exact modulo 2^32 at every width, 8 included.
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

#ifdef __AVX512VBMI__
constexpr bool kVbmi = true;

// 64 codes of 2..7 bits to 64 bytes. Eight codes are N whole bytes:
//
//     permute      64-bit lane i = bytes i*N .. i*N + 7
//     multishift   byte j of a lane = its 8 bits from bit j*N on
//     mask         the lowest N of them
template <int Bits>
struct LaneBytes {
    alignas(64) std::uint8_t at[64] = {};

    constexpr LaneBytes() {
        for (int i = 0; i < 64; ++i) at[i] = static_cast<std::uint8_t>(i / 8 * Bits + i % 8);
    }
};

template <int Bits>
inline constexpr LaneBytes<Bits> kLaneBytes{};

template <int Bits>
inline __m512i spread_64(__m512i packed) {
    std::uint64_t shifts = 0;
    for (int i = 0; i < 8; ++i) shifts |= static_cast<std::uint64_t>(i * Bits) << (8 * i);
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(kLaneBytes<Bits>.at), packed);
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<long long>(shifts)), lanes);
    return _mm512_and_si512(codes, _mm512_set1_epi8((1 << Bits) - 1));
}
#else
constexpr bool kVbmi = false;
#endif

struct Avx512Vnni {
    static constexpr int vector_bytes = 64;
    static constexpr bool spreads_in_registers = kVbmi;
    static constexpr int sums = 12;
    static constexpr int quad_channels = 4;
    static constexpr int quad_rows = 6;
    static constexpr int most_quad_rows = 20;
    static constexpr int most_spread_rows = 64;
    static constexpr int prefetch_bytes = 2048;
    static constexpr int fetches_ahead = 8192;  // bytes, of a row of 4 or 8 bits
    static constexpr int table_rows = 4;

    using Vector = __m512i;

    static Vector load(const void* p) { return _mm512_loadu_si512(p); }

    // Lanes that the mask leaves out are not touched in memory.
    static Vector load_some(const void* p, int bytes) {
        return _mm512_maskz_loadu_epi8((static_cast<__mmask64>(1) << bytes) - 1, p);
    }

    template <int Bits>
    struct Dot {
        using Lane = std::int8_t;
        static constexpr bool in_place = Bits == 2 || Bits == 4 || Bits == 8;
        static constexpr int parts = in_place ? 8 / Bits : 1;
        static constexpr int blocks_per_flush = kNeverFlush;
        static_assert(in_place || kVbmi);

        struct Sum {
            __m512i wide;
        };

        static Vector load(const std::uint8_t* w) {
            if constexpr (in_place) {
                return Avx512Vnni::load(w);
            } else {
                return load_some(w, 8 * Bits);
            }
        }
        static Vector load_some(const std::uint8_t* w, int bytes) {
#ifdef __AVX512VBMI__
            if constexpr (!in_place) return spread_64<Bits>(Avx512Vnni::load_some(w, bytes));
#endif
            return Avx512Vnni::load_some(w, bytes);
        }
        static void clear(Sum& s) { s.wide = _mm512_setzero_si512(); }
        // nothing to flush; but without a use of the sum behind the loop GCC copies every one in every step
        static void flush(Sum& s) { asm("" : "+v"(s.wide)); }

        template <int P>
        static Vector part(Vector w) {
            if constexpr (parts == 1) return w;
            if constexpr (P > 0) w = _mm512_srli_epi16(w, P * Bits);
            return _mm512_and_si512(w, _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1)));
        }

        // Masked and not shifted: the code times 2^(P * Bits). Products are at most 240 * 128 in size and a lane adds
        // 2^17 / 16 / parts of them, so int32 holds their sum.
        template <int P>
        static Vector part_in_place(Vector w) {
            if constexpr (parts == 1) return w;
            return _mm512_and_si512(w, _mm512_set1_epi8(static_cast<char>(((1 << Bits) - 1) << P * Bits)));
        }

        template <int P>
        static void settle(Sum& total, Sum part) {
            total.wide = _mm512_add_epi32(total.wide, _mm512_srai_epi32(part.wide, P * Bits));
        }

        static void add(Sum& s, Vector u, Vector q) { s.wide = _mm512_dpbusd_epi32(s.wide, u, q); }
    };

    static std::int32_t total(__m512i wide) { return _mm512_reduce_add_epi32(wide); }

    static __m256i fold(__m512i wide) {
        return _mm256_add_epi32(_mm512_castsi512_si256(wide), _mm512_extracti64x4_epi64(wide, 1));
    }

    static void total_4(__m512i a, __m512i b, __m512i c, __m512i d, std::int32_t* out) {
        const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        const __m256i pairs = fold(_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)));
        const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sums);
    }

    // Four vectors, one of each row, to sums of four lanes: quarter i is what the quarters i of the four have in them.
    template <class Sum, int MR>
    static __m512i fold_quarters(const Sum (&s)[4][MR], int m) {
        const __m512i a = s[0][m].wide, b = s[1][m].wide, c = s[2][m].wide, d = s[3][m].wide;
        const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }

    // Even quarters plus odd ones, of two vectors.
    static __m512i add_quarters(__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    }

    // See groups.hpp: the sums of four weight rows and activation row m, `Groups` in a vector, to [groups][4].
    template <int Groups, int Units, class Sum, int MR>
    [[gnu::always_inline]] static void fold(const Sum (&s)[Units][4][MR], int m, std::int32_t* out) {
        if constexpr (Groups == 1) {
            const __m512i first = add_quarters(fold_quarters(s[0], m), fold_quarters(s[1], m));
            const __m512i second = add_quarters(fold_quarters(s[2], m), fold_quarters(s[3], m));
            _mm512_store_si512(out, add_quarters(first, second));
        } else if constexpr (Groups == 2) {
            _mm512_store_si512(out, add_quarters(fold_quarters(s[0], m), fold_quarters(s[1], m)));
        } else if constexpr (Groups == 4) {
            _mm512_store_si512(out, fold_quarters(s[0], m));
        } else {
            const auto pick = [](__m512i x, __m512i y, auto odd) __attribute__((always_inline)) {
                constexpr int lanes = odd.value ? 0xdd : 0x88;
                return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), lanes));
            };
            const __m512i a = s[0][0][m].wide, b = s[0][1][m].wide, c = s[0][2][m].wide, d = s[0][3][m].wide;
            const __m512i ab = _mm512_add_epi32(pick(a, b, Index<0>{}), pick(a, b, Index<1>{}));
            const __m512i cd = _mm512_add_epi32(pick(c, d, Index<0>{}), pick(c, d, Index<1>{}));
            const __m512i even = pick(ab, cd, Index<0>{}), odd = pick(ab, cd, Index<1>{});
            const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
            const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
            _mm512_store_si512(out, _mm512_permutex2var_epi64(even, low, odd));
            _mm512_store_si512(out + 16, _mm512_permutex2var_epi64(even, high, odd));
        }
    }

    // A tile of a panel: 6 rows of activations, 4 vectors of 16 channels; 24 sums of 32 registers.
    struct Tile {
        using Element = std::int8_t;
        using Words = __m512i;
        using Weights = __m512i;
        using Sum = __m512i;
        static constexpr int lanes = 16, vectors = 4, rows = 6;
        static constexpr std::int64_t q_step = 4;
        static constexpr std::int64_t step_bytes = lanes * 4;

        static constexpr std::int64_t flush_steps(int) { return kNeverFlush; }
        static constexpr std::int32_t offset(int bits) { return 1 << (bits - 1); }

        static Words load_words(const std::uint8_t* p) { return load(p); }
        static Words load_words(const std::uint8_t* p, int bytes) { return load_some(p, bytes); }
        static void store_step(std::uint8_t* p, Words w) { _mm512_store_si512(p, w); }

        template <int Bits, int P>
        static Words part(Words w) {
            return Dot<Bits>::template part<P>(w);
        }

        // 16 rows of 16 words: pairs and quads within 16-byte quarters, then the quarters.
        static void transpose(Words (&w)[16]) {
            __m512i pair[16], quad[16];
            for (int i = 0; i < 16; i += 2) {
                pair[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
                pair[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
            }
            for (int i = 0; i < 16; i += 4) {
                quad[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
                quad[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
                quad[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
                quad[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
            }
            for (int i = 0; i < 4; ++i) {
                const __m512i low = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0x88);
                const __m512i odd = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0xdd);
                const __m512i low2 = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0x88);
                const __m512i odd2 = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0xdd);
                w[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
                w[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
                w[i + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
                w[i + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
            }
        }

        static Weights weights(const std::uint8_t* p) { return _mm512_load_si512(p); }
        static __m512i activations(const std::uint8_t* p) {
            std::int32_t word;
            std::memcpy(&word, p, sizeof word);
            return _mm512_set1_epi32(word);
        }

        static void clear(Sum& s) { s = _mm512_setzero_si512(); }
        static void start(Sum& s, std::int32_t value) { s = _mm512_set1_epi32(value); }
        static void restore(Sum& s, const std::int32_t* p) { s = _mm512_load_si512(p); }
        static void save(const Sum& s, std::int32_t* p) { _mm512_store_si512(p, s); }
        static Sum lanes_of(const Sum& s) { return s; }
        static void flush(Sum&) {}
        static void hold(Sum& s) { asm("" : "+v"(s)); }  // in its register, as in Dot
        static void add(Sum& s, Weights w, __m512i q) { s = _mm512_dpbusd_epi32(s, w, q); }
    };
    using Tile8 = Tile;

    static constexpr int unpack_codes = kVbmi ? 64 : 32;

    template <int Bits>
    static void unpack_step(const std::uint8_t* codes, std::uint8_t* out) {
#ifdef __AVX512VBMI__
        _mm512_storeu_si512(out, spread_64<Bits>(load_some(codes, 8 * Bits)));
#else
        spread_32<Bits>(codes, out);
#endif
    }

    // Sixteen float32 lanes.
    using Floats = __m512;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static void add_product(Floats& sum, Floats a, Floats b) { sum = _mm512_fmadd_ps(a, b, sum); }
    static void add_rounded(Floats& sum, Floats a, Floats b) { sum = _mm512_add_ps(sum, _mm512_mul_ps(a, b)); }
    static Floats broadcast(float v) { return _mm512_set1_ps(v); }

    static Floats load_int8(const std::int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }

    // Eight-bit codes, stored with 128 added.
    static Floats load_codes(const std::uint8_t* p) {
        const __m512i stored = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(stored, _mm512_set1_epi32(128)));
    }

    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }

    // clamp(rne(v), -128, 127), NaN to 127: see isa_avx2.cpp.
    static void store_codes(Floats v, std::int8_t* q) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_min_ps(v, _mm512_set1_ps(127.0f)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtsepi32_epi8(rounded));
    }

    static Floats clamp_lanes(Floats v) {  // see requantize.hpp
        return _mm512_max_ps(_mm512_min_ps(v, _mm512_set1_ps(127.0f)), _mm512_set1_ps(-128.0f));
    }

    static Floats round_bfloat(Floats v) {  // round_to_bfloat of every lane
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __m512i rounded = _mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)));
    }

    static Floats load_bfloat(const std::uint16_t* p) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }

    static Floats load_half(const std::uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }

    // Lanes l and l + 8, then l and l + 4, l and l + 2, l and l + 1.
    static float sum(Floats v) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        return sum_8(eight);
    }

    // The values of sixteen codes. A permutation looks at the lowest four bits of a lane only, so the
    // codes need a shift each and no mask; three-bit values are there twice.
    template <int Bits>
    struct Table {
        static_assert(Bits == 3 || Bits == 4);
        static constexpr int bits = Bits;
        __m512 values;

        explicit Table(const float* v) {
            if constexpr (Bits == 3) values = _mm512_broadcast_f32x8(_mm256_loadu_ps(v));
            if constexpr (Bits == 4) values = _mm512_loadu_ps(v);
        }

        static __m512i word(const std::uint8_t* codes) {
            std::int32_t word;
            std::memcpy(&word, codes, sizeof word);
            return _mm512_set1_epi32(word);
        }

        // Eight lanes see one word and eight the next.
        Floats at(const std::uint8_t* codes) const {
            if constexpr (Bits == 3) {  // six bytes: the second word starts a byte early
                const __m512i shifts = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 8, 11, 14, 17, 20, 23, 26, 29);
                const __m512i words = _mm512_mask_mov_epi32(word(codes), 0xff00, word(codes + 2));
                return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), values);
            } else {
                const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
                const __m512i words = _mm512_mask_mov_epi32(word(codes), 0xff00, word(codes + 4));
                return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), values);
            }
        }
    };

    static void widen_half(const std::uint16_t* in, float* out) {
        for (int i = 0; i < kChunk; i += 16) {
            _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
        }
    }

    static void narrow_half(const float* in, std::uint16_t* out) {
        for (int i = 0; i < kChunk; i += 16) {
            const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), half);
        }
    }
};

}  // namespace

#ifndef BYTELANE_WITHOUT_AVX512_TABLE  // isa_avx512amx.cpp starts from this source and has its own table
namespace {

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c") &&
           (!kVbmi || __builtin_cpu_supports("avx512vbmi"));
}

}  // namespace

constexpr Kernels kTable = {kVbmi ? "avx512vbmi" : "avx512vnni",
                            supported,
                            quantize<Avx512Vnni>,
                            requantize<Avx512Vnni>,
                            make_group_scales,
                            matmul<Avx512Vnni>,
                            weight_only<Avx512Vnni>,
                            embedding<Avx512Vnni>,
                            norm_rows<Avx512Vnni>,
                            head_rows<Avx512Vnni>,
                            gate_rows<Avx512Vnni>,
                            add_rows<Avx512Vnni>,
                            store_codes<Avx512Vnni>,
                            attention<Avx512Vnni>,
                            dense<Avx512Vnni>, peak_dots<Avx512Vnni>, read_all<Avx512Vnni>};

#ifdef __AVX512VBMI__
const Kernels avx512vbmi_kernels = kTable;
#else
const Kernels avx512vnni_kernels = kTable;
#endif
#endif

}  // namespace bytelane::cpu
