"""A launch passes Triton's launcher what Triton's own `kernel[grid](...)` would, of code that is really compiled.

No GPU is needed: a driver that only remembers stands in for CUDA's, and Triton compiles for it (compute capability 9.0)
down to machine code. On a machine with a GPU the kernels' own tests launch for real.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import driver

from bytelane.kernels import cuda
from bytelane.kernels.compile_worker import NamedDevice
from bytelane.kernels.triton_configs import CodesTile, DecodeTile, FusedTile, RowsTile, Tile
from bytelane.kernels.triton_launch import Launch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="stands in for a GPU, and for compiled code",
)


class Recorder(NamedDevice):
    """As much of a Triton driver as compiling and launching ask for; `launches` are what the launcher was given."""

    launches: list[tuple[Any, ...]]

    class utils:
        loaded = itertools.count(1)

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10}

        @staticmethod
        def load_binary(name: str, code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            assert code
            return next(Recorder.utils.loaded), next(Recorder.utils.loaded), 32, 0, 1024

    def __init__(self) -> None:
        super().__init__(90)
        self.launches = launches = []

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name = metadata.name

            def __call__(self, *arguments: Any) -> None:
                launches.append((self.name, *arguments))

        self.launcher_cls = Launcher


@pytest.fixture(scope="module")
def stand_in() -> Iterator[Recorder]:
    """One for all: compiled code keeps the launcher it was made with."""
    made = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        # `driver.reset_active` would look for a GPU's driver, which is not there
        patch.setattr(driver, "_active", made)
        yield made


@pytest.fixture
def recorder(stand_in: Recorder) -> Recorder:
    stand_in.launches.clear()
    return stand_in


def operands(n: int, k: int, bits: int, m: int) -> tuple[Tensor, ...]:
    scale = torch.tensor(0.1)
    x, rows = torch.randn(m, k).bfloat16(), torch.zeros(n, k * bits // 8, dtype=torch.uint8)
    return x, rows, torch.ones(n, 1), scale, scale


def linear(m: int, tile: Tile, bits: int = 4) -> Callable[[], object]:
    args = operands(128, 512, bits, m)
    return lambda: cuda.linear(*args, None, bits, tile=tile)


CALLS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "decode": (linear(3, DecodeTile(4, 64, 2)), ["decode_linear"]),
    "fused": (linear(1, FusedTile(64, 64, 1, 4, 3)), ["fused_linear"]),
    "codes": (linear(20, CodesTile(64, 32, 64, 8, 4, 3)), ["quantize_planes", "codes_linear"]),
    "shared K": (linear(16, CodesTile(64, 16, 32, 8, 4, 3, splits=4), 2), ["quantize_planes", "codes_linear"]),
    "rows": (linear(16, RowsTile(64, 4, 2, ask=True)), ["rows_linear"]),
    "rows, shared K": (linear(2, RowsTile(64, 4, 1, splits=2, ask=True), 8), ["quantize_planes", "rows_linear"]),
    "quantize": (lambda: cuda.quantize(torch.randn(100).bfloat16(), torch.tensor(0.1)), ["quantize_planes"]),
    "weight only": (
        lambda: cuda.linear_weight_only(*operands(128, 512, 4, 2)[:3], None, None, 4),
        ["weight_only_linear"],
    ),
    "embedding": (
        lambda: cuda.embedding(torch.tensor([1, 2]), *operands(128, 512, 4, 1)[1:3], 4, 512, 1.0, torch.bfloat16),
        ["gather_rows"],
    ),
}


def same(left: Any, right: Any) -> bool:
    """Equal arguments; of tensors, those of one form, which two calls do not share."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return (left.dtype, left.shape) == (right.dtype, right.shape)
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_is_tritons_own(recorder: Recorder, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    call, kernels = CALLS[name]
    call()
    planned = list(recorder.launches)
    assert [launch[0] for launch in planned] == kernels
    recorder.launches.clear()

    def by_triton(self: Launch, device: int | None, tensors: tuple[Tensor, ...]) -> None:
        self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)

    monkeypatch.setattr(Launch, "_run", by_triton)
    call()
    assert len(recorder.launches) == len(planned)
    for ours, theirs in zip(planned, recorder.launches, strict=True):
        # names, grid, stream, code, metadata, and all arguments; what lies between is made for each launch
        assert ours[:7] == theirs[:7]
        assert len(ours) == len(theirs)
        assert all(same(a, b) for a, b in zip(ours[10:], theirs[10:], strict=True))


def test_unaligned_tensors_get_code_of_their_own(recorder: Recorder) -> None:
    tile = FusedTile(64, 64, 1, 4, 3)
    x, rows, scales, s_in, s_out = operands(128, 512, 4, 1)
    cuda.linear(x, rows, scales, s_in, s_out, None, 4, tile=tile)
    moved = torch.zeros(rows.numel() + 1, dtype=torch.uint8)[1:].view(rows.shape)
    cuda.linear(x, moved, scales, s_in, s_out, None, 4, tile=tile)
    aligned, unaligned = recorder.launches
    assert aligned[5] != unaligned[5]


@pytest.mark.parametrize("name", ["decode", "fused", "codes", "shared K", "rows", "rows, shared K"])
def test_launches_that_overlap_the_one_before_compile(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As on Hopper: with the wait for the kernel before, and the weights asked for ahead of it."""
    monkeypatch.setattr(cuda, "overlaps", lambda device: True)
    call, kernels = CALLS[name]
    call()
    assert [launch[0] for launch in recorder.launches] == kernels


def test_no_byte_of_a_row_is_asked_for_twice_or_past_its_end() -> None:
    for n, k, bits in ((1536, 12288, 4), (12288, 1536, 2), (64, 128, 8), (262144, 1536, 2), (5, 32, 4)):
        form = cuda.layout(n, k, bits, 0)
        for bn, warps in ((4, 8), (16, 8), (32, 4), (128, 4)):
            size, pieces = cuda._prefetch(form, True, True, bn, warps)
            assert size % 16 == 0
            assert size * pieces <= form.row_bytes
            assert size == 0 or pieces & (pieces - 1) == 0
            assert bn * pieces <= max(32 * warps, bn)
    assert cuda._prefetch(cuda.layout(8, 8, 4, 0), True, True, 4, 4)[0] == 0
    assert cuda._prefetch(cuda.layout(1536, 12288, 4, 0), False, True, 4, 4)[0] == 0
