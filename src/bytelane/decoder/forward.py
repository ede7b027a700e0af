"""The forward of a decoder layer: native, or step by step with the same bits.

`install_decoder` binds it to each supported layer of a loaded model. A call then goes one of three ways:

- *native*, two calls around the cache, when every projection is one of bytelane's in integer numerics and nobody
  watches it (`trace` does, with hooks);
- *step by step*, the same kernels with the model's own projection modules called between them: whatever those are now;
- *transformers' own*, where the call asks for what the first two do not do: attention weights, gradients, another
  device, `torch.compile`, another attention implementation than `sdpa`, a mask that is not of bools, hooks on a module
  that is not a projection.

The first two give the same bits, and the same bits for any batch, padding, threads or pieces of a prompt. The third has
torch's sums, whose last bits depend on those.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from bytelane.cache import GrowingCache, grows
from bytelane.decoder.native import NativeLayer, build
from bytelane.decoder.norms import install_norms
from bytelane.decoder.parts import NormPart, NotSupportedError, Parts, norm_part, read_parts, uses_sdpa
from bytelane.dispatch import FLOATS, machine
from bytelane.errors import ConfigError
from bytelane.kernels import float_ops
from bytelane.kernels.float_ops import KeyValues
from bytelane.scheme import Numerics

FloatOps = Literal["auto", "native", "torch"]
"""Who computes what lies between the layers: `auto` is `native` in integer numerics where the architecture has it."""


@dataclass(frozen=True, eq=False)
class SharedKeyValues:
    """Keys and values handed on to later layers; unpacks to float tensors, as transformers' own layers expect."""

    stored: KeyValues
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.stored.floats(self.dtype))


class LayerForward:
    """A decoder layer's parts and, by activation dtype, its native forms."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._native: dict[torch.dtype, NativeLayer] = {}
        projections = {id(part.module) for part in parts.linears()}
        # projections may be watched: their steps are called one by one then
        inner = [m for m in parts.layer.modules() if m is not parts.layer and id(m) not in projections]
        self._hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def __getstate__(self) -> dict[str, Any]:
        # a native layer points at tensors of this model: a copy builds its own
        return {**self.__dict__, "_native": {}}

    def native(self, dtype: torch.dtype) -> NativeLayer | None:
        """The native form for a dtype, built on first use and again when a projection was replaced; None if none."""
        made = self._native.get(dtype)
        if made is not None and made.current():
            return made
        self._native.pop(dtype, None)
        try:
            made = build(self.parts, dtype)
        except NotSupportedError:
            return None
        if not made.current():
            return None
        self._native[dtype] = made
        return made

    def unwatched(self) -> bool:
        """Whether no module of the layer but the projections has hooks; `NativeLayer.current` asks for those."""
        return not any(self._hooks)

    def takes(self, x: Tensor, mask: Tensor | None, angles: Any, arguments: Mapping[str, Any]) -> bool:
        """Whether a call is one for the first two ways."""
        config = self.parts.attention.config
        return bool(
            not torch.compiler.is_compiling()
            and x.is_cpu
            and x.dtype in FLOATS
            and x.numel() > 0
            and not (torch.is_grad_enabled() and x.requires_grad)
            and (mask is None or mask.dtype is torch.bool)
            and angles is not None
            and angles[0].shape[-1] == self.parts.dim
            and angles[0].dtype is x.dtype
            and uses_sdpa(config)
            # without a mask, sdpa aligns causal attention with a static cache's first places; the kernels with its last
            and not (mask is None and isinstance(arguments.get("cache", arguments.get("past_key_values")), StaticCache))
            and not arguments.get("output_attentions")
            and self.unwatched()
        )


def _forward(
    self: Any, hidden_states: Tensor, per_layer_input: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """The `forward` bound to a decoder layer; arguments and result are transformers'."""
    own: LayerForward = self.bytelane_forward
    parts = own.parts
    mask: Tensor | None = kwargs.get("attention_mask")
    angles: Any = kwargs.get("position_embeddings")
    if args or not own.takes(hidden_states, mask, angles, kwargs):
        given = (hidden_states,) if per_layer_input is None and not args else (hidden_states, per_layer_input, *args)
        return type(self).forward(self, *given, **kwargs)  # type: ignore[no-any-return]
    x = hidden_states.contiguous()
    batch, queries, _ = x.shape
    cosine, sine = (angle.contiguous() for angle in angles)
    cache = kwargs.get("cache")
    cache = kwargs.get("past_key_values") if cache is None else cache
    shared: Any = kwargs.get("shared_kv_states")
    native = own.native(x.dtype)

    def remember(k: Tensor, v: Tensor) -> KeyValues:
        shape = (batch, queries, parts.kv_heads, parts.dim)
        stored = _store(cache, parts.layer_idx, k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2))
        if parts.stores and shared is not None:
            shared[parts.shares] = SharedKeyValues(stored, x.dtype)
        return stored

    def recall() -> KeyValues:
        found = shared[parts.shares]
        return found.stored if isinstance(found, SharedKeyValues) else KeyValues(*found)

    if native is None:
        return _step_by_step(parts, x, (cosine, sine), mask, per_layer_input, remember, recall)
    rows, threads = batch * queries, torch.get_num_threads()
    q = x.new_empty(batch, queries, parts.heads * parts.dim)
    k = v = None
    if parts.k is not None:
        k, v = (x.new_empty(batch, queries, parts.kv_heads * parts.dim) for _ in range(2))
    native.run.before(
        x.data_ptr(),
        cosine.data_ptr(),
        sine.data_ptr(),
        cosine.numel() // parts.dim,
        q.data_ptr(),
        0 if k is None else k.data_ptr(),
        0 if v is None else v.data_ptr(),
        rows,
        threads,
    )
    stored = recall() if k is None or v is None else remember(k, v)
    tokens = stored.keys.shape[-2]
    place = stride = 0
    if parts.per_layer is not None:
        # `float_ops` checks what Python hands to native code; here the shapes are the model's own
        flat = _even_rows(per_layer_input)
        place, stride = flat.data_ptr(), flat.stride(0)
    y = torch.empty_like(x)
    native.run.after(
        x.data_ptr(),
        q.data_ptr(),
        *stored.places(),
        *float_ops.mask_place(mask, batch, queries, tokens),
        place,
        stride,
        y.data_ptr(),
        batch,
        queries,
        tokens,
        threads,
    )
    return y


def _even_rows(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("the layer takes a per-layer input, and there is none")
    flat = x.flatten(0, -2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _store(cache: Any, layer_idx: int, k: Tensor, v: Tensor) -> KeyValues:
    """Put new keys and values `[batch, KV heads, tokens, dim]` into a cache; all that attention may look at."""
    if cache is None:
        return KeyValues(k, v)
    layer = cache.layers[layer_idx] if isinstance(cache, GrowingCache) else None
    if grows(layer):
        return layer.write(k, v)
    return KeyValues(*cache.update(k, v, layer_idx))


def _step_by_step(
    parts: Parts,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    mask: Tensor | None,
    per_layer_input: Tensor | None,
    remember: Any,
    recall: Any,
) -> Tensor:
    """The layer with its projection modules called one by one: the order of csrc/cpu/decoder_layer.hpp."""
    isa = machine().isas[0]

    def heads(y: Tensor, norm: NormPart | None, rotated: bool) -> Tensor:
        made = None if norm is None else norm.norm()
        return float_ops.head_rows(y, parts.dim, made, angles if rotated else None, isa=isa)

    def join(stream: Tensor, branch: Tensor, norm: NormPart | None, scalar: Tensor | None = None) -> Tensor:
        if norm is None:
            return stream + branch
        return float_ops.norm_rows(branch, norm.norm(), residual=stream, scalar=scalar, isa=isa)

    n = float_ops.norm_rows(x, parts.input_norm.norm(), isa=isa)
    q = heads(parts.q.module(n), parts.q_norm, True)
    if parts.k is None or parts.v is None:
        stored = recall()
    else:
        raw = parts.k.module(n)
        values = raw if parts.v is parts.k else parts.v.module(n)
        stored = remember(heads(raw, parts.k_norm, True), heads(values, parts.v_norm, False))
    by_head = q.view(*x.shape[:-1], parts.heads, parts.dim)
    seen = float_ops.attention(by_head, stored, mask, parts.scaling, isa=isa).view(q.shape)
    stream = join(x, parts.o.module(seen), parts.post_attention)
    n = float_ops.norm_rows(stream, parts.mlp_norm.norm(), isa=isa)
    gated = float_ops.gate_rows(parts.gate.module(n), parts.up.module(n), parts.activation, isa=isa)
    branch = parts.down.module(gated)
    scalar = None if parts.scalar is None else parts.scalar.detach().to(x.dtype).to(torch.float32).reshape(())
    if parts.per_layer is None:
        return join(stream, branch, parts.post_mlp, scalar)
    stream = join(stream, branch, parts.post_mlp)
    gate = parts.per_layer.gate.module(stream)
    gated = float_ops.gate_rows(gate.flatten(0, -2), _even_rows(per_layer_input), parts.activation, isa=isa)
    gated = gated.view_as(gate)
    return join(stream, parts.per_layer.projection.module(gated), parts.per_layer.norm, scalar)


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    """The `forward` bound to a norm outside the decoder layers."""
    part: NormPart = self.bytelane_norm
    plain = x.is_cpu and x.dtype in FLOATS and not (torch.is_grad_enabled() and x.requires_grad)
    if torch.compiler.is_compiling() or not plain or (part.weight_in_t and part.module.weight.dtype is not x.dtype):
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    return float_ops.norm_rows(x.contiguous(), part.norm(), isa=machine().isas[0])


def _dense_forward(self: Any, x: Tensor) -> Tensor:
    """The `forward` bound to a linear layer that was never quantized."""
    weight: Tensor = self.weight
    plain = x.is_cpu and x.dtype in FLOATS and weight.dtype is x.dtype and weight.is_cpu
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if torch.compiler.is_compiling() or not plain or grad:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    bias = None if self.bias is None else self.bias.to(torch.float32)
    return float_ops.dense(x, weight, bias, isa=machine().isas[0])


def install_decoder(
    model: PreTrainedModel, choice: FloatOps = "auto", *, numerics: Numerics = Numerics.INTEGER
) -> None:
    """Give a model's decoder layers, and the norms around them, bytelane's forward.

    Sets `model.bytelane_float_ops` to `"native"` or `"torch"`; `refusals(model)` says which layers stayed as they were
    and why. On a CUDA device `auto` gives the norms bytelane's kernel and leaves the rest to torch.

    Args:
        model: as loaded, on its device.
        choice: what the user asked for.
        numerics: of the model's layers.

    Raises:
        ValueError: an unknown choice.
        ConfigError: `native` for a model none of whose decoder layers can have it.
    """
    if choice not in get_args(FloatOps):
        raise ValueError(f"float_ops must be one of {', '.join(get_args(FloatOps))}, found {choice!r}")
    state: Any = model
    state.bytelane_float_ops = "torch"
    on_cpu = model.device.type == "cpu"
    if choice == "torch" or (choice == "auto" and numerics is not Numerics.INTEGER):
        return
    if choice == "auto" and not on_cpu:
        if install_norms(model):
            from bytelane.decoder.token_step import merge_rows  # it imports Triton, as CUDA devices alone have it

            merge_rows(model)
        return
    decoder: Any = model.get_decoder()
    installed = 0
    for layer in getattr(decoder, "layers", ()):
        try:
            parts = read_parts(layer)
        except NotSupportedError:
            continue
        layer.bytelane_forward = LayerForward(parts)
        layer.bytelane_forward.native(model.dtype)  # merges projections now, and not in the middle of a first prompt
        # on the instance and as a bound method: the class is shared, and a deep copy binds its own
        layer.forward = types.MethodType(_forward, layer)
        installed += 1
    if choice == "native" and not (installed and on_cpu):
        reason = next(iter(refusals(model).values()), "it is not on the CPU")
        raise ConfigError(f"float_ops='native' has no layer to run: {reason}", tensor=type(model).__name__)
    if not installed:
        return
    inside = {id(m) for layer in decoder.layers for m in layer.modules()}
    around: list[Any] = [*decoder.modules(), model.get_output_embeddings()]
    for module in around:
        if id(module) in inside:
            continue
        part = norm_part(module)
        if part is not None:
            module.bytelane_norm = part
            module.forward = types.MethodType(_norm_forward, module)
        elif type(module) is nn.Linear:
            setattr(module, "forward", types.MethodType(_dense_forward, module))  # noqa: B010
    state.bytelane_float_ops = "native"


def refusals(model: PreTrainedModel) -> dict[str, str]:
    """The decoder layers that keep transformers' own forward, or run step by step, by name, with the reason."""
    decoder: Any = model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, str] = {}
    for layer in getattr(decoder, "layers", ()):
        own: LayerForward | None = getattr(layer, "bytelane_forward", None)
        try:
            parts = read_parts(layer) if own is None else own.parts
            if own is None:
                found[names[id(layer)]] = "float_ops is 'torch'"
            else:
                build(parts, model.dtype)
        except NotSupportedError as error:
            found[names[id(layer)]] = str(error)
    return found
