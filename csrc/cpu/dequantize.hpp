// Canonical rows back to floats, one rounding per operation, as torch computes them in the activation dtype T:
//
//     v[k] = T(f32(u[k] - 2^(N-1)) * f32(T(s[g])))
//
// A code is exact in every T, so `codes.to(T) * scale.to(T)` is this one product.
#pragma once

#include <cstdint>

#include "convert.hpp"
#include "kernels.hpp"
#include "unpack.hpp"

namespace bytelane::cpu {
namespace {

inline float round_to(float value, Dtype dtype) {
    if (dtype == Dtype::float32) return value;
    if (dtype == Dtype::float16) return float_from_half(half_from_float(value));
    return round_to_bfloat(value);
}

// One chunk of 64 values, each rounded to T and kept as float32.
template <class Isa>
void round_chunk(float* values, Dtype dtype) {
    if (dtype == Dtype::float32) return;
    if (dtype == Dtype::float16) {
        std::uint16_t halves[kChunk];
        Isa::narrow_half(values, halves);
        Isa::widen_half(halves, values);
    } else {
        for (int i = 0; i < kChunk; ++i) values[i] = round_to_bfloat(values[i]);
    }
}

// A row of codes: `readable` bytes may be read from `first` on, one scale for every `size` codes; a row has fewer than
// 2^31 of them.
struct CodedRow {
    const std::uint8_t* first;
    std::int64_t readable;
    int bits;
    const float* scale;
    std::int64_t size;
};

// Codes `start .. start + count` of a row, at most 64; what follows them in `out[64]` is 0. `start` is a multiple of 8.
template <class Isa>
void dequantize_chunk(const CodedRow& row, std::int64_t start, std::int64_t count, Dtype dtype, float* out) {
    alignas(64) std::uint8_t codes[kChunk];
    unpack<Isa>(row.bits, row.first, row.readable, start, count, codes);
    const std::int32_t offset = 1 << (row.bits - 1);
    const auto size = static_cast<std::uint32_t>(row.size);  // a 64-bit division costs as much as half a chunk
    const std::int64_t group = static_cast<std::uint32_t>(start) / size;
    if (count == kChunk && start + kChunk <= (group + 1) * row.size) {
        const float scale = round_to(row.scale[group], dtype);
        for (int i = 0; i < kChunk; ++i) out[i] = static_cast<float>(codes[i] - offset) * scale;
    } else {
        std::int64_t i = 0;
        for (std::int64_t g = group; i < count; ++g) {
            const std::int64_t stop = smaller(count, (g + 1) * row.size - start);
            const float scale = round_to(row.scale[g], dtype);
            for (; i < stop; ++i) out[i] = static_cast<float>(codes[i] - offset) * scale;
        }
        for (; i < kChunk; ++i) out[i] = 0.0f;
    }
    round_chunk<Isa>(out, dtype);
}

}  // namespace
}  // namespace bytelane::cpu
