"""The model that comes with bytelane: ask it, measure it, look into it. Seconds, and no download.

The commands a user would type, run in order. The text it is measured on is made here, by the rules its training text
was made by but from another seed (`examples/small/stories.py`), so the model has not seen it.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

from bytelane.cli import main as bytelane_main

sys.path.insert(0, str(Path(__file__).resolve().parent / "small"))

from corpus import HELD_OUT_SEED, made

MODEL = "bytelane:small"


def bytelane(*arguments: str | Path) -> None:
    """Run one command, shown first as a user would type it."""
    print(f"\n$ bytelane {shlex.join(str(a) for a in arguments)}", flush=True)
    try:
        bytelane_main([str(a) for a in arguments])
    except SystemExit as ended:
        if ended.code:
            raise


def main() -> None:
    """The demo."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bytelane-demo-") as folder:
        text = Path(folder) / "stories.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in made(12, HELD_OUT_SEED)))
        bytelane("run", MODEL, "Tell me a story about a fox.", "--greedy")
        bytelane("eval", MODEL, text, "--emulated", "--max-tokens", "1024")
        converted = Path(folder) / "small-ct"
        bytelane("convert", MODEL, converted, "--to", "compressed-tensors")
        bytelane("run", converted, "What is a bear?", "--greedy")
        bytelane("verify", converted, "--no-kernels", "--samples", "4")
    print(f"\n{time.perf_counter() - start:.0f} seconds. Talk to it: .venv/bin/bytelane chat {MODEL}")


if __name__ == "__main__":
    main()
