"""A decoder's layers, run one at a time: the hidden states between them are kept, not computed again.

`SequentialError` says which models cannot be run so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.errors import QuantizeError


class SequentialError(QuantizeError):
    """The model's layers cannot be run one at a time."""


@dataclass
class Call:
    """How the model called one of its layers: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    """Raised to leave a forward pass at the first layer."""


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """A model's layers and their common name.

    Raises:
        SequentialError: there are none where transformers' decoders have them.
    """
    base = getattr(model, "base_model", model)
    found = getattr(base, "layers", None)
    for name, module in model.named_modules():
        if module is found and isinstance(module, nn.ModuleList) and len(module):
            return name, module
    raise SequentialError(
        f"{type(model).__name__}: its layers are not in `model.layers`, so they cannot be run one at a time; "
        f'use "rounding": "nearest" and "search": 0'
    )


def layer_calls(model: Any, layers: nn.ModuleList, window: Tensor) -> list[Call]:
    """Let the model call its layers once, to learn with what beside the hidden states."""
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], Tensor):
            raise SequentialError(
                f"{type(model).__name__}: its layers do not take the hidden states as their first argument; "
                f'use "rounding": "nearest" and "search": 0'
            )
        calls.append(Call(args[1:], dict(kwargs)))

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=window[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != len(layers):
        raise SequentialError(
            f"{type(model).__name__}: called {len(calls)} of its {len(layers)} layers, or one of them twice; "
            f'use "rounding": "nearest" and "search": 0'
        )
    return calls


def first_hidden(model: Any, first: nn.Module, window: Tensor) -> Tensor:
    """The hidden states `[1, tokens, width]` that enter the first layer."""
    kept: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
        kept.append(args[0].detach())
        raise _Reached

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=window[None], use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return kept[0]


def run_layer(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states that leave a layer."""
    out = layer(hidden, *call.args, **call.kwargs)
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@torch.no_grad()
def advance(layers: Sequence[nn.Module], calls: Sequence[Call], states: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states through some consecutive layers."""
    found = list(states)
    for layer, call in zip(layers, calls, strict=True):
        found = [run_layer(layer, hidden, call) for hidden in found]
    return found


@contextmanager
def entered_at(layers: nn.ModuleList, index: int, states: Sequence[Tensor]) -> Iterator[None]:
    """The model meanwhile skips the layers before `index`; what enters there is `states`, one a pass, over and over."""
    passes = 0

    def skip(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal passes
        passes += 1
        return (states[(passes - 1) % len(states)], *args[1:]), kwargs

    handle = layers[index].register_forward_pre_hook(enter, with_kwargs=True)
    skipped = list(layers)[:index]
    for layer in skipped:
        layer.forward = skip
    try:
        yield
    finally:
        handle.remove()
        for layer in skipped:
            del layer.forward  # the class's own again
