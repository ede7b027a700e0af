// The interface between the Python module and the kernels: plain structs, and one table of function pointers for each
// instruction set. Nothing here is inline code, so including it from objects built with different flags is safe.
#pragma once

#include <cstdint>

namespace bytelane::cpu {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// packed reads the canonical rows directly (2, 4 or 8 bits, one scale per channel); unpacked first spreads a few rows
// to one byte a code (any width, channel or group scales).
enum class Path : int { packed = 0, unpacked = 1 };

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
    const float* output_scale;
    const float* bias;  // [N]
    void* y;            // [M][N]
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

struct Kernels {
    const char* name;
    bool (*supported)();
    void (*quantize)(const Quantize&);
    void (*requantize)(const Requantize&);
    void (*matmul)(const Matmul&);
};

extern const Kernels avx512vnni_kernels;
extern const Kernels avx2_kernels;
extern const Kernels portable_kernels;

}  // namespace bytelane::cpu
