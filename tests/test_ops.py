"""Every registered operation passes opcheck and refuses what its schema cannot say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bytelane import numerics
from bytelane.ops import SCHEMAS
from bytelane.packing import pack_rows

BITS, OUT, IN, M = 4, 6, 64, 3


def sample_codes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-8, 8, (OUT, IN), dtype=torch.int8, generator=generator)


def samples(op: str) -> list[tuple[object, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(M, IN, generator=generator)
    q = torch.randint(-128, 128, (M, IN), dtype=torch.int8, generator=generator)
    weight = pack_rows(sample_codes(), BITS)
    channel, grouped = torch.full((OUT, 1), 0.01), torch.full((OUT, 2), 0.01)
    s_in, s_out, bias = torch.tensor(0.03), torch.tensor(0.05), torch.ones(OUT)
    each = torch.linspace(0.02, 0.07, OUT)
    acc = numerics.accumulate(q, sample_codes())
    ids = torch.tensor([[0, 5], [2, 2]])
    made: dict[str, list[tuple[object, ...]]] = {
        "quantize": [(x, s_in), (x.bfloat16(), s_in), (x.t(), s_in)],
        "accumulate": [(q, weight, BITS, 0), (q, weight, BITS, 32)],
        "requantize": [
            (acc, channel, s_in, s_out, bias, torch.float32),
            (acc, channel, s_in, None, None, torch.bfloat16),
            (acc, channel, s_in, each, bias, torch.float32),
            (numerics.accumulate(q, sample_codes(), 32), grouped, s_in, s_out, bias, torch.float16),
            (numerics.accumulate(q, sample_codes(), 32), grouped, s_in, each, bias, torch.float16),
        ],
        "linear": [
            (x, weight, channel, s_in, s_out, bias, BITS, 0),
            (x, weight, channel, s_in, each, bias, BITS, 0),
            (x.bfloat16().reshape(1, M, IN), weight, grouped, s_in, None, None, BITS, 32),
            (x[0].half(), weight, grouped, s_in, each, None, BITS, 32),
        ],
        "linear_weight_only": [
            (x, weight, channel, s_out, bias, BITS),
            (x, weight, grouped, None, None, BITS),
            (x.bfloat16(), weight, channel, s_out, bias, BITS),
            (x.half().reshape(1, M, IN), weight, grouped, None, None, BITS),
            (x.bfloat16()[0], weight[:, : IN // 4].contiguous(), channel, None, None, 2),
        ],
        "linear_emulated": [
            (x, weight, channel, s_in, s_out, bias, BITS),
            (x, weight, grouped, None, None, None, BITS),
        ],
        "embedding": [
            (ids, weight, grouped, BITS, IN, 2.0, torch.bfloat16),
            (ids[0].to(torch.int32), weight, channel, BITS, IN, 1.0, torch.float32),
        ],
    }
    return made[op]


@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op: str) -> None:
    for arguments in samples(op):
        torch.library.opcheck(getattr(torch.ops.bytelane, op).default, arguments)


def test_linear_is_its_three_parts() -> None:
    x, weight, scale, s_in, s_out, bias, bits, group = samples("linear")[0]
    ops = torch.ops.bytelane
    acc = ops.accumulate(ops.quantize(x, s_in), weight, bits, group)
    parts = ops.requantize(acc, scale, s_in, s_out, bias, x.dtype)
    assert torch.equal(parts, ops.linear(x, weight, scale, s_in, s_out, bias, bits, group))


def change(position: int, value: Callable[[object], object]) -> tuple[object, ...]:
    arguments = list(samples("linear")[0])
    arguments[position] = value(arguments[position])
    return tuple(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        change(0, lambda x: x.double()),
        change(0, lambda x: x[:, :-2]),
        change(1, lambda w: w.to(torch.int16)),
        change(2, lambda s: s.double()),
        change(2, lambda s: s[:-1]),
        change(3, lambda s: s.double()),
        change(3, lambda s: s.expand(OUT).clone()),
        change(4, lambda s: s.double()),
        change(4, lambda s: s.expand(OUT - 1).clone()),
        change(5, lambda b: b[:-1]),
        change(5, lambda b: b.bfloat16()),
        change(7, lambda _: 32),
    ],
)
def test_linear_checks_its_arguments(arguments: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be|need|do not fit"):
        torch.ops.bytelane.linear(*arguments)


def test_weight_only_and_embedding_check_their_arguments() -> None:
    x, weight, scale, s_out, bias, bits = samples("linear_weight_only")[0]
    ids = torch.tensor([0])
    ops = torch.ops.bytelane
    wrong: list[Callable[[], object]] = [
        lambda: ops.linear_weight_only(x, weight, torch.ones(OUT, 3), None, None, bits),
        lambda: ops.linear_weight_only(x, weight, torch.ones(OUT, 0), None, None, bits),
        lambda: ops.linear_weight_only(x, weight, scale, torch.ones(OUT), None, bits),
        lambda: ops.linear_weight_only(x, weight, scale, s_out, bias[:-1], bits),
        lambda: ops.embedding(ids.float(), weight, scale, bits, IN, 1.0, torch.float32),
        lambda: ops.embedding(ids, weight, scale[:-1], bits, IN, 1.0, torch.float32),
        lambda: ops.embedding(ids, weight, torch.ones(OUT, 3), bits, IN, 1.0, torch.float32),
        lambda: ops.embedding(ids, weight, scale, bits, IN + 8, 1.0, torch.float32),
        lambda: ops.embedding(ids, weight, scale, bits, IN, 1.0, torch.float64),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"must be|need|do not fit|do not divide"):
            call()
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([OUT]), weight, scale, bits, IN, 1.0, torch.float32)
