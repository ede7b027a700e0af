"""The peers of `gpu_linear.py`: what else runs a wNa8o8 layer, or its emulation, on a GPU.

| name | what |
| --- | --- |
| bf16 | torch's `F.linear` on a bfloat16 weight: no quantization at all |
| emulated | what vLLM computes: fake quantization (compiled), humming's weight-only matmul, fake quantization |
| humming | humming's integer matmul with a static input scale, then the output step, compiled |

humming-kernels is optional (`pip install humming-kernels`); without it only bf16 is timed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_timing import copies_of

Calls = list[Callable[[], object]]


def available() -> bool:
    """Whether humming can be imported."""
    return importlib.util.find_spec("humming") is not None


@torch.compile(dynamic=True)
def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


def bf16_calls(x: Tensor, out_features: int) -> Calls:
    k = x.shape[1]
    weights = torch.randn(copies_of(2 * k * out_features), out_features, k, device="cuda").bfloat16().unbind(0)
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


@functools.lru_cache(maxsize=2)
def humming_layer(
    in_features: int, out_features: int, bits: int, *, integer: bool
) -> tuple[Any, Callable[..., Tensor]]:
    """A layer of random codes, and a function of `(x, weight)` that runs it with another copy of its weight."""
    from humming.forward import humming_forward
    from humming.layer import HummingLayer

    quantized_input = {"dtype": "int8", "input_quant_mode": "static_tensor"} if integer else None
    layer = HummingLayer(
        shape_n=out_features,
        shape_k=in_features,
        weight_config={"dtype": f"int{bits}"},
        input_config=quantized_input,
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_unquantized(torch.randn(out_features, in_features, device="cuda").bfloat16() * 0.02)
    if integer:
        layer.input_scale.data.fill_(0.02)
    layer.transform()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return humming_forward(
            layer.humming_config,
            inputs=x,
            weight=weight,
            weight_scale=getattr(layer, "weight_scale", None),
            zero_point=getattr(layer, "zero_point", None),
            input_scale=getattr(layer, "input_scale", None),
            locks=layer.locks,
        )

    return layer, run


def humming_calls(x: Tensor, out_features: int, bits: int, *, few: bool = False) -> dict[str, Calls]:
    """Both forms of humming with the steps around them; on one copy of the weight where `few`."""
    k = x.shape[1]
    scale = torch.tensor(0.02, device="cuda", dtype=torch.bfloat16)
    s_out = torch.tensor(0.5, device="cuda", dtype=torch.bfloat16)
    made: dict[str, Calls] = {}
    for name, integer in (("emulated", False), ("humming", True)):
        layer, run = humming_layer(k, out_features, bits, integer=integer)
        count = 1 if few else copies_of(layer.weight.nbytes)
        weights = [layer.weight.data.clone() for _ in range(count)]
        if integer:
            made[name] = [lambda w=w, run=run: fake_quantize(run(x, w), s_out) for w in weights]
        else:
            made[name] = [lambda w=w, run=run: fake_quantize(run(fake_quantize(x, scale), w), s_out) for w in weights]
    return made
