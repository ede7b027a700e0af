"""Compiles Triton kernels into the cache on disk, one for each line of standard input.

    python -m bytelane.kernels.compile_worker CAPABILITY        # 90 for an H100

A line is a `Job` as JSON; the answer is the seconds it took. Nothing here touches a GPU: a driver that only names the
device stands in for CUDA's, so that any number of these run beside the process that holds the memory.
"""

from __future__ import annotations

import importlib
import json
import sys
import time

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class NamedDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target


def main() -> None:
    """Compile until standard input ends; a kernel that does not compile ends this with its traceback."""
    driver.set_active(NamedDevice(int(sys.argv[1])))
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        kernel = getattr(importlib.import_module(job["module"]), job["name"])
        dtypes = [getattr(torch, name) for name in job["dtypes"]]
        kernel.warmup(*dtypes, *job["numbers"], grid=(1, 1), **job["constants"], **job["options"])
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
