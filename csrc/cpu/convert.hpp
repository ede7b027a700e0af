// Floats to int8 codes, and between float32 and the activation dtypes.
//
//     q = clamp(rne(f32(x) * f32(1 / s_in)), -128, 127)        NaN and +inf give 127, -inf gives -128
//
// Elements are handled in chunks of 64; a shorter tail goes through a zero-filled buffer on the stack, so neither `x`
// nor `q` needs any slack, and no alignment but that of an element.
//
// This and every other header an instruction set's source includes live in an anonymous namespace: the same template
// is compiled with different flags in each object, and the linker must never merge two of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "scratch.hpp"

namespace bytelane::cpu {
namespace {

constexpr int kChunk = 64;

// `count` things dealt out evenly: the first ones get one more.
struct Even {
    std::int64_t each, more;

    Even(std::int64_t count, std::int64_t among) : each(count / among), more(count % among) {}
    std::int64_t of(std::int64_t i) const { return each + (i < more ? 1 : 0); }
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds half to even for |value| <= 2^22: there the sum's last place is 1. Needs no rounding instruction, so it is
// the same vector code on every machine.
inline float round_small(float value) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23
    return (value + magic) - magic;
}

// A comparison with NaN is false, and then the bound is taken.
inline float clamp_nan_high(float value) {
    value = value < 127.0f ? value : 127.0f;
    return value > -128.0f ? value : -128.0f;
}

inline float float_from_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x0400u) return float_of(sign | ((rest << 13) + 0x38000000u));
    return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
}

inline std::uint16_t half_from_float(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    const std::uint32_t rest = bits & 0x7fffffffu;
    std::uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u;
    } else if (rest >= 0x477ff000u) {  // 65520, the tie between the largest half and infinity
        half = 0x7c00u;
    } else if (rest >= 0x38800000u) {
        half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
    } else {  // the last place of 0.5 is that of a subnormal half, so the addition rounds
        half = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
    }
    return static_cast<std::uint16_t>(sign | half);
}

inline float float_from_bfloat(std::uint16_t value) { return float_of(static_cast<std::uint32_t>(value) << 16); }

inline std::uint16_t bfloat_from_float(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded);
}

// The same rounding where the result stays a float32: 32-bit lanes throughout, so no vector is packed and unpacked.
inline float round_to_bfloat(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    return float_of(value != value ? 0x7fc00000u : rounded);
}

inline std::int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// One chunk of activations as float32, in `buffer` or where they already are. `x` holds 64 elements and is read in
// place: a copy by memcpy is narrower than the loads that follow, and they would wait for it.
template <class Isa>
const float* widen(const void* x, Dtype dtype, float* buffer) {
    if (dtype == Dtype::float32) return static_cast<const float*>(x);
    const auto* in = static_cast<const std::uint16_t*>(x);
    if (dtype == Dtype::float16) {
        Isa::widen_half(in, buffer);
    } else {
        for (int i = 0; i < kChunk; ++i) buffer[i] = float_from_bfloat(in[i]);
    }
    return buffer;
}

// One chunk of float32 results in the activation dtype; `count` of them are stored.
template <class Isa>
void narrow(const float* values, Dtype dtype, void* y, std::int64_t count) {
    if (dtype == Dtype::float32) {
        std::memcpy(y, values, count * sizeof(float));
        return;
    }
    std::uint16_t out[kChunk];
    if (dtype == Dtype::float16) {
        Isa::narrow_half(values, out);
    } else {
        for (int i = 0; i < kChunk; ++i) out[i] = bfloat_from_float(values[i]);
    }
    std::memcpy(y, out, count * sizeof(std::uint16_t));
}

// Sixteen elements at a time, from memory to codes in registers: `Isa::store_codes` clamps and rounds.
template <class Isa>
void quantize_chunk(const void* x, Dtype dtype, float inverse, std::int8_t* q) {
    const auto scale = Isa::broadcast(inverse);
    const auto each = [&](auto&& load) __attribute__((always_inline)) {
        for (int i = 0; i < kChunk; i += 16) Isa::store_codes(Isa::multiply(load(i), scale), q + i);
    };
    const auto* halves = static_cast<const std::uint16_t*>(x);
    if (dtype == Dtype::float32) {
        each([x](int i) __attribute__((always_inline)) { return Isa::load(static_cast<const float*>(x) + i); });
    } else if (dtype == Dtype::float16) {
        each([halves](int i) __attribute__((always_inline)) { return Isa::load_half(halves + i); });
    } else {
        each([halves](int i) __attribute__((always_inline)) { return Isa::load_bfloat(halves + i); });
    }
}

template <class Isa>
void quantize_span(const void* x, Dtype dtype, std::int64_t count, float inverse, std::int8_t* q) {
    const std::int64_t size = element_bytes(dtype);
    const auto* in = static_cast<const std::uint8_t*>(x);
    std::int64_t i = 0;
    for (; i + kChunk <= count; i += kChunk) quantize_chunk<Isa>(in + i * size, dtype, inverse, q + i);
    if (i < count) {
        union {
            float floats[kChunk];
            std::uint16_t halves[kChunk];
        } rest = {};
        std::int8_t codes[kChunk];
        std::memcpy(&rest, in + i * size, (count - i) * size);
        quantize_chunk<Isa>(&rest, dtype, inverse, codes);
        std::memcpy(q + i, codes, count - i);
    }
}

constexpr std::int64_t kQuantizeTask = 16384;

template <class Isa>
void quantize(const Quantize& args) {
    const float inverse = 1.0f / *args.input_scale;
    const std::int64_t tasks = ceil_div(args.count, kQuantizeTask);
    const int threads = static_cast<int>(smaller(args.threads, larger(tasks / 2, 1)));
    const auto* x = static_cast<const std::uint8_t*>(args.x);
    in_parallel(threads, [&] {
#pragma omp for schedule(static) nowait
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t start = task * kQuantizeTask;
            quantize_span<Isa>(x + start * element_bytes(args.dtype), args.dtype,
                               smaller(kQuantizeTask, args.count - start), inverse, args.q + start);
        }
    });
}

}  // namespace
}  // namespace bytelane::cpu
