"""One token of one sequence through all decoder layers on a GPU: about ten launches a layer, nothing between.

transformers' decoder layers take some forty, most of them copies, masks, and sums of a few thousand numbers, each two
or three microseconds even in a captured graph. Here q, k and v are one matrix where they may be (`merge`), and gate and
up another; the rest of a layer are the launches of `kernels.cuda_step`. The linear layers give the bits they always
give, and so do norms, rotary embedding, gates and sums: those of the CPU. Attention sums in an order of its own.

`StepGraph` captures it. A step is for the model as it is when the step is made: every projection one of bytelane's, in
integers, and watched by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from bytelane.decoder.merge import Merged, merge
from bytelane.decoder.norms import norm_form
from bytelane.decoder.outline import Outline
from bytelane.decoder.parts import (
    LinearPart,
    NormPart,
    NotSupportedError,
    Parts,
    is_decoder,
    norm_part,
    read_parts,
    uses_sdpa,
)
from bytelane.dispatch import FLOATS
from bytelane.kernels.cuda_norm import MAX_WIDTH, NormForm
from bytelane.kernels.cuda_step import CacheRows, HeadNorms, attend, gate, heads, join
from bytelane.layers import QuantLinear
from bytelane.scheme import Numerics

MAX_HEAD = 512
"""The widest head: 32 of its keys are held in registers."""


class _Rows:
    """Projections of one input, as few calls as may be."""

    def __init__(self, parts: dict[str, LinearPart]) -> None:
        modules = {name: _linear(part) for name, part in parts.items()}
        distinct = list({id(module): module for module in modules.values()}.values())
        self._groups = merge(distinct, move=False)
        self._columns: dict[str, tuple[int, slice]] = {}
        for name, module in modules.items():
            index = next(i for i, group in enumerate(self._groups) if module in group.parts)
            first = self._groups[index].first[self._groups[index].parts.index(module)]
            self._columns[name] = index, slice(first, first + module.out_features)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """`[in]` to each projection's `[out]`."""
        made = [_run(group, x[None])[0] for group in self._groups]
        return {name: made[index][columns] for name, (index, columns) in self._columns.items()}


def _run(merged: Merged, x: Tensor) -> Tensor:
    one = merged.parts[0]
    if len(merged.parts) == 1:
        return one(x)  # type: ignore[no-any-return]
    tensors = (merged.packed, merged.weight_scale, merged.input_scale, merged.output_scale, merged.bias)
    return torch.ops.bytelane.linear(x, *tensors, one.num_bits, one.group_size or 0)  # type: ignore[no-any-return]


def _linear(part: LinearPart) -> QuantLinear:
    module = part.module
    if type(module) is not QuantLinear or module.numerics is not Numerics.INTEGER:
        raise NotSupportedError(f"{part.name} is not one of bytelane's layers in integer numerics")
    return module


def _weight(part: NormPart, dtype: torch.dtype) -> Tensor | None:
    weight: Tensor | None = getattr(part.module, "weight", None)
    if weight is None:
        return None
    if weight.dtype is not dtype and (part.weight_in_t or weight.dtype not in FLOATS):
        raise NotSupportedError(f"a norm's weight is {weight.dtype}, the activations are {dtype}")
    return weight.detach().contiguous()


def _weighted(part: NormPart, dtype: torch.dtype) -> tuple[Tensor, NormForm]:
    weight = _weight(part, dtype)
    if weight is None:
        raise NotSupportedError("a norm of the stream has no weight")
    return weight, norm_form(part)


def _maybe(part: NormPart | None, dtype: torch.dtype) -> tuple[Tensor, NormForm] | None:
    return None if part is None else _weighted(part, dtype)


def _head_norms(parts: Parts, dtype: torch.dtype) -> HeadNorms:
    named = {"q": parts.q_norm, "k": parts.k_norm, "v": parts.v_norm}
    if parts.k is not None and (parts.q_norm is None) != (parts.k_norm is None):
        raise NotSupportedError("queries have a norm and keys have none, or the other way round")
    there = [part for part in named.values() if part is not None]
    forms = {norm_form(part) for part in there} or {NormForm(0.0)}
    if len(forms) > 1:
        raise NotSupportedError("the norms of its heads round in different orders")
    q, k, v = (None if part is None else _weight(part, dtype) for part in named.values())
    if (parts.q_norm is not None and q is None) or (parts.k_norm is not None and k is None):
        raise NotSupportedError("a norm of queries or keys has no weight")
    return HeadNorms(q, k, v, parts.v_norm is not None, forms.pop())


@dataclass(eq=False)
class _Layer:
    """One decoder layer's calls and tensors."""

    parts: Parts
    qkv: _Rows
    gate_up: _Rows
    o: QuantLinear
    down: QuantLinear
    norms: HeadNorms
    input_norm: tuple[Tensor, NormForm]
    mlp_norm: tuple[Tensor, NormForm]
    post_attention: tuple[Tensor, NormForm] | None
    post_mlp: tuple[Tensor, NormForm] | None
    scalar: Tensor | None
    per_layer: tuple[QuantLinear, QuantLinear, tuple[Tensor, NormForm]] | None

    @classmethod
    def of(cls, parts: Parts, dtype: torch.dtype) -> _Layer:
        """The layer as it is now.

        Raises:
            NotSupportedError: something in it that the launches do not do.
        """
        if parts.dim > MAX_HEAD or parts.dim % 2 or parts.hidden > MAX_WIDTH:
            raise NotSupportedError(f"heads of {parts.dim}, a stream of {parts.hidden}")
        named = {"q": parts.q, "k": parts.k, "v": parts.v}
        scalar, per_layer = parts.scalar, parts.per_layer
        return cls(
            parts,
            _Rows({name: part for name, part in named.items() if part is not None}),
            _Rows({"gate": parts.gate, "up": parts.up}),
            _linear(parts.o),
            _linear(parts.down),
            _head_norms(parts, dtype),
            _weighted(parts.input_norm, dtype),
            _weighted(parts.mlp_norm, dtype),
            _maybe(parts.post_attention, dtype),
            _maybe(parts.post_mlp, dtype),
            None if scalar is None else scalar.detach().to(dtype),
            None
            if per_layer is None
            else (_linear(per_layer.gate), _linear(per_layer.projection), _weighted(per_layer.norm, dtype)),
        )

    def run(
        self,
        stream: Tensor,
        n: Tensor,
        angles: tuple[Tensor, Tensor],
        position: Tensor,
        cache: CacheRows,
        window: int,
        given: Tensor | None,
        after: tuple[Tensor, NormForm],
    ) -> tuple[Tensor, Tensor]:
        """The stream `[hidden]` and its norm through the layer; `after` is the norm of what follows."""
        parts = self.parts
        made = self.qkv(n)
        q = heads(made["q"], made.get("k"), made.get("v"), self.norms, angles, position, cache)
        seen = attend(q, cache, position, parts.scaling, window)
        stream, n = join(stream, self.o(seen[None])[0], self.post_attention, None, self.mlp_norm)
        made = self.gate_up(n)
        branch = self.down(gate(made["gate"], made["up"], parts.activation)[None])[0]
        if self.per_layer is None:
            return join(stream, branch, self.post_mlp, self.scalar, after)
        stream, _ = join(stream, branch, self.post_mlp, None, None)
        assert given is not None
        to_gate, project, norm = self.per_layer
        gated = gate(to_gate(stream[None])[0], given, parts.activation)
        return join(stream, project(gated[None])[0], norm, self.scalar, after)


class TokenStep:
    """A model's decoder layers as one chain of launches, as they are now."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Read the layers off a model.

        Raises:
            NotSupportedError: why one of them, or the model around them, cannot be taken.
        """
        decoder: Any = model.get_decoder()
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        if watched or not is_decoder(decoder) or model.dtype not in FLOATS:
            raise NotSupportedError("a module is watched, or the architecture or the dtype is not known")
        last = norm_part(decoder.norm)
        if last is None:
            raise NotSupportedError(f"{type(decoder.norm).__name__} is not a norm this build knows")
        every = [read_parts(layer) for layer in decoder.layers]
        if not all(uses_sdpa(parts.attention.config) for parts in every):
            raise NotSupportedError("its attention is another than sdpa")
        self._layers = [_Layer.of(parts, model.dtype) for parts in every]
        self._outline = Outline(model, every)
        self._check_angles(model, every)
        norms = [layer.input_norm for layer in self._layers]
        self._after = [*norms[1:], _weighted(last, model.dtype)]
        self._first = every[0].input_norm.module
        self._dtype = model.dtype

    def __call__(self, token: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Run one token.

        Args:
            token: int64 `[1, 1]`.
            position: int64 `[1, 1]`, the token's place.
            cache: of layers that keep every place (`StaticLayer`, `Int8StaticLayer`); the token is written at its
                place. Their own count of tokens is left as it is.

        Returns:
            Logits `[vocabulary]`.
        """
        x, per_layer = self._outline.embed(token)
        angles = [(c.view(-1), s.view(-1)) for c, s in self._outline.angles(x, position)]
        stream, n = x.view(-1), self._first(x).view(-1)
        for index, (layer, place) in enumerate(zip(self._layers, self._outline.places, strict=True)):
            given = None if per_layer is None else per_layer[0, 0, index]
            rows = self._rows(cache.layers[place.layer], layer.parts)
            after = self._after[index]
            stream, n = layer.run(stream, n, angles[place.angles], position, rows, place.window, given, after)
        return self._outline.logits(n.view(1, 1, -1))

    def _check_angles(self, model: PreTrainedModel, every: list[Parts]) -> None:
        x = torch.empty((1, 1, 1), dtype=model.dtype, device=model.device)
        found = self._outline.angles(x, torch.zeros((1, 1), dtype=torch.int64, device=model.device))
        for parts, place in zip(every, self._outline.places, strict=True):
            if any(angle.numel() != parts.dim or angle.dtype is not model.dtype for angle in found[place.angles]):
                raise NotSupportedError(f"not all of a head of {parts.dim} is rotated, or not in {model.dtype}")

    def _rows(self, held: Any, parts: Parts) -> CacheRows:
        if not held.is_initialized:
            device = _linear(parts.q).packed.device
            shown = torch.empty((1, parts.kv_heads, 1, parts.dim), dtype=self._dtype, device=device)
            held.lazy_initialization(shown, shown)
        return CacheRows(
            held.keys[0], held.values[0], getattr(held, "key_scale", None), getattr(held, "value_scale", None)
        )


def merge_rows(model: PreTrainedModel) -> int:
    """Move the rows of projections that read one tensor together, in every layer where they may run as one.

    Done once, when a model is loaded: what is captured later reads the rows where they then lie.

    Returns:
        How many layers have merged projections.
    """
    decoder: Any = model.get_decoder()
    found = 0
    for layer in getattr(decoder, "layers", ()):
        try:
            parts = read_parts(layer)
            named = [[part for part in (parts.q, parts.k, parts.v) if part is not None], [parts.gate, parts.up]]
            groups = [merge(list({id(part.module): _linear(part) for part in some}.values())) for some in named]
        except NotSupportedError:
            continue
        found += any(len(one.parts) > 1 for some in groups for one in some)
    return found


def token_step(model: PreTrainedModel) -> TokenStep | None:
    """The step of a model, or None where it cannot be had."""
    try:
        return TokenStep(model)
    except NotSupportedError:
        return None
