"""The vLLM plugin's arithmetic over ranks that are bare processes: the oracle's bits, on CPUs and on two GPUs."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as multiprocessing

import sharded
from bytelane.integrations.vllm.reduce import EXACT_FLOAT32, all_reduce_accumulators, largest_sum


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_oracles_bits(ranks: int) -> None:
    """Cuts inside a byte are among them, sums beyond float32's integers, and layers without an output scale."""
    multiprocessing.spawn(sharded.on_one_rank, (ranks, sharded.free_port(), "cpu", (2, 3, 4, 8)), nprocs=ranks)


def gpu_kernels_on_one_rank(rank: int, ranks: int, port: int) -> None:
    """`sharded.on_one_rank` with the GPU's kernels in the place of the CPU's; the interpreter takes CPU tensors."""
    from bytelane import ops
    from bytelane.kernels import cuda

    ops.select = lambda op, *_: SimpleNamespace(run=getattr(cuda, op))
    sharded.on_one_rank(rank, ranks, port, "cpu", (4,))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_gpus_kernels_give_the_oracles_bits_over_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, which each process reads of its environment."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    multiprocessing.spawn(gpu_kernels_on_one_rank, (2, sharded.free_port()), nprocs=2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_oracles_bits() -> None:
    """NCCL sums int32, alone and in a CUDA graph."""
    multiprocessing.spawn(sharded.on_one_rank, (2, sharded.free_port(), "cuda", (2, 3, 4, 8)), nprocs=2)


@pytest.mark.parametrize(
    ("bits", "inputs", "planes"), [(2, 65536, 1), (4, 16384, 1), (8, 1024, 1), (8, 1025, 2), (8, 131071, 2)]
)
def test_accumulators_travel_in_float32_without_losing_a_bit(bits: int, inputs: int, planes: int) -> None:
    """On CPUs, where the all-reduce takes floats only: at the edges of int32 and of float32's integers."""
    bound = largest_sum(bits, inputs)
    edge = bound // 3
    parts = torch.randint(-edge, edge + 1, (3, 4, 33, 1), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    parts[:, 0, :4, 0] = torch.tensor([edge, -edge, edge - 1, 1 - edge])
    seen: list[torch.dtype] = []

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        """As three ranks do it: the others' share of the same tensor is made from theirs."""
        seen.append(tensor.dtype)
        assert tensor.numel() == planes * parts[0].numel()
        high = parts[1:] >> 12
        others = [torch.stack((h, p - (h << 12))) if planes == 2 else p for h, p in zip(high, parts[1:], strict=True)]
        return tensor + sum(others).to(tensor.dtype)

    total = all_reduce_accumulators(parts[0], bits, inputs, all_reduce)
    assert torch.equal(total.to(torch.int64), parts.to(torch.int64).sum(0))
    assert seen == [torch.float32]
    assert (bound <= EXACT_FLOAT32) == (planes == 1)


def test_on_cuda_accumulators_are_reduced_as_they_are() -> None:
    """Shapes and dtypes only, on tensors without data: one int32 all-reduce, no copy to another dtype."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        acc = torch.empty(4, 33, 1, dtype=torch.int32, device="cuda")
        seen: list[tuple[torch.dtype, str]] = []

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            seen.append((tensor.dtype, tensor.device.type))
            assert tensor is acc
            return tensor

        assert all_reduce_accumulators(acc, 8, 131071, all_reduce) is acc
    assert seen == [(torch.int32, "cuda")]
