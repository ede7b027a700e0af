// Any little-endian machine: plain C++ on arrays of lanes, which the compiler vectorizes as it can.
//
// Lanes are 16 bits wide at every width: a product of an 8-bit code and an int8 fits int32 with no narrow sum at all.
#include <cstdint>
#include <cstring>

#include "matmul.hpp"

namespace bytelane::cpu {
namespace {

struct Portable {
    static constexpr int vector_bytes = 16;
    static constexpr int vector_rows = 1;
    static constexpr int tile_rows = 1;
    static constexpr int prefetch_bytes = 512;

    struct Vector {
        std::int16_t lane[8];
    };

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
        static constexpr int blocks_per_flush = 1 << 30;

        struct Sum {
            std::uint32_t wide[8];
        };

        static void clear(Sum& s) { s = {}; }
        static void flush(Sum&) {}

        template <int P>
        static Vector part(const Vector& w) {
            Vector v;
            for (int i = 0; i < 8; ++i) {
                const auto lane = static_cast<std::uint16_t>(w.lane[i]);
                v.lane[i] = static_cast<std::int16_t>(lane >> (P * Bits) & ((1 << Bits) - 1));
            }
            return v;
        }

        static void add(Sum& s, const Vector& u, const Vector& q) {
            for (int i = 0; i < 8; ++i) s.wide[i] += static_cast<std::uint32_t>(u.lane[i] * q.lane[i]);
        }

        static std::int32_t total(const Sum& s) {
            std::uint32_t sum = 0;
            for (const std::uint32_t lane : s.wide) sum += lane;
            return static_cast<std::int32_t>(sum);
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

const Kernels portable_kernels = {"portable", supported, quantize<Portable>, requantize<Portable>, matmul<Portable>};

}  // namespace bytelane::cpu
