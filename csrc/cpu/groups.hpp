// Few activation rows against weights with a scale for each group of inputs.
//
//     total[m,n] = f32(acc[m,n,0]) * r[n,0] + f32(acc[m,n,1]) * r[n,1] + ...        in ascending g, each step rounded
//
// What is dotted at once is a *unit*: a group of whole vectors, or a vector of 2, 4 or 8 whole groups, each of them two
// lanes of int32 or more. Four output channels, a quad, go side by side, some units at a time:
//
//     dot      a vector of partial sums for each channel and unit
//     fold     the lanes of a group added up, channels side by side               [groups][4 channels]
//     scale    added to the four totals
//
// Four rows side by side are more than a processor fetches ahead by itself, so the same places of the next rows are asked
// for: the memory is as busy while sums are folded as while weights are loaded.
//
// r[n,g] = s_in * s_w[n,g] / s_out depends on no activation, so a layer keeps it, in the order of the last step:
//
//     group_scales    n0 g0, n1 g0, n2 g0, n3 g0, n0 g1, ... n3 g1, ... | n4 g0, ...        zeros past the last channel
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "dot.hpp"
#include "kernels.hpp"
#include "scratch.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kGroupRows = 4;
constexpr std::int64_t kFetchAhead = 64 << 10;  // bytes of weights, at least

// r of the channels n0 .. n0 + 4 in the order above, for all groups.
inline void group_scales_of_quad(const Output& o, std::int64_t n, std::int64_t groups, std::int64_t n0, float* r) {
    const float s_in = *o.input_scale;
    for (std::int64_t i = 0; i < kGroupRows; ++i) {
        if (n0 + i >= n) {
            for (std::int64_t g = 0; g < groups; ++g) r[g * kGroupRows + i] = 0.0f;
            continue;
        }
        const float* scale = o.weight_scale + (n0 + i) * groups;
        for (std::int64_t g = 0; g < groups; ++g) r[g * kGroupRows + i] = s_in * scale[g];
    }
    if (o.output_scale == nullptr) return;
    float out[kGroupRows];
    for (std::int64_t i = 0; i < kGroupRows; ++i) out[i] = o.output_scale[smaller(n0 + i, n - 1) * o.output_stride];
    for (std::int64_t g = 0; g < groups; ++g) {
        for (std::int64_t i = 0; i < kGroupRows; ++i) r[g * kGroupRows + i] /= out[i];
    }
}

inline void make_group_scales(const GroupScales& args) {
    const std::int64_t quads = ceil_div(args.n, kGroupRows);
    in_parallel(args.threads, [&] {
#pragma omp for schedule(static) nowait
        for (std::int64_t quad = 0; quad < quads; ++quad) {
            float* r = args.r + quad * args.groups * kGroupRows;
            group_scales_of_quad(args.output, args.n, args.groups, quad * kGroupRows, r);
        }
    });
}

// The groups of a row as the kernel of an instruction set takes them.
struct Units {
    std::int64_t codes;  // of a unit
    std::int64_t count;
    std::int64_t groups;  // of a unit: 1, 2, 4 or 8

    // Units of groups of `size` codes, `block` of which are a vector of `bytes`; a group that is neither whole vectors
    // nor a part of one is a unit that sticks out of its last vector.
    static Units of(std::int64_t k, std::int64_t size, std::int64_t block, std::int64_t bytes) {
        const bool several = size > 0 && size < block && block % size == 0 && block / size <= bytes / 8;
        const std::int64_t codes = several ? block : size;
        return {codes, codes > 0 ? ceil_div(k, codes) : 1, several ? block / size : 1};
    }

    // Whether units follow one another without a gap.
    static bool fit(std::int64_t size, std::int64_t block, std::int64_t bytes) {
        return size % block == 0 || of(size, size, block, bytes).groups > 1;
    }
};

// Units that fold together, Groups in each.
template <class Isa, int Groups>
constexpr int kFoldUnits = Isa::vector_bytes / 16 > Groups ? Isa::vector_bytes / 16 / Groups : 1;

// A quad of weight rows, and what its sums are turned into. Whole units can be read of all of them.
struct GroupQuad {
    const std::uint8_t* row[kGroupRows];
    std::int64_t unit_bytes, units;  // from one unit of a row to the next, and how many there are
    std::int64_t ahead;              // bytes to the rows to ask memory for
    std::int64_t groups;
    const float* r;                  // [groups][4]
    const std::int32_t* correction;  // [MR][groups]: what an accumulator has too much
    std::int64_t rows;               // of activations that count; the rest of a tile is computed and dropped
    float* total;                    // [MR][4], total_stride apart; they started as kNothing
    std::int64_t total_stride;
    std::int32_t* acc;  // or null: the bare accumulators go here, [MR][channels][groups], acc_stride apart
    std::int64_t acc_stride, channels;
};

using Int4 = std::int32_t __attribute__((vector_size(16)));
using Uint4 = std::uint32_t __attribute__((vector_size(16)));
using Float4 = float __attribute__((vector_size(16)));

template <class Vector>
inline Vector load_4(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// `count` groups, from group g on, of folded sums ([MR][stride], each [groups][4]) as bare accumulators.
inline void store_groups(const std::int32_t* folded, std::int64_t stride, const GroupQuad& quad, std::int64_t g,
                         std::int64_t count) {
    for (std::int64_t m = 0; m < quad.rows; ++m, folded += stride) {
        const std::int32_t* correction = quad.correction + m * quad.groups + g;
        for (std::int64_t n = 0; n < quad.channels; ++n) {
            std::int32_t* out = quad.acc + m * quad.acc_stride + n * quad.groups + g;
            for (std::int64_t i = 0; i < count; ++i) {
                const auto acc = static_cast<std::uint32_t>(folded[i * kGroupRows + n]);
                out[i] = static_cast<std::int32_t>(acc - static_cast<std::uint32_t>(correction[i]));
            }
        }
    }
}

// MR rows of activations against a quad. Blocks: vectors of a unit, 0 for a number known at run time only; Groups: of a
// unit. Units that fold together go past the last one: it is dotted again then, and the result is not used.
template <class Isa, int Bits, int MR, int Blocks, int Groups>
[[gnu::noinline]] void dot_group_quad(const GroupQuad& quad, const Codes& codes, std::int64_t m0) {
    using L = Layout<Isa, Bits>;
    using Sum = typename L::Dot::Sum;
    constexpr int together = kFoldUnits<Isa, Groups>, most = together * Groups;
    const std::int64_t unit_bytes = Blocks == 1 ? L::weight_bytes : quad.unit_bytes;
    const std::int64_t q_bytes = Blocks == 1 ? L::block_bytes : codes.group_stride;
    const Rows rows{nullptr, nullptr, 0, unit_bytes, unit_bytes};
    const std::uint8_t* q = codes.first + m0 * codes.stride;
    Float4 total[MR];
    for (int m = 0; m < MR; ++m) total[m] = load_4<Float4>(quad.total + m * quad.total_stride);
    std::int64_t g = 0;
    alignas(64) std::int32_t folded[MR][most * kGroupRows];
    const auto scale = [&](std::int64_t count) __attribute__((always_inline)) {
        const float* r = quad.r + g * kGroupRows;
        for (int line = 0; line < most * kGroupRows; line += 16) __builtin_prefetch(r + quad.groups * kGroupRows + line, 0, 2);
        for (std::int64_t i = 0; i < count; ++i) {
            const Float4 factor = load_4<Float4>(r + i * kGroupRows);
            for (int m = 0; m < MR; ++m) {
                const auto c = static_cast<std::uint32_t>(quad.correction[m * quad.groups + g + i]);
                const Uint4 acc = load_4<Uint4>(folded[m] + i * kGroupRows) - Uint4{c, c, c, c};  // mod 2^32
                total[m] = total[m] + __builtin_convertvector(reinterpret_cast<Int4>(acc), Float4) * factor;
            }
        }
    };
    for (std::int64_t u = 0; u < quad.units; u += together) {
        Sum sum[together][kGroupRows][MR];
        unroll<together>([&](auto j) __attribute__((always_inline)) {
            const std::int64_t at = smaller(u + j.value, quad.units - 1);
            unroll<kGroupRows>([&](auto i) __attribute__((always_inline)) {
                const std::uint8_t* w = quad.row[i.value] + at * unit_bytes;
                for (std::int64_t line = 0; line < unit_bytes; line += 64) {
                    __builtin_prefetch(w + quad.ahead + line, 0, 2);
                }
                dot_group<Isa, Bits, MR, Blocks, false>(w, rows, q + at * q_bytes, codes.stride, sum[j.value][i.value]);
            });
        });
        for (int m = 0; m < MR; ++m) Isa::template fold<Groups>(sum, m, folded[m]);
        if (quad.acc != nullptr) {
            store_groups(folded[0], most * kGroupRows, quad, g, smaller(most, quad.groups - g));
        } else if (g + most <= quad.groups) {
            scale(most);
        } else {
            scale(quad.groups - g);
        }
        g += most;
    }
    for (int m = 0; m < MR; ++m) std::memcpy(quad.total + m * quad.total_stride, &total[m], sizeof total[m]);
}

// The same for what is known at run time.
template <class Isa, int Bits, int MR>
void dot_group_quad(std::int64_t blocks, std::int64_t groups, const GroupQuad& quad, const Codes& codes, std::int64_t m0) {
    constexpr int most = Isa::vector_bytes / 8;
    if (groups == 1 && blocks == 1) return dot_group_quad<Isa, Bits, MR, 1, 1>(quad, codes, m0);
    if (groups == 1) return dot_group_quad<Isa, Bits, MR, 0, 1>(quad, codes, m0);
    if (groups == 2) return dot_group_quad<Isa, Bits, MR, 1, 2>(quad, codes, m0);
    if constexpr (most >= 4) {
        if (groups == 4) return dot_group_quad<Isa, Bits, MR, 1, 4>(quad, codes, m0);
    }
    if constexpr (most >= 8) return dot_group_quad<Isa, Bits, MR, 1, 8>(quad, codes, m0);
}

}  // namespace
}  // namespace bytelane::cpu
