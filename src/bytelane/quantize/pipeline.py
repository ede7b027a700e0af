"""From a float model and text to a checkpoint: plan, fold, observe, search, round, learn, write.

- plan: the recipe meets the model; every refusal that needs no text comes first
- `bytelane.quantize.settle`: changes of basis in a copy of the model; the calibration windows are read and ranges kept;
  the loudest ranges by loss; GPTQ; all scales by the model's loss, codes as they are; each where the recipe wants it
- round: other weights to the nearest codes, one module at a time while the writer streams
- write: `bytelane.checkpoint.write_checkpoint`: all of it or nothing
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from bytelane.checkpoint import QuantizedModule, QuantizedTensors, write_checkpoint
from bytelane.errors import ConfigError, FileFormatError, OutputExistsError
from bytelane.generation import peak_memory_bytes
from bytelane.packing import pack_rows
from bytelane.quantize.observe import Observations
from bytelane.quantize.plan import Plan, make_plan
from bytelane.quantize.recipe import Recipe
from bytelane.quantize.report import LayerReport, QuantizationReport
from bytelane.quantize.rounding import round_to_nearest
from bytelane.quantize.settle import Progress, Settled, Side, needs_text, settle
from bytelane.quantize.text import Split, read_files, windows

DEFAULT_WINDOW = 512
DEFAULT_WINDOWS = 32


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
    used: list[Tensor] = []
    if needs_text(make_plan(model, recipe), recipe):
        used = windows(tokenizer, texts, length=window, limit=max_windows)
    done = settle(model, used, recipe, resume=None if resume is None else Path(resume), progress=progress)
    source, plan, inputs, outputs = done.source, done.plan, done.inputs, done.outputs
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
            modules=_rounded(done, stored_dtype, progress),
            plain=_plain(source, plan, stored_dtype),
            kv_scales=done.kv_scales,
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
        shared_inputs=_shared(done.seen, inputs),
        windows=len(used),
        tokens=done.seen.tokens,
        float_bytes=_float_bytes(model, stored_dtype),
        kv_layers=len(done.kv_scales),
        checkpoint_bytes=sum(path.stat().st_size for path in written.glob("*.safetensors")),
        seconds=round(time.perf_counter() - started, 3),
        peak_bytes=peak_memory_bytes(),
    )


def _rounded(
    settled: Settled, dtype: torch.dtype, progress: Progress | None
) -> Iterator[tuple[QuantizedModule, QuantizedTensors]]:
    """Every planned module with its codes, made when the writer asks for it."""
    modules, inputs, outputs = settled.plan.modules, settled.inputs, settled.outputs
    for done, module in enumerate(modules, start=1):
        source = settled.source.get_submodule(module.name)
        found = settled.rounded.get(module.name)
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
            progress("write", done, len(modules))


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


def _layer_report(module: QuantizedModule, side_in: Side | None, side_out: Side | None) -> LayerReport:
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


def _shared(seen: Observations, inputs: dict[str, Side]) -> tuple[tuple[str, ...], ...]:
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
        ConfigError: the checkpoint is quantized already, or transformers makes a tokenizer of a GGUF file that
            `check_words` refuses.
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
        check_words(tokenizer, folder / gguf_file)
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


def check_words(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Refuse a tokenizer that cuts up words its vocabulary has whole.

    transformers 5.17 makes such a one of Gemma 3's GGUF files ("▁t", "wo"), 5.24 does not. The model then reads pieces
    it was not taught, at eight times the perplexity for gemma3-270m, and calibration would go on as if nothing were.

    Raises:
        ConfigError: it does, for one of three common words.
    """
    vocabulary = tokenizer.get_vocab()
    for word in ("two", "three", "four"):
        whole = [vocabulary[mark + word] for mark in ("▁", "Ġ") if mark + word in vocabulary]
        if whole and tokenizer(f"one {word}", add_special_tokens=False)["input_ids"][-1] not in whole:
            raise ConfigError(
                f"the tokenizer that transformers {transformers.__version__} makes of this file cuts up {word!r}, a "
                "word of its vocabulary; install a newer transformers, or give a folder with the right tokenizer.json",
                file=file,
                tensor="tokenizer",
            )


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
