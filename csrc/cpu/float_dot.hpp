// Dot products of float32 rows with rows of codes, 16-bit floats or float32, summed in one order whatever the tile:
//
//     lane l   = x[l] * w[l] + x[l+16] * w[l+16] + ...        16 lanes, ascending
//     sum      = lanes l and l + 8, then l and l + 4, l and l + 2, l and l + 1
//
// `Exact` says that every product is exact in float32 (a 16-bit float times a code or another 16-bit float); a fused
// multiply-add and a multiply and an add then give the same bits. Otherwise the two are kept apart.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kVector = 16;

struct Bfloat {
    std::uint16_t bits;
};
struct Half {
    std::uint16_t bits;
};

// The rows that share loads: as many on each side as leave the sums in registers.
template <class Isa>
constexpr int kDotTile = Isa::vector_bytes == 64 ? 4 : Isa::vector_bytes == 32 ? 2 : 1;

template <class Isa, class Element, bool Exact>
struct FloatDot {
    using Floats = typename Isa::Floats;

    static void add(Floats& sum, const Floats& x, const Floats& y) {
        if constexpr (Exact) {
            Isa::add_product(sum, x, y);
        } else {
            Isa::add_rounded(sum, x, y);
        }
    }

    static Floats load(const Element* p) {
        if constexpr (std::is_same_v<Element, std::int8_t>) {
            return Isa::load_int8(p);
        } else if constexpr (std::is_same_v<Element, Bfloat>) {
            return Isa::load_bfloat(&p->bits);
        } else if constexpr (std::is_same_v<Element, Half>) {
            return Isa::load_half(&p->bits);
        } else {
            return Isa::load(p);
        }
    }

    // Rows `x`, padded with zeros to whole vectors, with rows `w` of `count` elements, of which nothing past the last
    // is read: out[r * out_stride + c] is the product of row r of x and row c of w.
    template <int Rows, int Columns>
    static void tile(const float* x, std::int64_t x_stride, const Element* w, std::int64_t w_stride,
                     std::int64_t count, float* out, std::int64_t out_stride) {
        Floats sum[Rows][Columns];
        for (int r = 0; r < Rows; ++r) {
            for (int c = 0; c < Columns; ++c) sum[r][c] = Isa::zero();
        }
        const auto step = [&](std::int64_t k, const Element* first, std::int64_t stride) {
            Floats value[Columns];
            for (int c = 0; c < Columns; ++c) value[c] = load(first + c * stride);
            for (int r = 0; r < Rows; ++r) {
                const Floats row = Isa::load(x + r * x_stride + k);
                for (int c = 0; c < Columns; ++c) add(sum[r][c], row, value[c]);
            }
        };
        std::int64_t k = 0;
        for (; k + kVector <= count; k += kVector) step(k, w + k, w_stride);
        if (k < count) {
            Element rest[Columns][kVector] = {};
            for (int c = 0; c < Columns; ++c) std::memcpy(rest[c], w + c * w_stride + k, (count - k) * sizeof(Element));
            step(k, rest[0], kVector);
        }
        for (int r = 0; r < Rows; ++r) {
            for (int c = 0; c < Columns; ++c) out[r * out_stride + c] = Isa::sum(sum[r][c]);
        }
    }
};

}  // namespace
}  // namespace bytelane::cpu
