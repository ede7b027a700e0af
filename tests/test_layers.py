"""The layers against the independent oracle, and their manners: refusals, dtype casts, compilation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bytelane
import oracle
from bytelane import QuantEmbedding, QuantLinear, errors, numerics
from bytelane.packing import pack_rows
from bytelane.scheme import code_range


def make_codes(rng: np.random.Generator, shape: tuple[int, int], bits: int) -> np.ndarray:
    low, high = code_range(bits)
    return rng.integers(low, high + 1, shape).astype(np.int8)


def make_case(seed: int, bits: int, *, groups: int = 1, out: int = 17, inputs: int = 96) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(0, 2, (5, inputs)).astype(np.float32),
        "codes": make_codes(rng, (out, inputs), bits),
        "weight_scale": rng.uniform(0.001, 0.02, (out, groups)).astype(np.float32),
        "bias": rng.normal(0, 1, out).astype(np.float32),
    }


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("output_scale", [None, 0.05])
@pytest.mark.parametrize("bias", [False, True])
def test_from_codes_equals_the_oracle(
    bits: int, group_size: int | None, output_scale: float | None, bias: bool
) -> None:
    case = make_case(bits, bits, groups=1 if group_size is None else 3)
    s_in = np.float32(0.04)
    s_out = None if output_scale is None else np.float32(output_scale)
    b = case["bias"] if bias else None
    layer = QuantLinear.from_codes(
        torch.from_numpy(case["codes"]),
        torch.from_numpy(case["weight_scale"]),
        num_bits=bits,
        input_scale=float(s_in),
        output_scale=None if s_out is None else torch.tensor([s_out]),
        bias=None if b is None else torch.from_numpy(b),
        group_size=group_size,
    )
    expected = oracle.linear(case["x"], case["codes"], case["weight_scale"], s_in, s_out, b, group_size or 0)
    assert torch.equal(layer(torch.from_numpy(case["x"])), torch.from_numpy(expected))
    x3 = torch.from_numpy(case["x"]).reshape(1, 5, -1)
    assert torch.equal(layer(x3)[0], torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations_are_computed_from_their_exact_values(dtype: torch.dtype) -> None:
    case = make_case(1, 4)
    x = torch.from_numpy(case["x"]).to(dtype)
    s_in, s_out = np.float32(0.04), np.float32(0.05)
    layer = QuantLinear.from_codes(
        torch.from_numpy(case["codes"]),
        torch.from_numpy(case["weight_scale"]),
        num_bits=4,
        input_scale=float(s_in),
        output_scale=float(s_out),
    )
    expected = oracle.linear(x.float().numpy(), case["codes"], case["weight_scale"], s_in, s_out)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, torch.from_numpy(expected).to(dtype))


def test_a_zero_scale_is_an_unquantized_side() -> None:
    case = make_case(2, 8)
    codes, scale = torch.from_numpy(case["codes"]), torch.from_numpy(case["weight_scale"])
    layer = QuantLinear.from_codes(codes, scale, num_bits=8, input_scale=0.0, output_scale=torch.zeros(1))
    assert layer.input_scale is None
    assert layer.output_scale is None
    assert layer.scheme.label == "w8a16o16"
    x = torch.from_numpy(case["x"])
    assert torch.equal(layer(x), torch.nn.functional.linear(x, codes.float() * scale))
    only_output = QuantLinear.from_codes(codes, scale, num_bits=8, output_scale=0.5)
    assert torch.equal(only_output(x), numerics.fake_quantize(layer(x), torch.tensor(0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 32])
def test_emulated_equals_the_specification(dtype: torch.dtype, group_size: int | None) -> None:
    case = make_case(3, 4, groups=1 if group_size is None else 3)
    codes, scale = torch.from_numpy(case["codes"]), torch.from_numpy(case["weight_scale"])
    layer = QuantLinear.from_codes(
        codes, scale, num_bits=4, input_scale=0.04, output_scale=0.05, group_size=group_size, numerics="emulated"
    )
    x = torch.from_numpy(case["x"]).to(dtype)
    expected = numerics.linear_emulated(x, codes, scale, torch.tensor(0.04), torch.tensor(0.05))
    assert torch.equal(layer(x), expected)


def test_scales_survive_dtype_casts() -> None:
    case = make_case(4, 4)
    layer = QuantLinear.from_codes(
        torch.from_numpy(case["codes"]),
        torch.from_numpy(case["weight_scale"]),
        num_bits=4,
        input_scale=0.0123456,
        output_scale=0.05,
        bias=torch.from_numpy(case["bias"]),
    )
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    for cast in (layer.to(torch.bfloat16), layer.half(), layer.double()):
        for name, tensor in cast.named_buffers():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])


def test_empty_batch() -> None:
    layer = QuantLinear.from_codes(
        torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), num_bits=8, input_scale=1.0, output_scale=1.0
    )
    assert layer(torch.empty(0, 8)).shape == (0, 4)
    assert layer(torch.empty(2, 0, 8)).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_bits": 1}, errors.UnsupportedWidthError),
        ({"num_bits": 9}, errors.UnsupportedWidthError),
        ({"num_bits": 3}, errors.CodeRangeError),
        ({"weight_scale": torch.tensor([0.1, -0.1, 0.1, 0.1])}, errors.ScaleError),
        ({"weight_scale": torch.tensor([0.1, float("nan"), 0.1, 0.1])}, errors.ScaleError),
        ({"weight_scale": torch.tensor([0.1, float("inf"), 0.1, 0.1])}, errors.ScaleError),
        ({"weight_scale": torch.ones(3)}, errors.TensorShapeError),
        ({"input_scale": -1.0}, errors.ScaleError),
        ({"input_scale": float("nan")}, errors.ScaleError),
        ({"output_scale": float("inf")}, errors.ScaleError),
        ({"input_scale": 1e-40}, errors.ScaleError),
        ({"output_scale": 1e-38, "weight_scale": torch.full((4,), 1000.0)}, errors.ScaleError),
        ({"group_size": 3}, errors.GroupSizeError),
        ({"group_size": 4}, errors.GroupSizeError),
        ({"group_size": 0}, errors.GroupSizeError),
        ({"bias": torch.ones(5)}, errors.TensorShapeError),
        ({"bias": torch.full((4,), 1e10)}, errors.AccumulatorError),
        ({"input_scale": torch.ones(2)}, errors.TensorShapeError),
    ],
)
def test_refusals(change: dict[str, object], error: type[bytelane.CheckpointError]) -> None:
    arguments: dict[str, object] = {
        "codes_int8": torch.full((4, 8), 7, dtype=torch.int8),
        "weight_scale": torch.full((4,), 0.1),
        "num_bits": 8,
        "input_scale": 0.1,
        "output_scale": 0.1,
    }
    arguments.update(change)
    with pytest.raises(error) as raised:
        QuantLinear.from_codes(**arguments)  # type: ignore[arg-type]
    assert isinstance(raised.value, bytelane.CheckpointError)


@pytest.mark.parametrize("end", [1, -1])
@pytest.mark.parametrize(("bits", "limit"), [(2, 2**31 - 1), (3, 2**31 - 1), (4, 2**27 - 1), (8, 2**31 - 1)])
def test_a_bias_may_fill_the_accumulator_and_no_more(bits: int, limit: int, end: int) -> None:
    """28 bits at 4-bit weights, as on the vendor's Arm kernels; up to there the sum is exact on every kernel here."""
    lowest = -(2 ** (bits - 1))
    codes = torch.full((9, 64), lowest, dtype=torch.int8)
    # The largest product of all; float32 holds the bias code only in steps of its last place.
    room = limit - 64 * 128 * -lowest
    fits = np.float32(room)
    fits = np.nextafter(fits, np.float32(0)) if int(fits) > room else fits
    beyond = np.nextafter(fits, np.float32(np.inf))

    def layer(bias: np.float32) -> QuantLinear:
        bias_units = torch.full((9,), float(bias) * end)
        arguments = {"num_bits": bits, "input_scale": 1.0, "output_scale": float(2 ** (limit.bit_length() - 7))}
        return QuantLinear.from_codes(codes, torch.ones(9), bias=bias_units, **arguments)

    with pytest.raises(errors.AccumulatorError, match=f"overflow the accumulator, {limit}"):
        layer(beyond)
    x = torch.cat([torch.full((1, 64), -128.0), torch.full((1, 64), 127.0), torch.zeros(1, 64)])
    y = layer(fits)(x)
    s_out = np.float32(2 ** (limit.bit_length() - 7))
    ones = np.ones((9, 1), np.float32)
    expected = oracle.linear(x.numpy(), codes.numpy(), ones, np.float32(1), s_out, np.full(9, fits * end, np.float32))
    assert (torch.sign(y) == end).all()
    np.testing.assert_array_equal(y.numpy(), expected)


def test_too_many_inputs_are_refused() -> None:
    scale = torch.full((1,), 0.1)
    with pytest.raises(errors.AccumulatorError):
        QuantLinear.from_codes(torch.zeros(1, 131073, dtype=torch.int8), scale, num_bits=8)
    with pytest.raises(errors.AccumulatorError):
        QuantLinear.from_codes(torch.full((1, 131072), -128, dtype=torch.int8), scale, num_bits=8)
    with pytest.raises(errors.AccumulatorError):
        QuantLinear.from_codes(torch.full((1, 131072), -8, dtype=torch.int8), scale, num_bits=4)
    QuantLinear.from_codes(torch.full((1, 131072), -2, dtype=torch.int8), scale, num_bits=2)
    longest = torch.full((1, 131072), -128, dtype=torch.int8)
    longest[0, 0] = -127
    layer = QuantLinear.from_codes(longest, scale, num_bits=8, input_scale=1.0)
    x = torch.full((1, 131072), -200.0)
    expected = np.float32(128 * 128 * 131072 - 128) * np.float32(np.float32(1.0) * np.float32(0.1))
    assert float(layer(x)) == float(expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("groups", [1, 4])
def test_embedding_gathers_rows(bits: int, groups: int) -> None:
    rng = np.random.default_rng(bits)
    codes = torch.from_numpy(make_codes(rng, (50, 40), bits))
    scale = torch.from_numpy(rng.uniform(0.01, 0.1, (50, groups)).astype(np.float32))
    table = QuantEmbedding(
        pack_rows(codes, bits),
        scale,
        embedding_dim=40,
        num_bits=bits,
        group_size=None if groups == 1 else 10,
        embed_scale=3.0,
    )
    ids = torch.from_numpy(rng.integers(0, 50, (2, 7)))
    expected = codes[ids].float() * scale[ids].repeat_interleave(40 // groups, dim=-1) * 3.0
    assert torch.equal(table(ids), expected)


@pytest.mark.parametrize("numerics_name", ["integer", "emulated"])
@pytest.mark.parametrize("input_scale", [0.04, None])
def test_compiles_without_a_graph_break(numerics_name: str, input_scale: float | None) -> None:
    case = make_case(5, 4)
    layer = QuantLinear.from_codes(
        torch.from_numpy(case["codes"]),
        torch.from_numpy(case["weight_scale"]),
        num_bits=4,
        input_scale=input_scale,
        output_scale=0.05,
        numerics=numerics_name,
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.from_numpy(case["x"])
    assert torch.equal(compiled(x), layer(x))


def test_compiles_with_inductor() -> None:
    case = make_case(6, 2)
    layer = QuantLinear.from_codes(
        torch.from_numpy(case["codes"]),
        torch.from_numpy(case["weight_scale"]),
        num_bits=2,
        input_scale=0.04,
        output_scale=0.05,
    )
    model = torch.nn.Sequential(layer, torch.nn.ReLU())
    x = torch.from_numpy(case["x"])
    assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))
