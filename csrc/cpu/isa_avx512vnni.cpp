// x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
//
// `dpbusd` multiplies unsigned bytes (the codes) by signed bytes (the activations) and adds four products to an int32
// lane. It is the form that does not saturate (`dpbusds` does), so it is exact modulo 2^32 at every width, 8 included.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matmul.hpp"

namespace bytelane::cpu {
namespace {

struct Avx512Vnni {
    static constexpr int vector_bytes = 64;
    static constexpr int vector_rows = 1;
    static constexpr int tile_rows = 4;
    static constexpr int prefetch_bytes = 2048;

    using Vector = __m512i;

    static Vector load(const void* p) { return _mm512_loadu_si512(p); }

    // Lanes that the mask leaves out are not touched in memory.
    static Vector load_some(const void* p, int bytes) {
        return _mm512_maskz_loadu_epi8((static_cast<__mmask64>(1) << bytes) - 1, p);
    }

    template <int Bits>
    struct Dot {
        using Lane = std::int8_t;
        static constexpr int parts = 8 / Bits;
        static constexpr int blocks_per_flush = 1 << 30;
        static_assert(Bits == 2 || Bits == 4 || Bits == 8);

        struct Sum {
            __m512i wide;
        };

        static void clear(Sum& s) { s.wide = _mm512_setzero_si512(); }
        static void flush(Sum&) {}

        template <int P>
        static Vector part(Vector w) {
            if constexpr (Bits == 8) return w;
            if constexpr (P > 0) w = _mm512_srli_epi16(w, P * Bits);
            return _mm512_and_si512(w, _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1)));
        }

        static void add(Sum& s, Vector u, Vector q) { s.wide = _mm512_dpbusd_epi32(s.wide, u, q); }

        static std::int32_t total(const Sum& s) { return _mm512_reduce_add_epi32(s.wide); }
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

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernels avx512vnni_kernels = {"avx512vnni", supported, quantize<Avx512Vnni>, requantize<Avx512Vnni>,
                                    matmul<Avx512Vnni>};

}  // namespace bytelane::cpu
