"""Changes of basis leave the float model's function, and what they are for happens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bytelane.quantize import FoldError, equalize, observe, rotate
from bytelane.quantize.blocks import blocks, norm_gain
from bytelane.quantize.fold import CLIPPED, Loudest, aligned_rotation, check_same_function, find_loudest, rotation

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
RELATIVE = 2e-5
"""float32 logits, recomputed in another basis: some hundred roundings of 2^-24 each, in products 100 long."""


def make(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")
    text = {**SIZES, "tie_word_embeddings": True, **more}
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**text)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=0.2, std=0.3)  # a gain that is not 1, some of it negative
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double()


def same(model: Any, before: torch.Tensor, ids: torch.Tensor) -> bool:
    return bool((logits(model, ids) - before).norm() <= RELATIVE * before.norm())


@pytest.mark.parametrize("width", [8, 24, 48, 576, 640, 7])
def test_a_rotation_is_orthogonal_and_flat(width) -> None:
    matrix = rotation(width)
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert float(matrix.abs().max()) <= (2 / width) ** 0.5 + 1e-12
    assert torch.equal(matrix, rotation(width))


@pytest.mark.parametrize("width", [8, 24, 48, 576, 7])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_aligned_rotation_makes_its_vector_even(width, sign) -> None:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(width))
    for made in (vector, sign * torch.eye(width)[0], sign * torch.eye(width)[width // 2]):
        matrix = aligned_rotation(made)
        assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
        turned = (made.double() @ matrix).abs()
        assert torch.allclose(turned, made.double().norm() / width**0.5 * torch.ones_like(turned), rtol=1e-6)
    assert torch.equal(aligned_rotation(torch.zeros(width)), rotation(width))


def test_a_clipped_vector_leaves_the_sum_where_it_pointed() -> None:
    before, vector = torch.randn(2, 48, generator=torch.Generator().manual_seed(0)).unbind()
    loud = Loudest(vector * 1000, before)
    rest = before + loud.clipped()
    assert torch.allclose(rest / rest.norm(), (before + vector * 1000) / (before + vector * 1000).norm(), atol=1e-5)
    assert float(loud.clipped().norm()) == pytest.approx(CLIPPED * float(before.norm()), rel=0.25)  # less `before`
    assert torch.allclose(Loudest(vector, before).clipped(), vector, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("Qwen2", {}),
        ("Qwen3", {}),
    ],
    ids=["llama", "biases", "qwen2", "qwen3"],
)
@pytest.mark.parametrize("windows", [(), (torch.arange(24),)], ids=["blind", "aligned"])
def test_rotating_changes_nothing_but_the_basis(kind, more, windows, ids) -> None:
    model = make(kind, **more)
    before = logits(model, ids)
    tables = model.get_input_embeddings().weight.clone()
    rotate(model, windows)
    assert same(model, before, ids)
    assert not torch.allclose(model.get_input_embeddings().weight, tables)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is False
    assert all(bool((b.mlp_norm.weight == 1).all()) for b in blocks(model))


def test_a_massive_activation_is_spread() -> None:
    """A value in one channel of what `down` writes is about sqrt(n) times smaller in every channel afterwards."""
    model = make("Llama")
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.weight[5] *= 1000
    window = torch.arange(24)
    before = observe(model, [window], ["model.layers.0.mlp.down_proj"]).outputs["model.layers.0.mlp.down_proj"].amax()
    rotate(model)
    after = observe(model, [window], ["model.layers.0.mlp.down_proj"]).outputs["model.layers.0.mlp.down_proj"].amax()
    assert after < before * (2 / 48) ** 0.5 * 1.05  # 5 % for the other channels


def test_a_massive_activation_is_clipped_without_turning() -> None:
    """With its range at a tenth, the loudest vector is shorter, and the sum it is added to points where it did."""
    model = make("Llama")
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.weight[5] *= 3000
        down.weight[7] *= 500
    window = torch.arange(24)
    loud = find_loudest(model, [window])
    assert float(loud.vector.abs().argmax()) == 5
    exact = (loud.before + loud.vector).double()
    turned = []
    for windows in ([], [window]):
        rotated = copy.deepcopy(model)
        rotate(rotated, windows)
        matrix = aligned_rotation(loud.clipped()) if windows else rotation(48)
        limit = float(loud.clipped().norm()) / 48**0.5
        left = torch.clamp(loud.vector.double() @ matrix, -limit, limit) @ matrix.T + loud.before.double()
        turned.append(1 - float(left @ exact / left.norm() / exact.norm()))
        seen = find_loudest(rotated, [window])
        assert torch.allclose(seen.vector.double() @ matrix.T, loud.vector.double(), atol=1e-3 * float(exact.norm()))
    assert turned[1] < 1e-3
    assert turned[1] < turned[0] / 10


def test_a_model_with_norms_after_its_layers_is_not_rotated(ids) -> None:
    model = make_gemma()
    before = logits(model, ids)
    with pytest.raises(FoldError, match=r"cannot be rotated.*leave `rotate` out"):
        rotate(model)
    assert torch.equal(logits(model, ids), before)


def make_gemma() -> Any:
    torch.manual_seed(0)
    text = {**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**text)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: make("Llama"), {"norm": 4, "down": 2, "value": 2, "query/key": 2}),
        (lambda: make("Llama", attention_bias=True, mlp_bias=True), {"norm": 4, "down": 2, "value": 2, "query/key": 2}),
        (lambda: make("Qwen3"), {"norm": 4, "down": 2, "value": 2, "query/key": 0}),
        (make_gemma, {"norm": 4, "down": 2, "value": 2, "query/key": 0}),
    ],
    ids=["llama", "biases", "qwen3", "gemma3"],
)
def test_equalizing_changes_nothing_but_the_scales(build, expected, ids) -> None:
    model = build()
    before = logits(model, ids)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert equalize(model, [ids[0]]) == expected
    assert same(model, before, ids)
    changed = {
        name.split(".")[-2] for name, value in model.state_dict().items() if not torch.equal(value, weights[name])
    }
    wanted = {"input_layernorm", "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "k_proj"}
    assert wanted <= changed
    assert not any(module._forward_hooks for module in model.modules())


def test_equalizing_evens_out_a_loud_channel(ids) -> None:
    model = make("Llama")
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.model.layers[0].mlp.up_proj.weight[7] *= 400
    name = "model.layers.0.mlp.down_proj"
    plain = observe(model, [ids[0]], [name]).inputs[name].amax()
    before = observe(loud, [ids[0]], [name]).inputs[name].amax()
    equalize(loud, [ids[0]])
    channels = loud.model.layers[0].mlp.down_proj.weight.detach().abs().amax(0)
    after = observe(loud, [ids[0]], [name]).inputs[name].amax()
    assert before > 100 * plain
    # Half of the excess (in the logarithm) went into the weight's column, which is the other half wider than most.
    assert after < before / 10
    assert float(channels[7] / channels.median()) < 40


def test_a_norm_is_told_by_what_it_computes() -> None:
    llama, gemma = make("Llama"), make_gemma()
    found = norm_gain(llama.model.norm)
    assert found is not None
    assert found[0] is llama.model.norm.weight
    assert found[1] == 0.0
    other = norm_gain(gemma.model.norm)
    assert other is not None
    assert other[1] == 1.0
    assert norm_gain(nn.LayerNorm(8)) is None
    assert norm_gain(nn.Identity()) is None


def test_an_architecture_unlike_its_names_is_refused(ids) -> None:
    """Ernie's rotary pairs are neighbours, not halves apart: scaling keys as if they were halves is not exact there."""
    model = make("Ernie4_5")
    with torch.no_grad():
        for b in blocks(model):  # attention that looks somewhere, as a trained model's does
            for linear in (b.q, b.k, b.v, b.o):
                linear.weight *= 12
    folded = copy.deepcopy(model)
    equalize(folded, [ids[0]])
    with pytest.raises(FoldError, match=r"computes something else.*leave `equalize`"):
        check_same_function(model, folded, ids[0])
    llama = make("Llama")
    folded = copy.deepcopy(llama)
    rotate(folded)
    equalize(folded, [ids[0]])
    check_same_function(llama, folded, ids[0])
