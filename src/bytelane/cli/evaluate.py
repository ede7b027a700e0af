"""`eval`: perplexity on a text, or the tasks of lm-eval."""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from bytelane.cli.options import LoadOptions, RunOptions, spread
from bytelane.cli.output import (
    JsonOption,
    ModelArgument,
    emit,
    progress,
    remarks,
    table,
)


@spread
def evaluate(
    model: ModelArgument,
    text: Annotated[
        list[Path] | None, typer.Argument(help="Text files (.txt, .utf8, .jsonl) nobody calibrated on.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", help="Tasks of lm-eval instead of a text, by name; repeatable.")
    ] = None,
    include: Annotated[
        list[Path] | None, typer.Option("--include", metavar="DIR", help="Folders with task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many documents of a task.")] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Examples in a prompt; the task's by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time, for tasks.")] = 1,
    reference: Annotated[
        str | None, typer.Option(help="A float model (folder or hub id) to put beside it; `--gguf` names a file in it.")
    ] = None,
    gguf: Annotated[str | None, typer.Option(help="The GGUF file in the reference's folder.")] = None,
    emulated: Annotated[bool, typer.Option("--emulated", help="Also run the float emulation.")] = False,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window; each window starts afresh.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="Read at most this many tokens.")] = 20_000,
    split: Annotated[
        str,
        typer.Option(help="For files of `<doc>` elements: **evaluation** (every fourth), **calibration** or **all**."),
    ] = "all",
    *,
    options: LoadOptions,
    json_output: JsonOption = False,
) -> None:
    """Perplexity on text, with the reference and the integer model side by side.

    Every model reads the same windows. Lower is better; the ratio to the last row, which is the reference where there
    is one, is what quantization costs. The loss in nats a token comes with its standard error, paired window by window.

    With `--tasks`, EleutherAI's harness scores the same models on its tasks (`pip install lm-eval`; its data sets come
    from the hub unless they are local).

    Example: `bytelane eval ./my-model-w8a8o8 wiki.txt --reference ./my-model`, or `bytelane eval ./my-model-w8a8o8
    --tasks arc_easy --limit 100`
    """
    if tasks:
        _evaluate_tasks(
            model,
            tasks,
            reference,
            numerics=["integer", *(["emulated"] if emulated else [])],
            load=options,
            include=include or [],
            options={"limit": limit, "few_shot": few_shot, "batch_size": batch_size},
            json_output=json_output,
        )
        return
    if not text:
        raise typer.BadParameter("give text files, or tasks with --tasks", param_hint="TEXT")
    import torch

    from bytelane.cli.common import check_split, load, parse_dtype, source_folder
    from bytelane.evaluate import PerplexityResult, compare_results, perplexity
    from bytelane.quantize.pipeline import load_float_model
    from bytelane.quantize.text import read_files, windows

    runs = ["integer", *(["emulated"] if emulated else [])]
    results: list[dict[str, Any]] = []
    scores: list[PerplexityResult] = []
    made = None
    for numerics in runs:
        loaded, tokenizer, directory = load(model, RunOptions(**vars(options), numerics=numerics))
        if made is None:
            documents = read_files(text, check_split(split))
            made = windows(tokenizer, documents, length=window, limit=max(1, max_tokens // window))
        with progress(f"{numerics} perplexity") as report:
            found = perplexity(loaded, made, progress=report)
        results.append({"model": str(directory), "numerics": numerics, **asdict(found)})
        scores.append(found)
        del loaded
    assert made is not None
    if reference is not None:
        float_model, _ = load_float_model(
            source_folder(reference),
            gguf_file=gguf,
            dtype=parse_dtype(options.dtype) or torch.bfloat16,
            device=options.device,
        )
        with progress("reference perplexity") as report:
            found = perplexity(float_model, made, progress=report)
        results.append({"model": reference, "numerics": str(float_model.dtype).removeprefix("torch."), **asdict(found)})
        scores.append(found)
    base = results[-1]["perplexity"]
    for r, score in zip(results, scores, strict=True):
        r["ratio"] = r["perplexity"] / base
        paired = compare_results(scores[-1], score)
        single = math.isnan(paired.standard_error)
        r["nll_increase"], r["standard_error"] = paired.nll_increase, None if single else paired.standard_error
    if json_output:
        emit({"window": window, "results": results})
        return
    table(
        f"perplexity, {window}-token windows, {results[0]['tokens']} predicted tokens",
        ("model", "numerics", "perplexity", "ratio", "nats more a token", "tokens/s"),
        [
            (
                r["model"],
                r["numerics"],
                f"{r['perplexity']:.3f}",
                f"{r['ratio']:.3f}",
                _increase(r) if r is not results[-1] else "-",
                f"{r['tokens_per_second']:.0f}",
            )
            for r in results
        ],
        right=("perplexity", "ratio", "nats more a token", "tokens/s"),
    )


def _increase(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['nll_increase']:+.4f}" + ("" if error is None else f" +- {error:.4f}")


def _evaluate_tasks(
    model: str,
    tasks: list[str],
    reference: str | None,
    *,
    numerics: list[str],
    load: LoadOptions,
    include: list[Path],
    options: dict[str, Any],
    json_output: bool,
) -> None:
    """Tasks of lm-eval, one row for each figure, a column for each model."""
    if find_spec("lm_eval") is None:
        raise typer.BadParameter("needs the harness: pip install lm-eval", param_hint="--tasks")
    from bytelane.cli.common import check_choice, check_device, parse_dtype, quiet, set_threads, source_folder
    from bytelane.decoder import FloatOps
    from bytelane.integrations.lm_eval import NAME, evaluate_tasks, find_tasks

    quiet()
    set_threads(load.threads)
    chosen, device = parse_dtype(load.dtype), check_device(load.device)
    float_ops = check_choice("--float-ops", load.float_ops, get_args(FloatOps))
    names = [name for entry in tasks for name in entry.split(",") if name]
    runs: list[tuple[str, str, str, dict[str, Any]]] = []
    for kind in numerics:
        extra: dict[str, Any] = {"numerics": kind, "dtype": chosen, "device": device, "float_ops": float_ops}
        extra["trust_remote_code"] = load.trust_remote_code
        runs.append(
            (NAME, model, kind, {**extra, "overrides": None if load.overrides is None else str(load.overrides)})
        )
    if reference is not None:
        runs.append(("hf", str(source_folder(reference)), "float", {"dtype": load.dtype or "auto", "device": device}))
    with remarks().status("looking the tasks up in lm-eval's index"):
        found = find_tasks(names, include=include)
    results: list[dict[str, Any]] = []
    for registered, path, kind, arguments in runs:
        scores = evaluate_tasks(path, found, registered=registered, arguments=arguments, **options)
        results.append({"model": path, "numerics": kind, "scores": [asdict(score) for score in scores]})
    if json_output:
        emit({"tasks": names, "results": results})
        return
    rows = [
        (first["task"], first["metric"], *(_score(r["scores"][i]) for r in results))
        for i, first in enumerate(results[0]["scores"])
    ]
    columns = ("task", "metric", *(f"{Path(r['model']).name}@{r['numerics']}" for r in results))
    table("lm-eval", columns, rows, right=columns[2:])


def _score(score: dict[str, Any]) -> str:
    error = score["standard_error"]
    return f"{score['value']:.4f}" + ("" if error is None else f" +- {error:.4f}")
