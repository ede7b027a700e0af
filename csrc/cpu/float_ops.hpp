// What lies between the layers: norms, rotary embedding, gated activations and sums, on rows of the activation dtype T.
//
//     norm(x)    r = 1 / sqrt(f32(mean of x^2) + eps), the mean in float64
//                T(x * r * w), or T(w * T(x * r)) where the weight is in T, or T(x * r) without one
//     rotary     y[i] = T(T(x[i] * c[i]) - T(x[i + d/2] * s[i]))         the first half
//                y[i] = T(T(x[i] * c[i]) + T(x[i - d/2] * s[i]))         the second
//     gate       T(T(g / (1 + exp(-z))) * u)         z = g (silu), z = 2 sqrt(2/pi) (g + 0.044715 g^3) (gelu_tanh)
//
// g / (1 + exp(-z)) with that z is 0.5 g (1 + tanh(z / 2)), the tanh form of GELU, without its cancellation. The
// roundings to T are those of transformers' own modules; only sums and exponentials are not torch's. They are defined
// here: float64 sums of squares in 16 lanes by index, an exponential of separately rounded float32 operations. So a row
// gives the same bits whatever the batch, the threads or the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "dequantize.hpp"
#include "kernels.hpp"
#include "scratch.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kSerialFloats = 32 << 10;  // fewer elements than this are not worth waking a thread
constexpr std::int64_t kSquareLanes = 16;

inline std::int64_t padded(std::int64_t width) { return ceil_div(width, kChunk) * kChunk; }

inline int threads_for(int threads, std::int64_t tasks, std::int64_t elements) {
    return static_cast<int>(larger(1, smaller(threads, smaller(tasks, elements / kSerialFloats))));
}

inline const void* at(const void* rows, std::int64_t element, Dtype dtype) {
    return static_cast<const std::uint8_t*>(rows) + element * element_bytes(dtype);
}

inline void* at(void* rows, std::int64_t element, Dtype dtype) {
    return static_cast<std::uint8_t*>(rows) + element * element_bytes(dtype);
}

// `count` activations as float32, zeros up to a whole chunk.
template <class Isa>
void widen_span(const void* x, Dtype dtype, std::int64_t count, float* out) {
    std::int64_t i = 0;
    for (; i + kChunk <= count; i += kChunk) {
        const float* values = widen<Isa>(at(x, i, dtype), dtype, out + i);
        if (values != out + i) std::memcpy(out + i, values, kChunk * sizeof(float));
    }
    if (i == count) return;
    union {
        float floats[kChunk];
        std::uint16_t halves[kChunk];
    } rest = {};
    std::memcpy(&rest, at(x, i, dtype), (count - i) * element_bytes(dtype));
    const float* values = widen<Isa>(&rest, dtype, out + i);
    if (values != out + i) std::memcpy(out + i, values, kChunk * sizeof(float));
}

template <class Isa>
void narrow_span(const float* values, Dtype dtype, std::int64_t count, void* y) {
    for (std::int64_t i = 0; i < count; i += kChunk) narrow<Isa>(values + i, dtype, at(y, i, dtype), smaller(kChunk, count - i));
}

template <class Isa>
void round_span(float* values, Dtype dtype, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += kChunk) round_chunk<Isa>(values + i, dtype);
}

// exp(x) in float32, every operation rounded apart: 2^n * e^r with |r| <= ln 2 / 2 and e^r by Taylor to r^7, whose
// remainder is below 2^-27. Below 2^-126 it is 0; above 88 it is infinite. NaN stays NaN.
inline float exponential(float x) {
    const float inside = x > -87.0f ? (x < 88.0f ? x : 88.0f) : -87.0f;  // NaN goes through the first bound
    const float n = round_small(inside * 1.44269504f);
    const float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; n times the first is exact
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float power = float_of(static_cast<std::uint32_t>(static_cast<std::int32_t>(n) + 127) << 23);
    float y = p * power;
    y = x < -87.0f ? 0.0f : y;
    y = x > 88.0f ? INFINITY : y;
    return x == x ? y : x;
}

// 1 / sqrt(mean of squares + eps) of a row padded with zeros.
inline float inverse_root(const float* x, std::int64_t width, float eps) {
    double lanes[kSquareLanes] = {};
    for (std::int64_t i = 0; i < padded(width); i += kSquareLanes) {
        for (std::int64_t l = 0; l < kSquareLanes; ++l) {
            lanes[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
        }
    }
    for (std::int64_t half = kSquareLanes / 2; half > 0; half /= 2) {
        for (std::int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    return 1.0f / std::sqrt(static_cast<float>(lanes[0] / static_cast<double>(width)) + eps);
}

// Normalizes a padded row in place; the result is rounded to T.
template <class Isa>
void normalize(float* x, std::int64_t width, const Norm& norm, Dtype dtype) {
    const float r = inverse_root(x, width, norm.eps);
    const std::int64_t whole = padded(width);
    for (std::int64_t i = 0; i < whole; ++i) x[i] = x[i] * r;
    if (norm.weight != nullptr) {
        if (norm.weight_in_t) round_span<Isa>(x, dtype, whole);
        for (std::int64_t i = 0; i < width; ++i) x[i] = x[i] * norm.weight[i];
    }
    round_span<Isa>(x, dtype, whole);
}

template <class Isa>
void norm_rows(const NormRows& a) {
    const int threads = threads_for(a.threads, a.rows, a.rows * a.width);
    const std::int64_t whole = padded(a.width);
    const Scratch scratch(2 * whole * 4 + 2 * Carver::alignment, threads);
    in_parallel(threads, [&] {
        Carver mine = scratch.of_this_thread();
        auto* x = mine.take<float>(whole);
        auto* residual = mine.take<float>(whole);
#pragma omp for schedule(static) nowait
        for (std::int64_t m = 0; m < a.rows; ++m) {
            widen_span<Isa>(at(a.x, m * a.x_stride, a.dtype), a.dtype, a.width, x);
            normalize<Isa>(x, a.width, a.norm, a.dtype);
            if (a.residual != nullptr) {
                widen_span<Isa>(at(a.residual, m * a.width, a.dtype), a.dtype, a.width, residual);
                for (std::int64_t i = 0; i < whole; ++i) x[i] = residual[i] + x[i];
                round_span<Isa>(x, a.dtype, whole);
            }
            if (a.scalar != nullptr) {
                const float scalar = *a.scalar;
                for (std::int64_t i = 0; i < whole; ++i) x[i] = x[i] * scalar;
            }
            narrow_span<Isa>(x, a.dtype, a.width, at(a.y, m * a.width, a.dtype));
        }
    });
}

// One head, padded, in place; `spare` is as long.
template <class Isa>
void rotate(float* x, const float* cosine, const float* sine, std::int64_t dim, Dtype dtype, float* spare) {
    const std::int64_t half = dim / 2, whole = padded(dim);
    for (std::int64_t i = 0; i < half; ++i) spare[i] = -(x[i + half] * sine[i]);
    for (std::int64_t i = half; i < dim; ++i) spare[i] = x[i - half] * sine[i];
    for (std::int64_t i = dim; i < whole; ++i) spare[i] = 0.0f;
    for (std::int64_t i = 0; i < dim; ++i) x[i] = x[i] * cosine[i];
    round_span<Isa>(spare, dtype, whole);
    round_span<Isa>(x, dtype, whole);
    for (std::int64_t i = 0; i < whole; ++i) x[i] = x[i] + spare[i];
}

template <class Isa>
void head_rows(const HeadRows& a) {
    const int threads = threads_for(a.threads, a.rows, a.rows * a.heads * a.dim);
    const std::int64_t whole = padded(a.dim);
    const Scratch scratch(4 * (whole * 4 + Carver::alignment), threads);
    in_parallel(threads, [&] {
        Carver mine = scratch.of_this_thread();
        auto* x = mine.take<float>(whole);
        auto* spare = mine.take<float>(whole);
        auto* cosine = mine.take<float>(whole);
        auto* sine = mine.take<float>(whole);
#pragma omp for schedule(static) nowait
        for (std::int64_t m = 0; m < a.rows; ++m) {
            if (a.cosine != nullptr) {
                const std::int64_t angle = m % a.angles * a.dim;
                widen_span<Isa>(at(a.cosine, angle, a.dtype), a.dtype, a.dim, cosine);
                widen_span<Isa>(at(a.sine, angle, a.dtype), a.dtype, a.dim, sine);
            }
            for (std::int64_t h = 0; h < a.heads; ++h) {
                widen_span<Isa>(at(a.x, m * a.x_stride + h * a.dim, a.dtype), a.dtype, a.dim, x);
                if (a.norm != nullptr) normalize<Isa>(x, a.dim, *a.norm, a.dtype);
                if (a.cosine != nullptr) rotate<Isa>(x, cosine, sine, a.dim, a.dtype, spare);
                narrow_span<Isa>(x, a.dtype, a.dim, at(a.y, (m * a.heads + h) * a.dim, a.dtype));
            }
        }
    });
}

// One chunk of activated gates, rounded to T.
template <class Isa>
void activate(float* g, Activation activation, Dtype dtype) {
    if (activation == Activation::silu) {
        for (int i = 0; i < kChunk; ++i) g[i] = g[i] / (1.0f + exponential(-g[i]));
    } else {
        constexpr float twice = 1.5957691216f;  // 2 sqrt(2 / pi)
        for (int i = 0; i < kChunk; ++i) {
            const float z = twice * (g[i] + 0.044715f * (g[i] * g[i] * g[i]));
            g[i] = g[i] / (1.0f + exponential(-z));
        }
    }
    round_chunk<Isa>(g, dtype);
}

template <class Isa>
void gate_rows(const GateRows& a) {
    const std::int64_t chunks = ceil_div(a.width, kChunk);
    const int threads = threads_for(a.threads, a.rows * chunks, a.rows * a.width * 4);
    in_parallel(threads, [&] {
#pragma omp for schedule(static) nowait
        for (std::int64_t task = 0; task < a.rows * chunks; ++task) {
            const std::int64_t m = task / chunks, start = task % chunks * kChunk, count = smaller(kChunk, a.width - start);
            alignas(64) float g[kChunk], u[kChunk];
            widen_span<Isa>(at(a.gate, m * a.gate_stride + start, a.dtype), a.dtype, count, g);
            widen_span<Isa>(at(a.up, m * a.up_stride + start, a.dtype), a.dtype, count, u);
            activate<Isa>(g, a.activation, a.dtype);
            for (int i = 0; i < kChunk; ++i) g[i] = g[i] * u[i];
            narrow<Isa>(g, a.dtype, at(a.y, m * a.width + start, a.dtype), count);
        }
    });
}

template <class Isa>
void add_rows(const AddRows& a) {
    const std::int64_t chunks = ceil_div(a.count, kChunk);
    const int threads = threads_for(a.threads, chunks, a.count / 4);
    in_parallel(threads, [&] {
#pragma omp for schedule(static) nowait
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
            const std::int64_t start = chunk * kChunk, count = smaller(kChunk, a.count - start);
            alignas(64) float left[kChunk], right[kChunk];
            widen_span<Isa>(at(a.a, start, a.dtype), a.dtype, count, left);
            widen_span<Isa>(at(a.b, start, a.dtype), a.dtype, count, right);
            for (int i = 0; i < kChunk; ++i) left[i] = left[i] + right[i];
            narrow<Isa>(left, a.dtype, at(a.y, start, a.dtype), count);
        }
    });
}

template <class Isa>
void store_codes(const StoreCodes& a) {
    const float inverse = 1.0f / *a.scale;
    for (std::int64_t b = 0; b < a.batch; ++b) {
        for (std::int64_t t = 0; t < a.tokens; ++t) {
            for (std::int64_t h = 0; h < a.heads; ++h) {
                quantize_span<Isa>(at(a.x, (b * a.tokens + t) * a.x_stride + h * a.dim, a.dtype), a.dtype, a.dim, inverse,
                                   a.codes + b * a.batch_stride + h * a.head_stride + t * a.dim);
            }
        }
    }
}

}  // namespace
}  // namespace bytelane::cpu
