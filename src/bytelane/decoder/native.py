"""A decoder layer as one native object, and whether it is still the layer it was built from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bytelane import _native
from bytelane.decoder.merge import Merged, merge
from bytelane.decoder.parts import LinearPart, NormPart, NotSupportedError, Parts
from bytelane.dispatch import machine, select
from bytelane.kernels.cpu import dtype_code, group_scales, isa_code, path_code
from bytelane.kernels.float_ops import ACTIVATIONS
from bytelane.layers import QuantLinear
from bytelane.scheme import Numerics


@dataclass(eq=False)
class NativeLayer:
    """The native layer of one activation dtype, and what it points at.

    Attributes:
        run: the native object.
        held: tensors that must live as long as `run`.
    """

    run: _native.DecoderLayer
    held: list[Tensor] = field(default_factory=list)

    def watch(self, parts: list[LinearPart]) -> None:
        """Note the projections as they are."""
        self._places = [(part.owner._modules, part.name) for part in parts]
        self._modules = [_linear(part) for part in parts]
        self._rows = [id(module.packed) for module in self._modules]
        self._grouped = [m for m in self._modules if m.group_size and not m.weight_scale.is_inference()]
        self._versions = [module.weight_scale._version for module in self._grouped]
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def current(self) -> bool:
        """Whether every projection is the module it was, with the same rows, integer, and watched by nobody.

        What was computed of group scales must be still true, too.
        """
        # asked by every layer of every token: lists compare by identity first, and `any` runs over dictionaries
        return (
            not any(self._hooks)
            and [modules[name] for modules, name in self._places] == self._modules
            and [id(module._buffers["packed"]) for module in self._modules] == self._rows
            and [module.weight_scale._version for module in self._grouped] == self._versions
            and all(module.numerics is Numerics.INTEGER for module in self._modules)
        )


def build(parts: Parts, dtype: torch.dtype) -> NativeLayer:
    """The native form of a layer.

    Raises:
        NotSupportedError: a projection is not bytelane's, or not one the native layer takes.
    """
    isa = machine().isas[0]
    run = _native.DecoderLayer(
        isa_code(isa),
        dtype_code(dtype),
        parts.hidden,
        parts.heads,
        parts.kv_heads,
        parts.dim,
        parts.scaling,
        ACTIVATIONS[parts.activation],
    )
    made = NativeLayer(run)
    for part in parts.linears():
        _check(part)
    named = {"q": parts.q, "k": parts.k, "v": parts.v}
    _add_group(made, dtype, "qkv", {name: part for name, part in named.items() if part is not None})
    _add_group(made, dtype, "gate_up", {"gate": parts.gate, "up": parts.up})
    singles = {"o": parts.o, "down": parts.down}
    norms = {
        "input": parts.input_norm,
        "q": parts.q_norm,
        "k": parts.k_norm,
        "v": parts.v_norm,
        "post_attention": parts.post_attention,
        "mlp": parts.mlp_norm,
        "post_mlp": parts.post_mlp,
    }
    if parts.per_layer is not None:
        singles |= {"per_layer_gate": parts.per_layer.gate, "per_layer": parts.per_layer.projection}
        norms["per_layer"] = parts.per_layer.norm
    for role, part in singles.items():
        _add(made, dtype, role, merge([_linear(part)])[0])
    for name, norm_part in norms.items():
        _add_norm(made, name, norm_part)
    if parts.scalar is not None:
        # kept as a value of T, which is what multiplies in T
        scalar = parts.scalar.detach().to(dtype).to(torch.float32).reshape(1).contiguous()
        made.held.append(scalar)
        run.scalar(scalar.data_ptr())
    try:
        run.seal()
    except ValueError as error:
        raise NotSupportedError(str(error)) from error
    made.watch(parts.linears())
    return made


def _linear(part: LinearPart) -> QuantLinear:
    module = part.module
    assert isinstance(module, QuantLinear)
    return module


def _check(part: LinearPart) -> None:
    module = part.module
    if type(module) is not QuantLinear:
        raise NotSupportedError(f"{part.name} is a {type(module).__name__}, not one of bytelane's layers")
    if module.numerics is not Numerics.INTEGER:
        raise NotSupportedError(f"{part.name} runs in {module.numerics.value} numerics")
    if not module.packed.is_cpu:
        raise NotSupportedError(f"{part.name} is on {module.packed.device}, not on the CPU")


def _add_group(made: NativeLayer, dtype: torch.dtype, role: str, parts: dict[str, LinearPart]) -> None:
    distinct = list({id(part.module): _linear(part) for part in parts.values()}.values())
    groups = merge(distinct)
    for group in groups:
        _add(made, dtype, role, group)
    for name, part in parts.items():
        module = part.module
        for index, group in enumerate(groups):
            if module in group.parts:
                made.run.columns(name, index, group.first[group.parts.index(module)])


def _add(made: NativeLayer, dtype: torch.dtype, role: str, merged: Merged) -> None:
    one = merged.parts[0]
    tensors = (merged.packed, merged.weight_scale, merged.input_scale, merged.output_scale, merged.bias)
    made.held += [tensor for tensor in tensors if tensor is not None]
    w, weight_scale, input_scale, output_scale, bias = (0 if t is None else t.data_ptr() for t in tensors)
    shape = (merged.out_features, one.in_features, one.num_bits)
    if merged.input_scale is None:
        if dtype is torch.float32:
            raise NotSupportedError("a layer without an input scale has no native form in float32")
        groups = merged.weight_scale.shape[1]
        made.run.weight_only(role, w, weight_scale, output_scale, bias, *shape, groups)
        return
    group_size = one.group_size or 0
    kernel = select("linear", "cpu", dtype, one.num_bits, group_size, 1)
    path = getattr(kernel.run, "keywords", {}).get("path")
    if path is None:
        raise NotSupportedError(f"its kernel is {kernel.name}, which is not native")
    scales, kept = 0 if merged.output_scale is None else merged.output_scale.numel(), 0
    if group_size and not merged.weight_scale.is_inference():
        made.held.append(
            group_scales(merged.weight_scale, merged.input_scale, merged.output_scale, isa=machine().isas[0])
        )
        kept = made.held[-1].data_ptr()
    made.run.integer(
        role, path_code(path), w, weight_scale, input_scale, output_scale, scales, bias, kept, *shape, group_size
    )


def _add_norm(made: NativeLayer, name: str, part: NormPart | None) -> None:
    if part is None:
        return
    norm = part.norm()
    if norm.weight is not None:
        made.held.append(norm.weight)
    made.run.norm(name, norm.address, norm.eps, norm.weight_in_t)
