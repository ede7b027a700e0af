"""Perplexity of recipes: quantize a model by each, score its integer layers beside the float model, keep the figures.

    python benchmarks/quality.py MODEL --text wiki.utf8                       # every row that has no figures yet
    python benchmarks/quality.py MODEL --text wiki.utf8 --only w8-best --again
    python benchmarks/quality.py --table-only                                 # only write the guide's table

MODEL is a float checkpoint folder or a GGUF file. Of the text, the calibration documents are read by `bytelane
quantize` and the evaluation documents by `bytelane eval`: no document by both. A row is two processes, so that its time
and its memory are its own, and is written to the result file when it is done; a run that is killed goes on from there.
All rows of a file are of one model, one text and one choice of windows, which is checked. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bytelane.cli.output import size, table, write_json, write_text
from bytelane.quantize import Recipe
from readme import replace

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
GUIDE = ROOT / "docs" / "quantizing.md"
MARKER = "perplexity of recipes"

_PLAIN: dict[str, Any] = {"learn_scales": 0}
_STILL: dict[str, Any] = {"rotate": False}
_W8: dict[str, Any] = {"embeddings": 8}
_W4: dict[str, Any] = {"default_bits": 4, "bits": {"lm_head|embed_tokens": 8}, "embeddings": 8}
_BEST = ("w8a8o8", "w4a8o8", "w4a8o8-g32")
_MSE = {"range": {"method": "mse"}}
_BEST8, _BEST4, _GROUPS4 = (Recipe.load(f"llama-{name}").model_dump(mode="json") for name in _BEST)

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "w8": ("8 bits, min-max", _W8),
    "w8-equalize": ("8 bits, `--equalize --range mse`", {**_W8, **_MSE, "equalize": True}),
    "w8-rotate": ("8 bits, `--rotate --equalize --range mse`", {**_W8, **_MSE, "rotate": True, "equalize": True}),
    "w8-unlearned": ("8 bits, `--recipe llama-w8a8o8 --learn-scales 0`", {**_BEST8, **_PLAIN}),
    "w8-best": ("8 bits, `--recipe llama-w8a8o8`", _BEST8),
    "w8-best-head": ("the same, and the head's sides too", {**_BEST8, "head": "full"}),
    "w4-weights": ("4 bits, weights alone, to nearest", {**_W4, "no_input": [""], "no_output": [""]}),
    "w4-nearest": ("4 bits, `--recipe llama-w4a8o8 --rounding nearest`", {**_BEST4, "rounding": "nearest"}),
    "w4-unlearned": ("4 bits, `--recipe llama-w4a8o8 --learn-scales 0`", {**_BEST4, **_PLAIN}),
    "w4": ("4 bits, `--recipe llama-w4a8o8`", _BEST4),
    "w4-groups-unlearned": ("4 bits, `--recipe llama-w4a8o8-g32 --learn-scales 0`", {**_GROUPS4, **_PLAIN}),
    "w4-groups": ("4 bits, `--recipe llama-w4a8o8-g32`", _GROUPS4),
    "w8-as-it-is": ("8 bits, `--recipe llama-w8a8o8 --no-rotate`", {**_BEST8, **_STILL}),
    "w4-as-it-is": ("4 bits, `--recipe llama-w4a8o8 --no-rotate`", {**_BEST4, **_STILL}),
    "w4-groups-as-it-is-unlearned": (
        "4 bits, `--recipe llama-w4a8o8-g32 --no-rotate --learn-scales 0`",
        {**_GROUPS4, **_STILL, **_PLAIN},
    ),
    "w4-groups-as-it-is": ("4 bits, `--recipe llama-w4a8o8-g32 --no-rotate`", {**_GROUPS4, **_STILL}),
}
"""By key: what the row is called, and its recipe."""


def rows_table(found: dict[str, Any]) -> str:
    """The rows that have figures, in the order of `ROWS`, as Markdown."""
    lines = [
        f"{found['model']}, {found['score']['windows']} windows of {found['score']['window']} tokens of the evaluation "
        f"documents of `{found['text']}`; calibrated on {found['calibration_windows']} windows of the others. "
        f"{found['machine']}, {found['date']}.",
        "",
        "| recipe | perplexity | over float | file | quantizing | memory |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| float | {found['float']['perplexity']:.2f} | 1 | {size(found['float']['bytes'])} | | |",
    ]
    for key, (label, _) in ROWS.items():
        if (row := found["rows"].get(key)) is not None:
            lines.append(
                f"| {label} | {row['perplexity']:.2f} | {row['ratio']:.3f} ± {row['ratio_error']:.3f} | "
                f"{size(row['checkpoint_bytes'])} | {row['seconds'] / 60:.1f} min | {size(row['peak_bytes'])} |"
            )
    return "\n".join(lines)


def scored(windows: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """A row's figures from the losses of its windows and the float model's, nats a token."""
    count = len(windows)
    gaps = [a - b for a, b in zip(windows, reference, strict=True)]
    mean = math.fsum(gaps) / count
    error = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (count - 1) / count) if count > 1 else math.nan
    ratio = math.exp(mean)
    return {"perplexity": math.exp(math.fsum(windows) / count), "ratio": ratio, "ratio_error": ratio * error}


def command(words: Sequence[object]) -> dict[str, Any]:
    """The JSON of a bytelane command."""
    done = subprocess.run(
        [sys.executable, "-c", "import bytelane.cli; bytelane.cli.main()", *map(str, words), "--json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def float_row(given: argparse.Namespace) -> dict[str, Any]:
    """The float model's losses, window by window."""
    from bytelane.evaluate import perplexity
    from bytelane.quantize import load_float_model, read_documents, windows

    model, tokenizer = load_float_model(given.model, device=given.device)
    held = windows(tokenizer, read_documents(given.text, "evaluation"), length=given.window, limit=given.score)
    found = perplexity(model, held)
    weights = {id(p): p.numel() for p in model.parameters()}
    return {
        "perplexity": found.perplexity,
        "window_nll": found.window_nll,
        "bytes": 2 * sum(weights.values()),
        "seconds": found.seconds,
    }


def quantized_row(given: argparse.Namespace, key: str, found: dict[str, Any]) -> dict[str, Any]:
    """One recipe: made, scored, and what that took."""
    _, recipe = ROWS[key]
    with tempfile.TemporaryDirectory(prefix="bytelane-quality-") as folder:
        out = (given.out or Path(folder)) / key
        file = Path(folder) / "recipe.json"
        file.write_text(json.dumps(recipe), encoding="utf-8")
        threads = [] if given.threads is None else ["--threads", given.threads]
        options = ["--text", given.text, "--split", "calibration", "--window", given.window, *threads]
        options += ["--windows", given.calibrate, "--recipe", file, "--overwrite", "--device", given.device]
        made = command(["quantize", given.model, out, *options])
        tokens = given.score * given.window
        options = ["--split", "evaluation", "--window", given.window, "--max-tokens", tokens, "--dtype", "float32"]
        options += ["--device", given.device]
        (run,) = command(["eval", out, given.text, *options, *threads])["results"]
    return {
        **scored(run["window_nll"], found["float"]["window_nll"]),
        "recipe": made["recipe"],
        "window_nll": run["window_nll"],
        "seconds": made["seconds"],
        "peak_bytes": made["peak_bytes"],
        "checkpoint_bytes": made["checkpoint_bytes"],
        "labels": made["labels"],
        "eval_tokens_per_second": run["tokens_per_second"],
    }


def cpu_name() -> str:
    """The processor as the kernel calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def machine(device: str) -> str:
    """What measures: a GPU or the processor."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()


def header(given: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a file have in common."""
    return {
        "model": given.name or given.model.stem,
        "text": given.text.name,
        "text_sha256": hashlib.sha256(given.text.read_bytes()).hexdigest(),
        "score": {"windows": given.score, "window": given.window},
        "calibration_windows": given.calibrate,
        "machine": machine(given.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--text", type=Path, help="a file of <doc> elements")
    parser.add_argument("--name", help="of the model in the table; the folder's or file's by default")
    parser.add_argument("--only", action="append", choices=[*ROWS], help="rows to measure; repeatable")
    parser.add_argument("--again", action="store_true", help="measure rows that have figures too")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--score", type=int, default=40, help="windows to score")
    parser.add_argument("--calibrate", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="a folder to keep the checkpoints in")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(given.json.read_text()) if given.json.exists() else {}
    if not given.table_only:
        if given.model is None or given.text is None:
            parser.error("needs MODEL and --text, or --table-only")
        common = header(given)
        other = [key for key, value in common.items() if found and found.get(key) != value]
        if other:
            parser.error(f"{given.json} has figures of another {', '.join(other)}; name another file with --json")
        if not found:
            found = {**common, "date": time.strftime("%Y-%m-%d"), "rows": {}}
            found["float"] = float_row(given)
            write_json(given.json, found)
        for key in given.only or ROWS:
            recipe = ROWS[key][1]
            if key in found["rows"] and not given.again:
                continue
            print(f"{key}: {json.dumps(recipe)}", file=sys.stderr, flush=True)
            found["rows"][key] = quantized_row(given, key, found)
            found["date"] = time.strftime("%Y-%m-%d")
            found["versions"] = {n: importlib.metadata.version(n) for n in ("bytelane", "torch", "transformers")}
            write_json(given.json, found)
    if given.json == RESULTS:
        text = GUIDE.read_text(encoding="utf-8")
        write_text(GUIDE, replace(text, MARKER, rows_table(found), script="benchmarks/quality.py"))
    table(
        f"{found['model']}, float {found['float']['perplexity']:.2f}",
        ("row", "perplexity", "over float", "size", "minutes", "memory"),
        [
            (
                key,
                f"{row['perplexity']:.2f}",
                f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}",
                size(row["checkpoint_bytes"]),
                f"{row['seconds'] / 60:.1f}",
                size(row["peak_bytes"]),
            )
            for key, row in found["rows"].items()
        ],
        right=("perplexity", "over float", "size", "minutes", "memory"),
    )
    print(json.dumps({key: row["ratio"] for key, row in found["rows"].items()}))


if __name__ == "__main__":
    main()
