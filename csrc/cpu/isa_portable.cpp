// Any little-endian machine, through the compiler's own 16-byte vectors (a GCC and Clang extension, no intrinsics).
//
// Lanes are 16 bits wide at every width: the product of a code and an int8 is at most 255 * 128 in size and fits one
// exactly. The even and the odd products are then sign-extended in place, in 32-bit lanes, and added.
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

using Uint16x8 = std::uint16_t __attribute__((vector_size(16)));
using Int32x4 = std::int32_t __attribute__((vector_size(16)));
using Uint32x4 = std::uint32_t __attribute__((vector_size(16)));
using Float32x4 = float __attribute__((vector_size(16)));

struct Portable {
    static constexpr int vector_bytes = 16;
    static constexpr bool spreads_in_registers = false;
    static constexpr int sums = 4;
    static constexpr int quad_channels = 4;
    static constexpr int quad_rows = 2;
    static constexpr int most_quad_rows = 0;
    static constexpr int prefetch_bytes = 2048;
    static constexpr int table_rows = 1;

    using Vector = Uint16x8;

    static Vector load(const void* p) {
        Vector v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }

    static Vector load_some(const void* p, int bytes) {
        Vector v = {};
        std::memcpy(&v, p, static_cast<std::size_t>(bytes));
        return v;
    }

    template <int Bits>
    struct Dot {
        using Lane = std::int16_t;
        static constexpr int parts = 16 / Bits;
        static constexpr int blocks_per_flush = kNeverFlush;
        static_assert(((1 << Bits) - 1) * 128 <= 32767, "a product must fit its lane");

        struct Sum {
            Uint32x4 wide;
        };

        static Vector load(const std::uint8_t* w) { return Portable::load(w); }
        static Vector load_some(const std::uint8_t* w, int bytes) { return Portable::load_some(w, bytes); }
        static void clear(Sum& s) { s.wide = Uint32x4{}; }
        static void flush(Sum&) {}

        template <int P>
        static Vector part(Vector w) {
            return w >> (P * Bits) & static_cast<std::uint16_t>((1 << Bits) - 1);
        }

        template <int P>
        static Vector part_in_place(Vector w) {
            return part<P>(w);
        }

        template <int P>
        static void settle(Sum& total, Sum part) {
            total.wide += part.wide;
        }

        static void add(Sum& s, Vector u, Vector q) {
            // mod 2^16: rows past the last one hold whatever was there, and their sums are not looked at
            const auto product = reinterpret_cast<Uint32x4>(u * q);
            const Int32x4 even = reinterpret_cast<Int32x4>(product << 16) >> 16;
            const Int32x4 odd = reinterpret_cast<Int32x4>(product) >> 16;
            s.wide += reinterpret_cast<Uint32x4>(even) + reinterpret_cast<Uint32x4>(odd);
        }
    };

    static std::int32_t total(Uint32x4 wide) { return static_cast<std::int32_t>(wide[0] + wide[1] + wide[2] + wide[3]); }

    static void total_4(Uint32x4 a, Uint32x4 b, Uint32x4 c, Uint32x4 d, std::int32_t* out) {
        out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
    }

    // See groups.hpp: the sums of four weight rows and activation row m, `Groups` in a vector, to [groups][4].
    template <int Groups, int Units, class Sum, int MR>
    static void fold(const Sum (&s)[Units][4][MR], int m, std::int32_t* out) {
        for (int i = 0; i < 4; ++i) {
            const Uint32x4 sums = s[0][i][m].wide;
            const std::uint32_t low = sums[0] + sums[1], high = sums[2] + sums[3];
            out[i] = static_cast<std::int32_t>(Groups == 1 ? low + high : low);
            if constexpr (Groups == 2) out[i + 4] = static_cast<std::int32_t>(high);
        }
    }

    // A tile of a panel: vectors of 4 channels, 2 of them, and 2 rows of activations; int16 lanes as in `Dot`.
    struct Tile {
        using Element = std::int16_t;
        using Words = Uint32x4;
        using Sum = Uint32x4;
        static constexpr int lanes = 4, vectors = 2, rows = 2;
        static constexpr std::int64_t q_step = 8;
        static constexpr std::int64_t step_bytes = lanes * 4;

        struct Weights {
            Uint16x8 even, odd;
        };
        struct Activations {
            Uint16x8 even, odd;
        };

        static constexpr std::int64_t flush_steps(int) { return kNeverFlush; }
        static constexpr std::int32_t offset(int bits) { return 1 << (bits - 1); }

        static Words load_words(const std::uint8_t* p) { return reinterpret_cast<Words>(load(p)); }
        static Words load_words(const std::uint8_t* p, int bytes) { return reinterpret_cast<Words>(load_some(p, bytes)); }
        static void store_step(std::uint8_t* p, Words w) { std::memcpy(p, &w, sizeof w); }

        template <int Bits, int P>
        static Words part(Words w) {
            return w >> (P * Bits) & (0x01010101u * ((1u << Bits) - 1));
        }

        static void transpose(Words (&w)[4]) {
            const Words a = w[0], b = w[1], c = w[2], d = w[3];
            for (int i = 0; i < 4; ++i) w[i] = Words{a[i], b[i], c[i], d[i]};
        }

        static Weights weights(const std::uint8_t* p) {
            const Vector w = load(p);
            return {w & static_cast<std::uint16_t>(255), w >> 8};
        }

        static Uint16x8 broadcast(const std::uint8_t* p) {
            std::uint32_t word;
            std::memcpy(&word, p, sizeof word);
            return reinterpret_cast<Uint16x8>(Uint32x4{word, word, word, word});
        }
        static Activations activations(const std::uint8_t* p) { return {broadcast(p), broadcast(p + 4)}; }

        static void clear(Sum& s) { s = Uint32x4{}; }
        static void start(Sum& s, std::int32_t value) { s = Uint32x4{} + static_cast<std::uint32_t>(value); }
        static void restore(Sum& s, const std::int32_t* p) { std::memcpy(&s, p, sizeof s); }
        static void save(const Sum& s, std::int32_t* p) { std::memcpy(p, &s, sizeof s); }
        static Sum lanes_of(const Sum& s) { return s; }
        static void flush(Sum&) {}
        static void hold(Sum&) {}
        static void add(Sum& s, const Weights& w, const Activations& q) {
            typename Dot<8>::Sum sum{s};
            Dot<8>::add(sum, w.even, q.even);
            Dot<8>::add(sum, w.odd, q.odd);
            s = sum.wide;
        }
    };
    using Tile8 = Tile;

    static constexpr int unpack_codes = 0;

    // Sixteen float32 lanes.
    struct Floats {
        Float32x4 part[4];
    };

    static Floats zero() { return {}; }
    static Floats load(const float* p) {
        Floats v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }
    static void add_product(Floats& sum, const Floats& a, const Floats& b) {
        for (int i = 0; i < 4; ++i) sum.part[i] = sum.part[i] + a.part[i] * b.part[i];
    }
    static void add_rounded(Floats& sum, const Floats& a, const Floats& b) { add_product(sum, a, b); }

    template <class Value>
    static Floats lanes(Value value) {
        float v[16];
        for (int i = 0; i < 16; ++i) v[i] = value(i);
        return load(v);
    }
    static Floats broadcast(float v) {
        return lanes([v](int) { return v; });
    }
    static Floats load_int8(const std::int8_t* p) {
        return lanes([p](int i) { return static_cast<float>(p[i]); });
    }
    // Eight-bit codes, stored with 128 added.
    static Floats load_codes(const std::uint8_t* p) {
        return lanes([p](int i) { return static_cast<float>(p[i] - 128); });
    }
    static Floats multiply(const Floats& a, const Floats& b) {
        Floats v;
        for (int i = 0; i < 4; ++i) v.part[i] = a.part[i] * b.part[i];
        return v;
    }

    // clamp(rne(v), -128, 127), NaN to 127. Two loops, because in one GCC packs the comparisons' masks down to bytes, which
    // costs more than the arithmetic.
    static void store_codes(const Floats& v, std::int8_t* q) {
        float values[16];
        store(values, v);
        for (int i = 0; i < 16; ++i) values[i] = round_small(clamp_nan_high(values[i]));
        for (int i = 0; i < 16; ++i) q[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(values[i]));
    }

    static Floats round_bfloat(const Floats& v) {
        float values[16];
        store(values, v);
        return lanes([&values](int i) { return round_to_bfloat(values[i]); });
    }
    static Floats load_bfloat(const std::uint16_t* p) {
        return lanes([p](int i) { return float_from_bfloat(p[i]); });
    }
    static Floats load_half(const std::uint16_t* p) {
        return lanes([p](int i) { return float_from_half(p[i]); });
    }

    // Lanes l and l + 8, then l and l + 4, l and l + 2, l and l + 1.
    static float sum(const Floats& v) {
        const Float32x4 four = (v.part[0] + v.part[2]) + (v.part[1] + v.part[3]);
        return (four[0] + four[2]) + (four[1] + four[3]);
    }

    // The values of sixteen codes.
    template <int Bits>
    struct Table {
        static constexpr int bits = Bits;
        float values[1 << Bits];

        explicit Table(const float* v) { std::memcpy(values, v, sizeof values); }

        Floats at(const std::uint8_t* codes) const {
            std::uint64_t word = 0;
            std::memcpy(&word, codes, 2 * Bits);
            float v[16];
            for (int i = 0; i < 16; ++i) v[i] = values[word >> (i * Bits) & ((1 << Bits) - 1)];
            return load(v);
        }
    };

    static void widen_half(const std::uint16_t* in, float* out) {
        for (int i = 0; i < kChunk; ++i) out[i] = float_from_half(in[i]);
    }

    static void narrow_half(const float* in, std::uint16_t* out) {
        for (int i = 0; i < kChunk; ++i) out[i] = half_from_float(in[i]);
    }
};

bool supported() { return true; }

}  // namespace

const Kernels portable_kernels = {"portable",       supported,
                                  quantize<Portable>, requantize<Portable>, make_group_scales,
                                  matmul<Portable>,   weight_only<Portable>,
                                  embedding<Portable>, norm_rows<Portable>,
                                  head_rows<Portable>, gate_rows<Portable>,
                                  add_rows<Portable>, store_codes<Portable>,
                                  attention<Portable>, dense<Portable>, peak_dots<Portable>, read_all<Portable>};

}  // namespace bytelane::cpu
