r"""What each layer's rounding costs the model at every width: from gradients, held against one trial a layer.

Rounding a weight W to Q changes the model's next-token distributions p. To second order, summed over a window's tokens,

    KL(p_W || p_Q)  =  1/2 <D, F D>,     D = Q - W,     F = E[ G G^T ]

with G the gradient at W of `sum_t log p(y_t)` for tokens y_t drawn from the model's own p: F is the Fisher information,
and that form of it is exact, products of different tokens included (their gradients are independent and their mean is
0). So one backward pass a window, in which every layer's G appears once, serves all layers and all widths:

    loss(layer, N)  =  1/2 . mean over windows of  sum_r <G_r, D_r>^2  /  tokens in a window          nats a token

The sum over rows r is taken outside the square: what rows (output channels) have in common averages out, since each is
rounded by itself, and a sum of many squares is known from few windows where a single square is not. D is of the
rounding that will be used: to the nearest, or GPTQ's, whose errors along the inputs cancel.

Where a rounding is no longer small this is too little: in SmolLM2 the gate that makes a massive activation costs four
times as much at 4 bits. So the layers that read one tensor are then tried out together, rounded to one width in the
middle, and the losses of all their widths are multiplied by what the trial's divergence is over the expected one. What
remains is that losses add up over layers only as long as all of them are small; a checkpoint is judged by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.checkpoint import QuantizedModule
from bytelane.errors import QuantizeError
from bytelane.quantize.gptq import Hessian, gptq
from bytelane.quantize.layerwise import advance, decoder_layers, first_hidden, layer_calls
from bytelane.quantize.observe import observe
from bytelane.quantize.rounding import round_to_nearest
from bytelane.scheme import WeightScheme

_CHUNK_WEIGHTS = 1 << 22
"""Weights whose rounding errors are held in float32 at a time."""

_NOTICED = 1e-6
"""nats a token: the divergence that roundings of float32 logits make up is some ten times less."""

Candidates = Mapping[str, Mapping[int, tuple[Tensor, Tensor]]]
"""By module and width: int8 codes `[out, in]` and float32 scales `[out, groups]`."""


class SensitivityError(QuantizeError):
    """A file of measured losses that is of something else, or is none."""


@dataclass
class Sensitivity:
    """The measured losses, as sums that grow with every window.

    Attributes:
        sums: by module and width, `sum_r <G_r, D_r>^2` over the windows read.
        tokens: predicted in those windows.
        windows: read.
        factors: by module, the divergence in a trial over the expected one.
    """

    sums: dict[str, dict[int, float]] = field(default_factory=dict)
    tokens: int = 0
    windows: int = 0
    factors: dict[str, float] = field(default_factory=dict)

    def losses(self, name: str) -> dict[int, float]:
        """A module's expected loss at every width, in nats a token, to four digits; none of one not measured."""
        scale = 0.5 * self.factors.get(name, 1.0) / max(1, self.tokens)
        return {bits: float(f"{scale * total:.4g}") for bits, total in self.sums.get(name, {}).items()}

    @classmethod
    def load(cls, file: Path, of: str) -> Sensitivity:
        """The sums in a file; none where there is no such file.

        Args:
            file: written by `save`.
            of: what they must be of: see `bytelane.quantize.resume.fingerprint`.

        Raises:
            SensitivityError: the file is none of `save`'s, or of another model, text, recipe or choice of widths.
        """
        if not file.exists():
            return cls()
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            sums = {str(n): {int(b): float(v) for b, v in widths.items()} for n, widths in held["sums"].items()}
            factors = {str(n): float(v) for n, v in held["factors"].items()}
            found = cls(sums, int(held["tokens"]), int(held["windows"]), factors)
            measured = str(held["of"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SensitivityError(f"{file}: no file of measured losses: {error!r}; give another name") from error
        if measured != of:
            raise SensitivityError(
                f"{file}: its losses are of another model, text, recipe or choice of widths; give another name, or "
                f"remove it to measure anew"
            )
        return found

    def save(self, file: Path, of: str) -> None:
        """Write the sums: all of them, or the file stays as it was."""
        values = {"of": of, **vars(self)}
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
        partial.replace(file)


def shared_inputs(model: nn.Module, window: Tensor, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The groups of two or more of these linears that read one tensor, in the model's order."""
    return observe(model, [window], names).shared if names else ()


@torch.no_grad()
def candidates(
    model: Any,
    windows: Sequence[Tensor],
    modules: Sequence[QuantizedModule],
    widths: Mapping[str, Sequence[int]],
    *,
    rounding: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
    """Round every module to every width that it could have: one byte a weight and width is held.

    Args:
        model: the float model; it is read, never changed.
        windows: what the Hessians of GPTQ come from; unused where `rounding` is `"nearest"`.
        modules: the modules, whose schemes give the groups.
        widths: the widths by module.
        rounding: `"nearest"` or `"gptq"`, the latter for what lies in decoder layers.
        progress: called with the modules done and the modules in all.

    Raises:
        SequentialError: GPTQ cannot run the model's layers one at a time.
    """
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    by_name = {m.name: m for m in modules}

    def schemes(name: str) -> Iterator[WeightScheme]:
        return (WeightScheme(bits, by_name[name].scheme.weight.group_size) for bits in widths[name])

    def done(name: str, made: dict[int, tuple[Tensor, Tensor]]) -> None:
        found[name] = made
        if progress is not None:
            progress(len(found), len(modules))

    if rounding == "gptq":
        for name, hessian in _hessians(model, windows, by_name):
            weight = model.get_submodule(name).weight
            done(name, {s.num_bits: gptq(weight, s, hessian.sum, name) for s in schemes(name)})
    for name in by_name:
        if name not in found:
            weight = model.get_submodule(name).weight
            done(name, {s.num_bits: round_to_nearest(weight, s, name) for s in schemes(name)})
    return found


def _hessians(model: Any, windows: Sequence[Tensor], names: Mapping[str, object]) -> Iterator[tuple[str, Hessian]]:
    """The Hessian of every linear in the decoder layers, one layer's at a time, on the float model's inputs."""
    prefix, layers = decoder_layers(model)
    device = next(model.parameters()).device
    used = [window.to(device) for window in windows]
    calls = layer_calls(model, layers, used[0])
    states = [first_hidden(model, layers[0], window) for window in used]
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        made: dict[str, Hessian] = {}
        handles = []
        for inner, linear in layer.named_modules():
            name = f"{prefix}.{index}.{inner}"
            if isinstance(linear, nn.Linear) and name in names:
                made[name] = Hessian(linear.in_features, device)
                handles.append(linear.register_forward_pre_hook(lambda _, args, h=made[name]: h.add(args[0])))
        try:
            states = advance([layer], [call], states)
        finally:
            for handle in handles:
                handle.remove()
        yield from made.items()


@contextmanager
def _gradients(model: nn.Module, seen: Mapping[str, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
    """Meanwhile a backward pass hands each of these modules' weights and gradients over, and keeps none."""
    before = {p: p.requires_grad for p in model.parameters()}
    handles = []
    try:
        model.requires_grad_(False)
        for name, take in seen.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            weight.requires_grad_(True)

            def hook(parameter: Tensor, take: Callable[[Tensor, Tensor], None] = take) -> None:
                assert parameter.grad is not None
                take(parameter.detach(), parameter.grad)
                parameter.grad = None

            handles.append(weight.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def squared_products(weight: Tensor, gradient: Tensor, codes: Tensor, scale: Tensor) -> float:
    """`sum_r <G_r, Q_r - W_r>^2` of a weight `[out, in]`, its gradient, its codes and its scales `[out, groups]`."""
    total = 0.0
    step = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        grouped = codes[rows].to(torch.float32).reshape(-1, scale.shape[1], weight.shape[1] // scale.shape[1])
        error = (grouped * scale[rows, :, None]).flatten(1).sub_(weight[rows])
        products = error.mul_(gradient[rows]).sum(1)
        total += float(products.to(torch.float64).square().sum())
    return total


def sampled_gradient(model: Any, window: Tensor, seed: int) -> int:
    """Backward from the log-likelihood of tokens that the model itself draws, one for every position of a window.

    Args:
        model: a causal language model whose parameters of interest want gradients.
        window: int64 `[length]` token ids.
        seed: of the draw.

    Returns:
        How many tokens were drawn.
    """
    logits = model(input_ids=window[None], use_cache=False).logits[0].to(torch.float32)
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
    nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return int(drawn.numel())


def measure(
    model: Any,
    windows: Sequence[Tensor],
    rounded: Candidates,
    found: Sensitivity,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[None]:
    """Add windows to what is known, one at each step of the iteration, beginning after those read before.

    Args:
        model: the float model, in evaluation mode; its parameters are not changed.
        windows: int64 `[length]` token ids each.
        rounded: see `candidates`.
        found: is added to.
        progress: called with the windows read and the windows in all.
    """
    device = next(model.parameters()).device
    new: dict[str, dict[int, float]] = {}

    def taker(name: str) -> Callable[[Tensor, Tensor], None]:
        def take(weight: Tensor, gradient: Tensor) -> None:
            new[name] = {b: squared_products(weight, gradient, *made) for b, made in rounded[name].items()}

        return take

    with _gradients(model, {name: taker(name) for name in rounded}):
        for index in range(found.windows, len(windows)):
            new.clear()
            with torch.enable_grad():
                tokens = sampled_gradient(model, windows[index].to(device), index)
            for name, widths in new.items():
                sums = found.sums.setdefault(name, dict.fromkeys(widths, 0.0))
                for bits, total in widths.items():
                    sums[bits] += total
            found.tokens += tokens
            found.windows = index + 1
            if progress is not None:
                progress(found.windows, len(windows))
            yield


@torch.no_grad()
def try_out(
    model: Any,
    windows: Sequence[Tensor],
    groups: Sequence[Sequence[str]],
    rounded: Candidates,
    bits: int,
    found: Sensitivity,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[None]:
    """Hold the expected losses against a trial of each group of modules, one at each step of the iteration.

    Args:
        model: the float model, in evaluation mode; its parameters are as before between and after the steps.
        windows: int64 `[length]` token ids each; read once for each group, their float logits are held.
        groups: the modules that are tried together; those that have factors are left out.
        rounded: see `candidates`.
        bits: the width tried.
        found: measured; its factors are added to.
        progress: called with the groups tried and the groups in all.
    """
    device = next(model.parameters()).device
    used = [window[None].to(device) for window in windows]

    def log_probabilities(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits[0].to(torch.float32).log_softmax(-1)
        return found

    if any(group[0] not in found.factors for group in groups):
        wanted = [log_probabilities(ids) for ids in used]
    for done, group in enumerate(groups, start=1):
        if group[0] in found.factors:
            continue
        weights = {name: model.get_submodule(name).weight for name in group}
        kept = {name: weight.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            codes, scale = rounded[name][bits]
            grouped = codes.to(torch.float32).reshape(codes.shape[0], scale.shape[1], -1) * scale[..., None]
            weight.copy_(grouped.reshape(codes.shape))
        total = 0.0
        for before, ids in zip(wanted, used, strict=True):
            total += float((before.exp() * (before - log_probabilities(ids))).sum())
        for name, weight in weights.items():
            weight.copy_(kept[name])
        true = max(0.0, total / sum(ids.numel() for ids in used))
        expected = sum(0.5 * found.sums[name][bits] / found.tokens for name in group)
        # A trial that changes next to nothing is all rounding of float32; what gradients say is then the better guess.
        factor = true / expected if true > _NOTICED and expected > 0 else 1.0
        found.factors |= dict.fromkeys(group, factor)
        if progress is not None:
            progress(done, len(groups))
        yield
