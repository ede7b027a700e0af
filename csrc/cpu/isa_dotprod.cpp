// AArch64 with NEON and the dot product instructions (Cortex-A55, -A76, Neoverse N1 and later; every Apple M).
//
// `sdot` adds four products of signed bytes to an int32 lane, exactly modulo 2^32. Codes of up to 7 bits are signed bytes as
// they are. Of 8-bit codes 128 is taken off first, by flipping the highest bit, which makes them the signed codes that they
// stand for: `taken` says so, and nothing is left to correct.
#include <arm_neon.h>

#ifdef __linux__
#include <sys/auxv.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

#include <cstdint>
#include <cstring>

#include "attention.hpp"
#include "dense.hpp"
#include "embedding.hpp"
#include "float_ops.hpp"
#include "limits.hpp"
#include "matmul.hpp"
#include "weight_digits.hpp"

namespace bytelane::cpu {
namespace {

inline int8x16_t signed_bytes(uint8x16_t v) { return vreinterpretq_s8_u8(v); }
inline int8x16_t signed_codes(uint8x16_t v) { return signed_bytes(veorq_u8(v, vdupq_n_u8(0x80))); }

// Eight codes of N whole bytes to eight 16-bit lanes: a code of at most 7 bits lies within two bytes.
template <int Bits>
struct SpreadTables {
    std::uint8_t bytes[16] = {};
    std::int16_t shifts[8] = {};  // to the left; negative ones are to the right

    constexpr SpreadTables() {
        for (int i = 0; i < 8; ++i) {
            bytes[2 * i] = static_cast<std::uint8_t>(i * Bits / 8);
            bytes[2 * i + 1] = static_cast<std::uint8_t>(i * Bits / 8 + 1);
            shifts[i] = static_cast<std::int16_t>(-(i * Bits % 8));
        }
    }
};

template <int Bits>
inline constexpr SpreadTables<Bits> kSpread{};

// The bytes past the codes are of no matter.
template <int Bits>
inline uint8x8_t spread_8(uint8x8_t packed) {
    const uint8x16_t windows = vqtbl1q_u8(vcombine_u8(packed, packed), vld1q_u8(kSpread<Bits>.bytes));
    const uint16x8_t codes = vshlq_u16(vreinterpretq_u16_u8(windows), vld1q_s16(kSpread<Bits>.shifts));
    return vmovn_u16(vandq_u16(codes, vdupq_n_u16((1 << Bits) - 1)));
}

struct Dotprod {
    static constexpr int vector_bytes = 16;
    static constexpr bool spreads_in_registers = false;
    static constexpr int sums = 12;
    static constexpr int quad_channels = 4;
    static constexpr int quad_rows = 6;
    static constexpr int most_quad_rows = 0;
    static constexpr int prefetch_bytes = 1024;
    static constexpr int table_rows = 2;

    using Vector = uint8x16_t;

    static Vector load(const void* p) { return vld1q_u8(static_cast<const std::uint8_t*>(p)); }

    static Vector load_some(const void* p, int bytes) {
        std::uint8_t copy[vector_bytes] = {};
        std::memcpy(copy, p, static_cast<std::size_t>(bytes));
        return load(copy);
    }

    template <int Bits>
    struct Dot {
        using Lane = std::int8_t;
        static constexpr int parts = 8 / Bits;
        static constexpr int blocks_per_flush = kNeverFlush;
        static constexpr std::uint32_t taken = Bits == 8 ? 128 : 0;

        struct Sum {
            int32x4_t wide;
        };

        static Vector load(const std::uint8_t* w) { return Dotprod::load(w); }
        static Vector load_some(const std::uint8_t* w, int bytes) { return Dotprod::load_some(w, bytes); }
        static void clear(Sum& s) { s.wide = vdupq_n_s32(0); }
        static void flush(Sum&) {}

        // The last part is what a shift leaves; 8 bits become signed.
        template <int P>
        static Vector part(Vector w) {
            if constexpr (parts == 1) {
                return vreinterpretq_u8_s8(signed_codes(w));
            } else {
                if constexpr (P > 0) w = vshrq_n_u8(w, P * Bits);
                if constexpr (P == parts - 1) return w;
                return vandq_u8(w, vdupq_n_u8((1 << Bits) - 1));
            }
        }

        // The code times 2^(P * Bits), but for the last part, which would not be a signed byte there.
        template <int P>
        static Vector part_in_place(Vector w) {
            if constexpr (P == 0 || P == parts - 1) return part<P>(w);
            return vandq_u8(w, vdupq_n_u8(((1 << Bits) - 1) << P * Bits));
        }

        template <int P>
        static void settle(Sum& total, Sum part) {
            if constexpr (P < parts - 1) part.wide = vshrq_n_s32(part.wide, P * Bits);
            total.wide = vaddq_s32(total.wide, part.wide);
        }

        static void add(Sum& s, Vector u, Vector q) { s.wide = vdotq_s32(s.wide, signed_bytes(u), signed_bytes(q)); }
    };

    static std::int32_t total(int32x4_t wide) { return vaddvq_s32(wide); }

    static void total_4(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d, std::int32_t* out) {
        vst1q_s32(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
    }

    // See groups.hpp: the sums of four weight rows and activation row m, `Groups` in a vector, to [groups][4].
    template <int Groups, int Units, class Sum, int MR>
    static void fold(const Sum (&s)[Units][4][MR], int m, std::int32_t* out) {
        const int32x4_t ab = vpaddq_s32(s[0][0][m].wide, s[0][1][m].wide);
        const int32x4_t cd = vpaddq_s32(s[0][2][m].wide, s[0][3][m].wide);
        if constexpr (Groups == 1) {
            vst1q_s32(out, vpaddq_s32(ab, cd));
        } else {
            vst1q_s32(out, vuzp1q_s32(ab, cd));
            vst1q_s32(out + 4, vuzp2q_s32(ab, cd));
        }
    }

    // A tile of a panel: 6 rows of activations, 4 vectors of 4 channels; 24 sums of 32 registers.
    struct Tile {
        using Element = std::int8_t;
        using Words = uint32x4_t;
        using Weights = int8x16_t;
        using Sum = int32x4_t;
        static constexpr int lanes = 4, vectors = 4, rows = 6;
        static constexpr std::int64_t q_step = 4;
        static constexpr std::int64_t step_bytes = lanes * 4;

        static constexpr std::int64_t flush_steps(int) { return kNeverFlush; }
        static constexpr std::int32_t offset(int bits) { return 1 << (bits - 1); }

        static Words load_words(const std::uint8_t* p) { return vreinterpretq_u32_u8(load(p)); }
        static Words load_words(const std::uint8_t* p, int bytes) { return vreinterpretq_u32_u8(load_some(p, bytes)); }
        static void store_step(std::uint8_t* p, Words w) { vst1q_u8(p, vreinterpretq_u8_u32(w)); }

        // Codes, not signed yet: a panel of any width may be filled as bytes.
        template <int Bits, int P>
        static Words part(Words w) {
            if constexpr (Bits == 8) return w;
            else return vreinterpretq_u32_u8(Dot<Bits>::template part<P>(vreinterpretq_u8_u32(w)));
        }

        static void transpose(Words (&w)[4]) {
            const auto wide = [](uint32x4_t v) { return vreinterpretq_u64_u32(v); };
            const uint32x4_t even_low = vtrn1q_u32(w[0], w[1]), odd_low = vtrn2q_u32(w[0], w[1]);
            const uint32x4_t even_high = vtrn1q_u32(w[2], w[3]), odd_high = vtrn2q_u32(w[2], w[3]);
            w[0] = vreinterpretq_u32_u64(vtrn1q_u64(wide(even_low), wide(even_high)));
            w[1] = vreinterpretq_u32_u64(vtrn1q_u64(wide(odd_low), wide(odd_high)));
            w[2] = vreinterpretq_u32_u64(vtrn2q_u64(wide(even_low), wide(even_high)));
            w[3] = vreinterpretq_u32_u64(vtrn2q_u64(wide(odd_low), wide(odd_high)));
        }

        static Weights weights(const std::uint8_t* p) { return signed_bytes(load(p)); }
        static int8x16_t activations(const std::uint8_t* p) {
            std::int32_t word;
            std::memcpy(&word, p, sizeof word);
            return vreinterpretq_s8_s32(vdupq_n_s32(word));
        }

        static void clear(Sum& s) { s = vdupq_n_s32(0); }
        static void start(Sum& s, std::int32_t value) { s = vdupq_n_s32(value); }
        static void restore(Sum& s, const std::int32_t* p) { s = vld1q_s32(p); }
        static void save(const Sum& s, std::int32_t* p) { vst1q_s32(p, s); }
        static Sum lanes_of(const Sum& s) { return s; }
        static void flush(Sum&) {}
        static void hold(Sum&) {}
        static void add(Sum& s, Weights w, int8x16_t q) { s = vdotq_s32(s, w, q); }
    };

    struct Tile8 : Tile {
        static constexpr std::int32_t offset(int) { return 0; }
        static Weights weights(const std::uint8_t* p) { return signed_codes(load(p)); }
    };

    static constexpr int unpack_codes = 16;

    template <int Bits>
    static void unpack_step(const std::uint8_t* codes, std::uint8_t* out) {
        vst1_u8(out, spread_8<Bits>(vld1_u8(codes)));
        vst1_u8(out + 8, spread_8<Bits>(vld1_u8(codes + Bits)));
    }

    // Sixteen float32 lanes.
    struct Floats {
        float32x4_t part[4];
    };

    static Floats zero() { return broadcast(0.0f); }
    static Floats load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
    static void store(float* p, const Floats& v) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.part[i]);
    }
    static void add_product(Floats& sum, const Floats& a, const Floats& b) {
        for (int i = 0; i < 4; ++i) sum.part[i] = vfmaq_f32(sum.part[i], a.part[i], b.part[i]);
    }
    static void add_rounded(Floats& sum, const Floats& a, const Floats& b) {
        for (int i = 0; i < 4; ++i) sum.part[i] = vaddq_f32(sum.part[i], vmulq_f32(a.part[i], b.part[i]));
    }
    static Floats broadcast(float v) {
        const float32x4_t all = vdupq_n_f32(v);
        return {{all, all, all, all}};
    }

    static Floats load_int8(const std::int8_t* p) {
        const int8x16_t codes = vld1q_s8(p);
        const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
        const auto floats = [](int16x4_t v) { return vcvtq_f32_s32(vmovl_s16(v)); };
        return {{floats(vget_low_s16(low)), floats(vget_high_s16(low)), floats(vget_low_s16(high)),
                 floats(vget_high_s16(high))}};
    }

    // Eight-bit codes, stored with 128 added: with the highest bit turned they are signed bytes.
    static Floats load_codes(const std::uint8_t* p) {
        std::int8_t codes[16];
        vst1q_u8(reinterpret_cast<std::uint8_t*>(codes), veorq_u8(vld1q_u8(p), vdupq_n_u8(128)));
        return load_int8(codes);
    }

    static Floats multiply(const Floats& a, const Floats& b) {
        Floats v;
        for (int i = 0; i < 4; ++i) v.part[i] = vmulq_f32(a.part[i], b.part[i]);
        return v;
    }

    // clamp(rne(v), -128, 127), NaN to 127: the minimum with a number is that number. Conversions saturate.
    static void store_codes(const Floats& v, std::int8_t* q) {
        int16x4_t words[4];
        for (int i = 0; i < 4; ++i) words[i] = vqmovn_s32(vcvtnq_s32_f32(vminnmq_f32(v.part[i], vdupq_n_f32(127.0f))));
        const int8x8_t low = vqmovn_s16(vcombine_s16(words[0], words[1]));
        const int8x8_t high = vqmovn_s16(vcombine_s16(words[2], words[3]));
        vst1q_s8(q, vcombine_s8(low, high));
    }

    static Floats round_bfloat(const Floats& v) {  // round_to_bfloat of every lane
        Floats out;
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t bits = vreinterpretq_u32_f32(v.part[i]);
            const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
            const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
            const uint32x4_t rounded = vandq_u32(sum, vdupq_n_u32(0xffff0000u));
            const uint32x4_t ordered = vceqq_f32(v.part[i], v.part[i]);
            out.part[i] = vreinterpretq_f32_u32(vbslq_u32(ordered, rounded, vdupq_n_u32(0x7fc00000u)));
        }
        return out;
    }

    static Floats load_bfloat(const std::uint16_t* p) {
        Floats v;
        for (int i = 0; i < 4; ++i) v.part[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
        return v;
    }

    static float32x4_t half_4(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static Floats load_half(const std::uint16_t* p) { return {{half_4(p), half_4(p + 4), half_4(p + 8), half_4(p + 12)}}; }

    // Lanes l and l + 8, then l and l + 4, l and l + 2, l and l + 1.
    static float sum(const Floats& v) {
        const float32x4_t four = vaddq_f32(vaddq_f32(v.part[0], v.part[2]), vaddq_f32(v.part[1], v.part[3]));
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }

    // The values of sixteen codes: the first, second, third and fourth bytes of all values in a register each, looked up apart.
    template <int Bits>
    struct Table {
        static_assert(Bits == 3 || Bits == 4);
        static constexpr int bits = Bits;
        uint8x16_t bytes[4];

        explicit Table(const float* v) {
            std::uint32_t values[16] = {};
            std::memcpy(values, v, sizeof(float) << Bits);
            std::uint8_t plane[4][16];
            for (int i = 0; i < 16; ++i) {
                for (int b = 0; b < 4; ++b) plane[b][i] = static_cast<std::uint8_t>(values[i] >> (8 * b));
            }
            for (int b = 0; b < 4; ++b) bytes[b] = vld1q_u8(plane[b]);
        }

        static uint8x16_t codes_at(const std::uint8_t* codes) {
            if constexpr (Bits == 4) {
                const uint8x8_t pairs = vld1_u8(codes);
                const uint8x8_t low = vand_u8(pairs, vdup_n_u8(15)), high = vshr_n_u8(pairs, 4);
                return vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
            } else {  // six bytes: the second word starts a byte early
                std::uint32_t low, high;
                std::memcpy(&low, codes, sizeof low);
                std::memcpy(&high, codes + 2, sizeof high);
                return vcombine_u8(spread_8<3>(vcreate_u8(low)), spread_8<3>(vcreate_u8(high >> 8)));
            }
        }

        Floats at(const std::uint8_t* codes) const {
            const uint8x16_t index = codes_at(codes);
            uint8x16_t plane[4];
            for (int b = 0; b < 4; ++b) plane[b] = vqtbl1q_u8(bytes[b], index);
            const uint16x8_t lower[2] = {vreinterpretq_u16_u8(vzip1q_u8(plane[0], plane[1])),
                                         vreinterpretq_u16_u8(vzip2q_u8(plane[0], plane[1]))};
            const uint16x8_t upper[2] = {vreinterpretq_u16_u8(vzip1q_u8(plane[2], plane[3])),
                                         vreinterpretq_u16_u8(vzip2q_u8(plane[2], plane[3]))};
            Floats v;
            for (int i = 0; i < 2; ++i) {
                v.part[2 * i] = vreinterpretq_f32_u16(vzip1q_u16(lower[i], upper[i]));
                v.part[2 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(lower[i], upper[i]));
            }
            return v;
        }
    };

    static void widen_half(const std::uint16_t* in, float* out) {
        for (int i = 0; i < kChunk; i += 4) vst1q_f32(out + i, half_4(in + i));
    }

    static void narrow_half(const float* in, std::uint16_t* out) {
        for (int i = 0; i < kChunk; i += 4) {
            vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
        }
    }
};

bool supported() {
#if defined(__linux__)
    constexpr unsigned long asimddp = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & asimddp) != 0;
#elif defined(__APPLE__)
    int found = 0;
    std::size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found != 0;
#else
    return false;  // no way to ask is known here
#endif
}

}  // namespace

const Kernels dotprod_kernels = {"dotprod",          supported,
                                 quantize<Dotprod>,  requantize<Dotprod>, make_group_scales,
                                 matmul<Dotprod>,    weight_only<Dotprod>,
                                 embedding<Dotprod>, norm_rows<Dotprod>,
                                 head_rows<Dotprod>, gate_rows<Dotprod>,
                                 add_rows<Dotprod>,  store_codes<Dotprod>,
                                 attention<Dotprod>, dense<Dotprod>,
                                 peak_dots<Dotprod>, read_all<Dotprod>};

}  // namespace bytelane::cpu
