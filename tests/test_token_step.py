"""A token's launches between the linear layers: the bits of the CPU, and attention within its own rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bytelane
import tiny
from bytelane.cache import cache_keyword, make_cache
from bytelane.checkpoint import KVScales
from bytelane.dispatch import machine
from bytelane.kernels import float_ops
from bytelane.kernels.float_ops import KeyValues, Norm
from bytelane.step_graph import StepGraph
from interpreted import DEVICE, elsewhere, kernels, run_in_the_interpreter

triton = pytest.importorskip("triton", reason="Triton is not installed")

from bytelane.decoder import token_step as module  # noqa: E402
from bytelane.decoder.token_step import TokenStep, merge_rows  # noqa: E402
from bytelane.kernels.cuda_norm import NormForm  # noqa: E402
from bytelane.kernels.cuda_step import CacheRows, HeadNorms, attend, gate, heads, join  # noqa: E402

ISA = machine().isas[0]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMS = [NormForm(1e-6), NormForm(1e-5, weight_in_t=True), NormForm(1e-6, plus_one=True)]


@elsewhere
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def drawn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def cpu_norm(weight: torch.Tensor | None, form: NormForm) -> Norm:
    if weight is None:
        return Norm(None, form.eps)
    values = weight.float()
    return Norm((1.0 + values if form.plus_one else values).contiguous(), form.eps, form.weight_in_t)


def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(DEVICE)


def empty_cache(kv_heads: int, length: int, dim: int, dtype: torch.dtype, codes: bool) -> CacheRows:
    """Full of what must not be read: NaN, or the largest code."""
    kind, filled = (torch.int8, 127) if codes else (dtype, float("nan"))
    keys, values = (torch.full((kv_heads, length, dim), filled, dtype=kind, device=DEVICE) for _ in range(2))
    scales = [torch.tensor(scale, device=DEVICE) if codes else None for scale in (0.02, 0.03)]
    return CacheRows(keys, values, *scales)


@kernels
@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "normed", "form"), [(64, False, FORMS[0]), (80, True, FORMS[0])] + [(32, True, f) for f in FORMS[1:]]
)
def test_heads(dim: int, normed: bool, form: NormForm, dtype: torch.dtype, codes: bool) -> None:
    """Normalized, rotated, and keys and values at their place of the cache, and nowhere else."""
    count, kv_heads, length, place = 6, 2, 24, 17
    q, k, v = (drawn(n * dim, dtype=dtype, seed=n) for n in (count, kv_heads, kv_heads))
    weights = [drawn(dim, dtype=dtype, seed=9 + i) if normed else None for i in range(2)]
    angle = drawn(dim, dtype=torch.float32, seed=5)
    angles = torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)
    cache = empty_cache(kv_heads, length, dim, dtype, codes)
    untouched = cache.keys.clone(), cache.values.clone()
    norms = HeadNorms(there(weights[0]), there(weights[1]), None, normed, form)
    position = torch.tensor([[place]], device=DEVICE)
    found = heads(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), norms, tuple(a.to(DEVICE) for a in angles), position, cache)  # type: ignore[arg-type]

    def expected(x: torch.Tensor, weight: torch.Tensor | None, has_norm: bool, rotated: bool) -> torch.Tensor:
        norm = cpu_norm(weight, form) if has_norm else None
        return float_ops.head_rows(x[None], dim, norm, angles if rotated else None, isa=ISA).view(-1, dim)

    assert torch.equal(found.cpu(), expected(q, weights[0], normed, True))
    written = expected(k, weights[1], normed, True), expected(v, None, normed, False)
    for rows, scale, one, before in zip(
        (cache.keys, cache.values), (cache.key_scale, cache.value_scale), written, untouched, strict=True
    ):
        wanted = one if scale is None else torch.ops.bytelane.quantize(one, scale.cpu())
        assert torch.equal(rows[:, place].cpu(), wanted)
        others = [t for t in range(length) if t != place]
        assert torch.equal(rows[:, others].nan_to_num(7.0), before[:, others].nan_to_num(7.0))
    alone = heads(q.to(DEVICE), None, None, norms, tuple(a.to(DEVICE) for a in angles), position, cache)  # type: ignore[arg-type]
    assert torch.equal(alone, found)


@kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(activation: Any, dtype: torch.dtype) -> None:
    g = torch.cat(
        [drawn(700, dtype=dtype, seed=1, scale=4.0), torch.tensor([0.0, -0.0, 200.0, -200.0, torch.nan]).to(dtype)]
    )
    up = drawn(g.numel(), dtype=dtype, seed=2)
    expected = float_ops.gate_rows(g[None], up[None], activation, isa=ISA)[0]
    found = gate(g.to(DEVICE), up.to(DEVICE), activation).cpu()
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(found.isnan(), expected.isnan())


@kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_sums(form: NormForm, dtype: torch.dtype, normed: bool) -> None:
    """With a scalar and without, and the norm of what follows."""
    width = 100
    stream, branch, weight, after = (drawn(width, dtype=dtype, seed=seed) for seed in range(4))
    for scalar in (None, torch.tensor([0.8125], dtype=dtype)):
        norm = (weight.to(DEVICE), form) if normed else None
        y, n = join(stream.to(DEVICE), branch.to(DEVICE), norm, there(scalar), (after.to(DEVICE), form))
        if normed:
            wide = None if scalar is None else scalar.float().reshape(())
            wanted = float_ops.norm_rows(
                branch[None], cpu_norm(weight, form), residual=stream[None], scalar=wide, isa=ISA
            )[0]
        else:
            wanted = stream + branch if scalar is None else (stream + branch) * scalar
        assert torch.equal(y.cpu(), wanted)
        assert torch.equal(n.cpu(), float_ops.norm_rows(wanted[None], cpu_norm(after, form), isa=ISA)[0])
        plain, same = join(stream.to(DEVICE), branch.to(DEVICE), norm, there(scalar), None)
        assert torch.equal(plain, y)
        assert same is plain


@kernels
@pytest.mark.parametrize(
    ("dim", "dtype", "codes", "window"),
    [
        (64, torch.bfloat16, True, 0),
        (80, torch.float32, True, 50),
        (256, torch.bfloat16, False, 40),
        (32, torch.float32, False, 0),
    ],
)
def test_attention(dim: int, dtype: torch.dtype, codes: bool, window: int) -> None:
    """Against float64, and the same bits in a longer cache.

    The error allowed is float32's: dim products and their sum in the scores (|score| < 40 here), an exponential of
    two units in the last place, a sum of keys; then one rounding to T.
    """
    count, kv_heads, place = 6, 2, 139
    scaling = dim**-0.5
    found = []
    for length in (place + 1, 512):
        cache = empty_cache(kv_heads, length, dim, dtype, codes)
        generator = torch.Generator().manual_seed(3)
        for rows in (cache.keys, cache.values):
            drawn_rows = torch.randn((kv_heads, place + 1, dim), generator=generator)
            rows[:, : place + 1] = (
                (drawn_rows * 40).round().clamp(-128, 127).to(torch.int8) if codes else drawn_rows.to(dtype)
            )
        q = drawn(count, dim, dtype=dtype, seed=4)
        found.append(attend(q.to(DEVICE), cache, torch.tensor([place], device=DEVICE), scaling, window).cpu())
    assert torch.equal(found[0], found[1])
    first = place + 1 - window if window else 0
    keys, values = (rows[:, first : place + 1].cpu().double() for rows in (cache.keys, cache.values))
    if codes:
        keys, values = keys * 0.02, values * 0.03
    keys, values = (rows.repeat_interleave(count // kv_heads, 0) for rows in (keys, values))
    scores = (keys @ q.double()[:, :, None])[..., 0] * scaling
    expected = (torch.softmax(scores, -1)[:, None] @ values)[:, 0].reshape(-1)
    assert scores.abs().max() < 40
    # relative: of the scores, |score| * dim / 2 units; of the rest, a few hundred; each unit is 2^-24
    unit = 2.0**-24
    inner = float(values.abs().max()) * (40 * dim / 2 + 300) * unit
    rounding = expected.abs() * torch.finfo(dtype).eps
    assert ((found[0].double() - expected).abs() <= inner + rounding).all()
    # far inside it, as a rule: a wrong key or weight would not be
    assert (found[0].double() - expected).abs().max() < 0.01


def load(architecture: str, folder: Path, kv_cache: Any = "auto") -> Any:
    config = tiny.config(architecture)
    scales = {f"model.layers.{i}.self_attn": KVScales(0.02, 0.03) for i in range(2)}
    tiny.write_random(folder / "model", config, tiny.default_schemes(config), kv_scales=scales)
    return bytelane.load_model(folder / "model", dtype=torch.bfloat16, device="cpu", kv_cache=kv_cache)


def cpu_attention(
    q: torch.Tensor, cache: CacheRows, position: torch.Tensor, scaling: float, window: int = 0
) -> torch.Tensor:
    """The CPU's own attention, on what the launches wrote; the GPU's must be near it.

    Weights sum to 1. The CPU rounds each to T, by eps / 2 of itself at most, and both round their result: together less
    than 2 eps of the largest value.
    """
    last = int(position) + 1
    first = max(0, last - window) if window else 0
    keys, values = (rows[None, :, first:last] for rows in (cache.keys, cache.values))
    stored = KeyValues(keys, values, cache.key_scale, cache.value_scale)
    theirs = float_ops.attention(q[None, None], stored, None, scaling, isa=ISA).view(-1)
    most = float(stored.floats(torch.float32)[1].float().abs().max())
    mine = attend(q, cache, position, scaling, window)
    assert float((mine.float() - theirs.float()).abs().max()) <= 2 * torch.finfo(q.dtype).eps * most
    return theirs


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's attention stands in for the GPU's")
@kernels
@pytest.mark.parametrize(
    ("architecture", "kv_cache"), [*((a, "float") for a in ("llama", "qwen3", "gemma3", "gemma4")), ("gemma4", "int8")]
)
def test_a_step_is_the_cpus_but_for_attention(
    architecture: str, kv_cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, past the sliding window of 16, where the CPU's attention stands in: nothing else differs.

    A prompt of an int8 cache is read by another way, which rounds what it dequantizes to T, so here it is of one token.
    """
    model = load(architecture, tmp_path, kv_cache)
    tokens = torch.randint(3, 120, (19,), generator=torch.Generator().manual_seed(0))
    begun = 15 if kv_cache == "float" else 0
    tokens = tokens if begun else tokens[:4]
    pieces = [tokens[None, :begun]] * (begun > 0) + list(tokens[begun:].view(-1, 1, 1))
    cache, expected = make_cache(model), []
    with torch.inference_mode():
        for piece in pieces:
            expected.append(model(piece, **{cache_keyword(model): cache}, use_cache=True).logits[0, -1])
    monkeypatch.setattr(module, "attend", cpu_attention)
    graph = StepGraph(model, 32)
    graph._chain = TokenStep(model)
    found = [graph.read(tokens[:begun])] if begun else []
    found += [graph.call(int(token)).clone() for token in tokens[begun:]]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    if begun:  # a prompt read after steps finds their keys and values
        with torch.inference_mode():
            more = model(tokens[None, :3], **{cache_keyword(model): cache}, use_cache=True).logits[0, -1]
        assert torch.equal(graph.read(tokens[:3]), more)


@kernels
def test_layers_that_are_watched_or_foreign_are_refused(tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    assert module.token_step(model) is not None
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert module.token_step(model) is None
    handle.remove()
    model.set_attn_implementation("eager")
    assert module.token_step(model) is None
    model.set_attn_implementation("sdpa")
    assert module.token_step(model) is not None
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(8, 8)
    assert module.token_step(model) is None


@kernels
def test_rows_are_moved_when_a_model_is_loaded_and_not_later(tmp_path: Path) -> None:
    """A step made later must not move what an earlier graph reads."""
    torch_model = bytelane.load_model(
        load("llama", tmp_path) and tmp_path / "model", dtype=torch.bfloat16, device="cpu", float_ops="torch"
    )
    attention: Any = torch_model.model.layers[0].self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    shared = len({float(p.input_scale) for p in projections}) == 1 and len({p.num_bits for p in projections}) == 1
    before = [p.packed.data_ptr() for p in projections]
    TokenStep(torch_model)
    assert [p.packed.data_ptr() for p in projections] == before
    assert (merge_rows(torch_model) > 0) == shared
    if shared:
        assert projections[1].packed.data_ptr() == projections[0].packed.data_ptr() + projections[0].packed.nbytes
