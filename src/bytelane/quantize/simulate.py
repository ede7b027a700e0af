"""A float model that behaves like its quantized form, to try ranges on: fake quantization by hooks on the linears.

The rounding is the integer layer's own, `clamp(rne(x * f32(1/s)), -128, 127) * s`, on float32. What is left out is the
exactness of the accumulator, which is far below a step. It is for choosing, not for judging: a finished checkpoint is
measured by its own integer layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn


def fake_quantize(x: Tensor, scale: float) -> Tensor:
    """`x` on the static int8 grid of `scale`, in its own dtype."""
    step = torch.tensor(scale, dtype=torch.float32)
    codes = torch.round(x.to(torch.float32) * float(1.0 / step)).clamp_(-128, 127)
    return (codes * float(step)).to(x.dtype)


class Simulation:
    """Static int8 sides on a model's linears while the context lasts; the scales may be changed in between.

    Attributes:
        inputs: layer name to input scale; a layer that is absent keeps its float input.
        outputs: likewise for outputs.
        paused: whether all sides are float for now.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, float], outputs: Mapping[str, float]) -> None:
        self._model = model
        self.inputs: dict[str, float] = dict(inputs)
        self.outputs: dict[str, float] = dict(outputs)
        self.paused = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Simulation:
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear):
                self._attach(name, module)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, name: str, linear: nn.Linear) -> None:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            scale = None if self.paused else self.inputs.get(name)
            return None if scale is None else (fake_quantize(args[0], scale), *args[1:])

        def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            scale = None if self.paused else self.outputs.get(name)
            return None if scale is None else fake_quantize(output, scale)

        self._handles.append(linear.register_forward_pre_hook(before))
        self._handles.append(linear.register_forward_hook(after))
