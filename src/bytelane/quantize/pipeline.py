"""From a float model and text to a checkpoint: plan, fold, observe, search, round, write.

- plan: the recipe meets the model; every refusal that needs no text comes first
- fold: changes of basis in a copy of the model, where the recipe wants them
- observe: the float model reads the calibration windows, ranges are kept
- search: the loudest ranges are chosen by loss, where the recipe wants it
- round: weights to codes; to the nearest one module at a time while the writer streams, by GPTQ layer by layer before
- learn: all scales together by the model's loss, codes as they are, where the recipe wants it
- write: `bytelane.checkpoint.write_checkpoint`: all of it or nothing
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from bytelane.checkpoint import QuantizedModule, QuantizedTensors, write_checkpoint
from bytelane.errors import ConfigError, FileFormatError, OutputExistsError
from bytelane.generation import peak_memory_bytes
from bytelane.packing import pack_rows
from bytelane.quantize.fold import check_same_function, equalize, rotate
from bytelane.quantize.kv import observe_kv
from bytelane.quantize.learn import learn_scales
from bytelane.quantize.observe import CODE_MAX, Observations, Statistics, observe, range_scale
from bytelane.quantize.plan import Plan, make_plan
from bytelane.quantize.recipe import Range, Recipe, RecipeError
from bytelane.quantize.report import LayerReport, QuantizationReport
from bytelane.quantize.resume import ObservationFile, fingerprint
from bytelane.quantize.rounding import dequantized, round_to_nearest
from bytelane.quantize.search import search_ranges
from bytelane.quantize.sequential import quantize_sequentially
from bytelane.quantize.text import Split, read_files, windows

DEFAULT_WINDOW = 512
DEFAULT_WINDOWS = 32

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
class _Side:
    """A quantized activation side: its scale (float32 `[]`), the label of what it came from, the share it clips."""

    scale: Tensor
    rule: str
    clipped: float


def activation_limit(statistics: Statistics, rule: Range) -> float:
    """The end of a range: the `|x|` that the highest code falls on."""
    if rule.method == "mse":
        return statistics.least_squares()
    return statistics.amax() if rule.percentile is None else statistics.percentile(rule.percentile)


def _sides(plan: Plan, seen: Observations) -> tuple[dict[str, _Side], dict[str, _Side]]:
    """The input and the output side of every layer that has them."""
    for names in seen.shared:
        rules = {plan.input_ranges[n].label: n for n in names if n in plan.input_ranges}
        if len(rules) > 1:
            found = ", ".join(f"{rule} for {name}" for rule, name in rules.items())
            raise RecipeError(
                f"input_ranges: layers that read the same tensor must agree on its range, found {found}; "
                f"widen the pattern to all of {', '.join(names)}"
            )
    made: list[dict[str, _Side]] = []
    for side, rules_of, statistics_of in (
        ("input", plan.input_ranges, seen.inputs),
        ("output", plan.output_ranges, seen.outputs),
    ):
        sides = {}
        for name, rule in rules_of.items():
            limit = activation_limit(statistics_of[name], rule)
            sides[name] = _Side(range_scale(limit, name, side), rule.label, statistics_of[name].clipped(limit))
        made.append(sides)
    return made[0], made[1]


def _scales(sides: Mapping[str, _Side]) -> dict[str, float]:
    return {name: float(side.scale) for name, side in sides.items()}


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


def quantize_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    recipe: Recipe,
    output: Path | str,
    *,
    copy_from: Path | str | None = None,
    window: int = DEFAULT_WINDOW,
    max_windows: int | None = DEFAULT_WINDOWS,
    dtype: torch.dtype | None = None,
    resume: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Make a wNa8o8 checkpoint from a float model in memory.

    Args:
        model: the float model; it is read, never changed (folding and gptq work on a copy).
        tokenizer: cuts the text, and is saved with the checkpoint.
        texts: calibration documents: see `bytelane.quantize.text`.
        recipe: what to do.
        output: the folder to make.
        copy_from: a folder whose tokenizer and generation files go along as they are; without it the tokenizer and
            the model's generation configuration are saved anew.
        window: tokens in a calibration window.
        max_windows: read at most this many windows; None for all of the text.
        dtype: of what stays float in the checkpoint, and of the model it will be; None for the model's own. A model run
            in float32 so that calibration is exact (or fast, on a processor without bfloat16 arithmetic) is stored in
            bfloat16 by giving it here.
        resume: a file that keeps what was observed, written while observing; one of the same model, text and recipe
            that is there already is gone on from.
        overwrite: replace a checkpoint that is there.
        progress: called while observing and writing.

    Raises:
        RecipeError: the recipe does not fit the model.
        FoldError: the architecture cannot be rotated or equalized.
        SequentialError: gptq cannot run the model's layers one at a time.
        TextError: the text is too short.
        CalibrationError: the text gives a layer no range.
        ResumeError: the file to resume from is of another model, text or recipe.
        CheckpointError: the checkpoint cannot be written, under the class that names the rule.
    """
    started = time.perf_counter()
    target = Path(output)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError("exists and is not empty; choose another folder or allow overwriting", file=target)
    plan = make_plan(model, recipe)
    seen = Observations({}, {}, (), 0)
    used: list[Tensor] = []

    def staged(stage: str, most: int | None = None) -> Callable[[int], None]:
        return lambda done: None if progress is None else progress(stage, done, len(used[:most]))

    rewritten = bool(recipe.rotate or recipe.equalize or recipe.rounding == "gptq" or recipe.learn_scales)
    if plan.observed or rewritten or recipe.kv_cache:
        used = windows(tokenizer, texts, length=window, limit=max_windows)
    source = model
    if rewritten:
        source = folded(model, recipe, used, staged("equalize", EQUALIZE_WINDOWS))
        plan = make_plan(source, recipe)  # a rotated model's tied head is no longer
    if plan.observed:
        kept = None
        settled = recipe.search or recipe.learn_scales  # by more than this text's statistics, which say what is cut
        if resume is not None:
            kept = ObservationFile(Path(resume), fingerprint(source, used, recipe.model_dump_json(), plan.observed))
        seen = observe(
            source,
            used,
            plan.observed,
            input_histograms=[n for n, r in plan.input_ranges.items() if r.needs_histogram or settled],
            output_histograms=[n for n, r in plan.output_ranges.items() if r.needs_histogram or settled],
            resume=kept,
            progress=staged("observe"),
        )
    kv_scales = observe_kv(source, used, progress=staged("kv cache")) if recipe.kv_cache else {}
    inputs, outputs = _sides(plan, seen)
    if recipe.search:
        _search(source, used, seen, inputs, outputs, recipe.search, progress)
    rounded: dict[str, tuple[Tensor, Tensor]] = {}
    if recipe.rounding == "gptq":
        rounded = quantize_sequentially(
            source,
            used,
            plan.modules,
            _scales(inputs),
            _scales(outputs),
            shared=seen.shared,
            progress=None if progress is None else lambda done, total: progress("gptq", done, total),
        )
    if recipe.learn_scales:
        rounded = _learned(source, model, used, plan, rounded, seen, inputs, outputs, recipe.learn_scales, progress)
    stored_dtype = dtype or model.dtype
    with tempfile.TemporaryDirectory(prefix="bytelane-") as temporary:
        if copy_from is None:
            tokenizer.save_pretrained(temporary)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(temporary)
        written = write_checkpoint(
            target,
            config=checkpoint_config(source, plan, stored_dtype),
            storage=recipe.storage,
            modules=_rounded(source, plan, rounded, inputs, outputs, stored_dtype, progress),
            plain=_plain(source, plan, stored_dtype),
            kv_scales=kv_scales,
            unquantized=plan.unquantized,
            tied=plan.tied,
            copy_from=copy_from or temporary,
            overwrite=overwrite,
        )
    return QuantizationReport(
        output=str(output),
        storage=recipe.storage,
        layers=tuple(_layer_report(m, inputs.get(m.name), outputs.get(m.name)) for m in plan.modules),
        unquantized=plan.unquantized,
        tied=dict(plan.tied),
        untied=plan.untied,
        shared_inputs=_shared(seen, inputs),
        windows=len(used),
        tokens=seen.tokens,
        float_bytes=_float_bytes(model, stored_dtype),
        kv_layers=len(kv_scales),
        checkpoint_bytes=sum(path.stat().st_size for path in written.glob("*.safetensors")),
        seconds=round(time.perf_counter() - started, 3),
        peak_bytes=peak_memory_bytes(),
    )


def _search(
    model: nn.Module,
    used: Sequence[Tensor],
    seen: Observations,
    inputs: dict[str, _Side],
    outputs: dict[str, _Side],
    count: int,
    progress: Progress | None,
) -> None:
    """Replace the sides of the loudest tensors by what the loss says of them."""
    choices = search_ranges(
        model,
        used[: math.ceil(SEARCH_TOKENS / used[0].numel())],
        seen,
        _scales(inputs),
        _scales(outputs),
        count,
        progress=None if progress is None else lambda done, total: progress("search", done, total),
    )
    for choice in choices:
        sides, statistics_of = (inputs, seen.inputs) if choice.side == "input" else (outputs, seen.outputs)
        for name in choice.names:
            scale = range_scale(choice.limit, name, choice.side)
            sides[name] = _Side(scale, SEARCHED, statistics_of[name].clipped(choice.limit))


@torch.no_grad()
def _learned(
    source: PreTrainedModel,
    model: PreTrainedModel,
    used: Sequence[Tensor],
    plan: Plan,
    rounded: Mapping[str, tuple[Tensor, Tensor]],
    seen: Observations,
    inputs: dict[str, _Side],
    outputs: dict[str, _Side],
    steps: int,
    progress: Progress | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Round what is not rounded yet, put it into the source, and replace all scales by learned ones."""
    found = dict(rounded)
    for name in plan.untied:  # stored apart from the table that it shares its weight with, so rounded apart too
        head = source.get_submodule(name)
        head.weight = nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)
    for module in plan.modules:
        if module.name in found:
            continue
        weight = source.get_submodule(module.name).get_parameter("weight")
        codes, scale = round_to_nearest(weight, module.scheme.weight, module.name)
        found[module.name] = codes, scale
        weight.copy_(dequantized(codes, scale))
    learned = learn_scales(
        source,
        model,
        used,
        steps,
        _scales(inputs),
        _scales(outputs),
        {name: found[name][1] for name in plan.observed},
        shared=seen.shared,
        progress=None if progress is None else lambda done, total: progress("learn", done, total),
    )
    for side, sides, learned_of, statistics_of in (
        ("input", inputs, learned.inputs, seen.inputs),
        ("output", outputs, learned.outputs, seen.outputs),
    ):
        for name, value in learned_of.items():
            limit = value * CODE_MAX
            sides[name] = _Side(range_scale(limit, name, side), LEARNED, statistics_of[name].clipped(limit))
    return found | {name: (found[name][0], scale) for name, scale in learned.weights.items()}


def _rounded(
    model: nn.Module,
    plan: Plan,
    done_before: Mapping[str, tuple[Tensor, Tensor]],
    inputs: dict[str, _Side],
    outputs: dict[str, _Side],
    dtype: torch.dtype,
    progress: Progress | None,
) -> Iterator[tuple[QuantizedModule, QuantizedTensors]]:
    """Every planned module with its codes, made when the writer asks for it."""
    for done, module in enumerate(plan.modules, start=1):
        source = model.get_submodule(module.name)
        found = done_before.get(module.name)
        if found is None:
            found = round_to_nearest(source.get_parameter("weight"), module.scheme.weight, module.name)
        codes, scale = found
        bias = source.get_parameter("bias").detach().to(dtype) if module.bias else None
        side_in, side_out = inputs.get(module.name), outputs.get(module.name)
        yield (
            module,
            QuantizedTensors(
                rows=pack_rows(codes, module.scheme.weight.num_bits),
                weight_scale=scale,
                input_scale=None if side_in is None else side_in.scale,
                output_scale=None if side_out is None else side_out.scale,
                bias=bias,
            ),
        )
        if progress is not None:
            progress("write", done, len(plan.modules))


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.dtype.is_floating_point else tensor.detach()


def _plain(model: nn.Module, plan: Plan, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is not a quantized module's, one that is tied to another only once."""
    taken = {f"{m.name}.{leaf}" for m in plan.modules for leaf in ("weight", "bias")}
    taken |= {f"{name}.weight" for name in plan.tied}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in taken or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield name, _stored(tensor, dtype)


def _float_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    distinct = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * (dtype.itemsize if t.dtype.is_floating_point else t.itemsize) for t in distinct.values())


def checkpoint_config(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """The checkpoint's config.json, without what belongs to the place the model came from."""
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    config.pop("quantization_config", None)
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    text = config.get("text_config")
    if plan.untied:
        config["tie_word_embeddings"] = False
        if isinstance(text, dict):
            text["tie_word_embeddings"] = False
    elif plan.tied or plan.float_tied:
        config["tie_word_embeddings"] = True
    if isinstance(text, dict):
        text["dtype"] = config["dtype"]
    return config


def _layer_report(module: QuantizedModule, side_in: _Side | None, side_out: _Side | None) -> LayerReport:
    return LayerReport(
        name=module.name,
        label=module.scheme.label,
        granularity=module.scheme.weight.granularity,
        shape=module.shape,
        weight_bytes=module.weight_bytes,
        input_scale=None if side_in is None else float(side_in.scale),
        output_scale=None if side_out is None else float(side_out.scale),
        input_range=None if side_in is None else side_in.rule,
        output_range=None if side_out is None else side_out.rule,
        input_clipped=None if side_in is None else side_in.clipped,
        output_clipped=None if side_out is None else side_out.clipped,
    )


def _shared(seen: Observations, inputs: dict[str, _Side]) -> tuple[tuple[str, ...], ...]:
    """The groups that share an input scale: of those that share an input, the members with a quantized input."""
    groups = (tuple(name for name in names if name in inputs) for names in seen.shared)
    return tuple(names for names in groups if len(names) > 1)


def load_float_model(
    source: Path | str,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A float causal language model and its tokenizer, from a folder.

    Args:
        source: a Hugging Face checkpoint folder, a folder with a GGUF file, or the GGUF file itself.
        gguf_file: the GGUF file's name in the folder; its weights are dequantized.
        dtype: of the parameters.
        device: where the model goes.

    Raises:
        FileFormatError: there is no such folder or file.
        ConfigError: the checkpoint is quantized already.
    """
    folder = Path(source)
    if folder.suffix == ".gguf" and gguf_file is None:
        folder, gguf_file = folder.parent, folder.name
    if not folder.is_dir():
        raise FileFormatError("no such folder; download the float model first and give its folder", file=folder)
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise FileFormatError("no such GGUF file", file=folder / gguf_file)
        extra: dict[str, Any] = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    else:
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise FileFormatError("no config.json; for a GGUF file name it with gguf_file", file=folder)
        if json.loads(config_file.read_text(encoding="utf-8")).get("quantization_config") is not None:
            raise ConfigError(
                "the model is quantized already; start from the float model",
                file=config_file,
                tensor="quantization_config",
            )
        extra = {}
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
    return model.to(device).eval(), tokenizer


def quantize_checkpoint(
    source: Path | str,
    output: Path | str,
    recipe: Recipe,
    text_files: Sequence[Path | str],
    *,
    gguf_file: str | None = None,
    split: Split = "calibration",
    window: int = DEFAULT_WINDOW,
    max_windows: int | None = DEFAULT_WINDOWS,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    resume: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Make a wNa8o8 checkpoint from a float checkpoint and text files.

    Args:
        source: see `load_float_model`.
        output: the folder to make.
        recipe: what to do.
        text_files: calibration text: see `bytelane.quantize.text`.
        gguf_file: see `load_float_model`.
        split: which documents of the text to calibrate with.
        window: tokens in a calibration window.
        max_windows: read at most this many windows; None for all of the text.
        dtype: of what stays float in the checkpoint, and of the model it will be.
        compute_dtype: of the float model while it is observed. float32 keeps the ranges free of rounding, and is
            several times faster on a processor without bfloat16 arithmetic; bfloat16 halves the memory.
        device: where the float model runs.
        resume: see `quantize_model`.
        overwrite: replace a checkpoint that is there.
        progress: called while observing and writing.

    Raises:
        RecipeError, TextError, CalibrationError, CheckpointError: see `quantize_model`.
    """
    texts = read_files([Path(path) for path in text_files], split)
    model, tokenizer = load_float_model(source, gguf_file=gguf_file, dtype=compute_dtype, device=device)
    from_gguf = gguf_file is not None or Path(source).suffix == ".gguf"
    return quantize_model(
        model,
        tokenizer,
        texts,
        recipe,
        output,
        copy_from=None if from_gguf else source,
        window=window,
        max_windows=max_windows,
        dtype=dtype,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
