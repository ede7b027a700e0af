"""The builder script: small models of its shapes load, run and stay finite."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bytelane
from bytelane import QuantLinear
from bytelane.generation import encode, generate, load_tokenizer
from bytelane.models import open_model
from bytelane.packing import unpack_rows
from bytelane.sampling import Sampling

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "build_gemma.py"
sys.path.insert(0, str(SCRIPT.parent))

import build_gemma  # noqa: E402  (a script beside the package)

NARROW = {**build_gemma.SHAPES["e2b"], "hidden_size": 128, "intermediate_size": 256}
"""E2B in everything but width, for speed."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four narrow layers of E2B with a vocabulary of 512, in both storages."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build_gemma.SHAPES, "narrow", NARROW)
        return {
            storage: build_gemma.build("narrow", folder / storage, storage=storage, layers=4, vocab=512)
            for storage in ("gemma", "compressed-tensors")
        }


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(5, 29)[None]).logits


@pytest.mark.parametrize("storage", ["gemma", "compressed-tensors"])
def test_loads_and_stays_finite_and_in_range(folders: dict[str, Path], storage: str) -> None:
    model = bytelane.load_model(folders[storage], dtype=torch.float32)
    spread: list[float] = []

    def note(layer: QuantLinear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if layer.input_scale is not None and layer.output_scale is not None:
            spread.append(float(inputs[0].std() / layer.input_scale))
            spread.append(float(output.std() / layer.output_scale))

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(note)
    found = logits(model)
    assert torch.isfinite(found).all()
    assert 2 < float(found.std()) < 8
    # Steps of the int8 grid to a standard deviation: neither lost below the step nor cut off above the range.
    assert 12 < min(spread) < max(spread) < 80


def test_storages_hold_the_same_model(folders: dict[str, Path]) -> None:
    one, two = (bytelane.load_model(folders[s], dtype=torch.float32) for s in ("gemma", "compressed-tensors"))
    assert torch.equal(logits(one), logits(two))


def test_emulated_logits_equal_transformers(folders: dict[str, Path]) -> None:
    ours = bytelane.load_model(folders["gemma"], dtype=torch.float32, numerics="emulated")
    # transformers makes room for one scale a row of the per-layer table, so it is given the table's by hand.
    theirs = AutoModelForCausalLM.from_pretrained(
        folders["gemma"], dtype=torch.float32, ignore_mismatched_sizes=True
    ).eval()
    table = ours.model.embed_tokens_per_layer
    theirs.model.embed_tokens_per_layer.embedding_scale = torch.nn.Parameter(table.weight_scale, requires_grad=False)
    assert torch.equal(logits(ours), logits(theirs))


def test_its_layout_is_the_released_one(folders: dict[str, Path]) -> None:
    checkpoint, _ = open_model(folders["gemma"])
    modules = checkpoint.modules
    assert modules["model.embed_tokens_per_layer"].scheme.weight.group_size == 256
    assert modules["lm_head"].scheme.label == "w2a16o16"
    assert checkpoint.ignored == ("model.per_layer_model_projection",)
    first, last = modules["model.layers.0.mlp.up_proj"], modules["model.layers.3.mlp.up_proj"]
    assert (first.scheme.label, first.shape) == ("w4a8o8", (256, 128))
    assert (last.scheme.label, last.shape) == ("w2a8o8", (512, 128))
    assert set(checkpoint.kv_scales) == {f"model.layers.{i}.self_attn" for i in (0, 1)}
    assert "model.layers.3.self_attn.k_proj" not in modules


def test_the_full_shapes() -> None:
    e2b, e4b = (build_gemma.text_config(shape, None, 262144) for shape in ("e2b", "e4b"))
    assert [i for i, t in enumerate(e2b.layer_types) if t == "full_attention"] == [4, 9, 14, 19, 24, 29, 34]
    assert (e2b.num_hidden_layers, e2b.num_kv_shared_layers, e2b.hidden_size) == (35, 20, 1536)
    assert (e4b.num_hidden_layers, e4b.num_key_value_heads, e4b.intermediate_size) == (42, 2, 10240)
    assert build_gemma.weight_bits("model.layers.14.mlp.up_proj", e2b) == 4
    assert build_gemma.weight_bits("model.layers.15.mlp.up_proj", e2b) == 2
    with pytest.raises(ValueError, match=r"must be 4\.\.35"):
        build_gemma.text_config("e2b", 3, 262144)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_linear_codes_have_mean_zero(bits: int) -> None:
    rows = build_gemma.linear_rows(64, 512, bits, build_gemma.np.random.default_rng(0))
    codes = unpack_rows(rows, bits, 512).float()
    assert codes.min() == 1 - (1 << (bits - 1))
    assert abs(float(codes.mean())) < 0.02 * float(codes.std())
    assert float(codes.square().mean().sqrt()) == pytest.approx(build_gemma.CODE_RMS[bits], rel=0.02)


def test_it_talks(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    model = bytelane.load_model(folders["gemma"])
    assert model.generation_config.eos_token_id == [1, 4]
    ids = encode(tokenizer, "Hello, world")
    assert "Hello, world" in tokenizer.decode(ids[0])
    text, stats = generate(model, tokenizer, ids, max_new_tokens=6, sampling=Sampling(seed=0), on_text=lambda _: None)
    assert text
    assert 0 < stats.new_tokens <= 6


def test_the_command_prints_json_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(build_gemma.SHAPES, "narrow", {**NARROW, "num_key_value_heads": 2})
    folder = tmp_path / "model"
    monkeypatch.setattr(
        sys, "argv", ["build_gemma.py", "narrow", str(folder), "--layers", "6", "--vocab", "300", "--wrapper"]
    )
    build_gemma.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bytes"] == sum(f.stat().st_size for f in folder.iterdir())
    model = bytelane.load_model(folder, text_only=True)
    assert torch.isfinite(logits(model)).all()
    assert model.model.language_model.embed_tokens.num_embeddings == 300
