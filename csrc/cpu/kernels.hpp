// The interface between the Python module and the kernels: plain structs, and one table of function pointers for each
// instruction set. Nothing here is inline code, so including it from objects built with different flags is safe.
#pragma once

#include <cstdint>

namespace bytelane::cpu {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// packed reads the canonical rows directly (2, 4 or 8 bits, groups as kGroupBytes says if any); unpacked first spreads a
// few rows to one byte a code (any width, any groups).
enum class Path : int { packed = 0, unpacked = 1 };

// The packed path takes groups of whole multiples of this many bytes, and of an eighth, a quarter and half of it: whole
// vectors, or whole parts of one, on every instruction set.
constexpr std::int64_t kGroupBytes = 64;

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
    const float* group_scales;   // what GroupScales makes of these, or null: `matmul` then makes it in every call
};

// r[n,g] of a layer with several groups, in the order of groups.hpp: [ceil(N / 4)][groups][4].
struct GroupScales {
    Output output;
    std::int64_t n, groups;
    float* r;
    int threads;
};

struct Requantize {
    const std::int32_t* acc;  // [M][N][groups]
    Output output;
    std::int64_t m, n, groups;
    int threads;
};

// y = requantize(codes . w), or, where `acc` is not null, the bare accumulators; `output` is not read then. The codes are
// those given, or, where `codes` is null, quantize(x).
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

// --- between the layers ------------------------------------------------------------------------------------------------
// Activations of dtype T in rows; a stride counts elements from one row to the next. See float_ops.hpp for the formulas.

// Root-mean-square normalization: the weight is null for none, in float32 where `weight_in_t` is false.
struct Norm {
    const float* weight;  // [width]
    float eps;
    bool weight_in_t;  // the normalized values are rounded to T, then multiplied by the weight in T
};

// y = residual + norm(x), times a scalar; `residual` and `scalar` may be null.
struct NormRows {
    const void* x;
    std::int64_t x_stride;
    Norm norm;
    const void* residual;  // [rows][width]
    const float* scalar;   // one, a value of T
    void* y;               // [rows][width]
    Dtype dtype;
    std::int64_t rows, width;
    int threads;
};

// y = rotary(norm(x)) of every head apart; `norm` may be null, and so may `cosine` and `sine`, for none.
struct HeadRows {
    const void* x;
    std::int64_t x_stride;
    const Norm* norm;
    const void* cosine;  // [angles][dim]; row m takes row m % angles
    const void* sine;
    std::int64_t angles;
    void* y;  // [rows][heads * dim]
    Dtype dtype;
    std::int64_t rows, heads, dim;
    int threads;
};

enum class Activation : int { gelu_tanh = 0, silu = 1 };

// y = activation(gate) * up; or y = a + b.
struct GateRows {
    const void* gate;
    const void* up;
    std::int64_t gate_stride, up_stride;
    void* y;  // [rows][width]
    Activation activation;
    Dtype dtype;
    std::int64_t rows, width;
    int threads;
};

struct AddRows {
    const void* a;
    const void* b;
    void* y;
    Dtype dtype;
    std::int64_t count;
    int threads;
};

// y = T(x . w + bias) with weights in T.
struct Dense {
    const void* x;  // [m][k]
    const void* w;  // [n][k]
    const float* bias;  // [n], values of T, or null
    void* y;  // [m][n]
    Dtype dtype;
    std::int64_t m, n, k;
    int threads;
};

// Keys or values of new tokens to int8 codes, at their places in the cache.
struct StoreCodes {
    const void* x;  // [batch][tokens][heads][dim] of T
    std::int64_t x_stride;  // from one token to the next
    const float* scale;
    std::int8_t* codes;
    std::int64_t batch_stride, head_stride;  // of `codes`; a token's codes are `dim` apart from the next one's
    Dtype dtype;
    std::int64_t batch, tokens, heads, dim;
};

// Keys or values as attention reads them: [batch][heads][tokens][dim], int8 where `scale` is not null, else T.
struct Stored {
    const void* data;
    const float* scale;
    std::int64_t batch_stride, head_stride, token_stride;
};

// y = softmax(scaling * q k^T) v over the visible keys. Without a mask, query s of S sees the keys up to K - S + s.
struct Attention {
    const void* q;  // [batch][queries][heads][dim] of T, contiguous
    Stored keys, values;
    const bool* mask;  // [batch][queries][tokens], true where visible; null for causal
    std::int64_t mask_batch_stride, mask_query_stride;
    void* y;  // as q
    float scaling;
    Dtype dtype;
    std::int64_t batch, queries, tokens, heads, kv_heads, dim;
    int threads;
};

// Multiply-adds of codes of `bits` bits at the best rate there is: see limits.hpp.
struct PeakDots {
    int bits;
    std::int64_t repeats;
    int threads;
};

struct ReadAll {
    const std::uint64_t* words;
    std::int64_t bytes;
    int threads;
};

struct Kernels {
    const char* name;
    bool (*supported)();
    void (*quantize)(const Quantize&);
    void (*requantize)(const Requantize&);
    void (*group_scales)(const GroupScales&);
    void (*matmul)(const Matmul&);
    void (*weight_only)(const WeightOnly&);
    void (*embedding)(const Embedding&);
    void (*norm_rows)(const NormRows&);
    void (*head_rows)(const HeadRows&);
    void (*gate_rows)(const GateRows&);
    void (*add_rows)(const AddRows&);
    void (*store_codes)(const StoreCodes&);
    void (*attention)(const Attention&);
    void (*dense)(const Dense&);
    std::int64_t (*peak_dots)(const PeakDots&);
    std::uint64_t (*read_all)(const ReadAll&);
};

extern const Kernels avx512vbmi_kernels;
extern const Kernels avx512vnni_kernels;
extern const Kernels avxvnni_kernels;
extern const Kernels avx2_kernels;
extern const Kernels dotprod_kernels;
extern const Kernels portable_kernels;

// What isa_avx512amx.cpp has of its own; table.hpp makes a table of it and avx512vbmi's. Nothing of that object may run
// before `amx_supported`, and a table that copies another one would be made by its own instructions as the library is
// loaded.
bool amx_supported();
void amx_matmul(const Matmul& args, const Kernels& others);
std::int64_t amx_peak_dots(const PeakDots& args);

}  // namespace bytelane::cpu
