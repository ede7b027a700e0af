"""The README's GPU figures from what the GPU benchmarks measured.

    python benchmarks/gpu_table.py             # print them
    python benchmarks/gpu_table.py --write     # put them into the README, between their markers

They come from `benchmarks/results/`: `gpu_linear_h100.json` (`gpu_linear.py --no-peers`: each shape's and width's
microseconds, and the percent of the limit measured in the same run), `gpu_tune_h100.json` (`gpu_tune.py`, where it has
the tile that ships: its time instead), `gpu_peers_h100.json` (the same beside peers: how many times as long each took,
and a `note` where runs were joined) and `gpu_generate_h100.json` (`gpu_generate.py`: tokens a second of whole models).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bytelane.cli.output import size, write_text
from bytelane.kernels.triton_configs import linear_tile
from gpu_timing import recorded_tile
from readme import README, replace

RESULTS = Path(__file__).parent / "results"
ROWS = frozenset({1, 16, 256, 4096})
NAME, SCRIPT = "figures of the GPU", "benchmarks/gpu_table.py"
PEERS = ("emulated", "humming", "bf16")


def percent(r: dict[str, Any]) -> str:
    return f"{100 * r['limit_seconds'] / r['seconds']['bytelane']:.0f}"


def microseconds(r: dict[str, Any]) -> str:
    return f"{r['seconds']['bytelane'] * 1e6:.1f}"


def lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def alone(measured: dict[str, Any], rows: set[int]) -> str:
    """Microseconds and percent of the limit, the widths side by side."""
    widths = sorted({r["bits"] for r in measured["results"]})
    cells = {(r["in"], r["out"], r["m"], r["bits"]): r for r in measured["results"]}
    made = []
    for k, n, m in sorted({key[:3] for key in cells if key[2] in rows}):
        found = (cells.get((k, n, m, bits)) for bits in widths)
        made.append(
            [
                f"{k} x {n}",
                str(m),
                *(
                    "" if r is None else f"{microseconds(r)}{'*' if 'tuned' in r else ''}, {percent(r)} %"
                    for r in found
                ),
            ]
        )
    return lines(["in x out", "M", *(f"{bits} bits: us, of the limit" for bits in widths)], made)


def tuned(measured: dict[str, Any], sweep: dict[str, Any]) -> dict[str, Any]:
    """A run with the times of the tiles that ship, where a later sweep has them: those rows say `tuned`."""
    times = {
        (r["in"], r["out"], r["rows"], r["bits"]): {recorded_tile(tile): seconds for seconds, tile in r["best"]}
        for r in sweep["results"]
    }
    rows = []
    for r in measured["results"]:
        key = (r["in"], r["out"], r["m"], r["bits"])
        tile = linear_tile("sm90", r["m"], r["out"], r["in"], r["bits"], 0)
        seconds = times.get(key, {}).get(tile)
        rows.append(r if seconds is None else {**r, "seconds": {"bytelane": seconds}, "tuned": True})
    return {**measured, "results": rows}


def beside_peers(measured: dict[str, Any]) -> str:
    """Of each layer and width, over all numbers of rows: the mean of each peer's time over ours, and the least."""
    present = [p for p in PEERS if any(p in r["seconds"] for r in measured["results"])]
    made = []
    for k, n, bits in dict.fromkeys((r["in"], r["out"], r["bits"]) for r in measured["results"]):
        rows = [r for r in measured["results"] if (r["in"], r["out"], r["bits"]) == (k, n, bits)]
        texts = []
        for peer in present:
            ratios = {r["m"]: r["seconds"][peer] / r["seconds"]["bytelane"] for r in rows if peer in r["seconds"]}
            least = min(ratios, key=lambda m, ratios=ratios: ratios[m]) if ratios else None
            mean = f"{statistics.geometric_mean(ratios.values()):.2f}" if ratios else ""
            texts.append(mean if least is None else f"{mean} ({ratios[least]:.2f} at M = {least})")
        made.append([f"{k} x {n}", str(bits), *texts])
    return lines(["in x out", "bits", *(f"{p} takes" for p in present)], made)


def against_peers(measured: dict[str, Any]) -> str:
    """Of each peer, over the whole table: the geometric mean of its times over ours, and the least."""
    said = []
    for peer in PEERS:
        ratios = [r["seconds"][peer] / r["seconds"]["bytelane"] for r in measured["results"] if peer in r["seconds"]]
        if ratios:
            said.append(f"{peer} {statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f})")
    return "; ".join(said)


def models(measured: dict[str, Any]) -> str:
    """Tokens a second of each model, candidate, mode and number of sequences."""

    def rate(found: float | None) -> str:
        return "" if found is None else f"{found:.0f}" if found >= 100 else f"{found:.1f}"

    made = []
    for r in measured["results"]:
        rates = (rate(r["prefill_tokens_per_second"]), rate(r["tokens_per_second"]))
        sizes = (size(r["weight_bytes"]), size(r["peak_bytes"]))
        made.append([r["model"], r["candidate"], r["mode"], str(r["batch"]), *rates, *sizes])
    return lines(
        ["model", "candidate", "mode", "sequences", "read a second", "written a second", "weights", "at most held"],
        made,
    )


def compiling(measured: dict[str, Any]) -> str:
    """What compiling took before bytelane's first token, model by model."""
    reports = {r["model"]: r["compile"] for r in measured["results"] if "compile" in r}
    return "; ".join(
        f"{model}: {found['compiled']} kernels by {found['workers']} processes in {found['seconds']:.0f} s"
        for model, found in reports.items()
    )


def limits_text(measured: dict[str, Any]) -> str:
    """Card, date, releases and limits of a run."""
    limits = measured["limits"]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items() if name != "bytelane")
    text = (
        f"{measured['device']}, {measured['date']}, {versions}; a copy moves "
        f"{limits['copy_bytes_per_second'] / 1e12:.2f} TB/s, torch's int8 matmul does "
        f"{limits['int8_operations_per_second'] / 1e12:.0f} TOP/s"
    )
    if "launch_seconds" in limits:
        text += (
            f", an empty kernel in a graph takes {limits['launch_seconds'] * 1e6:.1f} us, one that overlaps "
            f"the one before {limits['overlapping_launch_seconds'] * 1e6:.1f}"
        )
    return text


def figures(
    linear: dict[str, Any], sweep: dict[str, Any], peers: dict[str, Any], generate: dict[str, Any] | None
) -> str:
    """The README's text between the markers."""
    parts = [
        f"Measured on {limits_text(linear)}.",
        "A star marks a tile chosen by a sweep (`python benchmarks/gpu_tune.py`, "
        f"{', '.join(sorted({r.get('date', sweep['date']) for r in sweep['results']}))}, another machine with",
        "the same card) and its time there, in shorter graphs, beside the limit of this run:",
        "",
        alone(tuned(linear, sweep), ROWS),
        "",
        "Beside what else runs such a layer, in one run with each other (`python benchmarks/gpu_linear.py`):",
        "emulation as vLLM does it (humming's weight-only matmul between compiled fake quantization), humming's",
        "integer matmul and a compiled output step, and torch in bfloat16. The last columns are their times over ours;",
        "over all rows, the geometric mean (and the least) is",
        f"{against_peers(peers)}.",
        f"{limits_text(peers)}{'; ' + peers['note'] if 'note' in peers else ''}. Over the rows of each layer:",
        "",
        beside_peers(peers),
    ]
    if generate is not None:
        parts += [
            "",
            "Whole models with random codes, greedily: "
            f"{generate['tokens']} tokens after a prompt of {generate['prompt']}",
            "(`python benchmarks/gpu_generate.py MODEL ...`; eager is the model called token by token, graph is",
            "`bytelane.step_graph`, a captured step: ours is the chain of `decoder/token_step.py`;",
            f"{generate['device']}, {generate['date']}, rounds timed: {generate['rounds']}"
            f"{'; ' + generate['note'] if 'note' in generate else ''}).",
            f"Before the first token, {compiling(generate)}:",
            "",
            models(generate),
        ]
    return "\n".join(parts)


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"gpu_{name}_h100.json").read_text())
    return found


def whole() -> str:
    """`figures` of the results that are there."""
    generated = load("generate") if (RESULTS / "gpu_generate_h100.json").exists() else None
    return figures(load("linear"), load("tune"), load("peers"), generated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the README")
    if parser.parse_args().write:
        write_text(README, replace(README.read_text(), NAME, whole(), SCRIPT))
    else:
        print(whole())


if __name__ == "__main__":
    main()
