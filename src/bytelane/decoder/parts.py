"""What a decoder layer consists of, read off transformers' modules.

Each supported architecture has a row of `ARCHITECTURES` with a reader, which names the modules, the norms and the order
of their roundings. A layer whose class is not here, or that has something these parts do not describe, is refused with
the reason, and keeps transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.kernels.float_ops import ACTIVATIONS, ActivationName, Norm


class NotSupportedError(Exception):
    """Why a decoder layer keeps transformers' own forward."""


@dataclass(frozen=True)
class LinearPart:
    """Where a projection is: looked up at every call, so that a replaced module counts."""

    owner: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """The linear layer."""
        found = self.owner._modules[self.name]
        assert found is not None
        return found


@dataclass(frozen=True)
class NormPart:
    """A norm's module and how it orders its roundings.

    Attributes:
        module: transformers' norm.
        eps: added to the mean of squares.
        weight_in_t: Llama's order: the weight multiplies values already rounded to T.
        plus_one: Gemma 3's: the weight is stored less 1.
    """

    module: nn.Module
    eps: float
    weight_in_t: bool = False
    plus_one: bool = False

    def norm(self) -> Norm:
        """The norm with its weight as it is now."""
        weight: Tensor | None = getattr(self.module, "weight", None)
        if weight is None:
            return Norm(None, self.eps)
        values = weight.detach().to(torch.float32)
        return Norm((1.0 + values if self.plus_one else values).contiguous(), self.eps, self.weight_in_t)


@dataclass(frozen=True)
class PerLayerParts:
    """Gemma 4's per-layer input: gated by the stream, projected, normalized, added."""

    gate: LinearPart
    projection: LinearPart
    norm: NormPart


@dataclass(frozen=True)
class Parts:
    """A decoder layer's parts. `k`, `v` and their norms are None in a layer that reads another layer's cache.

    Attributes:
        layer_idx: of the cache layer.
        scaling: of the attention scores.
        shares: the layer type under which keys and values are handed on (Gemma 4), or None.
        stores: this layer hands its keys and values on.
        scalar: multiplies the layer's output; a tensor of one element, or None.
    """

    layer: nn.Module
    attention: nn.Module
    layer_idx: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    scaling: float
    activation: ActivationName
    input_norm: NormPart
    q: LinearPart
    k: LinearPart | None
    v: LinearPart | None
    o: LinearPart
    q_norm: NormPart | None
    k_norm: NormPart | None
    v_norm: NormPart | None
    post_attention: NormPart | None
    mlp_norm: NormPart
    gate: LinearPart
    up: LinearPart
    down: LinearPart
    post_mlp: NormPart | None
    per_layer: PerLayerParts | None = None
    scalar: Tensor | None = None
    shares: str | None = None
    stores: bool = False

    def linears(self) -> list[LinearPart]:
        """Every projection, in the order of execution."""
        found = [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]
        if self.per_layer is not None:
            found += [self.per_layer.gate, self.per_layer.projection]
        return [part for part in found if part is not None]


def _activation(config: Any, *names: str) -> ActivationName:
    found: str | None = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    if found == "swish":
        return "silu"
    match found:
        case "silu" | "gelu_pytorch_tanh":
            return found
    raise NotSupportedError(f"the gate activation is {found}, not one of {', '.join(ACTIVATIONS)}")


def _common(layer: Any, activation: ActivationName) -> dict[str, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    if not getattr(attention, "is_causal", False):
        raise NotSupportedError("its attention is not causal")
    dim, k = attention.head_dim, getattr(attention, "k_proj", None)
    heads = attention.q_proj.out_features // dim
    return {
        "layer": layer,
        "attention": attention,
        "layer_idx": attention.layer_idx,
        "hidden": attention.q_proj.in_features,
        "heads": heads,
        "kv_heads": heads // attention.num_key_value_groups,
        "dim": dim,
        "scaling": float(attention.scaling),
        "activation": activation,
        "q": LinearPart(attention, "q_proj"),
        "k": None if k is None else LinearPart(attention, "k_proj"),
        "v": None if k is None else LinearPart(attention, "v_proj"),
        "o": LinearPart(attention, "o_proj"),
        "gate": LinearPart(mlp, "gate_proj"),
        "up": LinearPart(mlp, "up_proj"),
        "down": LinearPart(mlp, "down_proj"),
    }


def _llama_norm(module: Any) -> NormPart:
    return NormPart(module, module.variance_epsilon, weight_in_t=True)


def _gemma3_norm(module: Any) -> NormPart:
    return NormPart(module, module.eps, plus_one=True)


def _gemma4_norm(module: Any) -> NormPart:
    return NormPart(module, module.eps)


def _llama(layer: Any) -> Parts:
    """Llama and Qwen 3: two norms, and in Qwen 3 one for each head of queries and keys."""
    attention, norm = layer.self_attn, _llama_norm
    return Parts(
        **_common(layer, _activation(attention.config, "hidden_act")),
        input_norm=norm(layer.input_layernorm),
        q_norm=norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        v_norm=None,
        post_attention=None,
        mlp_norm=norm(layer.post_attention_layernorm),
        post_mlp=None,
    )


def _gemma3(layer: Any) -> Parts:
    attention, norm = layer.self_attn, _gemma3_norm
    if getattr(attention, "attn_logit_softcapping", None):
        raise NotSupportedError("its attention scores are soft-capped")
    return Parts(
        **_common(layer, _activation(attention.config, "hidden_activation", "hidden_act")),
        input_norm=norm(layer.input_layernorm),
        q_norm=norm(attention.q_norm),
        k_norm=norm(attention.k_norm),
        v_norm=None,
        post_attention=norm(layer.post_attention_layernorm),
        mlp_norm=norm(layer.pre_feedforward_layernorm),
        post_mlp=norm(layer.post_feedforward_layernorm),
    )


def _gemma4(layer: Any) -> Parts:
    attention, norm = layer.self_attn, _gemma4_norm
    if layer.enable_moe_block:
        raise NotSupportedError("it has a mixture of experts")
    own = not attention.is_kv_shared_layer
    parts = _common(layer, _activation(layer.config, "hidden_activation"))
    if own and attention.v_proj is None:  # attention_k_eq_v: the values are the keys before their norm
        parts["v"] = parts["k"]
    per_layer = None
    if layer.hidden_size_per_layer_input:
        per_layer = PerLayerParts(
            LinearPart(layer, "per_layer_input_gate"),
            LinearPart(layer, "per_layer_projection"),
            norm(layer.post_per_layer_input_norm),
        )
    return Parts(
        **parts,
        input_norm=norm(layer.input_layernorm),
        q_norm=norm(attention.q_norm),
        k_norm=norm(attention.k_norm) if own else None,
        v_norm=norm(attention.v_norm) if own else None,
        post_attention=norm(layer.post_attention_layernorm),
        mlp_norm=norm(layer.pre_feedforward_layernorm),
        post_mlp=norm(layer.post_feedforward_layernorm),
        per_layer=per_layer,
        scalar=layer.layer_scalar,
        shares=attention.layer_type,
        stores=attention.store_full_length_kv,
    )


@dataclass(frozen=True)
class Architecture:
    """What is known of a model's code, by the exact names of its classes: a subclass may do something else.

    Attributes:
        module: transformers' module.
        decoder: the text model, which `DecodeStack` can stand in for.
        layer: its decoder layer.
        norm: its norm.
        read: a decoder layer's parts.
        read_norm: a norm's part.
    """

    module: str
    decoder: str
    layer: str
    norm: str
    read: Callable[[Any], Parts]
    read_norm: Callable[[Any], NormPart]


_MODELS = "transformers.models"

ARCHITECTURES = (
    Architecture(
        f"{_MODELS}.llama.modeling_llama", "LlamaModel", "LlamaDecoderLayer", "LlamaRMSNorm", _llama, _llama_norm
    ),
    Architecture(
        f"{_MODELS}.qwen3.modeling_qwen3", "Qwen3Model", "Qwen3DecoderLayer", "Qwen3RMSNorm", _llama, _llama_norm
    ),
    Architecture(
        f"{_MODELS}.gemma3.modeling_gemma3",
        "Gemma3TextModel",
        "Gemma3DecoderLayer",
        "Gemma3RMSNorm",
        _gemma3,
        _gemma3_norm,
    ),
    Architecture(
        f"{_MODELS}.gemma4.modeling_gemma4",
        "Gemma4TextModel",
        "Gemma4TextDecoderLayer",
        "Gemma4RMSNorm",
        _gemma4,
        _gemma4_norm,
    ),
)
"""Every architecture with native decoder layers."""


def _architecture(module: nn.Module, role: str) -> Architecture | None:
    """The architecture whose class of that role a module is of."""
    kind = type(module)
    known = (a for a in ARCHITECTURES if a.module == kind.__module__ and getattr(a, role) == kind.__qualname__)
    return next(known, None)


def uses_sdpa(config: Any) -> bool:
    """Whether a model's attention is torch's scaled dot product, the one that bytelane's own stands in for."""
    # the property costs ten times the attribute behind it, and this is asked by every layer of every token
    chosen = vars(config).get("_attn_implementation_internal")
    return bool((config._attn_implementation if chosen is None else chosen) == "sdpa")


def is_decoder(module: nn.Module) -> bool:
    """Whether a module is the text model of a known architecture."""
    return _architecture(module, "decoder") is not None


def read_parts(layer: nn.Module) -> Parts:
    """A decoder layer's parts.

    Raises:
        NotSupportedError: its class is of no known architecture, or something in it the parts do not describe.
    """
    found = _architecture(layer, "layer")
    if found is None:
        raise NotSupportedError(f"{type(layer).__name__} is not an architecture this build knows")
    return found.read(layer)


def norm_part(module: nn.Module) -> NormPart | None:
    """A norm outside the decoder layers, or None for a class that is not known."""
    found = _architecture(module, "norm")
    return None if found is None else found.read_norm(module)
