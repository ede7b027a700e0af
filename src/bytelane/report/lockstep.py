"""Run two models on the same tokens in lockstep: they stop at each linear layer, and only one layer is held.

Comparing two models layer by layer needs each layer's input and output from both at the same moment. Keeping one
model's activations until the other has run would take gigabytes for a window of a large model. Here each model runs in
a thread of its own and passes a baton at every layer: one thread runs at a time, and the other stands inside the layer
it has just computed. Two models that call their layers in the same order therefore hold one layer's tensors each.
A layer that one model reaches earlier than the other waits, as a copy, until the other gets there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from bytelane.layers import QuantLinear


@dataclass(frozen=True)
class Visit:
    """One call of one layer.

    Attributes:
        module: the layer.
        x: its input, `[tokens, in]`.
        y: its output, `[tokens, out]`.
    """

    module: nn.Module
    x: Tensor
    y: Tensor


Meet = Callable[[str, Visit, Visit], None]
"""Called with a layer's name and the two models' calls of it."""


class _StoppedError(Exception):
    """The other thread has failed, and this one ends too."""


class _Baton:
    """Lets one of two threads run at a time; thread 0 begins."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._turn = 0
        self._left = [False, False]
        self._broken = False

    def wait(self, me: int) -> None:
        """Wait for the turn.

        Raises:
            _StoppedError: the other thread failed.
        """
        with self._change:
            while self._turn != me and not self._broken:
                self._change.wait()
            if self._broken:
                raise _StoppedError

    def pass_on(self, me: int) -> None:
        """Let the other thread run until it passes the baton back or ends."""
        with self._change:
            if not self._left[1 - me]:
                self._turn = 1 - me
                self._change.notify_all()
        self.wait(me)

    def leave(self, me: int) -> None:
        """End: the other thread keeps the baton."""
        with self._change:
            self._left[me] = True
            self._turn = 1 - me
            self._change.notify_all()

    def break_off(self) -> None:
        """Make both threads end at their next stop."""
        with self._change:
            self._broken = True
            self._change.notify_all()


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name, quantized or not."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantLinear)}


class Lockstep:
    """Two models and what to do where they meet; use as a context manager.

    Args:
        first: a causal language model.
        second: another one.
        names: the linear layers to meet at; both models have them.
        meet: called for every pair of calls, in the order in which they become complete.
    """

    def __init__(self, first: nn.Module, second: nn.Module, names: Collection[str], meet: Meet) -> None:
        self._models = (first, second)
        self._meet = meet
        self._baton = _Baton()
        self._waiting: tuple[dict[str, deque[Visit]], ...] = ({}, {})
        self._handles = [
            module.register_forward_hook(self._hook(me, name))
            for me, model in enumerate(self._models)
            for name, module in linear_layers(model).items()
            if name in set(names)
        ]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bytelane-lockstep")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._baton.break_off()
        for handle in self._handles:
            handle.remove()
        self._pool.shutdown()

    def _hook(self, me: int, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            x = arguments[0].detach()
            visit = Visit(module, x.reshape(-1, x.shape[-1]), output.detach().reshape(-1, output.shape[-1]))
            theirs = self._waiting[1 - me].get(name)
            if theirs:
                pair = (visit, theirs.popleft()) if me == 0 else (theirs.popleft(), visit)
                self._meet(name, *pair)
                return
            mine = self._waiting[me].setdefault(name, deque())
            mine.append(visit)
            self._baton.pass_on(me)
            if mine and mine[-1] is visit:  # this model goes on and may write to its tensors in place
                mine[-1] = replace(visit, x=visit.x.clone(), y=visit.y.clone())

        return hook

    @torch.inference_mode()
    def _forward(self, me: int, ids: Tensor) -> Tensor:
        model: Any = self._models[me]
        try:
            self._baton.wait(me)
            logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        except BaseException:
            self._baton.break_off()  # the other thread must not wait for one that is gone
            raise
        self._baton.leave(me)
        return logits

    def run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Feed token ids `[n]` to both; returns the logits of each, `[n, vocabulary]`."""
        self._baton = _Baton()
        for waiting in self._waiting:
            waiting.clear()
        other = self._pool.submit(self._forward, 0, ids)
        try:
            second = self._forward(1, ids)
        except _StoppedError:
            second = None
        first = other.result()  # raises what the other thread raised
        assert second is not None
        return first, second
