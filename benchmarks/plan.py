"""Mixed widths beside one width for all at the same size: perplexity of the integer layers, and what the plan expected.

    python benchmarks/plan.py MODEL --text wiki.utf8 --average 3.5 4 5

For every average the checkpoint with one width for all linear layers (where the average is a whole number) and the
checkpoint of the plan under that average are quantized alike and scored on the same held-out windows. Losses are
measured once and kept beside the results. A row is written when it is done, and rows that have figures are not run
again. With the usual result file the guide's table is written; `--draw` writes its picture too, and `--table-only`
measures nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bytelane.cli.output import table, write_json, write_text
from bytelane.evaluate import compare_results, perplexity, result_of
from bytelane.models import load_model
from bytelane.quantize import Budget, Recipe, load_float_model, plan_bits, quantize_model, read_documents, windows
from quality import machine
from readme import replace

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
PICTURE = ROOT / "docs" / "images" / "plan.svg"
WINDOW = 512
GUIDE = ROOT / "docs" / "quantizing.md"
MARKER = "plans beside one width for all"
PINNED = {"lm_head|embed_tokens": 8}


def recipes(given: argparse.Namespace, model: Any, tokenizer: Any, texts: list[str]) -> dict[str, tuple[Recipe, float]]:
    """By row: the recipe, and the loss that the measurement expects of it."""
    base = Recipe.load(given.recipe).model_dump(mode="json") | {"rounding": given.rounding, "bits": PINNED}
    base["learn_scales"] = given.learn_scales
    losses = given.results.with_suffix(".losses.json")
    found: dict[str, tuple[Recipe, float]] = {}
    for average in given.average:
        plan = plan_bits(
            model,
            tokenizer,
            texts,
            Recipe.of(base),
            Budget(average_bits=average),
            window=given.measure_window,
            max_windows=given.measure,
            dtype=torch.bfloat16,
            cache=losses,
            progress=lambda stage, done, total: print(f"{stage} {done}/{total}", file=sys.stderr),
        )
        bits = int(average)
        if bits == average:
            expected = sum(layer.losses.get(bits, 0.0) for layer in plan.layers)
            found[f"{bits} bits for all"] = (Recipe.of(base | {"default_bits": bits}), expected)
        found[f"plan, {average:g} bits on average"] = (plan.to_recipe(), plan.loss)
    return found


def rows_table(found: dict[str, Any]) -> str:
    """The rows by size, as Markdown."""
    choice = found["choice"]
    lines = [
        f"{choice['model']}, float {found['float']['perplexity']:.2f}, {choice['score']} windows of {choice['window']} "
        f"tokens of the evaluation documents of `{choice['text']}`; `{choice['recipe']}` with `{choice['rounding']}` "
        f"and {choice['learn_scales']} steps of learning scales, calibrated on {choice['calibrate']} windows. "
        f"{found['machine']}.",
        "",
        "| widths | file | perplexity | over float | nats more | expected of the weights |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in found["rows"].items():
        lines.append(
            f"| {name} | {r['bytes'] / 1e6:.1f} MB | {r['perplexity']:.2f} | {math.exp(r['nll_increase']):.3f} | "
            f"{r['nll_increase']:.3f} ± {r['standard_error']:.3f} | {r['expected_loss']:.3f} |"
        )
    return "\n".join(lines)


def write_guide(found: dict[str, Any], *, picture: bool) -> None:
    """The guide's table, and its picture."""
    text = GUIDE.read_text(encoding="utf-8")
    write_text(GUIDE, replace(text, MARKER, rows_table(found), script="benchmarks/plan.py"))
    if picture:
        write_text(PICTURE, draw(found["rows"], found["float"]["perplexity"]))


def draw(rows: dict[str, dict[str, Any]], base: float) -> str:
    """Size against perplexity over float, both kinds of row, as SVG."""
    width, height, left, bottom, top = 640, 360, 64, 48, 24
    points = [(r["bytes"] / 1e6, r["perplexity"] / base) for r in rows.values()]
    x0, x1 = min(x for x, _ in points) - 3, max(x for x, _ in points) + 3
    y1 = math.log(max(y for _, y in points) * 1.15)

    def at(size: float, ratio: float) -> tuple[float, float]:
        return (
            left + (size - x0) / (x1 - x0) * (width - left - 16),
            height - bottom - math.log(ratio) / y1 * (height - bottom - top),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#666">',
        f'<text x="{(left + width) / 2}" y="{height - 10}" text-anchor="middle">checkpoint, MB</text>',
        f'<text x="14" y="{top - 8}">perplexity over float</text>',
    ]
    for ratio in (r for r in (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50) if math.log(r) <= y1):
        _, y = at(x0, ratio)
        parts.append(f'<path d="M{left} {y:.1f}H{width - 16}" stroke="#8884"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{ratio:g}</text>')
    for size in range(10 * math.ceil(x0 / 10), int(x1) + 1, 10):
        x, y = at(size, 1)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{size}</text>')
    for kind, color, label in (("for all", "#d97706", "one width for all"), ("plan", "#0d9488", "plan")):
        held = sorted((r["bytes"] / 1e6, r["perplexity"] / base) for n, r in rows.items() if kind in n)
        places = [at(*p) for p in held]
        parts.append(
            f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}" fill="none" stroke="{color}" '
            f'stroke-width="2"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in places]
        x, y = places[0]
        parts.append(f'<text x="{x + 10:.1f}" y="{y - 4:.1f}" fill="{color}">{label}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    """Every row that has no figures yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a float checkpoint folder")
    parser.add_argument("--text", type=Path, help="documents, every fourth held out")
    parser.add_argument("--recipe", default="llama-w8a8o8", help="everything but the widths")
    parser.add_argument("--rounding", choices=["nearest", "gptq"], default="nearest")
    parser.add_argument("--learn-scales", type=int, default=64, help="steps, for both kinds of row")
    parser.add_argument("--average", type=float, nargs="+", default=[4.0])
    parser.add_argument("--measure", type=int, default=16, help="windows to measure losses on")
    parser.add_argument("--measure-window", type=int, default=256)
    parser.add_argument("--calibrate", type=int, default=8, help="windows that ranges come from")
    parser.add_argument("--score", type=int, default=40, help="windows to score")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.table_only:
        write_guide(json.loads(given.results.read_text(encoding="utf-8")), picture=given.draw)
        return
    if given.model is None or given.text is None:
        parser.error("needs MODEL and --text, or --table-only")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    choice = {"model": given.model.name, "text": given.text.name, "window": WINDOW}
    choice |= {
        k: getattr(given, k)
        for k in ("recipe", "rounding", "learn_scales", "measure", "measure_window", "calibrate", "score")
    }
    results: dict[str, Any] = {"choice": choice, "machine": machine(given.device), "rows": {}}
    if given.results.exists():
        results = json.loads(given.results.read_text(encoding="utf-8"))
        if results["choice"] != choice:
            sys.exit(f"{given.results} is of {results['choice']}, not of {choice}")
    model, tokenizer = load_float_model(given.model, device=given.device)
    texts = read_documents(given.text, "calibration")
    held = windows(tokenizer, read_documents(given.text, "evaluation"), length=WINDOW, limit=given.score)
    if "float" not in results:
        scored = perplexity(model, held)
        results["float"] = {"perplexity": scored.perplexity, "window_nll": scored.window_nll}
        write_json(given.results, results)
    count = WINDOW - 1
    reference = result_of([n * count for n in results["float"]["window_nll"]], [count] * given.score, 1.0)
    for name, (recipe, expected) in recipes(given, model, tokenizer, texts).items():
        if name in results["rows"]:
            continue
        with tempfile.TemporaryDirectory(prefix="bytelane-plan-") as folder:
            out = Path(folder) / "model"
            report = quantize_model(
                model, tokenizer, texts, recipe, out, window=WINDOW, max_windows=given.calibrate, dtype=torch.bfloat16
            )
            scored = perplexity(load_model(out, dtype=torch.float32, device=given.device), held)
        paired = compare_results(reference, scored)
        results["rows"][name] = {
            "perplexity": scored.perplexity,
            "bytes": report.checkpoint_bytes,
            "expected_loss": expected,
            "nll_increase": paired.nll_increase,
            "standard_error": paired.standard_error,
            "window_nll": scored.window_nll,
        }
        write_json(given.results, results)
    rows = results["rows"]
    table(
        f"{given.model.name}, float {results['float']['perplexity']:.2f}",
        ("widths", "MB", "perplexity", "nats more", "expected of the weights"),
        [
            (
                name,
                f"{r['bytes'] / 1e6:.1f}",
                f"{r['perplexity']:.2f}",
                f"{r['nll_increase']:.3f} ± {r['standard_error']:.3f}",
                f"{r['expected_loss']:.3f}",
            )
            for name, r in rows.items()
        ],
        right=("MB", "perplexity", "nats more", "expected of the weights"),
    )
    if given.results == RESULTS:
        write_guide(results, picture=given.draw)
    print(json.dumps({name: r["perplexity"] for name, r in rows.items()}))


if __name__ == "__main__":
    main()
