"""GPTQ over a whole model, one decoder layer at a time, on inputs that quantized layers before it made.

The hidden states that enter the first layer are kept for every window. For each layer in turn

1. the float layer reads what float layers made, and its linears' inputs are kept for a window, and how long each
   token's residual stream is afterwards: errors of `o` and `down` are weighted by one over that;
2. the layer reads what quantized layers made, with its static int8 sides simulated, and the Hessians of its linears'
   (dequantized int8) inputs are summed, and the means of these and of the float ones;
3. its weights are rounded with them, and replaced by what the codes stand for; its biases are corrected;
4. it reads the states of 2 again, and what comes out enters the next layer.

So the whole costs three passes over the text. Held at a time: the hidden states of all windows, twice (windows x tokens
x width floats), and one layer's Hessians, whatever the depth of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.checkpoint import QuantizedModule
from bytelane.quantize.blocks import blocks
from bytelane.quantize.gptq import Hessian, corrected_bias, gptq
from bytelane.quantize.layerwise import Call, decoder_layers, first_hidden, layer_calls, run_layer
from bytelane.quantize.rounding import dequantized
from bytelane.quantize.simulate import Simulation, fake_quantize

_SHORTEST = 1e-6
"""Of a residual stream, so that a token without any has a weight."""


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
        model: a transformers decoder; **its weights are replaced** by what the codes stand for, its biases corrected.
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
    exact = [first_hidden(model, layers[0], window) for window in used]
    states = list(exact)
    writers = {linear for b in blocks(model) if b.plain_residual for linear in (b.o, b.down)}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with Simulation(model, inputs, outputs) as simulation:
        for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
            names = {
                f"{prefix}.{index}.{name}": linear
                for name, linear in layer.named_modules()
                if isinstance(linear, nn.Linear) and f"{prefix}.{index}.{name}" in by_name
            }
            hessians, exact = _hessians(simulation, layer, call, names, writers, states, exact, shared)
            for name, linear in names.items():
                hessian = hessians[name]
                codes, scale = gptq(linear.weight, by_name[name].scheme.weight, hessian.sum, name)
                found[name] = (codes, scale)
                rounded = dequantized(codes, scale)
                if linear.bias is not None:
                    linear.bias.copy_(corrected_bias(linear.bias, linear.weight, rounded, hessian))
                linear.weight.copy_(rounded.to(linear.weight.dtype))
            states = [run_layer(layer, hidden, call) for hidden in states]
            if progress is not None:
                progress(index + 1, len(layers))
    return found


def _hessians(
    simulation: Simulation,
    layer: nn.Module,
    call: Call,
    names: Mapping[str, nn.Linear],
    writers: Collection[nn.Module],
    states: Sequence[Tensor],
    exact: Sequence[Tensor],
    shared: Sequence[Sequence[str]],
) -> tuple[dict[str, Hessian], list[Tensor]]:
    """The Hessian of every linear's input, and the hidden states that leave the float layer.

    Linears that read one tensor with one scale share the object.
    """
    inputs = simulation.inputs
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
    wanted: dict[str, Tensor] = {}
    left: list[Tensor] = []

    def hook_of(name: str, hessian: Hessian) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            if simulation.paused:
                wanted[name] = args[0]
                return
            scale = inputs.get(name)
            weights = 1.0 / left[-1].norm(dim=-1).clamp_min(_SHORTEST) if linear in writers else None
            hessian.add(args[0] if scale is None else fake_quantize(args[0], scale), wanted.pop(name), weights)

        return hook

    handles = [
        names[name].register_forward_pre_hook(hook_of(name, hessian), prepend=True) for name, hessian in found.items()
    ]
    try:
        for hidden, float_hidden in zip(states, exact, strict=True):
            simulation.paused = True
            left.append(run_layer(layer, float_hidden, call))
            simulation.paused = False
            run_layer(layer, hidden, call)
    finally:
        simulation.paused = False
        for handle in handles:
            handle.remove()
    return {name: found[first.get(name, name)] for name in names}, left
