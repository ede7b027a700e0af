// The interface between the Python module and the kernels: plain structs, and one table of function pointers for each
// instruction set. Nothing here is inline code, so including it from objects built with different flags is safe.
#pragma once

#include <cstdint>

namespace bytelane::cpu {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// packed reads the canonical rows directly (2, 4 or 8 bits, groups of whole 16 bytes if any); unpacked first spreads a
// few rows to one byte a code (any width, any groups).
enum class Path : int { packed = 0, unpacked = 1 };

// The packed path takes groups of whole multiples of this many bytes, on every instruction set.
constexpr std::int64_t kGroupBytes = 16;

// x float -> int8 codes, `count` elements.
struct Quantize {
    const void* x;
    Dtype dtype;
    std::int64_t count;
    const float* input_scale;
    std::int8_t* q;
    int threads;
};

// How accumulators become outputs. `output_scale` and `bias` may be null.
struct Output {
    const float* weight_scale;  // [N][groups]
    const float* input_scale;
    const float* output_scale;   // one, or [N]
    std::int64_t output_stride;  // from one channel's output scale to the next: 0 or 1
    const float* bias;           // [N]
    void* y;                     // [M][N]
    Dtype dtype;
};

struct Requantize {
    const std::int32_t* acc;  // [M][N][groups]
    Output output;
    std::int64_t m, n, groups;
    int threads;
};

// y = requantize(quantize(x) . w), or, where `acc` is not null, the bare accumulators of `codes`; `x` and `output` are
// not read then.
struct Matmul {
    const void* x;            // [M][K] of output.dtype
    const std::int8_t* codes; // [M][K]
    const std::uint8_t* w;    // canonical rows, N of them, ceil(K * bits / 8) bytes each; nothing is read past the last
    Output output;
    std::int32_t* acc;        // [M][N][groups], or null
    std::int64_t m, n, k;
    int bits;
    std::int64_t group_size;  // 0: one group of all K
    Path path;
    int threads;
};

// y = fake_quantize(x . T(codes * weight_scale) + bias) for activations that are not quantized, in their dtype T.
// `output_scale` and `bias` may be null.
struct WeightOnly {
    const void* x;              // [M][K] of dtype, which is not float32
    const std::uint8_t* w;      // canonical rows, N of them
    const float* weight_scale;  // [N][groups]
    const float* output_scale;  // one
    const float* bias;          // [N]
    void* y;                    // [M][N]
    Dtype dtype;
    std::int64_t m, n, k;
    int bits;
    std::int64_t groups;
    int threads;
};

// y[i] = T(T(codes * weight_scale) * embed_scale) of row ids[i], T being dtype. Every id is a row of the table.
struct Embedding {
    const void* ids;  // [count], int64 or int32
    bool wide_ids;
    std::int64_t count;
    const std::uint8_t* w;
    std::int64_t row_stride;    // bytes
    const float* weight_scale;  // [rows][groups]
    std::int64_t scale_stride;  // elements
    std::int64_t dim, groups;
    int bits;
    float embed_scale;
    void* y;  // [count][dim]
    Dtype dtype;
    int threads;
};

struct Kernels {
    const char* name;
    bool (*supported)();
    void (*quantize)(const Quantize&);
    void (*requantize)(const Requantize&);
    void (*matmul)(const Matmul&);
    void (*weight_only)(const WeightOnly&);
    void (*embedding)(const Embedding&);
};

extern const Kernels avx512vnni_kernels;
extern const Kernels avx2_kernels;
extern const Kernels portable_kernels;

}  // namespace bytelane::cpu
