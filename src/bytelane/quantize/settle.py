"""What a recipe makes of a model before anything is written: its basis, its ranges, its codes.

`settle` folds, observes, searches, rounds by GPTQ and learns scales, each where the recipe wants it, and in this order.
A checkpoint is written of it (`bytelane.quantize.pipeline`), or tuning starts from it (`bytelane.tune.student`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bytelane.checkpoint import KVScales
from bytelane.quantize.fold import check_same_function, equalize, rotate
from bytelane.quantize.kv import observe_kv
from bytelane.quantize.learn import learn_scales
from bytelane.quantize.observe import CODE_MAX, Observations, Statistics, observe, range_scale
from bytelane.quantize.plan import Plan, make_plan
from bytelane.quantize.recipe import Range, Recipe, RecipeError
from bytelane.quantize.resume import ObservationFile, fingerprint
from bytelane.quantize.rounding import dequantized, round_to_nearest
from bytelane.quantize.search import search_ranges
from bytelane.quantize.sequential import quantize_sequentially

Progress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all: `"equalize"`, `"observe"` and `"kv cache"` count windows,
`"search"` ranges tried, `"gptq"` decoder layers, `"learn"` steps, `"write"` modules."""

SEARCH_TOKENS = 512
"""Tokens whose loss judges a range, in whole windows: they are read once for each range tried."""

EQUALIZE_WINDOWS = 8
"""Windows that say how loud each channel is: more do not change how channels compare."""

SEARCHED = "loss"
"""The label of a range that was chosen by loss."""

LEARNED = "learned"
"""The label of a range that was learned."""


@dataclass(frozen=True)
class Side:
    """A quantized activation side: its scale (float32 `[]`), the label of what it came from, the share it clips."""

    scale: Tensor
    rule: str
    clipped: float


def activation_limit(statistics: Statistics, rule: Range) -> float:
    """The end of a range: the `|x|` that the highest code falls on."""
    if rule.method == "mse":
        return statistics.least_squares()
    return statistics.amax() if rule.percentile is None else statistics.percentile(rule.percentile)


def sides_of(plan: Plan, seen: Observations) -> tuple[dict[str, Side], dict[str, Side]]:
    """The input and the output side of every layer that has them."""
    for names in seen.shared:
        rules = {plan.input_ranges[n].label: n for n in names if n in plan.input_ranges}
        if len(rules) > 1:
            found = ", ".join(f"{rule} for {name}" for rule, name in rules.items())
            raise RecipeError(
                f"input_ranges: layers that read the same tensor must agree on its range, found {found}; "
                f"widen the pattern to all of {', '.join(names)}"
            )
    made: list[dict[str, Side]] = []
    for side, rules_of, statistics_of in (
        ("input", plan.input_ranges, seen.inputs),
        ("output", plan.output_ranges, seen.outputs),
    ):
        sides = {}
        for name, rule in rules_of.items():
            limit = activation_limit(statistics_of[name], rule)
            sides[name] = Side(range_scale(limit, name, side), rule.label, statistics_of[name].clipped(limit))
        made.append(sides)
    return made[0], made[1]


def _scales(sides: Mapping[str, Side]) -> dict[str, float]:
    return {name: float(side.scale) for name, side in sides.items()}


@dataclass
class Settled:
    """A model and all that was decided about it.

    Attributes:
        source: the float model in the basis that is quantized; where its weights are rounded already, what their codes
            stand for (but for tables and heads).
        plan: what is quantized, of the source.
        seen: what was observed.
        inputs: the input side of every layer that has one.
        outputs: the output side likewise.
        kv_scales: of the attention's keys and values, where the recipe wants them.
        rounded: int8 codes `[out, in]` and float32 scales `[out, groups]` of the modules that are rounded already; the
            others are rounded to the nearest when they are written.
    """

    source: PreTrainedModel
    plan: Plan
    seen: Observations = field(default_factory=lambda: Observations({}, {}, (), 0))
    inputs: dict[str, Side] = field(default_factory=dict)
    outputs: dict[str, Side] = field(default_factory=dict)
    kv_scales: dict[str, KVScales] = field(default_factory=dict)
    rounded: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def replace(self, side: str, limits: Mapping[str, float], rule: str) -> None:
        """Give layers other ranges on a side, by the end of each."""
        sides, seen = (self.inputs, self.seen.inputs) if side == "input" else (self.outputs, self.seen.outputs)
        for name, limit in limits.items():
            sides[name] = Side(range_scale(limit, name, side), rule, seen[name].clipped(limit))


def _rewrites(recipe: Recipe) -> bool:
    """Whether the source is a copy, with weights of its own."""
    return bool(recipe.rotate or recipe.equalize or recipe.rounding == "gptq" or recipe.learn_scales)


def needs_text(plan: Plan, recipe: Recipe) -> bool:
    """Whether anything is to be observed."""
    return bool(plan.observed or _rewrites(recipe) or recipe.kv_cache)


def settle(
    model: PreTrainedModel,
    used: Sequence[Tensor],
    recipe: Recipe,
    *,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> Settled:
    """Carry out a recipe, but for the rounding to nearest.

    Args:
        model: the float model; it is read, never changed.
        used: int64 `[length]` token ids each, all of one length; none where nothing is observed: see `needs_text`.
        recipe: what to do.
        resume: see `bytelane.quantize.quantize_model`.
        progress: called with stages and steps.

    Raises:
        RecipeError, FoldError, SequentialError, CalibrationError, LearningError, ResumeError: see
            `bytelane.quantize.quantize_model`.
    """
    plan = make_plan(model, recipe)

    def counted(stage: str, most: int | None = None) -> Callable[[int], None] | None:
        return None if progress is None else lambda done: progress(stage, done, len(used[:most]))

    def staged(stage: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(stage, done, total)

    source = model
    if _rewrites(recipe):
        source = folded(model, recipe, used, counted("equalize", EQUALIZE_WINDOWS))
        plan = make_plan(source, recipe)  # a rotated model's tied head is no longer
    found = Settled(source, plan)
    kept = None
    if resume is not None and plan.observed:
        kept = ObservationFile(resume, fingerprint(source, used, recipe.model_dump_json(), plan.observed))
    # ranges that the loss chooses follow from more than statistics, and those then say what is cut
    observe_ranges(
        found, used, all_histograms=bool(recipe.search or recipe.learn_scales), resume=kept, progress=counted("observe")
    )
    if recipe.kv_cache:
        found.kv_scales = observe_kv(source, used, progress=counted("kv cache"))
    if recipe.search:
        _search(found, used, recipe.search, staged("search"))
    if recipe.rounding == "gptq":
        found.rounded = quantize_sequentially(
            source,
            used,
            plan.modules,
            _scales(found.inputs),
            _scales(found.outputs),
            shared=found.seen.shared,
            progress=staged("gptq"),
        )
    if recipe.learn_scales:
        _learn(found, model, used, recipe.learn_scales, staged("learn"))
    return found


def observe_ranges(
    found: Settled,
    used: Sequence[Tensor],
    *,
    all_histograms: bool = False,
    resume: ObservationFile | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Observe the source and choose its ranges, as the plan has them.

    Args:
        found: is given `seen`, `inputs` and `outputs`.
        used: int64 `[length]` token ids each.
        all_histograms: keep them of sides whose range needs none, too.
        resume: keeps what is observed.
        progress: called with the windows read.

    Raises:
        RecipeError: layers that read one tensor have different rules.
        CalibrationError: the text gives a layer no range.
    """
    plan = found.plan
    if plan.observed:
        found.seen = observe(
            found.source,
            used,
            plan.observed,
            input_histograms=[n for n, r in plan.input_ranges.items() if r.needs_histogram or all_histograms],
            output_histograms=[n for n, r in plan.output_ranges.items() if r.needs_histogram or all_histograms],
            resume=resume,
            progress=progress,
        )
    found.inputs, found.outputs = sides_of(plan, found.seen)


def folded(
    model: PreTrainedModel, recipe: Recipe, used: Sequence[Tensor], progress: Callable[[int], None] | None = None
) -> PreTrainedModel:
    """A copy of the float model, rotated and equalized as the recipe wants it.

    Args:
        model: the float model; it is read, never changed.
        recipe: what to do.
        used: int64 `[length]` token ids each: rotation looks at the first, equalization at `EQUALIZE_WINDOWS` of them.
        progress: called with the windows read.

    Raises:
        FoldError: the architecture cannot be rotated or equalized.
    """
    source = copy.deepcopy(model).eval()
    if recipe.rotate:
        rotate(source, used[:1])
    if recipe.equalize:
        equalize(source, used[:EQUALIZE_WINDOWS], progress=progress)
    if recipe.rotate or recipe.equalize:
        check_same_function(model, source, used[0])
    return source


def _search(found: Settled, used: Sequence[Tensor], count: int, progress: Callable[[int, int], None] | None) -> None:
    """Replace the sides of the loudest tensors by what the loss says of them."""
    choices = search_ranges(
        found.source,
        used[: math.ceil(SEARCH_TOKENS / used[0].numel())],
        found.seen,
        _scales(found.inputs),
        _scales(found.outputs),
        count,
        progress=progress,
    )
    for choice in choices:
        found.replace(choice.side, dict.fromkeys(choice.names, choice.limit), SEARCHED)


@torch.no_grad()
def _learn(
    found: Settled,
    model: PreTrainedModel,
    used: Sequence[Tensor],
    steps: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Round what is not rounded yet, put it into the source, and replace all scales by learned ones."""
    source, plan = found.source, found.plan
    for name in plan.untied:  # stored apart from the table that it shares its weight with, so rounded apart too
        head = source.get_submodule(name)
        head.weight = nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)
    kept: dict[str, Tensor] = {}
    for module in plan.modules:
        if module.name in found.rounded:
            continue
        weight = source.get_submodule(module.name).get_parameter("weight")
        codes, scale = round_to_nearest(weight, module.scheme.weight, module.name)
        if module.name in plan.observed:
            found.rounded[module.name] = codes, scale
        else:
            kept[module.name] = weight.clone()
        weight.copy_(dequantized(codes, scale))
    learned = learn_scales(
        source,
        model,
        used,
        steps,
        _scales(found.inputs),
        _scales(found.outputs),
        {name: found.rounded[name][1] for name in plan.observed},
        shared=found.seen.shared,
        progress=progress,
    )
    found.replace("input", {name: scale * CODE_MAX for name, scale in learned.inputs.items()}, LEARNED)
    found.replace("output", {name: scale * CODE_MAX for name, scale in learned.outputs.items()}, LEARNED)
    for name, scale in learned.weights.items():
        codes, _ = found.rounded[name]
        found.rounded[name] = codes, scale
        source.get_submodule(name).get_parameter("weight").copy_(dequantized(codes, scale))
    for name, weight in kept.items():
        source.get_submodule(name).get_parameter("weight").copy_(weight)
