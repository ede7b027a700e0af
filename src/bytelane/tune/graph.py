"""A training step as one CUDA graph: thousands of launches in the time of one.

A step of a small model is bound by the host, which takes some ten microseconds for every operation of Python and torch:
two hundred quantized layers are forty thousand operations. Recorded once, the GPU runs them one after another by
itself. What is recorded is the step as it is: the kernels, their order and so the values are those of the eager one.
Only its inputs are copied to where the recording reads them, and learning rates are numbers on the device.

What lies between the layers (norms, activation functions and their gradients) is compiled first, so that each is one
pass over memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bytelane.tune.teacher import TuningError

_ATTENTION = "bytelane_recorded"
"""transformers' `sdpa`, but for how it decides on a mask."""

_WARMUP = 3
"""Runs before the recording, in which kernels are compiled and libraries take their workspaces."""


class CapturedStep:
    """Calls a step that was recorded.

    Attributes:
        inputs: where the recording reads.
    """

    def __init__(
        self, gradients: Callable[..., Tensor], apply: Callable[[], None], forget: Callable[[], None], *inputs: Tensor
    ) -> None:
        """Record `gradients(*inputs)`, then `apply()`; nothing is applied now.

        Args:
            gradients: computes the loss, a float32 scalar, and adds to the parameters' gradients.
            apply: takes the optimizer's step.
            forget: makes the parameters have no gradients.
            inputs: tensors of the shapes and dtypes every call will have.

        Raises:
            TuningError: the step does what a recording cannot hold, such as reading a value from the GPU.
        """
        self.inputs = tuple(i.clone() for i in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                gradients(*self.inputs)
                forget()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._loss = gradients(*self.inputs)
                apply()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise TuningError(f"a step of this model cannot be recorded ({reason}); tune it eagerly") from error

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the step; the loss is overwritten by the next one."""
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._loss


class Losses:
    """Losses on their way from the device: reading one does not wait for the step started after it."""

    def __init__(self) -> None:
        """None yet."""
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def add(self, loss: Tensor) -> None:
        """Note the loss of the step just started, a float32 scalar."""
        if not loss.is_cuda:
            self._waiting.append((loss, None))
            return
        host = torch.empty((), dtype=torch.float32, pin_memory=True)
        host.copy_(loss, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((host, event))

    def read(self, *, everything: bool) -> Iterator[float]:
        """The losses not read so far, in order; on a GPU without the last one, unless `everything`."""
        while self._waiting and (everything or len(self._waiting) > 1 or self._waiting[0][1] is None):
            host, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            yield float(host)


def _mask(*, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """None where attention is simply causal, also while recording.

    Then transformers would make a mask to be on the safe side, which keeps attention from its fast kernels.
    """
    local = kwargs.get("local_size")
    plain = kwargs.get("allow_is_causal_skip", False) and kwargs.get("attention_mask") is None
    if plain and q_length == kv_length and (local is None or kv_length < local):
        return None
    made: Tensor | None = sdpa_mask(q_length=q_length, kv_length=kv_length, **kwargs)
    return made


@contextmanager
def plain_attention(*models: Any) -> Iterator[None]:
    """For the length of a block, models that attend by `sdpa` make masks only where attention is not simply causal."""
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, _mask)
    changed = [m for m in models if isinstance(m, PreTrainedModel) and m.config._attn_implementation == "sdpa"]
    for model in changed:
        model.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        for model in changed:
            model.config._attn_implementation = "sdpa"


def ready_for_capture(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's moments, which it would make in its first step: a recording must find them there."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def between_layers(decoder: Any) -> list[nn.Module]:
    """The parts of decoder layers that see neither positions nor a cache: norms and MLPs, and the last norm."""
    found = [
        child
        for layer in getattr(decoder, "layers", ())
        for child in layer.children()
        if not any(hasattr(part, "layer_idx") for part in child.modules())
    ]
    last = getattr(decoder, "norm", None)
    return [*found, *([] if last is None else [last])]


@contextmanager
def compiled(modules: list[nn.Module]) -> Iterator[None]:
    """Compile modules for the length of a block; inside, their copies are not compiled."""
    for module in modules:
        module.compile(dynamic=False)
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None
