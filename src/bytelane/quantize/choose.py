"""Bits by budget: what each width costs each layer is measured, then the widths are chosen that cost least.

The recipe meets the model as it always does (`make_plan`) and decides what is quantized, which sides, which groups.
Widths that its `bits` patterns give stand. All others are chosen: `bytelane.quantize.sensitivity` measures,
`bytelane.quantize.knapsack` chooses, and a `BitPlan` says what came out.

Layers that read one tensor get one width, so that a runtime may merge them. A tied head and its table are one module.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bytelane.checkpoint import QuantizedModule
from bytelane.quantize.bit_plan import VERSION, BitPlan, PlannedLayer
from bytelane.quantize.knapsack import BudgetError, Solution, solve
from bytelane.quantize.kv import attention_names
from bytelane.quantize.pipeline import (
    DEFAULT_WINDOW,
    DEFAULT_WINDOWS,
    load_float_model,
)
from bytelane.quantize.plan import Plan, make_plan
from bytelane.quantize.recipe import GEMMA_BITS, Head, Recipe
from bytelane.quantize.resume import fingerprint
from bytelane.quantize.sensitivity import Sensitivity, candidates, measure, shared_inputs, try_out
from bytelane.quantize.settle import EQUALIZE_WINDOWS, Progress, folded
from bytelane.quantize.text import Split, read_files, windows
from bytelane.scheme import MAX_BITS, MIN_BITS, Kind, LinearScheme

DEFAULT_WIDTHS = (2, 3, 4, 5, 6, 8)
"""Tried where the storage holds them."""

TRIAL_WINDOWS = 2
"""Windows that each group of layers is tried out on."""


@dataclass(frozen=True)
class Budget:
    """What limits the widths: exactly one of the three.

    Attributes:
        size: bytes of the checkpoint's safetensors files, everything in them counted.
        average_bits: of the weights whose width is chosen.
        loss: nats a token that the chosen widths may cost by the measurement.
    """

    size: int | None = None
    average_bits: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.size, self.average_bits, self.loss) if v is not None]
        if len(given) != 1:
            raise BudgetError("a budget is a size, an average of bits or a loss, and one of them only")
        if not given[0] > 0:
            raise BudgetError(f"a budget must be positive, found {given[0]}")


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """`"60MB"`, `"1.5 GiB"` or a number of bytes, as bytes.

    Raises:
        BudgetError: none of them.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise BudgetError(f"a size is a number with kB, MB, GB, KiB, MiB or GiB behind it, found {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def check_widths(widths: Sequence[int] | None, storage: str) -> tuple[int, ...]:
    """The widths to try, ascending; by default what the storage holds of `DEFAULT_WIDTHS`.

    Raises:
        BudgetError: a width that it does not hold, or none.
    """
    held = GEMMA_BITS if storage == "gemma" else tuple(range(MIN_BITS, MAX_BITS + 1))
    if widths is None:
        return tuple(b for b in DEFAULT_WIDTHS if b in held)
    wrong = sorted(set(widths) - set(held))
    if wrong or not widths:
        raise BudgetError(f"widths: the {storage} storage holds {', '.join(map(str, held))}; found {wrong or 'none'}")
    return tuple(sorted(set(widths)))


def _untie(model: nn.Module, plan: Plan) -> None:
    """Give heads that the checkpoint will store apart a parameter, and so a gradient, of their own."""
    for name in plan.untied:
        head = model.get_submodule(name)
        head.weight = nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)


def plan_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    recipe: Recipe,
    budget: Budget,
    *,
    widths: Sequence[int] | None = None,
    window: int = DEFAULT_WINDOW,
    max_windows: int | None = DEFAULT_WINDOWS,
    dtype: torch.dtype | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> BitPlan:
    """Choose every layer's width under a budget.

    Args:
        model: the float model; it is read, never changed.
        tokenizer: cuts the text.
        texts: documents to measure on: see `bytelane.quantize.text`.
        recipe: everything but the widths, and those that its `bits` patterns give.
        budget: what limits the widths.
        widths: to choose from; by default what the storage holds of 2, 3, 4, 5, 6 and 8.
        window: tokens in a window.
        max_windows: read at most this many windows; None for all of the text.
        dtype: of what stays float in the checkpoint; None for the model's own.
        cache: a file for the measured losses. It grows with every window; what it holds already is not measured again.
        progress: called while equalizing, rounding (modules), measuring (windows) and trying out (groups of layers).

    Raises:
        BudgetError: no choice fits the budget.
        SensitivityError: the cache is of something else.
        RecipeError, FoldError, SequentialError, TextError: see `quantize_model`.
    """
    tried = check_widths(widths, recipe.storage)
    used = windows(tokenizer, texts, length=window, limit=max_windows)

    def staged(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: None if progress is None else progress(stage, done, total)

    make_plan(model, recipe)  # what is wrong with the recipe is said before the text is read
    source = folded(model, recipe, used, lambda done: staged("equalize")(done, len(used[:EQUALIZE_WINDOWS])))
    plan = make_plan(source, recipe)
    _untie(source, plan)
    free = [m for m in plan.modules if not any(re.search(p, m.name) for p in recipe.bits)]
    if not free:
        raise BudgetError("the recipe's `bits` patterns give every layer its width; there is none to choose")
    of = fingerprint(model, used, recipe.model_dump_json(), tried)
    found = Sensitivity() if cache is None else Sensitivity.load(cache, of)
    linears = [m.name for m in plan.modules if m.kind is Kind.LINEAR]
    leader = {n: names[0] for names in shared_inputs(source, used[0], linears) for n in names}
    together: dict[str, list[str]] = {}
    for m in free:
        together.setdefault(leader.get(m.name, m.name), []).append(m.name)
    if found.windows < len(used) or len(found.factors) < len(free):
        every, middle = {m.name: tried for m in free}, tried[(len(tried) - 1) // 2]
        rounded = candidates(source, used, free, every, rounding=recipe.rounding, progress=staged("round"))
        steps = measure(source, used, rounded, found, staged("measure"))
        trials = [*together.values()]
        tries = try_out(source, used[:TRIAL_WINDOWS], trials, rounded, middle, found, staged("try out"))
        for _ in itertools.chain(steps, tries):
            if cache is not None:
                found.save(cache, of)
    head = source.get_output_embeddings()
    weight_only = recipe.head is Head.WEIGHTS
    tied = {table: name for name, table in plan.tied.items()}
    layers = [
        _layer(m, leader, tied, weight_only and source.get_submodule(m.name) is head, found) for m in plan.modules
    ]
    stored = dtype or model.dtype
    start = BitPlan(
        plan=VERSION,
        model=type(model).__name__,
        budget={k: v for k, v in vars(budget).items() if v is not None},
        recipe=recipe.model_dump(mode="json", exclude_defaults=True),
        other_bytes=_other_bytes(source, plan, stored) + (_kv_bytes(source) if recipe.kv_cache else 0),
        layers=tuple(layers),
    )
    return choose(start, budget, {m.name for m in free}, tried, stored)


def _layer(
    module: QuantizedModule, leader: Mapping[str, str], tied: Mapping[str, str], is_head: bool, found: Sensitivity
) -> PlannedLayer:
    scheme = module.scheme
    sides = (scheme.quantize_input, scheme.quantize_output) if isinstance(scheme, LinearScheme) else (False, False)
    return PlannedLayer(
        name=module.name,
        kind="embedding" if module.kind is Kind.EMBEDDING else "head" if is_head else "linear",
        shape=module.shape,
        bits=scheme.weight.num_bits,
        granularity=scheme.weight.group_size or "channel",
        input=sides[0],
        output=sides[1],
        together=leader.get(module.name),
        tied=tied.get(module.name),
        bias=module.bias,
        losses=found.losses(module.name),
    )


def _other_bytes(model: nn.Module, plan: Plan, dtype: torch.dtype) -> int:
    """Of the tensors beside the quantized modules, each counted once, with their places in the header."""
    taken = {f"{m.name}.{leaf}" for m in plan.modules for leaf in ("weight", "bias")}
    taken |= {f"{name}.weight" for name in plan.tied}
    others: dict[int, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in taken:
            width = dtype.itemsize if tensor.dtype.is_floating_point else tensor.itemsize
            others.setdefault(id(tensor), tensor.numel() * width + len(name) + 128)
    return sum(others.values()) + 128


def _kv_bytes(model: PreTrainedModel) -> int:
    """Of a scale for keys and one for values in every attention layer, with their places in the header."""
    return sum(2 * (torch.float32.itemsize + len(f"{name}.k_scale") + 128) for name in attention_names(model).values())


def choose(
    plan: BitPlan, budget: Budget, free: set[str], widths: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> BitPlan:
    """The plan with the widths that cost least under a budget.

    Args:
        plan: its layers that are free have a loss for each of the widths; the widths of the others stay.
        budget: what limits the widths.
        free: the layers whose widths are chosen.
        widths: to choose from.
        dtype: of what stays float.

    Raises:
        BudgetError: no choice fits the budget.
    """
    groups: dict[tuple[str, object], list[PlannedLayer]] = {}
    for layer in plan.layers:
        if layer.name in free:
            groups.setdefault((layer.together or layer.name, layer.granularity), []).append(layer)
    members = list(groups.values())

    def total(of: Callable[[PlannedLayer, int], float]) -> list[list[float]]:
        return [[sum(of(layer, bits) for layer in group) for bits in widths] for group in members]

    sizes = total(lambda layer, bits: layer.bytes_at(bits, plan.storage, dtype))
    losses = total(lambda layer, bits: layer.losses[bits])
    if budget.size is not None:
        fixed = plan.other_bytes + sum(plan.layer_bytes(x) for x in plan.layers if x.name not in free)
        if fixed + sum(map(min, sizes)) > budget.size:
            raise BudgetError(
                f"size: {budget.size} bytes are too few: with {widths[0]} bits everywhere the checkpoint has "
                f"{fixed + int(sum(map(min, sizes)))}, {fixed} of them where no width is chosen"
            )
        solution = _solve(sizes, losses, budget.size - fixed)
    elif budget.average_bits is not None:
        if budget.average_bits < widths[0]:
            raise BudgetError(f"average_bits: {budget.average_bits:g} is less than the least width, {widths[0]}")
        weights = total(lambda layer, bits: float(bits * layer.weights))
        solution = _solve(weights, losses, budget.average_bits * sum(x.weights for g in members for x in g))
    else:
        assert budget.loss is not None
        least = sum(map(min, losses))
        if least > budget.loss:
            raise BudgetError(f"loss: even the best widths cost {least:.3g} nats a token, more than {budget.loss:g}")
        solution = _solve(losses, sizes, budget.loss)
    bits = {x.name: widths[at] for group, at in zip(members, solution.chosen, strict=True) for x in group}
    made = tuple(x.model_copy(update={"bits": bits.get(x.name, x.bits)}) for x in plan.layers)
    return _agreeing(plan.model_copy(update={"layers": made}))


def _solve(costs: Sequence[Sequence[float]], values: Sequence[Sequence[float]], budget: float) -> Solution:
    return solve([list(zip(c, v, strict=True)) for c, v in zip(costs, values, strict=True)], budget)


def _agreeing(plan: BitPlan) -> BitPlan:
    """Without `together` where the recipe itself keeps layers apart that read one tensor."""
    by_name = {x.name: x for x in plan.layers}

    def apart(x: PlannedLayer) -> bool:
        first = by_name[x.together] if x.together else x
        return (first.bits, first.granularity) != (x.bits, x.granularity)

    layers = tuple(x.model_copy(update={"together": None}) if apart(x) else x for x in plan.layers)
    return plan.model_copy(update={"layers": layers})


def plan_checkpoint(
    source: Path | str,
    recipe: Recipe,
    text_files: Sequence[Path | str],
    budget: Budget,
    *,
    gguf_file: str | None = None,
    split: Split = "calibration",
    widths: Sequence[int] | None = None,
    window: int = DEFAULT_WINDOW,
    max_windows: int | None = DEFAULT_WINDOWS,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> BitPlan:
    """Choose the widths of a float checkpoint's layers on text files: see `plan_bits` and `quantize_checkpoint`."""
    texts = read_files([Path(path) for path in text_files], split)
    model, tokenizer = load_float_model(source, gguf_file=gguf_file, dtype=compute_dtype, device=device)
    return plan_bits(
        model,
        tokenizer,
        texts,
        recipe,
        budget,
        widths=widths,
        window=window,
        max_windows=max_windows,
        dtype=dtype,
        cache=cache,
        progress=progress,
    )
