"""`tune`: quantization-aware training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytelane.cli.make import OutputArgument, OverwriteOption
from bytelane.cli.output import JsonOption, ThreadsOption, emit, size, steps
from bytelane.cli.recipe import (
    BitsOption,
    DefaultBitsOption,
    EmbeddingsOption,
    EqualizeOption,
    GgufOption,
    HeadOption,
    PlanOption,
    RecipeOption,
    RotateOption,
    SourceArgument,
    SplitOption,
    StorageOption,
    StoredDtypeOption,
    WindowOption,
    chosen_recipe,
)

if TYPE_CHECKING:
    from bytelane.tune.folders import TunedCheckpoint


def tune(
    source: SourceArgument,
    out: OutputArgument,
    text: Annotated[list[Path], typer.Option("--text", help="Text to train on (.txt, .utf8, .jsonl); repeatable.")],
    recipe: RecipeOption = None,
    plan: PlanOption = None,
    default_bits: DefaultBitsOption = None,
    bits: BitsOption = None,
    embeddings: EmbeddingsOption = None,
    head: HeadOption = None,
    range_: Annotated[
        str | None,
        typer.Option("--range", help="Where activation ranges start: minmax, mse, or a percentile such as 99.99."),
    ] = None,
    rotate: RotateOption = None,
    equalize: EqualizeOption = None,
    storage: StorageOption = None,
    kv_cache: Annotated[bool, typer.Option("--kv-cache", help="Learn int8 scales of the KV cache too.")] = False,
    split: SplitOption = "calibration",
    window: WindowOption = 512,
    observe: Annotated[int, typer.Option(min=1, help="Windows that the starting ranges come from.")] = 32,
    evaluate: Annotated[
        int, typer.Option(min=0, help="Windows of the evaluation split to score the integer model on.")
    ] = 0,
    write: Annotated[
        int, typer.Option(min=0, help="Windows of text that the float model writes itself, to train on with the rest.")
    ] = 0,
    write_batch: Annotated[
        int, typer.Option(min=1, help="Windows that it writes at a time; a GPU has room for many more.")
    ] = 64,
    step_count: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Optimizer steps, at most; 500, or with --minutes as many as fit."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="End after so many minutes of training.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts a step is computed in, to save memory.")] = 1,
    rate: Annotated[float, typer.Option(help="Learning rate of weights.")] = 1e-4,
    scale_rate: Annotated[float, typer.Option(help="Learning rate of the logarithms of scales.")] = 2e-3,
    text_weight: Annotated[
        float, typer.Option(help="Weight of the text's own next tokens beside the float model's predictions.")
    ] = 0.0,
    hidden_weight: Annotated[float, typer.Option(help="Weight of the float model's hidden states.")] = 0.0,
    keep_teacher: Annotated[
        bool, typer.Option("--keep-teacher", help="Compute the float model's last hidden states once and keep them.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of windows.")] = 0,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Steps between scores; 0 for one at the end.")] = 0,
    state: Annotated[Path | None, typer.Option(help="Folder for the run's state, to resume from.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state in --state.")] = False,
    gguf: GgufOption = None,
    dtype: StoredDtypeOption = "bfloat16",
    mixed_precision: Annotated[
        str, typer.Option(help="Of the float arithmetic in training: **no** or **bf16**, for GPUs.")
    ] = "no",
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU although there is a GPU.")] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="Take a step's operations one by one on a GPU: not compiled, not recorded.")
    ] = False,
    overwrite: OverwriteOption = False,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    r"""Train a float model to live with integer weights and static int8 activations, and write what it became.

    The float model is the teacher: its predictions are what the quantized one learns, and with it where every clamp
    should be. Scores are those of the integer layers. Under `torchrun` several processes share a batch.

    Example: `bytelane tune ./my-model ./out --text wiki.txt --default-bits 4 --minutes 20 --mixed-precision bf16`
    """
    from accelerate import PartialState

    from bytelane.cli.common import check_choice, check_split, parse_dtype, quiet, set_threads, source_folder
    from bytelane.tune import UNLIMITED_STEPS, TuneSettings
    from bytelane.tune.folders import tune_checkpoint

    quiet()
    set_threads(threads)
    check_choice("--mixed-precision", mixed_precision, ("no", "bf16"))
    if evaluate and split != "calibration":
        raise typer.BadParameter("needs --split calibration, which holds text out", param_hint="--evaluate")
    given = {
        "default_bits": default_bits,
        "bits": bits,
        "embeddings": embeddings,
        "head": head,
        "range": range_,
        "rotate": rotate,
        "equalize": equalize,
        "storage": storage,
    }
    made = chosen_recipe(recipe, given, plan, (source, gguf))
    settings = TuneSettings(
        steps=step_count or (TuneSettings.steps if minutes is None else UNLIMITED_STEPS),
        batch=batch,
        accumulate=accumulate,
        learning_rate=rate,
        scale_rate=scale_rate,
        plain_rate=rate,
        text_weight=text_weight,
        hidden_weight=hidden_weight,
        keep_teacher=keep_teacher,
        seed=seed,
        max_seconds=None if minutes is None else 60 * minutes,
        evaluate_every=evaluate_every,
        save_every=save_every,
    )
    chosen = parse_dtype(dtype)
    assert chosen is not None
    with steps() as report_step:
        done = tune_checkpoint(
            source_folder(source),
            out,
            made,
            text,
            settings,
            gguf_file=gguf,
            split=check_split(split),
            window=window,
            observe=observe,
            evaluate=evaluate,
            write=write,
            write_batch=write_batch,
            kv_cache=kv_cache,
            dtype=chosen,
            mixed_precision=mixed_precision,
            cpu=cpu,
            eager=eager,
            state=state,
            resume=resume,
            overwrite=overwrite,
            progress=report_step,
        )
    if not PartialState().is_main_process:
        return
    if json_output:
        emit({"recipe": made.model_dump(mode="json"), **done.to_dict()})
        return
    print("\n".join(_summary(done)))


def _summary(done: TunedCheckpoint) -> list[str]:
    report = done.report
    edge = max(1, len(report.losses) // 20)
    first, last = (sum(part) / edge for part in (report.losses[:edge], report.losses[-edge:]))
    lines = [
        f"wrote {done.output} as {done.storage}",
        f"modules      {done.modules} quantized; {done.shared_inputs} groups of layers share an input scale; "
        f"{done.kv_layers} layers have int8 cache scales",
        f"training     {report.steps} steps, {report.tokens} tokens of {done.windows} windows, {report.seconds:.0f} s "
        f"after {report.start_seconds:.0f} s of preparation",
        f"loss         {first:.4f} at the start, {last:.4f} at the end",
    ]
    lines += [f"step {e.step:<8}perplexity {e.perplexity:.2f} over {e.tokens} tokens" for e in report.evaluations]
    if report.peak_bytes:
        lines.append(f"memory       {size(report.peak_bytes)} of the accelerator at most")
    return lines
