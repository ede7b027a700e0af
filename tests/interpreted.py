"""Where Triton kernels are tested: on a GPU, and where there is none in Triton's interpreter.

Triton reads the variable when it is imported, so a file of such tests runs once more, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
"""Of the tensors that kernels are given."""

kernels = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="needs a GPU or Triton's interpreter, in which test_in_the_interpreter runs it"
)
elsewhere = pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels themselves run here")


def run_in_the_interpreter(file: str) -> None:
    """Run a file of tests there; they must pass, and some must have run."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
