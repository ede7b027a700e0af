"""Where the norms and linears of a decoder are, for changes of basis that leave the float model's function as it is.

What may be folded where depends on what lies between two linears, so the parts are found by the names that transformers
gives them, and what cannot be told from names (whether a norm multiplies by `w` or by `1 + w`) is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """One decoder layer's parts; names are relative to the model.

    Attributes:
        name: of the layer.
        attention_norm: the norm whose output query, key and value read, and nothing else.
        mlp_norm: the norm whose output gate and up read, and nothing else.
        q, k, v, o: the attention's projections; `k` and `v` are None where the layer uses another's.
        gate, up, down: the gated MLP's projections.
        head_dim: channels of a head.
        plain_residual: whether `o` and `down` are added to the residual as they are, with no norm between.
        plain_heads: whether query and key go to the rotary embedding as they are, with no norm between.
        plain_values: likewise for the value and the attention.
    """

    name: str
    attention_norm: nn.Module
    mlp_norm: nn.Module
    q: nn.Linear
    k: nn.Linear | None
    v: nn.Linear | None
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    head_dim: int
    plain_residual: bool
    plain_heads: bool
    plain_values: bool


def norm_gain(norm: nn.Module) -> tuple[Tensor, float] | None:
    """A norm's weight `w` and the constant `c` of its gain `c + w` (0 for Llama's, 1 for Gemma's).

    Returns:
        None for a module that is not `x / rms(x) * (c + w)`, such as a LayerNorm.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or getattr(norm, "bias", None) is not None:
        return None
    generator = torch.Generator().manual_seed(0)
    x = 1.0 + torch.rand(1, weight.numel(), generator=generator)
    x = x.to(weight.device, weight.dtype)
    with torch.no_grad():
        found = norm(x).float() / (x.float() * torch.rsqrt(x.float().square().mean()))
    for constant in (0.0, 1.0):
        expected = constant + weight.detach().float()
        # A relative 2^-6: four half steps of bfloat16's 8 significant bits (x, the rms, the product, the gain).
        if torch.allclose(found[0], expected, rtol=2.0**-6, atol=2.0**-6):
            return weight, constant
    return None


def _linear(owner: nn.Module, *path: str) -> nn.Linear | None:
    found: Any = owner
    for part in path:
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Linear) else None


def blocks(model: nn.Module) -> Iterator[Block]:
    """The decoder layers with attention and a gated MLP, in the model's order; other layers are left out."""
    for name, layer in model.named_modules():
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
            continue
        q, o = _linear(attention, "q_proj"), _linear(attention, "o_proj")
        gate, up, down = (_linear(mlp, f"{part}_proj") for part in ("gate", "up", "down"))
        attention_norm = getattr(layer, "input_layernorm", None)
        sandwiched = getattr(layer, "pre_feedforward_layernorm", None)
        mlp_norm = sandwiched or getattr(layer, "post_attention_layernorm", None)
        head_dim = getattr(attention, "head_dim", None)
        if q is None or o is None or gate is None or up is None or down is None or not isinstance(head_dim, int):
            continue
        if not isinstance(attention_norm, nn.Module) or not isinstance(mlp_norm, nn.Module):
            continue
        yield Block(
            name=name,
            attention_norm=attention_norm,
            mlp_norm=mlp_norm,
            q=q,
            k=_linear(attention, "k_proj"),
            v=_linear(attention, "v_proj"),
            o=o,
            gate=gate,
            up=up,
            down=down,
            head_dim=head_dim,
            plain_residual=sandwiched is None and not hasattr(layer, "per_layer_input_gate"),
            plain_heads=not hasattr(attention, "q_norm") and not hasattr(attention, "k_norm"),
            plain_values=not hasattr(attention, "v_norm"),
        )
