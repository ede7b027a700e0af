"""What tuning recovers: perplexity of a model in float, quantized to nearest, and tuned for a given time.

    python benchmarks/tune.py MODEL --text wiki.utf8 --more c4.utf8 --variant w4a8o8 --seconds 200 --rate 3e-4

MODEL is a float checkpoint folder or a GGUF file. Of `--text`, the calibration documents are trained on and the
evaluation documents scored (40 windows of 512 tokens); `--more` is trained on whole. Every linear layer of the decoder
has both sides quantized; the embedding and the head are weights alone, with shared codes unless rotated. Scores are of
the integer layers. The last line is JSON.
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

from bytelane.evaluate import perplexity
from bytelane.quantize import Recipe, load_float_model, read_documents, windows
from bytelane.tune import TuneSettings, evaluate, export_checkpoint, prepare, tune

VARIANTS: dict[str, dict[str, Any]] = {
    "w8a8o8": {"default_bits": 8, "embeddings": 8},
    "w4a8o8": {"default_bits": 4, "embeddings": 8, "bits": {"^lm_head$": 8}},
    "mobile": {
        "default_bits": 4,
        "bits": {"^lm_head$": 2, "layers\\.(1[3-9]|2\\d)\\.mlp\\.": 2},
        "embeddings": 2,
    },
}
"""Recipes; `mobile` is the phone's map on 30 layers: 4-bit attention and lower MLPs, the rest 2 bits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--more", type=Path, action="append", default=[])
    parser.add_argument("--variant", choices=[*VARIANTS], action="append", required=True)
    parser.add_argument("--range", default="mse")
    parser.add_argument("--rotate", action="store_true", help="rotate the student's residual stream first")
    parser.add_argument("--equalize", action="store_true", help="equalize its channels")
    parser.add_argument("--seconds", type=float, action="append", required=True, help="for each variant")
    parser.add_argument("--rate", type=float, action="append", required=True, help="learning rate for each variant")
    parser.add_argument("--scale-rate", type=float, default=2e-3)
    parser.add_argument("--hidden", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100_000, help="at most, where the time allows more")
    parser.add_argument("--score", type=int, default=40, help="windows to score")
    parser.add_argument("--observe", type=int, default=16, help="windows to observe ranges on")
    parser.add_argument("--untuned", action="store_true", help="score the start too")
    parser.add_argument("--out", type=Path, help="folder for a checkpoint of each variant")
    parser.add_argument("--json", type=Path, help="file for the result, written after each variant")
    given = parser.parse_args()

    run = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    teacher, tokenizer = load_float_model(given.model, device=run.device)
    text = windows(tokenizer, read_documents(given.text, "calibration"), length=given.window)
    observed = text[: given.observe]
    for path in given.more:
        text += windows(tokenizer, read_documents(path), length=given.window)
    random.Random(0).shuffle(text)
    held = windows(tokenizer, read_documents(given.text, "evaluation"), length=given.window, limit=given.score)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "windows": len(text),
        "float": perplexity(teacher, held).perplexity,
        "variants": {},
    }
    print(json.dumps(result), flush=True)
    for variant, seconds, rate in zip(given.variant, given.seconds, given.rate, strict=True):
        started = time.perf_counter()
        changes = {"rotate": given.rotate, "equalize": given.equalize}
        recipe = Recipe.of({**VARIANTS[variant], "head": "weights", "range": given.range, **changes})
        student = prepare(copy.deepcopy(teacher).requires_grad_(True), recipe, observed)
        prepared = time.perf_counter() - started
        untuned = evaluate(student.eval(), held, dtype=torch.bfloat16)[0] if given.untuned else None
        print(variant, "prepared", round(prepared, 1), "s; untuned", untuned, flush=True)
        settings = TuneSettings(
            steps=given.steps,
            batch=given.batch,
            learning_rate=rate,
            scale_rate=given.scale_rate,
            hidden_weight=given.hidden,
            max_seconds=seconds,
        )

        def show(_: str, done: int, __: int) -> None:
            if done in (1, 2, 5, 10) or done % 50 == 0:
                print(f"step {done} at {time.perf_counter() - started:.1f} s", flush=True)  # noqa: B023

        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        report = tune(student, teacher, text, settings, accelerator=run, progress=show)
        tuned = evaluate(student, held, dtype=torch.bfloat16)[0]
        losses = report.losses
        result["variants"][variant] = {
            "untuned": untuned,
            "tuned": tuned,
            "ratio": tuned / result["float"],
            "steps": report.steps,
            "tokens": report.tokens,
            "seconds": report.seconds,
            "peak_bytes": report.peak_bytes,
            "rate": rate,
            "losses": [round(sum(losses[i : i + 20]) / len(losses[i : i + 20]), 4) for i in range(0, len(losses), 20)],
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
