// x86-64 with AVX2 and AVX-VNNI (Alder Lake and later, Zen 5 and later): AVX2's source, but for the multiply-add.
//
// `dpbusd` adds four products of unsigned bytes (the codes) and signed bytes (the activations) to an int32 lane. It is the
// form that does not saturate, so every width is dotted as bytes and nothing is ever flushed; `maddubs` is not used.
//
// Compiled with AVX-512 VL and VNNI instead, the same source uses the same operation in its other encoding: that is how a
// processor that lacks AVX-VNNI tests it (BYTELANE_EVEX_VNNI in CMakeLists.txt).
#define BYTELANE_WITHOUT_AVX2_TABLE
#include <cpuid.h>

#include "isa_avx2.cpp"

namespace bytelane::cpu {
namespace {

#ifdef __AVXVNNI__
inline __m256i dot_bytes(__m256i sum, __m256i u, __m256i q) { return _mm256_dpbusd_avx_epi32(sum, u, q); }
#else
inline __m256i dot_bytes(__m256i sum, __m256i u, __m256i q) { return _mm256_dpbusd_epi32(sum, u, q); }
#endif

struct AvxVnni : Avx2 {
    static constexpr bool spreads_in_registers = false;
    static constexpr int sums = 8;
    static constexpr int quad_channels = 4;
    static constexpr int quad_rows = 2;
    static constexpr int most_quad_rows = 0;
    static constexpr int group_panel_rows = 0;

    template <int Bits>
    struct Dot {
        using Lane = std::int8_t;
        static constexpr int parts = 8 / Bits;
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
            if constexpr (parts == 1) return w;
            if constexpr (P > 0) w = _mm256_srli_epi16(w, P * Bits);
            return _mm256_and_si256(w, _mm256_set1_epi8(static_cast<char>((1 << Bits) - 1)));
        }

        // The code times 2^(P * Bits): see isa_avx512vnni.cpp.
        template <int P>
        static Vector part_in_place(Vector w) {
            if constexpr (parts == 1) return w;
            return _mm256_and_si256(w, _mm256_set1_epi8(static_cast<char>(((1 << Bits) - 1) << P * Bits)));
        }

        template <int P>
        static void settle(Sum& total, Sum part) {
            total.wide = _mm256_add_epi32(total.wide, _mm256_srai_epi32(part.wide, P * Bits));
        }

        static void add(Sum& s, Vector u, Vector q) { s.wide = dot_bytes(s.wide, u, q); }
    };

    // 12 sums, 2 vectors of codes and the activations of a row: 15 of 16 registers.
    struct Tile : Channels {
        using Element = std::int8_t;
        using Weights = __m256i;
        using Sum = __m256i;
        static constexpr int rows = 6;
        static constexpr std::int64_t q_step = 4;
        static constexpr std::int64_t step_bytes = lanes * 4;

        static constexpr std::int64_t flush_steps(int) { return kNeverFlush; }

        static Weights weights(const std::uint8_t* p) { return load(p); }
        static __m256i activations(const std::uint8_t* p) { return broadcast(p); }

        static void clear(Sum& s) { s = _mm256_setzero_si256(); }
        static void start(Sum& s, std::int32_t value) { s = _mm256_set1_epi32(value); }
        static void restore(Sum& s, const std::int32_t* p) { s = load(p); }
        static void save(const Sum& s, std::int32_t* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s); }
        static __m256i lanes_of(const Sum& s) { return s; }
        static void flush(Sum&) {}
        static void hold(Sum& s) { asm("" : "+x"(s)); }  // in its register: see isa_avx512vnni.cpp
        static void add(Sum& s, Weights w, __m256i q) { s = dot_bytes(s, w, q); }
    };
    using Tile8 = Tile;
};

bool supported() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return false;
#ifdef __AVXVNNI__
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // leaf 7, subleaf 1: bit 4 of eax
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
#else
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
}

}  // namespace

const Kernels avxvnni_kernels = {"avxvnni",          supported,
                                 quantize<AvxVnni>,  requantize<AvxVnni>, make_group_scales,
                                 matmul<AvxVnni>,    weight_only<AvxVnni>,
                                 embedding<AvxVnni>, norm_rows<AvxVnni>,
                                 head_rows<AvxVnni>, gate_rows<AvxVnni>,
                                 add_rows<AvxVnni>,  store_codes<AvxVnni>,
                                 attention<AvxVnni>, dense<AvxVnni>,
                                 peak_dots<AvxVnni>, read_all<AvxVnni>};

}  // namespace bytelane::cpu
