r"""Scales by the gradient of the model's loss: where every clamp cuts, and how long every weight's step is.

Ranges chosen tensor by tensor know nothing of each other, nor of what the model makes of an error. Here all scales of
the model are learned together, while every weight code stays what rounding made it:

    y = clamp(rne( (clamp(rne(x / s_in)) s_in) (c s_w)^T / s_out )) s_out          learned: log s_in, log s_w, log s_out

The loss is the Kullback-Leibler divergence of the predictions from the float model's, so the text's own next tokens are
not seen. Roundings are passed straight through by gradients, and a scale's gradient weighs what it rounds against what
it cuts, as in tuning (`bytelane.tune.fake`). Every step reads one window; the rate falls to nothing along a cosine. A
step that costs more than the first one of its window is no matter: what is kept are the last step's scales.

Held at a time: what one window's backward pass needs, and two moments a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.errors import QuantizeError

RATE = 0.02
"""Of the logarithms of activation scales, in the first steps: a step of Adam moves a scale by two percent."""
WEIGHT_RATE = 0.002
"""Of the logarithms of weight scales, which are many and nearly right."""


class LearningError(QuantizeError):
    """The scales cannot be learned."""


@dataclass(frozen=True)
class Learned:
    """What came out.

    Attributes:
        inputs: the input scale by layer, those of layers that read one tensor the same.
        outputs: the output scale by layer.
        weights: float32 `[out, groups]` by layer, the scales that go with its codes.
        losses: the divergence in every step, nats a token.
    """

    inputs: dict[str, float]
    outputs: dict[str, float]
    weights: dict[str, Tensor]
    losses: tuple[float, ...]


def _log(value: float, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.tensor(math.log(value), dtype=torch.float32, device=device))


@contextmanager
def _scaled_forward(
    model: nn.Module,
    inputs: Mapping[str, nn.Parameter],
    outputs: Mapping[str, nn.Parameter],
    gains: Mapping[str, nn.Parameter],
) -> Iterator[None]:
    """Meanwhile these linears compute with the scales that are learned."""
    from bytelane.tune.fake import fake_quantize_int8  # tuning imports this package

    def forward_of(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if name in inputs:
                x = fake_quantize_int8(x, inputs[name].exp())
            weight: Tensor = linear.weight
            if name in gains:
                gain = gains[name]
                factor = gain.exp().to(weight.dtype)[..., None]
                weight = (weight.reshape(weight.shape[0], gain.shape[1], -1) * factor).flatten(1)
            y = nn.functional.linear(x, weight, linear.bias)
            return fake_quantize_int8(y, outputs[name].exp()) if name in outputs else y

        return forward

    changed = [model.get_submodule(name) for name in {*inputs, *outputs, *gains}]
    for name in {*inputs, *outputs, *gains}:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.forward = forward_of(name, linear)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for linear in changed:
            del linear.forward  # the class's own again


def learn_scales(
    model: Any,
    teacher: Any,
    windows: Sequence[Tensor],
    steps: int,
    inputs: Mapping[str, float],
    outputs: Mapping[str, float],
    weights: Mapping[str, Tensor],
    *,
    shared: Sequence[Sequence[str]] = (),
    rate: float = RATE,
    weight_rate: float = WEIGHT_RATE,
    progress: Callable[[int, int], None] | None = None,
) -> Learned:
    """Learn the scales of a model whose weights are rounded.

    Args:
        model: a causal language model whose weights are what codes stand for; left as it is.
        teacher: the float model.
        windows: int64 `[length]` token ids each, read in turn, over and over.
        steps: of Adam, a window each.
        inputs: the static input scales by layer to start from.
        outputs: likewise for outputs.
        weights: float32 `[out, groups]` by layer, the scales of its weight's codes.
        shared: the groups of layers that read one tensor; where their scales are equal they stay so.
        rate: of the logarithms of activation scales.
        weight_rate: of the logarithms of weight scales; 0 leaves them alone.
        progress: called with the steps done and the steps in all.

    Raises:
        LearningError: the divergence is not finite.
    """
    from bytelane.tune.loss import logits_loss  # tuning imports this package

    device = next(model.parameters()).device
    leader: dict[str, str] = {}
    for group in shared:
        first: dict[float, str] = {}
        for name in group:
            if name in inputs:
                leader[name] = first.setdefault(inputs[name], name)
    own = {name: _log(scale, device) for name, scale in inputs.items() if leader.get(name, name) == name}
    log_inputs = {name: own[leader.get(name, name)] for name in inputs}
    log_outputs = {name: _log(scale, device) for name, scale in outputs.items()}
    gains = {n: nn.Parameter(torch.zeros_like(s, device=device)) for n, s in weights.items() if weight_rate}
    learned = [([*own.values(), *log_outputs.values()], rate), ([*gains.values()], weight_rate)]
    groups = [{"params": parameters, "base": base} for parameters, base in learned if parameters]
    optimizer = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.95))
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    losses: list[float] = []
    try:
        model.requires_grad_(False)
        with _scaled_forward(model, log_inputs, log_outputs, gains), torch.enable_grad():
            for step in range(steps):
                ids = windows[step % len(windows)][None].to(device)
                with torch.no_grad():
                    given = teacher(input_ids=ids, use_cache=False).logits[0]
                found = model(input_ids=ids, use_cache=False).logits[0]
                loss = logits_loss(found, given, ids[0])
                for held in optimizer.param_groups:
                    held["lr"] = held["base"] * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise LearningError(
                        f"the loss of step {step} is {losses[-1]}; learn the scales in fewer steps or not at all"
                    )
                if progress is not None:
                    progress(step + 1, steps)
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
    with torch.no_grad():
        return Learned(
            inputs={name: float(log.exp()) for name, log in log_inputs.items()},
            outputs={name: float(log.exp()) for name, log in log_outputs.items()},
            weights={n: s.to(device) * gains[n].exp() if n in gains else s for n, s in weights.items()},
            losses=tuple(losses),
        )
