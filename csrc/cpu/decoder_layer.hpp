// One decoder layer of a language model as two native calls: all that comes before attention, and all from there on.
//
//     before      n = norm(x)                     q, k, v = n . Wq, n . Wk, n . Wv        n quantized once for one scale
//                 q = rotary(norm(q))             k = rotary(norm(k))                     v = norm(v)
//                 (the caller puts k and v into its cache)
//     after       h = x + norm(attention(q, cache) . Wo)
//                 h = h + norm((act(n . Wg) * (n . Wu)) . Wd)                             n = norm(h)
//                 h = h + norm((act(h . Wi) * p) . Wp)                                    per-layer input p, Gemma 4
//                 y = h * scalar
//
// Every norm but the two that feed a projection may be absent, and so may k and v (a layer that reads another one's
// cache), the per-layer input and the scalar. Activations are T between the steps, so the bits are those of the steps
// called one by one. What a layer has is set once; a run allocates its own scratch, so runs may overlap.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.hpp"

namespace bytelane::cpu {

// A norm that may be absent.
struct MaybeNorm {
    bool there = false;
    Norm norm = {};
    const Norm* get() const { return there ? &norm : nullptr; }
};

// A matrix of weights: integer where it has an input scale, weight-only otherwise.
struct Projection {
    bool integer = true;
    Matmul matmul = {};        // without x, y, m, threads
    WeightOnly weight_only = {};
    std::int64_t width() const { return integer ? matmul.n : weight_only.n; }
};

// The columns of one logical projection in the output of a merged one.
struct Columns {
    std::int64_t group = -1, first = 0;
    bool there() const { return group >= 0; }
};

struct LayerShape {
    std::int64_t hidden, heads, kv_heads, dim;
    float scaling;
    Activation activation;
};

struct BeforeCall {
    const void* x;  // [m][hidden]
    const void* cosine;
    const void* sine;
    std::int64_t angles;
    void* q;  // [m][heads * dim]
    void* k;  // [m][kv_heads * dim], or null
    void* v;
    std::int64_t m;
    int threads;
};

struct AfterCall {
    const void* x;
    const void* q;
    Stored keys, values;
    const bool* mask;
    std::int64_t mask_batch_stride, mask_query_stride;
    const void* per_layer;  // [m][...], or null
    std::int64_t per_layer_stride;
    void* y;  // [m][hidden]
    std::int64_t batch, queries, tokens;
    int threads;
};

// Where the cache layer that a decoder layer writes or reads lies, for one sequence: what is visible begins at the
// addresses and ends with the place of the token at hand.
struct CacheSlot {
    void* keys;
    void* values;
    const float* key_scale;  // null for values of T
    const float* value_scale;
    std::int64_t key_head_stride, value_head_stride;
    std::int64_t tokens;  // with the one at hand
};

// One token of one sequence through a layer: `before`, the cache, `after`.
struct StepCall {
    const void* x;
    const void* cosine;  // [dim]
    const void* sine;
    CacheSlot slot;
    const void* per_layer;
    void* y;
    int threads;
};

// Rows of T, freed with the call.
class Rows {
  public:
    Rows(std::int64_t m, std::int64_t width, Dtype dtype);

    void* get() const { return memory_.get(); }
    const void* column(std::int64_t first) const { return memory_.get() + first * size_; }
    std::int64_t width() const { return width_; }

  private:
    std::int64_t size_, width_;
    std::unique_ptr<std::uint8_t[]> memory_;
};

class DecoderLayer {
  public:
    DecoderLayer(const Kernels& kernels, Dtype dtype, const LayerShape& shape)
        : kernels_(kernels), dtype_(dtype), shape_(shape) {}

    void before(const BeforeCall& call) const;
    void after(const AfterCall& call) const;
    void step(const StepCall& call) const;

    MaybeNorm input, q_norm, k_norm, v_norm, post_attention, mlp, post_mlp, per_layer_norm;
    std::vector<Projection> qkv, gate_up;
    Columns q, k, v, gate, up;
    Projection o, down, per_layer_gate, per_layer;
    bool has_per_layer = false;
    const float* scalar = nullptr;

    const LayerShape& shape() const { return shape_; }
    const Kernels& kernels() const { return kernels_; }
    Dtype dtype() const { return dtype_; }

  private:
    void project(const Projection& projection, const void* x, void* y, std::int64_t m, int threads,
                 const std::int8_t* codes = nullptr) const;
    std::vector<Rows> project_all(const std::vector<Projection>& projections, const void* x, std::int64_t m,
                                  int threads) const;
    void normalize(const MaybeNorm& norm, const void* x, const void* residual, const float* scalar, void* y,
                   std::int64_t m, int threads) const;
    void store(const void* x, void* to, const float* scale, std::int64_t head_stride, std::int64_t token) const;
    void heads(const MaybeNorm& norm, const void* x, std::int64_t stride, const BeforeCall& call, bool rotate,
               std::int64_t count, void* y) const;

    const Kernels& kernels_;
    Dtype dtype_;
    LayerShape shape_;
};

}  // namespace bytelane::cpu
