// Softmax attention over keys and values as the cache holds them: int8 codes, read in place, or T.
//
//     s[t] = f32(scaling * k_scale) * sum_d q[d] * k[t,d]      float32, 16 lanes by d, then lanes l and l + 8, + 4, + 2, + 1
//     e[t] = exp(s[t] - max s)                                 over the visible keys alone
//     p[t] = T(e[t] / sum e)                                   the sum in 16 lanes by rank among the visible keys
//     y[d] = T(v_scale * sum_t p[t] * v[t,d])                  float32, ascending t
//
// Codes times 16-bit floats and products of two 16-bit floats are exact in float32, so a fused multiply-add and a
// multiply and an add give the same bits; with float32 activations the two are kept apart. A key that is not visible
// leaves no trace: not in the maximum, not in the sums, not in the order. So the bits depend on the query and the keys
// it sees, and not on padding, on how a prompt was cut into pieces, on a window's buffer, the batch or the threads.
//
// A task is a tile of rows that share keys: (query, head of the group) pairs of one batch entry and one KV head.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "float_dot.hpp"
#include "float_ops.hpp"
#include "kernels.hpp"
#include "scratch.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kSerialProducts = 128 << 10;  // fewer multiply-adds than this are not worth waking a thread

// Which keys a row sees: `first .. last`, all of them if `whole`.
struct Visible {
    std::int64_t first, last;
    bool whole;
};

template <class Isa, class Element, bool Exact>
class AttentionDriver {
    using Floats = typename Isa::Floats;
    using Dot = FloatDot<Isa, Element, Exact>;
    static constexpr int kTile = kDotTile<Isa>;

  public:
    explicit AttentionDriver(const Attention& args) : a_(args) {
        group_ = a_.heads / a_.kv_heads;
        rows_ = a_.queries * group_;
        dim_ = ceil_div(a_.dim, kVector) * kVector;
        tokens_ = ceil_div(a_.tokens, kVector) * kVector;
        tile_ = kTile;
        while (tile_ > 1 && a_.batch * a_.kv_heads * ceil_div(rows_, tile_) < a_.threads) tile_ /= 2;
        tiles_ = ceil_div(rows_, tile_);
        const std::int64_t products = a_.batch * a_.heads * a_.queries * a_.tokens * a_.dim;
        const std::int64_t tasks = a_.batch * a_.kv_heads * tiles_;
        threads_ = products < kSerialProducts ? 1 : static_cast<int>(larger(1, smaller(a_.threads, tasks)));
        const float k_scale = a_.keys.scale != nullptr ? *a_.keys.scale : 1.0f;
        factor_ = a_.scaling * k_scale;
        v_scale_ = a_.values.scale != nullptr ? *a_.values.scale : 1.0f;
    }

    void run() const {
        // Heads that are no whole number of vectors are copied once, padded with zeros, so that loads never overreach.
        const bool ragged = dim_ != a_.dim;
        const std::int64_t head = a_.tokens * dim_, heads = a_.batch * a_.kv_heads;
        const Scratch copies(ragged ? 2 * (heads * head * static_cast<std::int64_t>(sizeof(Element)) + Carver::alignment) : 0, 1);
        Carver copied = copies.of(0);
        Stored keys = a_.keys, values = a_.values;
        if (ragged) {
            keys = pad(keys, copied.take<Element>(heads * head));
            values = pad(values, copied.take<Element>(heads * head));
        }
        const std::int64_t each = tile_ * (dim_ + tokens_) * 4 + tokens_ * 8 + dim_ * 4 + 8 * Carver::alignment + 256;
        const Scratch scratch(each, threads_);
        in_parallel(threads_, [&] {
#pragma omp for schedule(dynamic) nowait
            for (std::int64_t task = 0; task < heads * tiles_; ++task) {
                const std::int64_t entry = task / tiles_, first = task % tiles_ * tile_;
                run_tile(entry / a_.kv_heads, entry % a_.kv_heads, first, smaller(tile_, rows_ - first), keys, values,
                         scratch.of_this_thread());
            }
        });
    }

  private:
    Stored pad(const Stored& from, Element* to) const {
        for (std::int64_t b = 0; b < a_.batch; ++b) {
            for (std::int64_t h = 0; h < a_.kv_heads; ++h) {
                for (std::int64_t t = 0; t < a_.tokens; ++t) {
                    Element* row = to + ((b * a_.kv_heads + h) * a_.tokens + t) * dim_;
                    std::memcpy(row, head_of(from, b, h) + t * from.token_stride, a_.dim * sizeof(Element));
                    std::memset(row + a_.dim, 0, (dim_ - a_.dim) * sizeof(Element));
                }
            }
        }
        return {to, from.scale, a_.kv_heads * a_.tokens * dim_, a_.tokens * dim_, dim_};
    }

    static const Element* head_of(const Stored& stored, std::int64_t b, std::int64_t h) {
        return static_cast<const Element*>(stored.data) + b * stored.batch_stride + h * stored.head_stride;
    }

    const bool* mask_row(std::int64_t b, std::int64_t query) const {
        return a_.mask + b * a_.mask_batch_stride + query * a_.mask_query_stride;
    }

    Visible visible(std::int64_t b, std::int64_t query) const {
        if (a_.mask == nullptr) return {0, larger(0, a_.tokens - a_.queries + query + 1), true};
        const bool* mask = mask_row(b, query);
        const auto* found = static_cast<const bool*>(std::memchr(mask, 1, a_.tokens));
        if (found == nullptr) return {0, 0, true};
        std::int64_t last = a_.tokens;
        while (!mask[last - 1]) --last;
        const std::int64_t first = found - mask;
        return {first, last, std::memchr(found, 0, last - first) == nullptr};
    }

    void run_tile(std::int64_t b, std::int64_t h, std::int64_t first, std::int64_t count, const Stored& keys,
                  const Stored& values, Carver memory) const {
        auto* q = memory.take<float>(tile_ * dim_ + kChunk);
        auto* scores = memory.take<float>(tile_ * tokens_);
        auto* compact = memory.take<float>(tokens_);
        auto* index = memory.take<std::int32_t>(tokens_);
        auto* sums = memory.take<float>(dim_ + kChunk);
        Visible seen[kTile] = {};
        std::int64_t begin = a_.tokens, end = 0;
        for (std::int64_t r = 0; r < smaller(count, kTile); ++r) {  // never more: said for the compiler
            const std::int64_t query = (first + r) / group_;
            seen[r] = visible(b, query);
            if (seen[r].first < seen[r].last) {
                begin = smaller(begin, seen[r].first);
                end = larger(end, seen[r].last);
            }
            load_query(b, h, first + r, q + r * dim_);
        }
        const Element* k = head_of(keys, b, h);
        const Element* v = head_of(values, b, h);
        std::int64_t r = 0;
        if (count == kTile) {
            score<kTile>(q, k, keys.token_stride, begin, end, scores);
        } else {
            for (r = 0; r < count; ++r) score<1>(q + r * dim_, k, keys.token_stride, begin, end, scores + r * tokens_);
        }
        for (r = 0; r < count; ++r) {
            const bool* mask = a_.mask == nullptr ? nullptr : mask_row(b, (first + r) / group_);
            softmax(scores + r * tokens_, seen[r], begin, end, mask, compact, index);
        }
        if (count == kTile) {
            combine<kTile>(scores, v, values.token_stride, begin, end, b, h, first, sums);
        } else {
            for (r = 0; r < count; ++r) {
                combine<1>(scores + r * tokens_, v, values.token_stride, begin, end, b, h, first + r, sums);
            }
        }
    }

    // Where row `row` of a group's rows stands in q and y.
    std::int64_t place(std::int64_t b, std::int64_t h, std::int64_t row) const {
        const std::int64_t query = row / group_, head = h * group_ + row % group_;
        return ((b * a_.queries + query) * a_.heads + head) * a_.dim;
    }

    void load_query(std::int64_t b, std::int64_t h, std::int64_t row, float* out) const {
        alignas(64) float chunk[kChunk];
        const void* from = at(a_.q, place(b, h, row), a_.dtype);
        for (std::int64_t d = 0; d < dim_; d += kChunk) {
            widen_span<Isa>(at(from, d, a_.dtype), a_.dtype, smaller(kChunk, a_.dim - d), chunk);
            std::memcpy(out + d, chunk, smaller(kChunk, dim_ - d) * sizeof(float));
        }
    }

    template <int R>
    void score(const float* q, const Element* k, std::int64_t stride, std::int64_t begin, std::int64_t end,
               float* scores) const {
        std::int64_t t = begin;
        for (; t + kTile <= end; t += kTile) {
            Dot::template tile<R, kTile>(q, dim_, k + t * stride, stride, dim_, scores + t, tokens_);
        }
        for (; t < end; ++t) Dot::template tile<R, 1>(q, dim_, k + t * stride, stride, dim_, scores + t, tokens_);
        for (int r = 0; r < R; ++r) {
            for (t = begin; t < end; ++t) scores[r * tokens_ + t] = factor_ * scores[r * tokens_ + t];
        }
    }

    // Scores to weights in place, zeros at the keys of `begin .. end` that the row does not see.
    void softmax(float* scores, const Visible& seen, std::int64_t begin, std::int64_t end, const bool* mask,
                 float* compact, std::int32_t* index) const {
        std::int64_t count = seen.last - seen.first;
        if (count <= 0) {
            for (std::int64_t t = begin; t < end; ++t) scores[t] = 0.0f;
            return;
        }
        if (seen.whole) {
            for (std::int64_t t = begin; t < seen.first; ++t) scores[t] = 0.0f;
            weigh(scores + seen.first, count);
            for (std::int64_t t = seen.last; t < end; ++t) scores[t] = 0.0f;
            return;
        }
        count = 0;
        for (std::int64_t t = seen.first; t < seen.last; ++t) {
            if (!mask[t]) continue;
            index[count] = static_cast<std::int32_t>(t);
            compact[count++] = scores[t];
        }
        weigh(compact, count);
        for (std::int64_t t = begin; t < end; ++t) scores[t] = 0.0f;
        for (std::int64_t i = 0; i < count; ++i) scores[index[i]] = compact[i];
    }

    // `count` scores, all visible, to weights; each is rounded to T.
    void weigh(float* s, std::int64_t count) const {
        float lanes[kVector];
        for (auto& lane : lanes) lane = -INFINITY;
        const std::int64_t whole = count / kVector * kVector;
        for (std::int64_t t = 0; t < whole; t += kVector) {
            for (int l = 0; l < kVector; ++l) lanes[l] = s[t + l] > lanes[l] ? s[t + l] : lanes[l];
        }
        for (std::int64_t t = whole; t < count; ++t) lanes[t - whole] = s[t] > lanes[t - whole] ? s[t] : lanes[t - whole];
        float most = lanes[0];
        for (const float lane : lanes) most = lane > most ? lane : most;
        for (auto& lane : lanes) lane = 0.0f;
        for (std::int64_t t = 0; t < whole; t += kVector) {
            for (int l = 0; l < kVector; ++l) {
                s[t + l] = exponential(s[t + l] - most);
                lanes[l] = lanes[l] + s[t + l];
            }
        }
        for (std::int64_t t = whole; t < count; ++t) {
            s[t] = exponential(s[t] - most);
            lanes[t - whole] = lanes[t - whole] + s[t];
        }
        const float total = Isa::sum(Isa::load(lanes));
        for (std::int64_t t = 0; t < count; ++t) s[t] = s[t] / total;
        alignas(64) float chunk[kChunk] = {};
        for (std::int64_t t = 0; t < count; t += kChunk) {
            const std::int64_t part = smaller(kChunk, count - t);
            std::memcpy(chunk, s + t, part * sizeof(float));
            round_chunk<Isa>(chunk, a_.dtype);
            std::memcpy(s + t, chunk, part * sizeof(float));
        }
    }

    template <int R>
    void combine(const float* weights, const Element* v, std::int64_t stride, std::int64_t begin, std::int64_t end,
                 std::int64_t b, std::int64_t h, std::int64_t row, float* sums) const {
        std::int64_t d = 0;
        for (; d + kChunk <= dim_; d += kChunk) {
            combine_block<R, kChunk / kVector>(weights, v + d, stride, begin, end, b, h, row, d, sums);
        }
        for (; d < dim_; d += kVector) combine_block<R, 1>(weights, v + d, stride, begin, end, b, h, row, d, sums);
    }

    // `Vectors` times 16 outputs from index d on, of R rows.
    template <int R, int Vectors>
    void combine_block(const float* weights, const Element* v, std::int64_t stride, std::int64_t begin,
                       std::int64_t end, std::int64_t b, std::int64_t h, std::int64_t row, std::int64_t d,
                       float* sums) const {
        Floats sum[R][Vectors];
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < Vectors; ++i) sum[r][i] = Isa::zero();
        }
        for (std::int64_t t = begin; t < end; ++t) {
            Floats value[Vectors];
            for (int i = 0; i < Vectors; ++i) value[i] = Dot::load(v + t * stride + i * kVector);
            for (int r = 0; r < R; ++r) {
                const Floats weight = Isa::broadcast(weights[r * tokens_ + t]);
                for (int i = 0; i < Vectors; ++i) Dot::add(sum[r][i], weight, value[i]);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < Vectors; ++i) Isa::store(sums + i * kVector, sum[r][i]);
            for (int i = 0; i < Vectors * kVector; ++i) sums[i] = sums[i] * v_scale_;
            const std::int64_t count = smaller(Vectors * kVector, a_.dim - d);
            narrow<Isa>(sums, a_.dtype, at(a_.y, place(b, h, row + r) + d, a_.dtype), count);
        }
    }

    const Attention& a_;
    std::int64_t group_, rows_, dim_, tokens_, tile_, tiles_;
    int threads_;
    float factor_, v_scale_;
};

template <class Isa>
void attention(const Attention& args) {
    if (args.keys.scale != nullptr) {
        if (args.dtype == Dtype::float32) return AttentionDriver<Isa, std::int8_t, false>(args).run();
        return AttentionDriver<Isa, std::int8_t, true>(args).run();
    }
    switch (args.dtype) {
        case Dtype::bfloat16: return AttentionDriver<Isa, Bfloat, true>(args).run();
        case Dtype::float16: return AttentionDriver<Isa, Half, true>(args).run();
        default: return AttentionDriver<Isa, float, false>(args).run();
    }
}

}  // namespace
}  // namespace bytelane::cpu
