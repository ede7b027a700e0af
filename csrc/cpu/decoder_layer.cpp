#include "decoder_layer.hpp"

#include <cstring>
#include <memory>

namespace bytelane::cpu {
Rows::Rows(std::int64_t m, std::int64_t width, Dtype dtype)
    : size_(dtype == Dtype::float32 ? 4 : 2), width_(width),
      memory_(std::make_unique_for_overwrite<std::uint8_t[]>(static_cast<std::size_t>(m * width * size_))) {}

void DecoderLayer::project(const Projection& projection, const void* x, void* y, std::int64_t m, int threads,
                           const std::int8_t* codes) const {
    if (projection.integer) {
        Matmul args = projection.matmul;
        args.x = x, args.codes = codes, args.output.y = y, args.output.dtype = dtype_, args.m = m, args.threads = threads;
        return kernels_.matmul(args);
    }
    WeightOnly args = projection.weight_only;
    args.x = x, args.y = y, args.dtype = dtype_, args.m = m, args.threads = threads;
    kernels_.weight_only(args);
}

// Projections of one tensor that could not be merged (of other widths, say): those of the first one's input scale read
// one set of codes.
std::vector<Rows> DecoderLayer::project_all(const std::vector<Projection>& projections, const void* x, std::int64_t m,
                                            int threads) const {
    std::vector<Rows> made;
    std::vector<std::int8_t> codes;
    const Projection& first = projections.front();
    const auto shares = [&](const Projection& p) {
        return p.integer && first.integer && *p.matmul.output.input_scale == *first.matmul.output.input_scale;
    };
    if (projections.size() > 1 && shares(projections[1])) {
        codes.resize(static_cast<std::size_t>(m * first.matmul.k));
        kernels_.quantize({x, dtype_, m * first.matmul.k, first.matmul.output.input_scale, codes.data(), threads});
    }
    for (const Projection& p : projections) {
        made.emplace_back(m, p.width(), dtype_);
        project(p, x, made.back().get(), m, threads, !codes.empty() && shares(p) ? codes.data() : nullptr);
    }
    return made;
}

void DecoderLayer::normalize(const MaybeNorm& norm, const void* x, const void* residual, const float* scale, void* y,
                             std::int64_t m, int threads) const {
    if (norm.there) {
        return kernels_.norm_rows(
            {x, shape_.hidden, norm.norm, residual, scale, y, dtype_, m, shape_.hidden, threads});
    }
    kernels_.add_rows({residual, x, y, dtype_, m * shape_.hidden, threads});
}

void DecoderLayer::heads(const MaybeNorm& norm, const void* x, std::int64_t stride, const BeforeCall& call,
                         bool rotate, std::int64_t count, void* y) const {
    kernels_.head_rows({x, stride, norm.get(), rotate ? call.cosine : nullptr, rotate ? call.sine : nullptr,
                        call.angles, y, dtype_, call.m, count, shape_.dim, call.threads});
}

void DecoderLayer::before(const BeforeCall& call) const {
    const Rows n(call.m, shape_.hidden, dtype_);
    normalize(input, call.x, nullptr, nullptr, n.get(), call.m, call.threads);
    const std::vector<Rows> made = project_all(qkv, n.get(), call.m, call.threads);
    const auto finish = [&](const Columns& columns, const MaybeNorm& norm, bool rotate, std::int64_t count, void* y) {
        const Rows& from = made[columns.group];
        heads(norm, from.column(columns.first), from.width(), call, rotate, count, y);
    };
    finish(q, q_norm, true, shape_.heads, call.q);
    if (k.there()) {
        finish(k, k_norm, true, shape_.kv_heads, call.k);
        finish(v, v_norm, false, shape_.kv_heads, call.v);
    }
}

// One token's keys or values to their place in the cache.
void DecoderLayer::store(const void* x, void* to, const float* scale, std::int64_t head_stride,
                         std::int64_t token) const {
    const std::int64_t dim = shape_.dim;
    if (scale != nullptr) {
        return kernels_.store_codes({x, shape_.kv_heads * dim, scale, static_cast<std::int8_t*>(to) + token * dim, 0,
                                     head_stride, dtype_, 1, 1, shape_.kv_heads, dim});
    }
    const std::int64_t size = dtype_ == Dtype::float32 ? 4 : 2;
    for (std::int64_t h = 0; h < shape_.kv_heads; ++h) {
        std::memcpy(static_cast<std::uint8_t*>(to) + (h * head_stride + token * dim) * size,
                    static_cast<const std::uint8_t*>(x) + h * dim * size, static_cast<std::size_t>(dim * size));
    }
}

void DecoderLayer::step(const StepCall& call) const {
    const std::int64_t dim = shape_.dim;
    const CacheSlot& slot = call.slot;
    const Rows q_row(1, shape_.heads * dim, dtype_), k_row(1, shape_.kv_heads * dim, dtype_),
        v_row(1, shape_.kv_heads * dim, dtype_);
    const bool own = k.there();
    before({call.x, call.cosine, call.sine, 1, q_row.get(), own ? k_row.get() : nullptr, own ? v_row.get() : nullptr, 1,
            call.threads});
    if (own) {
        store(k_row.get(), slot.keys, slot.key_scale, slot.key_head_stride, slot.tokens - 1);
        store(v_row.get(), slot.values, slot.value_scale, slot.value_head_stride, slot.tokens - 1);
    }
    after({call.x, q_row.get(), {slot.keys, slot.key_scale, 0, slot.key_head_stride, dim},
           {slot.values, slot.value_scale, 0, slot.value_head_stride, dim}, nullptr, 0, 0, call.per_layer, 0, call.y, 1,
           1, slot.tokens, call.threads});
}

void DecoderLayer::after(const AfterCall& call) const {
    const std::int64_t m = call.batch * call.queries, hidden = shape_.hidden;
    const int threads = call.threads;
    const Rows branch(m, hidden, dtype_), stream(m, hidden, dtype_), next(m, hidden, dtype_);
    {
        const Rows seen(m, shape_.heads * shape_.dim, dtype_);
        kernels_.attention({call.q, call.keys, call.values, call.mask, call.mask_batch_stride, call.mask_query_stride,
                            seen.get(), shape_.scaling, dtype_, call.batch, call.queries, call.tokens, shape_.heads,
                            shape_.kv_heads, shape_.dim, threads});
        project(o, seen.get(), branch.get(), m, threads);
    }
    normalize(post_attention, branch.get(), call.x, nullptr, stream.get(), m, threads);
    normalize(mlp, stream.get(), nullptr, nullptr, next.get(), m, threads);
    {
        const std::vector<Rows> made = project_all(gate_up, next.get(), m, threads);
        const Rows &gates = made[gate.group], &ups = made[up.group];
        const std::int64_t width = down.integer ? down.matmul.k : down.weight_only.k;
        const Rows gated(m, width, dtype_);
        kernels_.gate_rows({gates.column(gate.first), ups.column(up.first), gates.width(), ups.width(), gated.get(),
                            shape_.activation, dtype_, m, width, threads});
        project(down, gated.get(), branch.get(), m, threads);
    }
    if (!has_per_layer) {
        return normalize(post_mlp, branch.get(), stream.get(), scalar, call.y, m, threads);
    }
    normalize(post_mlp, branch.get(), stream.get(), nullptr, next.get(), m, threads);
    const std::int64_t width = per_layer_gate.width();
    const Rows gates(m, width, dtype_), gated(m, width, dtype_);
    project(per_layer_gate, next.get(), gates.get(), m, threads);
    kernels_.gate_rows({gates.get(), call.per_layer, width, call.per_layer_stride, gated.get(), shape_.activation,
                        dtype_, m, width, threads});
    project(per_layer, gated.get(), branch.get(), m, threads);
    normalize(per_layer_norm, branch.get(), next.get(), scalar, call.y, m, threads);
}

}  // namespace bytelane::cpu
