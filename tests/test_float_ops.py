"""The kernels between the layers: the NumPy oracle's bits on every instruction set, near the real formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import float_oracle
from bytelane.kernels import cpu, float_ops
from bytelane.kernels.float_ops import KeyValues, Norm

ISAS = cpu.supported_isas()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

isas = pytest.mark.parametrize("isa", ISAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def values(seed: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DTYPES[dtype])


def array(x: torch.Tensor) -> np.ndarray:
    return x.to(torch.float32).numpy()


def assert_same(found: torch.Tensor, expected: np.ndarray) -> None:
    """Equal to the bit, NaN for NaN."""
    left = array(found)
    assert left.shape == expected.shape
    np.testing.assert_array_equal(left, expected)
    assert not (np.signbit(left) ^ np.signbit(expected))[~np.isnan(expected)].any()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- norms and rotary embedding ----------------------------------------------------------------------------------


@isas
@dtypes
@pytest.mark.parametrize("width", [1, 15, 64, 100, 1536])
def test_norm_equals_the_oracle(isa: str, dtype: str, width: int) -> None:
    x = values(width, (5, width), dtype, 3.0)
    weight = values(1, (width,), dtype).to(torch.float32)
    for norm in (Norm(None, 1e-6), Norm(weight, 1e-6), Norm(weight, 1e-5, weight_in_t=True)):
        w = None if norm.weight is None else norm.weight.numpy()
        expected = float_oracle.norm(array(x), w, norm.eps, norm.weight_in_t, dtype)
        assert_same(float_ops.norm_rows(x, norm, isa=isa), expected)


@isas
@dtypes
def test_norm_adds_the_residual_and_scales(isa: str, dtype: str) -> None:
    x, residual = values(0, (2, 3, 100), dtype), values(1, (2, 3, 100), dtype)
    norm, scalar = Norm(None, 1e-6), torch.tensor(0.40625)
    branch = float_oracle.norm(array(x), None, 1e-6, False, dtype)
    total = float_oracle.round_to(array(residual) + branch, dtype)
    assert_same(float_ops.norm_rows(x, norm, residual=residual, isa=isa), total)
    scaled = float_oracle.round_to(total * np.float32(0.40625), dtype)
    assert_same(float_ops.norm_rows(x, norm, residual=residual, scalar=scalar, isa=isa), scaled)


@isas
@dtypes
def test_norm_reads_rows_that_lie_apart(isa: str, dtype: str) -> None:
    wide = values(0, (4, 300), dtype)
    cut = wide[:, 40:140]
    assert torch.equal(
        float_ops.norm_rows(cut, Norm(None, 1e-6), isa=isa),
        float_ops.norm_rows(cut.contiguous(), Norm(None, 1e-6), isa=isa),
    )


@isas
@dtypes
@pytest.mark.parametrize("dim", [2, 16, 80, 256])
def test_heads_are_normalized_and_rotated(isa: str, dtype: str, dim: int) -> None:
    batch, tokens, heads = 2, 3, 4
    x = values(dim, (batch, tokens, heads * dim), dtype)
    weight = values(1, (dim,), dtype).to(torch.float32)
    by_head = array(x).reshape(batch, tokens, heads, dim)
    normed = float_oracle.norm(by_head, weight.numpy(), 1e-6, False, dtype)
    for rows in (tokens, batch * tokens):  # angles shared by the batch, or its own
        angles = values(2, (rows, dim), dtype), values(3, (rows, dim), dtype)
        each = [np.resize(array(a), (batch * tokens, dim)).reshape(batch, tokens, 1, dim) for a in angles]
        turned = float_oracle.rotary(normed, *each, dtype).reshape(batch, tokens, heads * dim)
        assert_same(float_ops.head_rows(x, dim, Norm(weight, 1e-6), angles, isa=isa), turned)
        plain = float_oracle.rotary(by_head, *each, dtype).reshape(batch, tokens, heads * dim)
        assert_same(float_ops.head_rows(x, dim, None, angles, isa=isa), plain)
    assert torch.equal(float_ops.head_rows(x, dim, isa=isa), x)


@isas
def test_rotation_is_transformers_own(isa: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    for dtype in DTYPES:
        x = values(0, (2, 5, 3 * 64), dtype)
        cosine, sine = values(1, (2, 5, 64), dtype), values(2, (2, 5, 64), dtype)
        theirs, _ = apply_rotary_pos_emb(x.view(2, 5, 3, 64), x.view(2, 5, 3, 64), cosine, sine, unsqueeze_dim=2)
        assert torch.equal(float_ops.head_rows(x, 64, None, (cosine, sine), isa=isa), theirs.reshape(x.shape))


# --- gates -------------------------------------------------------------------------------------------------------


@isas
@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gates_equal_the_oracle(isa: str, dtype: str, activation: str) -> None:
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 87.0, -87.5, 88.5, -88.5, 300.0, -300.0, 6e4, -6e4, torch.nan])
    gate = torch.cat([special.to(DTYPES[dtype]), values(0, (1000,), dtype, 4.0)])[None].repeat(3, 1)
    up = values(1, gate.shape, dtype)
    expected = float_oracle.gate(array(gate), array(up), activation, dtype)
    assert_same(float_ops.gate_rows(gate, up, activation, isa=isa), expected)
    wide = torch.cat([gate, up], dim=1)
    halves = wide[:, : gate.shape[1]], wide[:, gate.shape[1] :]
    assert_same(float_ops.gate_rows(*halves, activation, isa=isa), expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gates_are_near_the_real_functions(activation: str) -> None:
    """In float32, over every scale.

    z is known to 6 roundings (relative u = 2^-24 each), which exp turns into 6 u |z|. The exponential's own argument
    reduction loses at most 2 u in r, its polynomial some 2 u and the product 1 u; the sum, the quotient and the series'
    remainder (2^-27) less than 4 u more.
    """
    g = np.concatenate([s * np.logspace(-30, 1.9, 200001) for s in (-1.0, 1.0)]).astype(np.float32)
    found = (
        float_ops.gate_rows(torch.from_numpy(g)[None], torch.ones(1, len(g)), activation, isa=ISAS[0])
        .numpy()[0]
        .astype(np.float64)
    )
    x = g.astype(np.float64)
    z = x if activation == "silu" else 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    with np.errstate(over="ignore"):
        exact = x / (1 + np.exp(-z))
    bound = np.abs(exact) * (6 * np.abs(z) + 9) * 2.0**-24 + 2.0**-120  # below which the exponential's infinity is 0
    inside = np.abs(z) < 86
    assert (np.abs(found - exact) <= bound)[inside].all()
    # outside, the gate is the value itself or nothing
    far = np.abs(np.where(z > 0, found - exact, found))[~inside]
    assert (far <= 2.0**-24 * np.abs(exact)[~inside] + 100 * np.exp(-86.0)).all()


# --- layers that were never quantized ----------------------------------------------------------------------------


@isas
@dtypes
def test_dense_equals_the_oracle(isa: str, dtype: str, threads) -> None:
    for m, n, k in ((1, 1, 1), (1, 130, 100), (3, 67, 16), (9, 5, 1000), (70, 66, 47)):
        x, w = values(m, (m, k), dtype), values(n, (n, k), dtype)
        bias = values(k, (n,), dtype).to(torch.float32)
        for count in (1, 3):
            threads(count)
            assert_same(float_ops.dense(x, w, None, isa=isa), float_oracle.dense(array(x), array(w), None, dtype))
            expected = float_oracle.dense(array(x), array(w), bias.numpy(), dtype)
            assert_same(float_ops.dense(x, w, bias, isa=isa), expected)


# --- attention ---------------------------------------------------------------------------------------------------


def random_stored(seed: int, shape: tuple[int, ...], dtype: str, codes: bool) -> KeyValues:
    if not codes:
        return KeyValues(values(seed, shape, dtype), values(seed + 1, shape, dtype))
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator) for _ in range(2)]
    return KeyValues(*made, torch.tensor(0.011), torch.tensor(0.017))


def expected_attention(q, stored, mask, scaling, dtype):
    batch, queries, heads, _ = q.shape
    _, kv_heads, tokens, _ = stored.keys.shape
    k_scale, v_scale = (np.float32(1) if s is None else s.numpy() for s in (stored.key_scale, stored.value_scale))
    y = np.zeros(q.shape, np.float32)
    for b in range(batch):
        for s in range(queries):
            seen = np.arange(tokens) <= tokens - queries + s
            if mask is not None:
                seen = mask[b % mask.shape[0], 0, s].numpy()
            for h in range(heads):
                k, v = (array(t[b, h * kv_heads // heads]) for t in (stored.keys, stored.values))
                factor = np.float32(scaling) * k_scale
                y[b, s, h] = float_oracle.attend(array(q[b, s, h]), k, v, factor, v_scale, seen, dtype)
    return y


SHAPES = [  # batch, queries, tokens, heads, KV heads, dim
    (1, 1, 1, 1, 1, 16),
    (1, 1, 37, 8, 1, 64),
    (2, 5, 5, 4, 2, 48),
    (1, 7, 40, 6, 3, 20),
    (2, 3, 19, 3, 3, 80),
]


@isas
@dtypes
@pytest.mark.parametrize("codes", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_oracle(isa: str, dtype: str, codes: bool, shape, threads) -> None:
    batch, queries, tokens, heads, kv_heads, dim = shape
    q = values(0, (batch, queries, heads, dim), dtype)
    stored = random_stored(1, (batch, kv_heads, tokens, dim), dtype, codes)
    generator = torch.Generator().manual_seed(2)
    scattered = torch.rand((batch, 1, queries, tokens), generator=generator) < 0.5
    scattered[0, 0, 0] = False  # a query that sees nothing
    window = torch.ones(1, 1, queries, tokens, dtype=torch.bool).tril(tokens - queries).triu(tokens - queries - 6)
    for mask in (None, window, scattered):
        expected = expected_attention(q, stored, mask, 0.3, dtype)
        for count in (1, 4):
            threads(count)
            assert_same(float_ops.attention(q, stored, mask, 0.3, isa=isa), expected)


@isas
def test_attention_is_near_softmax(isa: str) -> None:
    """In float32, against float64. A score errs by at most (dim / 16 + 6) u of its terms' sizes, which the exponential
    turns into that much of the weight; weights and sums of n terms add at most (n + 20) u of sum p |v|."""
    q, stored = values(0, (1, 4, 2, 64), "float32"), random_stored(1, (1, 2, 300, 64), "float32", False)
    found = float_ops.attention(q, stored, None, 0.125, isa=isa).double()
    query, k, v = q.double().transpose(1, 2), stored.keys.double(), stored.values.double()
    hidden = torch.ones(4, 300, dtype=torch.bool).tril(296).logical_not()
    scores = (query @ k.transpose(2, 3) * 0.125).masked_fill(hidden, -torch.inf)
    p = scores.softmax(-1)
    sizes = (query.abs() @ k.abs().transpose(2, 3) * 0.125).amax(-1, keepdim=True)
    bound = 2.0**-24 * (300 + 20 + 2 * 10 * sizes) * (p @ v.abs())
    assert ((found.transpose(1, 2) - p @ v).abs() <= bound).all()


@isas
@dtypes
@pytest.mark.parametrize("codes", [True, False], ids=["int8", "float"])
def test_what_is_not_seen_leaves_no_trace(isa: str, dtype: str, codes: bool) -> None:
    """A query's output is the same alone or among others, with padding before it, in a wider buffer."""
    tokens, heads, kv_heads, dim = 33, 4, 2, 32
    q, stored = values(0, (1, 9, heads, dim), dtype), random_stored(1, (1, kv_heads, tokens, dim), dtype, codes)
    whole = float_ops.attention(q, stored, None, 0.2, isa=isa)
    scales = stored.key_scale, stored.value_scale
    for s in range(9):
        cut = KeyValues(stored.keys[:, :, : tokens - 8 + s], stored.values[:, :, : tokens - 8 + s], *scales)
        alone = float_ops.attention(q[:, s : s + 1].contiguous(), cut, None, 0.2, isa=isa)
        assert torch.equal(alone, whole[:, s : s + 1])
    padded = [torch.nn.functional.pad(t, (0, 0, 5, 3), value=1) for t in (stored.keys, stored.values)]
    mask = torch.zeros(1, 1, 9, tokens + 8, dtype=torch.bool)
    mask[0, 0, :, 5 : 5 + tokens] = torch.ones(9, tokens, dtype=torch.bool).tril(tokens - 9)
    assert torch.equal(float_ops.attention(q, KeyValues(*padded, *scales), mask, 0.2, isa=isa), whole)


@isas
@dtypes
def test_codes_are_stored_in_place(isa: str, dtype: str) -> None:
    batch, heads, tokens, dim = 2, 3, 4, 20
    scale = torch.tensor(0.013)
    x = values(0, (batch, tokens, heads * dim), dtype).view(batch, tokens, heads, dim).transpose(1, 2)
    expected = torch.ops.bytelane.quantize(x.contiguous(), scale)
    for states in (x, x.contiguous()):
        room = torch.full((batch, heads, 10, dim), 99, dtype=torch.int8)
        float_ops.store_codes(states, scale, room[:, :, 3 : 3 + tokens], isa=isa)
        assert torch.equal(room[:, :, 3 : 3 + tokens], expected)
        assert (room[:, :, :3] == 99).all()
        assert (room[:, :, 3 + tokens :] == 99).all()


# --- refusals ----------------------------------------------------------------------------------------------------


def test_wrong_calls_are_refused() -> None:
    isa, x = ISAS[0], torch.zeros(2, 32)
    stored, q = KeyValues(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16)), torch.zeros(1, 3, 4, 16)
    wrong = [
        lambda: float_ops.norm_rows(x, Norm(torch.zeros(31), 1e-6), isa=isa),
        lambda: float_ops.norm_rows(x, Norm(None, 1e-6), residual=torch.zeros(2, 31), isa=isa),
        lambda: float_ops.norm_rows(torch.zeros(3, 4, 8).transpose(0, 1), Norm(None, 1e-6), isa=isa),
        lambda: float_ops.norm_rows(x.double(), Norm(None, 1e-6), isa=isa),
        lambda: float_ops.norm_rows(torch.zeros(2, 0), Norm(None, 1e-6), isa=isa),
        lambda: float_ops.head_rows(x, 15, isa=isa),
        lambda: float_ops.head_rows(x, 16, None, (torch.zeros(3, 16), torch.zeros(3, 16)), isa=isa),
        lambda: float_ops.gate_rows(x, x[:, :31], "silu", isa=isa),
        lambda: float_ops.dense(x, torch.zeros(4, 31), None, isa=isa),
        lambda: float_ops.dense(x, torch.zeros(4, 32, dtype=torch.bfloat16), None, isa=isa),
        lambda: float_ops.attention(q, KeyValues(stored.keys[..., :8], stored.values), None, 1.0, isa=isa),
        lambda: float_ops.attention(q[:, :, :3].contiguous(), stored, None, 1.0, isa=isa),
        lambda: float_ops.attention(q, stored, torch.ones(1, 1, 3, 4, dtype=torch.bool), 1.0, isa=isa),
        lambda: float_ops.attention(q, stored, torch.zeros(1, 1, 3, 5), 1.0, isa=isa),
        lambda: float_ops.store_codes(torch.zeros(1, 2, 3, 8), torch.tensor(1.0), torch.zeros(1, 2, 3, 8), isa=isa),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"must|divide|take|go with|alike|distances"):
            call()
