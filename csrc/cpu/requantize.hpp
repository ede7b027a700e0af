// Accumulators to outputs; every operation a separately rounded float32 one.
//
//     unit[n,g] = s_in * s_w[n,g]          r[n,g] = unit[n,g] / s_out, or unit[n,g] without an output scale
//     total     = f32(acc[m,n,0] + b[n]) * r[n,0] + f32(acc[m,n,1]) * r[n,1] + ...        in ascending g
//     y         = f32(clamp(rne(total), -128, 127)) * s_out, or total + bias[n]           cast to the dtype of x
//     b[n]      = rne(bias[n] / unit[n,0]) with an output scale and one group, else 0
//     s_out     one for all channels, or one for each
//
// With an output scale and several groups `bias[n] / s_out` is added to the total last.
//
// A panel is up to 64 output channels, contiguous, one group after the other; what follows the panel's last channel
// is computed and dropped:
//
//     acc, scale    g0: n0 n1 ... n63 | g1: n0 n1 ... n63 | ...
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "kernels.hpp"
#include "scratch.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kPanel = kChunk;
constexpr std::int64_t kStep = 16;  // channels of one vector, or more; a panel is a whole number of them

// What requantizing a panel needs, computed once and used for every m.
struct PanelScales {
    float* scale;              // [groups][kPanel]
    std::int32_t* bias_codes;  // [kPanel]
    float* bias;               // [kPanel]
    float* output;             // [kPanel]
};

inline std::int64_t panel_scales_bytes(std::int64_t groups) { return (groups + 3) * kPanel * 4; }

inline PanelScales take_panel_scales(Carver& memory, std::int64_t groups) {
    return {memory.take<float>(groups * kPanel), memory.take<std::int32_t>(kPanel), memory.take<float>(kPanel),
            memory.take<float>(kPanel)};
}

// float to int32 with the one out-of-range answer x86 gives, which is also torch's.
inline std::int32_t int_from_float(float value) {
    const bool fits = value >= -2147483648.0f && value < 2147483648.0f;
    return fits ? static_cast<std::int32_t>(value) : INT32_MIN;
}

// Rounds half to even for every float: from 2^23 on they are all integers.
inline float round_any(float value) {
    constexpr float whole = 8388608.0f;
    const float size = float_of(bits_of(value) & 0x7fffffffu);
    const float rounded = (size + whole) - whole;
    const float kept = size < whole ? rounded : size;
    return float_of(bits_of(kept) | (bits_of(value) & 0x80000000u));
}

// Scales of the panel's outputs and its bias.
inline void prepare_outputs(const Output& o, std::int64_t groups, std::int64_t n0, std::int64_t count, PanelScales& p) {
    const float all = o.output_scale && o.output_stride == 0 ? *o.output_scale : 1.0f;
    for (std::int64_t n = 0; n < kPanel; ++n) {
        p.output[n] = all;
        p.bias_codes[n] = 0;
        p.bias[n] = 0.0f;
    }
    if (o.output_scale && o.output_stride != 0) {
        for (std::int64_t n = 0; n < count; ++n) p.output[n] = o.output_scale[(n0 + n) * o.output_stride];
    }
    if (o.bias == nullptr) return;
    for (std::int64_t n = 0; n < count; ++n) {
        const float bias = o.bias[n0 + n];
        if (o.output_scale && groups == 1) {
            p.bias_codes[n] = int_from_float(round_any(bias / (*o.input_scale * o.weight_scale[n0 + n])));
        } else {
            p.bias[n] = bias / p.output[n];
        }
    }
}

inline void prepare_panel(const Output& o, std::int64_t groups, std::int64_t n0, std::int64_t count, PanelScales& p) {
    prepare_outputs(o, groups, n0, count, p);
    if (o.group_scales != nullptr) {
        const float* r = o.group_scales + n0 * groups;
        for (std::int64_t n = 0; n < count; n += 4) {
            for (std::int64_t g = 0; g < groups; ++g, r += 4) std::memcpy(p.scale + g * kPanel + n, r, 4 * sizeof *r);
        }
        return;
    }
    const float s_in = *o.input_scale;
    float unit[kPanel] = {};
    for (std::int64_t g = 0; g < groups; ++g) {
        const float* weight_scale = o.weight_scale + n0 * groups + g;
        if (groups == 1) {
            for (std::int64_t n = 0; n < count; ++n) unit[n] = s_in * weight_scale[n];
        } else {
            for (std::int64_t n = 0; n < count; ++n) unit[n] = s_in * weight_scale[n * groups];
        }
        // dividing by 1 changes nothing, and keeps this one loop
        for (std::int64_t n = 0; n < kPanel; ++n) p.scale[g * kPanel + n] = unit[n] / p.output[n];
    }
}

// The total of no group: any float added to it is itself, -0 too.
constexpr float kNothing = -0.0f;

// The loops below run to a whole number of vectors; they must not have a constant length, or GCC unrolls them completely
// before it looks for vectors.

// Group g of one row of a panel joins its total; the first one starts it. `start` is added to its accumulators first.
inline void scale_group(const std::int32_t* __restrict acc, const PanelScales& p, std::int64_t g, std::int64_t whole,
                        float* __restrict total, std::uint32_t start = 0) {
    const float* __restrict scale = p.scale + g * kPanel;
    if (g == 0) {
        for (std::int64_t n = 0; n < whole; ++n) {
            const auto biased = static_cast<std::uint32_t>(acc[n]) + start + static_cast<std::uint32_t>(p.bias_codes[n]);
            total[n] = static_cast<float>(static_cast<std::int32_t>(biased)) * scale[n];
        }
    } else {
        for (std::int64_t n = 0; n < whole; ++n) total[n] = total[n] + static_cast<float>(acc[n]) * scale[n];
    }
}

// A vector of channels as the compiler's own types (GCC 12 does not take a size that is a template's).
template <int Count>
struct Lanes;
template <>
struct Lanes<4> {
    typedef std::int32_t Ints __attribute__((vector_size(16)));
    typedef std::uint32_t Bits __attribute__((vector_size(16)));
    typedef float Floats __attribute__((vector_size(16)));
    typedef std::uint16_t Halves __attribute__((vector_size(8)));
};
template <>
struct Lanes<8> {
    typedef std::int32_t Ints __attribute__((vector_size(32)));
    typedef std::uint32_t Bits __attribute__((vector_size(32)));
    typedef float Floats __attribute__((vector_size(32)));
    typedef std::uint16_t Halves __attribute__((vector_size(16)));
};
template <>
struct Lanes<16> {
    typedef std::int32_t Ints __attribute__((vector_size(64)));
    typedef std::uint32_t Bits __attribute__((vector_size(64)));
    typedef float Floats __attribute__((vector_size(64)));
    typedef std::uint16_t Halves __attribute__((vector_size(32)));
};

template <class Vector, class Element>
[[gnu::always_inline]] inline Vector load_lanes(const Element* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Whether outputs are codes that become bfloat16 or float32, and whole vectors: then one pass does all.
inline bool passes_once(const Output& o, std::int64_t count) {
    return o.output_scale != nullptr && o.dtype != Dtype::float16 && count % kStep == 0;
}

// clamp(v, -128, 127), NaN to 127, as clamp_nan_high: by instructions of the instruction set, of which GCC makes four.
template <class Isa, class Floats>
[[gnu::always_inline]] inline Floats clamp_lanes(Floats v) {
    if constexpr (requires { Isa::clamp_lanes(v); }) {
        return Isa::clamp_lanes(v);
    } else {
        const Floats high = Floats{} + 127.0f, low = Floats{} - 128.0f;
        v = v < high ? v : high;
        return v > low ? v : low;
    }
}

// Totals, as `total_at(n)` gives a vector's from n on, to codes and to outputs at y, never leaving registers.
template <class Isa, class L, class TotalAt>
[[gnu::always_inline]] inline void finish_steps(const PanelScales& p, Dtype dtype, std::int64_t count, void* y,
                                                const TotalAt& total_at) {
    using Floats = typename L::Floats;
    using Bits = typename L::Bits;
    constexpr std::int64_t lanes = sizeof(Floats) / sizeof(float);
    const Floats magic = Floats{} + 12582912.0f;
    const auto value_at = [&](std::int64_t n) __attribute__((always_inline)) {
        Floats v = clamp_lanes<Isa, Floats>(total_at(n));
        v = (v + magic) - magic;  // as round_small
        return Floats(v * load_lanes<Floats>(p.output + n));
    };
    if (dtype == Dtype::float32) {
        auto* out = static_cast<float*>(y);
        for (std::int64_t n = 0; n < count; n += lanes) {
            const Floats v = value_at(n);
            std::memcpy(out + n, &v, sizeof v);
        }
        return;
    }
    auto* out = static_cast<std::uint16_t*>(y);
    for (std::int64_t n = 0; n < count; n += lanes) {  // as bfloat_from_float
        const Floats v = value_at(n);
        const auto bits = reinterpret_cast<Bits>(v);
        const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        const Bits kept = v != v ? Bits{} + 0x7fc0u : rounded;
        const typename L::Halves halves = __builtin_convertvector(kept, typename L::Halves);
        std::memcpy(out + n, &halves, sizeof halves);
    }
}

// The totals of one row of a panel to `count` outputs at y.
template <class Isa>
void finish_total(float* __restrict total, const PanelScales& p, const Output& o, std::int64_t groups,
                  std::int64_t count, void* y) {
    using L = Lanes<Isa::Tile::lanes>;
    if (passes_once(o, count) && !(o.bias != nullptr && groups > 1)) {
        finish_steps<Isa, L>(p, o.dtype, count, y, [&](std::int64_t n) __attribute__((always_inline)) {
            return load_lanes<typename L::Floats>(total + n);
        });
        return;
    }
    const bool quantized = o.output_scale != nullptr;
    const bool float_bias = o.bias != nullptr && !(quantized && groups == 1);
    const std::int64_t whole = ceil_div(count, kStep) * kStep;
    if (float_bias) {
        for (std::int64_t n = 0; n < whole; ++n) total[n] = total[n] + p.bias[n];
    }
    if (quantized) {
        for (std::int64_t n = 0; n < whole; ++n) total[n] = round_small(clamp_nan_high(total[n])) * p.output[n];
    }
    narrow<Isa>(total, o.dtype, y, count);
}

// One row of a panel: acc [groups][kPanel] to `count` outputs at y. `start` as in `scale_group`.
template <class Isa>
void finish_panel(const std::int32_t* acc, const PanelScales& p, const Output& o, std::int64_t groups,
                  std::int64_t count, void* y, std::uint32_t start = 0) {
    using L = Lanes<Isa::Tile::lanes>;
    if (groups == 1 && passes_once(o, count)) {
        using Floats = typename L::Floats;
        using Bits = typename L::Bits;
        finish_steps<Isa, L>(p, o.dtype, count, y, [&](std::int64_t n) __attribute__((always_inline)) {
            const Bits biased = load_lanes<Bits>(acc + n) + start + load_lanes<Bits>(p.bias_codes + n);
            const Floats whole = __builtin_convertvector(reinterpret_cast<typename L::Ints>(biased), Floats);
            return Floats(whole * load_lanes<Floats>(p.scale + n));
        });
        return;
    }
    const std::int64_t whole = ceil_div(count, kStep) * kStep;
    alignas(64) float total[kPanel];
    for (std::int64_t g = 0; g < groups; ++g) scale_group(acc + g * kPanel, p, g, whole, total, start);
    finish_total<Isa>(total, p, o, groups, count, y);
}

template <class Isa>
void requantize(const Requantize& args) {
    const std::int64_t panels = ceil_div(args.n, kPanel);
    const std::int64_t work = args.m * args.n * args.groups;
    const int threads = static_cast<int>(larger(smaller(args.threads, smaller(panels, work / 32768)), 1));
    const std::int64_t each = panel_scales_bytes(args.groups) + args.groups * kPanel * 4 + 4 * Carver::alignment;
    const Scratch scratch(each, threads);
    in_parallel(threads, [&] {
        Carver memory = scratch.of_this_thread();
        PanelScales scales = take_panel_scales(memory, args.groups);
        auto* acc = memory.take<std::int32_t>(args.groups * kPanel);
        std::memset(acc, 0, args.groups * kPanel * 4);
#pragma omp for schedule(static) nowait
        for (std::int64_t panel = 0; panel < panels; ++panel) {
            const std::int64_t n0 = panel * kPanel;
            const std::int64_t count = smaller(kPanel, args.n - n0);
            prepare_panel(args.output, args.groups, n0, count, scales);
            for (std::int64_t m = 0; m < args.m; ++m) {
                const std::int32_t* in = args.acc + (m * args.n + n0) * args.groups;
                if (args.groups == 1) {
                    std::memcpy(acc, in, count * sizeof *acc);
                } else {
                    for (std::int64_t n = 0; n < count; ++n) {
                        for (std::int64_t g = 0; g < args.groups; ++g) acc[g * kPanel + n] = in[n * args.groups + g];
                    }
                }
                auto* y = static_cast<std::uint8_t*>(args.output.y) +
                          (m * args.n + n0) * element_bytes(args.output.dtype);
                finish_panel<Isa>(acc, scales, args.output, args.groups, count, y);
            }
        }
    });
}

}  // namespace
}  // namespace bytelane::cpu
