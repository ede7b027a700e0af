"""The cases of `tests/fuzz.py`, chosen by atheris: it keeps the bytes that reach lines of bytelane no others reached.

    make fuzz                                                             two minutes of it
    python tests/fuzz_coverage.py CORPUS -max_total_time=3600             a folder, then libFuzzer's own options

Hypothesis turns the bytes into a case, so both draw from one strategy. A finding ends the run with its traceback and is
left as `crash-*`; `python tests/fuzz_coverage.py crash-...` repeats it.
"""

from __future__ import annotations

import collections
import inspect
import random
import sys
from pathlib import Path

import atheris
import torch

sys.path.insert(0, str(Path(__file__).parent))

import fuzz

LENGTH = 4096
"""Bytes of a case: with fewer, Hypothesis has none left for the last choices and drops the case."""


def instrument() -> None:
    """Have every function of bytelane report its branches.

    atheris' own import hook misses an editable install, whose modules come from a finder of the build's.
    """
    functions = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "bytelane" or not hasattr(module, "__dict__"):
            continue
        owners = [module, *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == name)]
        functions |= {f for owner in owners for f in vars(owner).values() if inspect.isfunction(f)}
    for function in functions:
        if function.__module__.partition(".")[0] == "bytelane":
            atheris.instrument_func(function)


def main() -> None:
    instrument()
    torch.set_num_threads(1)
    corpus = Path(sys.argv[1])
    if corpus.is_dir() and not any(corpus.iterdir()):  # libFuzzer would begin with a few bytes
        for seed in range(64):
            (corpus / f"seed-{seed}").write_bytes(random.Random(seed).randbytes(LENGTH))
    held = fuzz.holder(1, 0, collections.Counter())
    atheris.Setup([*sys.argv, f"-max_len={LENGTH}", "-len_control=0"], held.hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
    atheris.Fuzz()


if __name__ == "__main__":
    main()
