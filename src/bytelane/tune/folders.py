"""Tuning from folder to folder: what `bytelane tune` does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from bytelane.errors import OutputExistsError
from bytelane.quantize.pipeline import load_float_model
from bytelane.quantize.recipe import Recipe
from bytelane.quantize.text import Split, read_files, windows
from bytelane.tune.export import export_checkpoint
from bytelane.tune.loop import Progress, TuneReport, TuneSettings, tune
from bytelane.tune.state import check_state_folder
from bytelane.tune.student import prepare
from bytelane.tune.written import WRITE_BATCH, written_windows


@dataclass(frozen=True)
class TunedCheckpoint:
    """What was made, and how the training went.

    Attributes:
        output: the checkpoint's folder.
        storage: `"compressed-tensors"` or `"gemma"`.
        modules: quantized modules.
        kv_layers: attention layers with int8 cache scales.
        shared_inputs: groups of layers that share an input scale.
        windows: windows of text, each read once an epoch, with those the float model wrote.
        report: of the training.
    """

    output: str
    storage: str
    modules: int
    kv_layers: int
    shared_inputs: int
    windows: int
    report: TuneReport

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.__dict__, "report": self.report.to_dict()}


def tune_checkpoint(
    source: Path | str,
    output: Path | str,
    recipe: Recipe,
    text_files: Sequence[Path | str],
    settings: TuneSettings,
    *,
    gguf_file: str | None = None,
    split: Split = "calibration",
    window: int = 512,
    observe: int = 32,
    evaluate: int = 0,
    write: int = 0,
    write_batch: int = WRITE_BATCH,
    kv_cache: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    mixed_precision: str = "no",
    cpu: bool = False,
    eager: bool = False,
    state: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TunedCheckpoint:
    """Tune a float checkpoint on text files and write the integer one.

    Args:
        source: see `load_float_model`.
        output: the folder to make.
        recipe: what to quantize.
        text_files: text to train on: see `bytelane.quantize.text`.
        settings: how to train.
        gguf_file: see `load_float_model`.
        split: which documents of the text to train on.
        window: tokens in a window.
        observe: windows that the starting ranges come from.
        evaluate: windows of the evaluation split to score; 0 for none. Needs `split="calibration"`.
        write: windows that the float model writes itself, to train on with the text: see `bytelane.tune.written`.
            With `mixed_precision="bf16"` it writes in bfloat16.
        write_batch: windows that it writes at a time.
        kv_cache: learn static int8 scales of the KV cache too.
        dtype: of what stays float in the checkpoint.
        mixed_precision: of the float arithmetic around the codes, `"no"` or `"bf16"`.
        cpu: train on the CPU although there is a GPU.
        eager: see `tune`.
        state: a folder to save the run's state in; it stays after the run.
        resume: go on from there.
        overwrite: replace a checkpoint that is there.
        progress: called through observing, preparing and tuning.

    Raises:
        RecipeError, TextError, CalibrationError, TuningError, CheckpointError: see `prepare`, `tune` and
            `export_checkpoint`. Nothing is written but the state.
    """
    if evaluate and split != "calibration":
        raise ValueError('evaluation text is held out by split="calibration" only')
    target = Path(output)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError("exists and is not empty; choose another folder or allow overwriting", file=target)
    if state is not None:
        check_state_folder(state, resume=resume)
    files = [Path(path) for path in text_files]
    text = read_files(files, split)
    held_text = read_files(files, "evaluation") if evaluate else []
    run = Accelerator(mixed_precision=mixed_precision, cpu=cpu)
    model, tokenizer = load_float_model(source, gguf_file=gguf_file, device=run.device)
    used = windows(tokenizer, text, length=window)
    held = windows(tokenizer, held_text, length=window, limit=evaluate) if evaluate else []
    teacher = copy.deepcopy(model) if settings.distills else None
    observed = used[:observe]
    if write:
        note = None if progress is None else lambda done: progress("write", done, write)
        writer = copy.deepcopy(model).to(torch.bfloat16) if mixed_precision == "bf16" else model
        used += written_windows(writer.eval(), used, write, batch=write_batch, seed=settings.seed, progress=note)
        del writer
    student = prepare(model, recipe, observed, kv_cache=kv_cache, progress=progress)
    report = tune(
        student,
        teacher,
        used,
        settings,
        evaluation=held,
        dtype=dtype,
        state=state,
        resume=resume,
        accelerator=run,
        eager=eager,
        progress=progress,
    )
    from_gguf = gguf_file is not None or Path(source).suffix == ".gguf"
    if run.is_main_process:
        export_checkpoint(
            student,
            target,
            tokenizer=tokenizer,
            copy_from=None if from_gguf else source,
            dtype=dtype,
            overwrite=overwrite,
        )
    return TunedCheckpoint(
        output=str(output),
        storage=recipe.storage,
        modules=len(student.plan.modules),
        kv_layers=len(student.kv_names),
        shared_inputs=len(student.shared_inputs),
        windows=len(used),
        report=report,
    )
