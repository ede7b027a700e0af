"""The tuning guide's table and curves from what `tune.py` measured.

    python benchmarks/tune_report.py [benchmarks/results/tune_*.json] [--svg docs/images/tuning.svg]
    python benchmarks/tune_report.py --write

Prints the table, of several files those of the later ones where two have a variant; `--svg` draws the loss and the
integer model's perplexity over the seconds of training; `--write` puts the table of each model in `results` into
docs/tuning.md, between the comments that name it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = tuple(ROOT / "benchmarks" / "results" / f"tune_{run}.json" for run in ("h200", "h100", "settled_h100"))
GEMMA = (ROOT / "benchmarks" / "results" / "tune_gemma_h100.json",)
GUIDE = ROOT / "docs" / "tuning.md"
TABLES = {"figures of tuning": RESULTS, "figures of tuning, Gemma 3": GEMMA}
"""What is between which comments of the guide, and the files it is made of."""
NAMES = {
    "w8a8o8": ("8-bit weights", "8 bits"),
    "w4a8o8": ("4-bit weights", "8 bits"),
    "w4a8o8-g32": ("4-bit weights in groups of 32", "8 bits"),
    "mobile": ("the phone's map: 4 bits, 2 bits in the MLPs of the upper 17 layers", "2 bits"),
    "mobile-18": ("the phone's map: 4 bits, 2 bits in the MLPs of the upper 10 layers", "2 bits"),
}
COLOURS = {
    "w8a8o8": "#2a9d8f",
    "w4a8o8": "#3a6fb0",
    "w4a8o8-g32": "#8e5ea2",
    "mobile": "#c8553d",
    "mobile-18": "#c8553d",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 220, 46, 34, 66


def rounded(value: float) -> str:
    return f"{value:.0e}".replace("e+0", "e") if value >= 1e5 else f"{value:.2f}"


def merged(files: Iterable[Path]) -> dict[str, Any]:
    """The results of some files as one; every variant says on what it was measured.

    Raises:
        SystemExit: they are of different evaluation windows.
    """
    found: dict[str, Any] = {}
    for file in files:
        held = json.loads(file.read_text(encoding="utf-8"))
        if not found:
            found = {**held, "variants": {}}
        if held["evaluated_tokens"] != found["evaluated_tokens"]:
            raise SystemExit(f"{file} scores {held['evaluated_tokens']} tokens, others {found['evaluated_tokens']}")
        about = {"device": held["device"], "windows": held["windows"], "written": held.get("written_windows", 0)}
        about["settled"] = held.get("settle", False)
        found["variants"] |= {name: {**values, **about} for name, values in held["variants"].items()}
    return found


def table(measured: dict[str, Any]) -> str:
    """Markdown, a variant a row."""
    header = ["layers, both sides int8", "embedding, head", "before", "after", "of float", "training"]
    rows = []
    for variant, (layers, table_bits) in NAMES.items():
        if variant not in measured["variants"]:
            continue
        v = measured["variants"][variant]
        training = (
            f"{v['device'].split()[1]}, {v['seconds']:.0f} s, {v['steps']} steps, "
            f"{v['tokens'] / 1e6:.1f} million tokens, rate {v['rate']:g}"
            f"{', from a settled start' if v['settled'] else ''}"
        )
        rows.append([layers, table_bits, rounded(v["untuned"]), rounded(v["tuned"]), f"{v['ratio']:.2f}", training])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis: 1, 2, 5 times powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


class Panel:
    """Axes of seconds, and of a logarithm."""

    def __init__(self, left: float, title: str, seconds: float, low: float, high: float) -> None:
        self.left, self.title, self.seconds, self.low, self.high = left, title, seconds, low, high

    def x(self, seconds: float) -> float:
        """Where a second is."""
        return self.left + WIDTH * seconds / self.seconds

    def y(self, value: float) -> float:
        """Where a value is."""
        return TOP + HEIGHT * (1 - math.log(value / self.low) / math.log(self.high / self.low))

    def frame(self, marks: list[float]) -> list[str]:
        """Title, lines and numbers."""
        found = [f'<text x="{self.left}" y="{TOP - 14}" class="title">{self.title}</text>']
        for mark in marks:
            y = self.y(mark)
            found.append(f'<path d="M{self.left} {y:.1f}h{WIDTH}" class="grid"/>')
            found.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" class="end">{mark:g}</text>')
        for second in range(0, int(self.seconds) + 1, 50):
            found.append(f'<text x="{self.x(second):.1f}" y="{TOP + HEIGHT + 16}" class="middle">{second}</text>')
        found.append(f'<text x="{self.left + WIDTH}" y="{TOP + HEIGHT + 39}" class="end">seconds of training</text>')
        return found

    def line(self, points: list[tuple[float, float]], colour: str, *, dots: bool) -> list[str]:
        """A curve through points of seconds and values."""
        places = [f"{self.x(s):.1f} {self.y(v):.1f}" for s, v in points]
        found = [f'<path d="M{"L".join(places)}" fill="none" stroke="{colour}" stroke-width="1.6"/>']
        if dots:
            found += [f'<circle cx="{p.split()[0]}" cy="{p.split()[1]}" r="3" fill="{colour}"/>' for p in places]
        return found


def svg(measured: dict[str, Any]) -> str:
    """Two panels: the loss, and the perplexity of the integer model over that of the float one."""
    variants = {n: v for n, v in measured["variants"].items() if n in NAMES}
    seconds = max(v["seconds"] for v in variants.values())
    losses = {n: [(share * v["seconds"], loss) for share, loss in v["losses"]] for n, v in variants.items()}
    scores = {n: [(s, p / measured["float"]) for s, p in v["scores"]] for n, v in variants.items()}
    values = [loss for line in losses.values() for _, loss in line]
    ratios = [r for line in scores.values() for _, r in line]
    left = Panel(LEFT, "loss: distance to the float model, nats", seconds, min(values) * 0.9, max(values) * 1.1)
    right = Panel(
        LEFT + WIDTH + GAP, "perplexity of the integer model, of float", seconds, min(1.0, *ratios), max(ratios) * 1.05
    )
    parts = left.frame(ticks(left.low, left.high))
    parts += right.frame([m for m in (1.0, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 3.0) if right.low <= m <= right.high])
    for place, (name, colour) in enumerate((n, COLOURS[n]) for n in NAMES if n in variants):
        parts += left.line(losses[name], colour, dots=False) + right.line(scores[name], colour, dots=True)
        x = LEFT + 90 * place
        parts.append(f'<rect x="{x}" y="{TOP + HEIGHT + 30}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="{TOP + HEIGHT + 39}">{name}</text>')
    width, height = LEFT + 2 * WIDTH + GAP + 16, TOP + HEIGHT + 50
    style = (
        "text{font:11px sans-serif;fill:#777}.title{font-size:12px;fill:#666}.end{text-anchor:end}"
        ".middle{text-anchor:middle}.grid{stroke:#999;stroke-opacity:.3;fill:none}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<style>{style}</style>\n{body}\n</svg>\n"
    )


def replace(text: str, made: str, name: str) -> str:
    """A guide's text with the table between the marks of that name."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(first) + ".*?" + re.escape(last), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no {first} in the guide")
    return pattern.sub(lambda _: f"{first}\n{made}\n{last}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", default=RESULTS)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--write", action="store_true", help="of all models in results; nothing else")
    given = parser.parse_args()
    measured = merged(given.results)
    made = table(measured)
    print(made)
    if given.svg is not None:
        given.svg.write_text(svg(measured), encoding="utf-8")
    if given.write:
        text = GUIDE.read_text(encoding="utf-8")
        for name, files in TABLES.items():
            text = replace(text, table(merged(files)), name)
        GUIDE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
