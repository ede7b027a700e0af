"""What a layer computes once its parts are sealed: parts joined into runs, and a run's arithmetic over ranks.

Knows nothing of vLLM: an all-reduce is a function that is handed in. So the same lines run under vLLM on CPU ranks, in
two bare processes on two GPUs, and in the tests of both.

Parts that can run as one call (same width, granularity, sides and input scale) are joined into a *run*: their rows are
concatenated and their output scales become one for each channel, so every output is the same bits as apart. Other parts
run one after the other, each quantizing the input by its own scale.

A row-parallel layer over several ranks does not requantize its partial sums. It accumulates, sums the int32
accumulators over the ranks (`reduce`), and requantizes once, with the bias, as one rank alone would.

Where there is no integer sum to reduce, float32 partial sums are reduced and the output is quantized once, after that:
group scales (the order of float additions then depends on the number of ranks) and layers without an input scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from bytelane import ops as _ops  # noqa: F401  (registers torch.ops.bytelane)
from bytelane.checkpoint.layout import ModuleLayout
from bytelane.integrations.vllm.parts import Sealed
from bytelane.integrations.vllm.reduce import AllReduce, all_reduce_accumulators, all_reduce_float


@dataclass(frozen=True)
class Run:
    """Parts that run as one call; the tensors are the layer's buffers `<prefix>packed` and so on.

    Attributes:
        prefix: of the buffers' names.
        num_bits: N.
        group_size: inputs that share a scale; 0 for one scale a channel.
        in_features: of the layer, all ranks together.
    """

    prefix: str
    num_bits: int
    group_size: int
    in_features: int

    def tensors(self, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Rows, weight scales, input scale, output scale and bias."""
        packed, scale = getattr(layer, f"{self.prefix}packed"), getattr(layer, f"{self.prefix}weight_scale")
        sides = (getattr(layer, f"{self.prefix}{name}") for name in ("input_scale", "output_scale", "bias"))
        return packed, scale, *sides


def _key(item: tuple[ModuleLayout, Sealed]) -> tuple[Any, ...]:
    """What parts that run as one call have in common."""
    layout, part = item
    sides = tuple(None if s is None else float(s) for s in (part.input_scale, part.output_scale))
    integer = part.input_scale is not None
    # Without integer inputs the operation takes one output scale.
    output: Any = sides[1] is None if integer else sides[1]
    return layout.num_bits, layout.group_size, sides[0], output, part.bias is None


def _joined_outputs(parts: Sequence[Sealed]) -> Tensor | None:
    """The output scales of a run: one, or one for each channel where the parts' differ."""
    scales = [p.output_scale for p in parts if p.output_scale is not None]
    if not scales:
        return None
    if all(torch.equal(s, scales[0]) for s in scales):
        return scales[0]
    return torch.cat([s.expand(p.rows.shape[0]) for p, s in zip(parts, scales, strict=True)])


def install_runs(
    layer: nn.Module, items: Sequence[tuple[ModuleLayout, Sealed]], in_features: int, device: torch.device
) -> tuple[Run, ...]:
    """Join neighbouring parts and give the layer their tensors."""
    runs = []
    for index, (_, group) in enumerate(groupby(items, key=_key)):
        members = list(group)
        layout, parts = members[0][0], [part for _, part in members]
        run = Run(f"run{index}_", layout.num_bits, layout.group_size or 0, in_features)
        biases = [p.bias for p in parts if p.bias is not None]
        tensors = {
            "packed": torch.cat([p.rows for p in parts]) if len(parts) > 1 else parts[0].rows,
            "weight_scale": torch.cat([p.weight_scale for p in parts]),
            "input_scale": parts[0].input_scale,
            "output_scale": _joined_outputs(parts),
            "bias": torch.cat(biases) if biases else None,
        }
        for name, tensor in tensors.items():
            held = None if tensor is None else tensor.to(device)
            layer.register_buffer(f"{run.prefix}{name}", held, persistent=False)
        runs.append(run)
    return tuple(runs)


def run_parts(layer: nn.Module, runs: Sequence[Run], x: Tensor) -> Tensor:
    """The outputs of all parts side by side: `[..., in]` to `[..., out]`."""
    outputs = [_run(layer, run, x) for run in runs]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _run(layer: nn.Module, run: Run, x: Tensor) -> Tensor:
    ops = torch.ops.bytelane
    packed, scale, s_in, s_out, bias = run.tensors(layer)
    if s_in is None:
        return ops.linear_weight_only(x, packed, scale, s_out, bias, run.num_bits)  # type: ignore[no-any-return]
    return ops.linear(x, packed, scale, s_in, s_out, bias, run.num_bits, run.group_size)  # type: ignore[no-any-return]


def run_reduced(layer: nn.Module, run: Run, x: Tensor, all_reduce: AllReduce) -> Tensor:
    """A row-parallel layer over several ranks: this rank's inputs to the final outputs of the whole layer.

    Args:
        layer: holds the run's tensors.
        run: the layer's only one.
        x: `[..., inputs of this rank]`.
        all_reduce: sums a tensor over the ranks; see `reduce`.
    """
    ops = torch.ops.bytelane
    packed, scale, s_in, s_out, bias = run.tensors(layer)
    flat = x.reshape(-1, x.shape[-1])
    if s_in is not None and run.group_size == 0:
        acc = ops.accumulate(ops.quantize(flat, s_in), packed, run.num_bits, 0)
        total = all_reduce_accumulators(acc, run.num_bits, run.in_features, all_reduce)
        y = ops.requantize(total, scale, s_in, s_out, bias, x.dtype)
        return y.reshape(*x.shape[:-1], packed.shape[0])  # type: ignore[no-any-return]
    if s_in is not None:
        acc = ops.accumulate(ops.quantize(flat, s_in), packed, run.num_bits, run.group_size)
        partial = ops.requantize(acc, scale, s_in, None, None, torch.float32)
    else:
        partial = ops.linear_weight_only(flat, packed, scale, None, None, run.num_bits)
    sums = all_reduce_float(partial, all_reduce)
    if bias is not None:
        sums = sums + bias
    if s_out is not None:
        sums = ops.quantize(sums, s_out).to(torch.float32) * s_out
    return sums.to(x.dtype).reshape(*x.shape[:-1], packed.shape[0])
