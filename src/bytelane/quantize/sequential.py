"""GPTQ over a whole model, one decoder layer at a time, on inputs that quantized layers before it made.

The hidden states that enter the first layer are kept for every window. For each layer in turn

1. the layer reads them with its static int8 sides simulated, and the Hessians of its linears' (dequantized int8) inputs
   are summed;
2. its weights are rounded with them, and replaced by what the codes stand for;
3. it reads them again, and what comes out enters the next layer.

So the whole costs two passes over the text. Held at a time: the hidden states of all windows (windows x tokens x width
floats) and one layer's Hessians, whatever the depth of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.checkpoint import QuantizedModule
from bytelane.quantize.gptq import Hessian, gptq
from bytelane.quantize.layerwise import Call, decoder_layers, first_hidden, layer_calls, run_layer
from bytelane.quantize.simulate import Simulation, fake_quantize


@torch.no_grad()
def quantize_sequentially(
    model: Any,
    windows: Sequence[Tensor],
    modules: Sequence[QuantizedModule],
    inputs: Mapping[str, float],
    outputs: Mapping[str, float],
    *,
    shared: Sequence[Sequence[str]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Round the linears inside the decoder layers.

    Args:
        model: a transformers decoder; **its weights are replaced** by what the codes stand for.
        windows: int64 `[length]` token ids each, all of one length.
        modules: the modules to quantize; those outside the decoder layers, and embeddings, are left for later.
        inputs: the static input scales by name; a layer that is absent has a float input.
        outputs: likewise for outputs.
        shared: the groups of linears that read one tensor, whose Hessian is then summed once.
        progress: called with the layers done and the layers in all.

    Returns:
        int8 codes `[out, in]` and float32 scales `[out, groups]` by module name.

    Raises:
        SequentialError: the model's layers cannot be run one at a time.
    """
    prefix, layers = decoder_layers(model)
    by_name = {m.name: m for m in modules}
    device = next(model.parameters()).device
    used = [window.to(device) for window in windows]
    calls = layer_calls(model, layers, used[0])
    states = [first_hidden(model, layers[0], window) for window in used]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with Simulation(model, inputs, outputs):
        for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
            names = {
                f"{prefix}.{index}.{name}": linear
                for name, linear in layer.named_modules()
                if isinstance(linear, nn.Linear) and f"{prefix}.{index}.{name}" in by_name
            }
            hessians = _hessians(layer, call, names, states, inputs, shared)
            for name, linear in names.items():
                codes, scale = gptq(linear.weight, by_name[name].scheme.weight, hessians[name].sum, name)
                found[name] = (codes, scale)
                grouped = codes.reshape(codes.shape[0], scale.shape[1], -1).to(torch.float32) * scale[..., None]
                linear.weight.copy_(grouped.reshape(codes.shape).to(linear.weight.dtype))
            states = [run_layer(layer, hidden, call) for hidden in states]
            if progress is not None:
                progress(index + 1, len(layers))
    return found


def _hessians(
    layer: nn.Module,
    call: Call,
    names: Mapping[str, nn.Linear],
    states: Sequence[Tensor],
    inputs: Mapping[str, float],
    shared: Sequence[Sequence[str]],
) -> dict[str, Hessian]:
    """The Hessian of every linear's input; linears that read one tensor with one scale share the object."""
    first: dict[str, str] = {}
    for group in shared:
        leaders: dict[float | None, str] = {}
        for name in group:
            first[name] = leaders.setdefault(inputs.get(name), name)
    found = {
        name: Hessian(linear.in_features, linear.weight.device)
        for name, linear in names.items()
        if first.get(name, name) == name
    }

    def hook_of(hessian: Hessian, scale: float | None) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            hessian.add(args[0] if scale is None else fake_quantize(args[0], scale))

        return hook

    handles = [
        names[name].register_forward_pre_hook(hook_of(hessian, inputs.get(name)), prepend=True)
        for name, hessian in found.items()
    ]
    try:
        for hidden in states:
            run_layer(layer, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[first.get(name, name)] for name in names}
