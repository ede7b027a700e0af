"""What vLLM's CUDA communicator does with an int32 tensor, read off its own code: no GPU is here to run it."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def custom(max_size: int) -> Any:
    """The all-reduce kernels of vLLM's own, as on two connected GPUs, without their buffers."""
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    made = object.__new__(CustomAllreduce)
    made.disabled, made.world_size, made.fully_connected = False, 2, True
    made.max_size, made._ptr = max_size, 0
    return made


class Nccl:
    """Takes what reaches it."""

    disabled = False
    world_size = 2

    def __init__(self) -> None:
        self.seen: list[torch.dtype] = []

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.seen.append(tensor.dtype)
        return tensor


@pytest.mark.parametrize("shape", [(1, 1536, 1), (512, 4096, 1)])
def test_accumulators_reach_nccl(shape: tuple[int, ...]) -> None:
    """The faster ways before it, which would read int32 as something else, ask for the dtype and step aside."""
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
    from vllm.distributed.device_communicators.flashinfer_all_reduce import FlashInferAllReduce
    from vllm.distributed.device_communicators.pynccl_wrapper import ncclDataTypeEnum
    from vllm.distributed.device_communicators.symm_mem import SymmMemCommunicator

    communicator = object.__new__(CudaCommunicator)
    nccl = Nccl()
    communicator.pynccl_comm = nccl
    communicator.ca_comm = custom(1 << 30)
    flashinfer = object.__new__(FlashInferAllReduce)
    flashinfer.disabled = False
    symmetric = object.__new__(SymmMemCommunicator)
    symmetric.disabled, symmetric.dtype = False, torch.bfloat16
    communicator.fi_ar_comm, communicator.symm_mem_comm = flashinfer, symmetric
    communicator.qr_comm = communicator.fi_pcie_ipc_ar_comm = communicator.aiter_ar_comm = None
    communicator.use_aiter_allreduce = False
    acc = torch.zeros(shape, dtype=torch.int32)
    assert communicator.all_reduce(acc) is acc
    assert nccl.seen == [torch.int32]
    assert not communicator.ca_comm.should_custom_ar(acc)
    assert communicator.ca_comm.should_custom_ar(acc.to(torch.bfloat16)), "floats go the custom way"
    assert ncclDataTypeEnum.from_torch(torch.int32) == ncclDataTypeEnum.ncclInt32
