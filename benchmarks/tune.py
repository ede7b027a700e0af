"""What tuning recovers: perplexity of a model in float, quantized to nearest, and tuned for a given time.

    python benchmarks/tune.py MODEL --text wiki.utf8 --more c4.utf8 --variant w4a8o8 --seconds 200 --rate 3e-4

MODEL is a float checkpoint folder or a GGUF file. Of `--text`, the calibration documents are trained on and the
evaluation documents scored (40 windows of 512 tokens); `--more` is trained on whole. Every linear layer of the decoder
has both sides quantized; the embedding and the head are weights alone, with shared codes unless rotated. Scores are of
the integer layers. `--variant` may be repeated, and what is given for each variant is then given as often, or once for
all. `tune_report.py` makes the guide's table and curves of the JSON file; the last line is JSON too.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from bytelane.evaluate import perplexity
from bytelane.quantize import Recipe, load_float_model, read_documents, windows
from bytelane.tune import (
    UNLIMITED_STEPS,
    Teacher,
    TuneSettings,
    evaluate,
    export_checkpoint,
    prepare,
    tune,
    written_windows,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "w8a8o8": {"default_bits": 8, "embeddings": 8},
    "w4a8o8": {"default_bits": 4, "embeddings": 8, "bits": {"^lm_head$": 8}},
    "w4a8o8-g32": {
        "default_bits": 4,
        "embeddings": 8,
        "bits": {"^lm_head$": 8},
        "granularity": {"lm_head|embed_tokens": "channel", "": 32},
    },
    "mobile": {
        "default_bits": 4,
        "bits": {"^lm_head$": 2, "layers\\.(1[3-9]|2\\d)\\.mlp\\.": 2},
        "embeddings": 2,
    },
    "mobile-18": {
        "default_bits": 4,
        "bits": {"^lm_head$": 2, "layers\\.([89]|1\\d)\\.mlp\\.": 2},
        "embeddings": 2,
    },
}
"""Recipes; `mobile` is the phone's map on 30 layers: 4-bit attention and lower MLPs, the rest 2 bits. `mobile-18` is
the same on 18: the upper 10 MLPs have 2 bits."""


SETTLED = {
    "rounding": "gptq",
    "search": 4,
    "learn_scales": 64,
    "output_ranges": {"mlp\\.gate_proj$": {"method": "minmax"}},
}
"""What the shipped recipes do before training starts."""

EACH: tuple[tuple[str, Any, Any, str], ...] = (
    ("--seconds", float, 60.0, "seconds of training"),
    ("--rate", float, 3e-4, "learning rate of weights"),
    ("--scale-rate", float, 2e-3, "learning rate of the logarithms of scales"),
    ("--plain-rate", float, 0.0, "learning rate of what stays float; 0 for that of weights"),
    ("--text-weight", float, 0.0, "share of the text's own tokens in the loss; the teacher has the rest"),
    ("--batch", int, 16, "windows in a step"),
    ("--accumulate", int, 1, "parts a step is computed in"),
    ("--evaluate-every", int, 0, "steps between scores"),
)
"""Options with a value for each variant, and their defaults."""


def for_each(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The values of `EACH` for every variant."""
    found: list[dict[str, Any]] = [{} for _ in given.variant]
    for name, _, default, _ in EACH:
        key = name[2:].replace("-", "_")
        values = getattr(given, key) or [default]
        if len(values) not in (1, len(found)):
            parser.error(f"{name}: {len(values)} values for {len(found)} variants")
        for place, held in enumerate(found):
            held[key] = values[place % len(values)]
    return found


def curve(losses: tuple[float, ...], points: int = 100) -> list[list[float]]:
    """The share of the run that is over, and the mean loss of that part."""
    size = max(1, len(losses) // points)
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [[round((i + 0.5) / len(parts), 4), round(sum(p) / len(p), 4)] for i, p in enumerate(parts)]


def written(given: argparse.Namespace, teacher: Any, first: list[torch.Tensor]) -> list[torch.Tensor]:
    """Windows that the float model writes, in bfloat16 on a GPU, or those that the file has of it."""
    if given.written is not None and given.written.exists():
        held = load_file(given.written)["windows"]
        if held.shape != (given.write, given.window):
            raise SystemExit(f"{given.written} has windows {tuple(held.shape)}; name another file with --written")
        return list(held.to(torch.int64))
    started = time.perf_counter()
    on_gpu = next(teacher.parameters()).is_cuda
    writer = copy.deepcopy(teacher).to(torch.bfloat16) if on_gpu else teacher
    made = written_windows(writer, first, given.write, batch=given.write_batch)
    print("wrote", given.write, "windows in", round(time.perf_counter() - started, 1), "s", flush=True)
    if given.written is not None:
        save_file({"windows": torch.stack(made).to(torch.int32)}, given.written)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--more", type=Path, action="append", default=[])
    parser.add_argument("--variant", choices=[*VARIANTS], action="append", required=True)
    parser.add_argument("--range", default="mse")
    parser.add_argument("--rotate", action="store_true", help="rotate the student's residual stream first")
    parser.add_argument("--equalize", action="store_true", help="equalize its channels")
    parser.add_argument("--settle", action="store_true", help="start from GPTQ, searched ranges and learned scales")
    for name, kind, default, meaning in EACH:
        parser.add_argument(name, type=kind, action="append", help=f"{meaning}, for each variant; {default}")
    parser.add_argument("--repeat", type=int, default=1, help="how often an epoch has the windows of --text")
    parser.add_argument("--write", type=int, default=0, help="windows that the float model writes itself")
    parser.add_argument("--written", type=Path, help="a file for them; what it holds already is not written again")
    parser.add_argument("--write-batch", type=int, default=1024, help="windows that it writes at a time")
    parser.add_argument("--eager", action="store_true", help="neither compile nor record a step on a GPU")
    parser.add_argument("--no-keep", action="store_true", help="compute the teacher in every step")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=UNLIMITED_STEPS, help="at most, where the time allows more")
    parser.add_argument("--score", type=int, default=40, help="windows to score")
    parser.add_argument("--observe", type=int, default=16, help="windows to observe ranges on")
    parser.add_argument("--untuned", action="store_true", help="score the start too")
    parser.add_argument("--out", type=Path, help="folder for a checkpoint of each variant")
    parser.add_argument("--json", type=Path, help="file for the result, written after each variant")
    given = parser.parse_args()
    each = for_each(parser, given)

    run = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    teacher, tokenizer = load_float_model(given.model, device=run.device)
    text = windows(tokenizer, read_documents(given.text, "calibration"), length=given.window)
    first, observed = text, text[: given.observe]
    text = first * given.repeat
    for path in given.more:
        text += windows(tokenizer, read_documents(path), length=given.window)
    if given.write:
        text += written(given, teacher, first)
    random.Random(0).shuffle(text)
    held = windows(tokenizer, read_documents(given.text, "evaluation"), length=given.window, limit=given.score)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "torch": torch.__version__.partition("+")[0],
        "windows": len(text),
        "written_windows": given.write,
        "window": given.window,
        "evaluated_tokens": sum(w.numel() - 1 for w in held),
        "rotate": given.rotate,
        "equalize": given.equalize,
        "settle": given.settle,
        "float": perplexity(teacher, held).perplexity,
        "variants": {},
    }
    print(json.dumps(result), flush=True)
    kept = Teacher(copy.deepcopy(teacher), run)
    if not given.no_keep:
        started = time.perf_counter()
        kept.keep(torch.stack(text).to(run.device), min(batch["batch"] for batch in each))
        result["teacher_seconds"] = round(time.perf_counter() - started, 1)
        print("kept the teacher's states in", result["teacher_seconds"], "s", flush=True)
    for variant, values in zip(given.variant, each, strict=True):
        started = time.perf_counter()
        changes: dict[str, Any] = {"rotate": given.rotate, "equalize": given.equalize}
        changes |= SETTLED if given.settle else {}
        recipe = Recipe.of({**VARIANTS[variant], "head": "weights", "range": given.range, **changes})
        student = prepare(copy.deepcopy(teacher).requires_grad_(True), recipe, observed)
        prepared = time.perf_counter() - started
        untuned = evaluate(student.eval(), held, dtype=torch.bfloat16)[0] if given.untuned else None
        print(variant, "prepared", round(prepared, 1), "s; untuned", untuned, flush=True)
        settings = TuneSettings(
            steps=given.steps,
            batch=values["batch"],
            accumulate=values["accumulate"],
            learning_rate=values["rate"],
            plain_rate=values["plain_rate"] or values["rate"],
            scale_rate=values["scale_rate"],
            kl_weight=1.0 - values["text_weight"],
            text_weight=values["text_weight"],
            keep_teacher=not given.no_keep,
            max_seconds=values["seconds"],
            evaluate_every=values["evaluate_every"],
        )

        def show(_: str, done: int, __: int) -> None:
            if done in (1, 2, 5, 10) or done % 200 == 0:
                print(f"step {done} at {time.perf_counter() - started:.1f} s", flush=True)  # noqa: B023

        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        report = tune(
            student,
            kept,
            text,
            settings,
            evaluation=held,
            dtype=torch.bfloat16,
            accelerator=run,
            eager=given.eager,
            progress=show,
        )
        tuned = report.evaluations[-1].perplexity
        result["variants"][variant] = {
            **values,
            "untuned": untuned,
            "tuned": tuned,
            "ratio": tuned / result["float"],
            "steps": report.steps,
            "tokens": report.tokens,
            "seconds": report.seconds,
            "start_seconds": report.start_seconds,
            "prepare_seconds": round(prepared, 1),
            "recorded": report.recorded,
            "peak_bytes": report.peak_bytes,
            "losses": curve(report.losses),
            "scores": [[e.seconds, round(e.perplexity, 3)] for e in report.evaluations],
        }
        print(json.dumps({variant: result["variants"][variant]}), flush=True)
        if given.out is not None:
            export_checkpoint(student, given.out / variant, tokenizer=tokenizer)
        if given.json is not None:
            given.json.write_text(json.dumps(result), encoding="utf-8")
        del student
    print(json.dumps(result))


if __name__ == "__main__":
    main()
