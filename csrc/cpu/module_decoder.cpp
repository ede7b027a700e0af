// The decoder layer and the kernels between the layers, for Python: addresses and sizes, as in module.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "decoder_layer.hpp"
#include "module.hpp"

namespace nb = nanobind;

namespace bytelane::cpu {
namespace {

using Address = std::uintptr_t;

void check_positive(std::int64_t value, const char* what) {
    if (value < 1) refuse(std::string(what) + " must be at least 1, found " + std::to_string(value));
}

void check_rows(std::int64_t rows, std::int64_t width) {
    if (rows < 0) refuse("sizes must not be negative");
    check_positive(width, "a row's width");
}

Activation activation_of(int activation) {
    if (activation < 0 || activation > 1) {
        refuse("activation must be 0 (gelu_tanh) or 1 (silu), found " + std::to_string(activation));
    }
    return static_cast<Activation>(activation);
}

void check_heads(std::int64_t heads, std::int64_t kv_heads, std::int64_t dim) {
    check_positive(heads, "heads"), check_positive(kv_heads, "kv_heads"), check_positive(dim, "a head's width");
    if (heads % kv_heads != 0) {
        refuse(std::to_string(kv_heads) + " KV heads do not divide " + std::to_string(heads) + " heads");
    }
}

// --- kernels ----------------------------------------------------------------------------------------------------------

void call_norm_rows(int isa, Address x, std::int64_t x_stride, int dtype, Address weight, bool weight_in_t, float eps,
                    Address residual, Address scalar, Address y, std::int64_t rows, std::int64_t width, int threads) {
    check_rows(rows, width);
    kernels(isa).norm_rows({pointer<const void>(x), x_stride, {pointer<const float>(weight), eps, weight_in_t},
                            pointer<const void>(residual), pointer<const float>(scalar), pointer<void>(y),
                            dtype_of(dtype), rows, width, Threads(threads)});
}

void call_head_rows(int isa, Address x, std::int64_t x_stride, int dtype, bool normalized, Address weight,
                    bool weight_in_t, float eps, Address cosine, Address sine, std::int64_t angles, Address y,
                    std::int64_t rows, std::int64_t heads, std::int64_t dim, int threads) {
    check_rows(rows, dim);
    check_positive(heads, "heads");
    if (cosine != 0) check_positive(angles, "angles");
    if (cosine != 0 && dim % 2 != 0) refuse("a rotated head has an even width, found " + std::to_string(dim));
    const Norm norm = {pointer<const float>(weight), eps, weight_in_t};
    kernels(isa).head_rows({pointer<const void>(x), x_stride, normalized ? &norm : nullptr, pointer<const void>(cosine),
                            pointer<const void>(sine), angles, pointer<void>(y), dtype_of(dtype), rows, heads, dim,
                            Threads(threads)});
}

void call_gate_rows(int isa, Address gate, std::int64_t gate_stride, Address up, std::int64_t up_stride, int dtype,
                    int activation, Address y, std::int64_t rows, std::int64_t width, int threads) {
    check_rows(rows, width);
    kernels(isa).gate_rows({pointer<const void>(gate), pointer<const void>(up), gate_stride, up_stride,
                            pointer<void>(y), activation_of(activation), dtype_of(dtype), rows, width,
                            Threads(threads)});
}

void call_dense(int isa, Address x, Address w, Address bias, Address y, int dtype, std::int64_t m, std::int64_t n,
                std::int64_t k, int threads) {
    check_rows(m, k);
    if (n < 0) refuse("sizes must not be negative");
    kernels(isa).dense({pointer<const void>(x), pointer<const void>(w), pointer<const float>(bias), pointer<void>(y),
                        dtype_of(dtype), m, n, k, Threads(threads)});
}

void call_store_codes(int isa, Address x, std::int64_t x_stride, int dtype, Address scale, Address codes,
                      std::int64_t batch_stride, std::int64_t head_stride, std::int64_t batch, std::int64_t tokens,
                      std::int64_t heads, std::int64_t dim) {
    check_rows(batch * tokens, dim);
    kernels(isa).store_codes({pointer<const void>(x), x_stride, pointer<const float>(scale),
                              pointer<std::int8_t>(codes), batch_stride, head_stride, dtype_of(dtype), batch, tokens,
                              heads, dim});
}

Stored stored(Address data, Address scale, std::int64_t batch, std::int64_t head, std::int64_t token) {
    return {pointer<const void>(data), pointer<const float>(scale), batch, head, token};
}

void call_attention(int isa, Address q, int dtype, Address k, Address k_scale, std::int64_t k_batch,
                    std::int64_t k_head, std::int64_t k_token, Address v, Address v_scale, std::int64_t v_batch,
                    std::int64_t v_head, std::int64_t v_token, Address mask, std::int64_t mask_batch,
                    std::int64_t mask_query, Address y, float scaling, std::int64_t batch, std::int64_t queries,
                    std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim, int threads) {
    check_heads(heads, kv_heads, dim);
    if (batch < 0 || queries < 0 || tokens < 0) refuse("sizes must not be negative");
    kernels(isa).attention({pointer<const void>(q), stored(k, k_scale, k_batch, k_head, k_token),
                            stored(v, v_scale, v_batch, v_head, v_token), pointer<const bool>(mask), mask_batch,
                            mask_query, pointer<void>(y), scaling, dtype_of(dtype), batch, queries, tokens, heads,
                            kv_heads, dim, Threads(threads)});
}

// --- the layer --------------------------------------------------------------------------------------------------------

// A decoder layer while it is being put together: what is still missing is refused by `seal`.
class LayerBuilder {
  public:
    LayerBuilder(int isa, int dtype, std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
                 float scaling, int activation)
        : layer_(bytelane::cpu::kernels(isa), dtype_of(dtype),
                 {hidden, heads, kv_heads, dim, scaling, activation_of(activation)}) {
        check_positive(hidden, "hidden");
        check_heads(heads, kv_heads, dim);
        norms_ = {{"input", &layer_.input},         {"q", &layer_.q_norm},
                  {"k", &layer_.k_norm},            {"v", &layer_.v_norm},
                  {"post_attention", &layer_.post_attention}, {"mlp", &layer_.mlp},
                  {"post_mlp", &layer_.post_mlp},   {"per_layer", &layer_.per_layer_norm}};
        columns_ = {{"q", &layer_.q}, {"k", &layer_.k}, {"v", &layer_.v}, {"gate", &layer_.gate}, {"up", &layer_.up}};
        singles_ = {{"o", &layer_.o}, {"down", &layer_.down}, {"per_layer_gate", &layer_.per_layer_gate},
                    {"per_layer", &layer_.per_layer}};
    }
    LayerBuilder(const LayerBuilder&) = delete;
    LayerBuilder& operator=(const LayerBuilder&) = delete;

    void norm(const std::string& name, Address weight, float eps, bool weight_in_t) {
        *named(norms_, name) = {true, {pointer<const float>(weight), eps, weight_in_t}};
    }

    void scalar(Address value) { layer_.scalar = pointer<const float>(value); }

    // `role` is a single projection, or "qkv" or "gate_up", which may be added several times.
    void integer(const std::string& role, int path, Address w, Address weight_scale, Address input_scale,
                 Address output_scale, std::int64_t output_scales, Address bias, Address group_scales, std::int64_t n,
                 std::int64_t k, int bits, std::int64_t group_size) {
        check_sizes(0, n, k, bits, group_size, path);
        Projection made;
        made.matmul.w = pointer<const std::uint8_t>(w);
        made.matmul.output = {pointer<const float>(weight_scale), pointer<const float>(input_scale),
                              pointer<const float>(output_scale), check_output_scales(output_scales, n),
                              pointer<const float>(bias), nullptr, layer_.dtype(),
                              pointer<const float>(group_scales)};
        made.matmul.n = n, made.matmul.k = k, made.matmul.bits = bits, made.matmul.group_size = group_size;
        made.matmul.path = static_cast<Path>(path);
        take(role, made);
    }

    void weight_only(const std::string& role, Address w, Address weight_scale, Address output_scale, Address bias,
                     std::int64_t n, std::int64_t k, int bits, std::int64_t groups) {
        check_table(0, k, bits, groups);
        if (layer_.dtype() == Dtype::float32) refuse("a weight-only projection takes bfloat16 or float16");
        Projection made;
        made.integer = false;
        made.weight_only.w = pointer<const std::uint8_t>(w);
        made.weight_only.weight_scale = pointer<const float>(weight_scale);
        made.weight_only.output_scale = pointer<const float>(output_scale);
        made.weight_only.bias = pointer<const float>(bias);
        made.weight_only.n = n, made.weight_only.k = k, made.weight_only.bits = bits, made.weight_only.groups = groups;
        take(role, made);
    }

    // Where a logical projection's outputs are: columns `first` on of the `group`-th "qkv" or "gate_up".
    void columns(const std::string& name, std::int64_t group, std::int64_t first) {
        *named(columns_, name) = {group, first};
    }

    void seal() {
        const LayerShape& shape = layer_.shape();
        const std::int64_t inner = shape.heads * shape.dim, kv = shape.kv_heads * shape.dim;
        if (!layer_.input.there || !layer_.mlp.there) refuse("a layer normalizes what its projections read");
        if (layer_.k.there() != layer_.v.there()) refuse("keys and values come together");
        check_columns("q", layer_.q, layer_.qkv, inner);
        if (layer_.k.there()) {
            check_columns("k", layer_.k, layer_.qkv, kv);
            check_columns("v", layer_.v, layer_.qkv, kv);
        }
        const std::int64_t middle = inputs(layer_.down);
        check_columns("gate", layer_.gate, layer_.gate_up, middle);
        check_columns("up", layer_.up, layer_.gate_up, middle);
        for (const Projection& p : layer_.qkv) check_projection("qkv", p, shape.hidden, p.width());
        for (const Projection& p : layer_.gate_up) check_projection("gate_up", p, shape.hidden, p.width());
        check_projection("o", layer_.o, inner, shape.hidden);
        check_projection("down", layer_.down, middle, shape.hidden);
        if (layer_.has_per_layer) {
            check_projection("per_layer_gate", layer_.per_layer_gate, shape.hidden, layer_.per_layer_gate.width());
            check_projection("per_layer", layer_.per_layer, layer_.per_layer_gate.width(), shape.hidden);
        }
        const MaybeNorm& last = layer_.has_per_layer ? layer_.per_layer_norm : layer_.post_mlp;
        if (layer_.scalar != nullptr && !last.there) refuse("a layer's scalar follows its last norm");
        if (layer_.has_per_layer && !layer_.per_layer_norm.there) refuse("a per-layer input's projection has a norm");
        sealed_ = true;
    }

    void before(Address x, Address cosine, Address sine, std::int64_t angles, Address q, Address k, Address v,
                std::int64_t m, int threads) const {
        check_sealed();
        check_positive(m, "rows"), check_positive(angles, "angles");
        if ((k != 0) != layer_.k.there() || (v != 0) != layer_.v.there()) refuse("k and v are for a layer that has them");
        layer_.before({pointer<const void>(x), pointer<const void>(cosine), pointer<const void>(sine), angles,
                       pointer<void>(q), pointer<void>(k), pointer<void>(v), m, Threads(threads)});
    }

    void after(Address x, Address q, Address k, Address k_scale, std::int64_t k_batch, std::int64_t k_head,
               std::int64_t k_token, Address v, Address v_scale, std::int64_t v_batch, std::int64_t v_head,
               std::int64_t v_token, Address mask, std::int64_t mask_batch, std::int64_t mask_query, Address per_layer,
               std::int64_t per_layer_stride, Address y, std::int64_t batch, std::int64_t queries, std::int64_t tokens,
               int threads) const {
        check_sealed();
        check_positive(batch, "batch"), check_positive(queries, "queries"), check_positive(tokens, "tokens");
        if ((per_layer != 0) != layer_.has_per_layer) refuse("a per-layer input is for a layer that has one");
        if ((k_scale != 0) != (v_scale != 0)) refuse("keys and values are stored alike");
        layer_.after({pointer<const void>(x), pointer<const void>(q), stored(k, k_scale, k_batch, k_head, k_token),
                      stored(v, v_scale, v_batch, v_head, v_token), pointer<const bool>(mask), mask_batch, mask_query,
                      pointer<const void>(per_layer), per_layer_stride, pointer<void>(y), batch, queries, tokens,
                      Threads(threads)});
    }

    const DecoderLayer& sealed() const {
        check_sealed();
        return layer_;
    }

  private:
    template <class T>
    static T* named(const std::map<std::string, T*>& table, const std::string& name) {
        const auto found = table.find(name);
        if (found == table.end()) refuse("a layer has no part named " + name);
        return found->second;
    }

    void take(const std::string& role, const Projection& projection) {
        if (role == "qkv") return layer_.qkv.push_back(projection);
        if (role == "gate_up") return layer_.gate_up.push_back(projection);
        if (role == "per_layer") layer_.has_per_layer = true;
        *named(singles_, role) = projection;
    }

    static std::int64_t inputs(const Projection& p) { return p.integer ? p.matmul.k : p.weight_only.k; }

    static void check_projection(const std::string& name, const Projection& p, std::int64_t k, std::int64_t n) {
        if (inputs(p) == k && p.width() == n && n > 0) return;
        refuse("the projection " + name + " must be " + std::to_string(k) + " to " + std::to_string(n) + ", found " +
               std::to_string(inputs(p)) + " to " + std::to_string(p.width()));
    }

    static void check_columns(const std::string& name, const Columns& columns, const std::vector<Projection>& groups,
                              std::int64_t width) {
        const bool there = columns.group >= 0 && columns.group < static_cast<std::int64_t>(groups.size());
        if (there && columns.first >= 0 && columns.first + width <= groups[columns.group].width()) return;
        refuse("the outputs of " + name + " are not columns of a projection");
    }

    void check_sealed() const {
        if (!sealed_) refuse("the layer is not sealed");
    }

    DecoderLayer layer_;
    std::map<std::string, MaybeNorm*> norms_;
    std::map<std::string, Columns*> columns_;
    std::map<std::string, Projection*> singles_;
    bool sealed_ = false;
};

// Layers that a token goes through one after the other.
class LayerStack {
  public:
    static constexpr std::int64_t kFields = 8;

    void add(const LayerBuilder& layer) { layers_.push_back(&layer.sealed()); }

    // `slots` has a row of int64 for each layer: the fields of CacheSlot in their order, and the index of its angles;
    // `angles` has two addresses for each index, cosines and sines; `per_layer` goes on by `per_layer_step` elements.
    void step(Address x, Address slots, std::int64_t rows, Address angles, std::int64_t angle_count, Address per_layer,
              std::int64_t per_layer_step, Address y, int threads) const {
        if (rows != static_cast<std::int64_t>(layers_.size()) || rows == 0) {
            refuse("there must be a slot for each of the " + std::to_string(layers_.size()) + " layers, found " +
                   std::to_string(rows));
        }
        const auto* fields = pointer<const std::int64_t>(slots);
        const auto* angle = pointer<const std::int64_t>(angles);
        const LayerShape& shape = layers_.front()->shape();
        const std::int64_t size = layers_.front()->dtype() == Dtype::float32 ? 4 : 2;
        std::vector<std::uint8_t> streams(static_cast<std::size_t>(2 * shape.hidden * size));
        const auto address = [](std::int64_t value) { return static_cast<Address>(value); };
        const Threads mine(threads);
        Address from = x;
        for (std::int64_t i = 0; i < rows; ++i, fields += kFields) {
            if (fields[6] < 1) refuse("a layer sees at least the token at hand");
            if (fields[7] < 0 || fields[7] >= angle_count) refuse("there are no such angles");
            const CacheSlot slot = {pointer<void>(address(fields[0])),        pointer<void>(address(fields[1])),
                                    pointer<const float>(address(fields[2])), pointer<const float>(address(fields[3])),
                                    fields[4], fields[5], fields[6]};
            const Address to = i + 1 == rows ? y : reinterpret_cast<Address>(streams.data() + i % 2 * shape.hidden * size);
            const Address gate = per_layer == 0 ? 0 : per_layer + address(i * per_layer_step * size);
            layers_[i]->step({pointer<const void>(from), pointer<const void>(address(angle[2 * fields[7]])),
                              pointer<const void>(address(angle[2 * fields[7] + 1])), slot, pointer<const void>(gate),
                              pointer<void>(to), mine});
            from = to;
        }
    }

  private:
    std::vector<const DecoderLayer*> layers_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
    using Free = nb::call_guard<nb::gil_scoped_release>;
    m.def("norm_rows", call_norm_rows, Free());
    m.def("head_rows", call_head_rows, Free());
    m.def("gate_rows", call_gate_rows, Free());
    m.def("dense", call_dense, Free());
    m.def("store_codes", call_store_codes, Free());
    m.def("attention", call_attention, Free());
    nb::class_<LayerBuilder>(m, "DecoderLayer")
        .def(nb::init<int, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float, int>())
        .def("norm", &LayerBuilder::norm)
        .def("scalar", &LayerBuilder::scalar)
        .def("integer", &LayerBuilder::integer)
        .def("weight_only", &LayerBuilder::weight_only)
        .def("columns", &LayerBuilder::columns)
        .def("seal", &LayerBuilder::seal)
        .def("before", &LayerBuilder::before, Free())
        .def("after", &LayerBuilder::after, Free());
    nb::class_<LayerStack>(m, "LayerStack")
        .def(nb::init<>())
        .def("add", &LayerStack::add, nb::keep_alive<1, 2>())
        .def("step", &LayerStack::step, Free());
}

}  // namespace bytelane::cpu
