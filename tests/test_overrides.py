"""Scales a checkpoint lacks, given in a file: what they make of a layer, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bytelane
import oracle
import tiny
from bytelane import QuantLinear, errors
from bytelane.cli import main
from bytelane.models import open_model
from bytelane.overrides import Overrides, ScaleOverride
from bytelane.packing import unpack_rows
from bytelane.quantize import round_to_nearest
from bytelane.scheme import EmbeddingScheme, LinearScheme, WeightScheme

GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"
PLE = {"per_layer_model_projection$": {"input_scale": 0.038878, "output_scale": 0.002353, "num_bits": 8}}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 15)[None]).logits


def test_a_float_layer_is_rounded_and_computed_as_the_phone_does() -> None:
    model = bytelane.load_model(GEMMA, dtype=torch.float32, overrides=PLE)
    layer = model.model.per_layer_model_projection
    assert isinstance(layer, QuantLinear)
    assert layer.scheme.label == "w8a8o8"
    stored = load_file(GEMMA / "model.safetensors")["model.per_layer_model_projection.weight"]
    codes, scale = round_to_nearest(stored, WeightScheme(8))
    assert torch.equal(unpack_rows(layer.packed, 8, 128), codes)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    s_in, s_out = (torch.tensor(v, dtype=torch.float32).numpy()[()] for v in (0.038878, 0.002353))
    expected = oracle.linear(x.numpy(), codes.numpy(), scale.numpy(), s_in, s_out)
    assert torch.equal(layer(x), torch.from_numpy(expected))
    assert not torch.equal(logits(model), logits(bytelane.load_model(GEMMA, dtype=torch.float32)))


def test_the_activation_dtype_does_not_change_the_codes() -> None:
    wide, narrow = (bytelane.load_model(GEMMA, dtype=d, overrides=PLE) for d in (torch.float32, torch.bfloat16))
    assert torch.equal(wide.model.per_layer_model_projection.packed, narrow.model.per_layer_model_projection.packed)


def test_uncalibrated_sides_get_their_scales(tmp_path: Path) -> None:
    file = tmp_path / "overrides.json"
    file.write_text(json.dumps({"lm_head": {"input_scale": 0.05}}))
    model = bytelane.load_model(GEMMA, dtype=torch.float32, overrides=file)
    assert model.lm_head.scheme.label == "w2a8o16"
    assert float(model.lm_head.input_scale) == pytest.approx(0.05)
    plain = bytelane.load_model(GEMMA, dtype=torch.float32)
    assert plain.lm_head.scheme.label == "w2a16o16"
    both = bytelane.load_model(GEMMA, dtype=torch.float32, overrides={"^lm_": {"input_scale": 0.05, "output_scale": 1}})
    assert both.lm_head.scheme.label == "w2a8o8"


def test_a_tied_head_can_have_scales(tmp_path: Path) -> None:
    config = tiny.config("qwen3", tie_word_embeddings=True)
    tiny.write_random(tmp_path / "model", config, {"model.embed_tokens": EmbeddingScheme(WeightScheme(4))})
    model = bytelane.load_model(tmp_path / "model", overrides={"lm_head": {"input_scale": 0.05}})
    assert model.lm_head.scheme.label == "w4a8o16"
    assert model.lm_head.packed.data_ptr() == model.model.embed_tokens.packed.data_ptr()


def test_a_bias_is_kept(tmp_path: Path) -> None:
    config = tiny.config("llama", mlp_bias=True)
    name = "model.layers.0.mlp.up_proj"
    tiny.write_random(tmp_path / "model", config, {"model.layers.0.mlp.gate_proj": LinearScheme(WeightScheme(4))})
    given = {name: {"input_scale": 0.05, "num_bits": 4}}
    layer = bytelane.load_model(tmp_path / "model", overrides=given).get_submodule(name)
    stored = load_file(tmp_path / "model" / "model.safetensors")[f"{name}.bias"]
    assert torch.equal(layer.bias, stored)
    assert layer.scheme.label == "w4a8o16"


Q_PROJ = "model.layers.0.self_attn.q_proj"
REFUSED: list[tuple[Any, type[errors.CheckpointError], str]] = [
    ({"nobody": {"input_scale": 0.1}}, errors.ConfigError, "matches no linear layer"),
    ({"embed_tokens": {"input_scale": 0.1}}, errors.ConfigError, "matches no linear layer"),
    ({"(": {"input_scale": 0.1}}, errors.ConfigError, "nor a regular expression"),
    ({Q_PROJ: {"input_scale": 0.1}}, errors.ConfigError, "has an input scale of its own"),
    ({"q_proj": {"output_scale": 0.1}}, errors.ConfigError, "has an output scale of its own"),
    ({Q_PROJ: {"input_scale": 0.1, "num_bits": 8}}, errors.ConfigError, "has quantized weights"),
    ({"lm_head": {"input_scale": 0.1}, "^lm": {"output_scale": 0.1}}, errors.ConfigError, "as 'lm_head' does"),
    ({"per_layer_model": {"input_scale": 0.1}}, errors.ConfigError, "num_bits says to how many bits"),
    ({"per_layer_model": {"num_bits": 8}}, errors.ConfigError, "gives neither"),
    ({"per_layer_model": {"input_scale": 0.1, "num_bits": 9}}, errors.UnsupportedWidthError, "2..8"),
    ({"per_layer_model": {"input_scale": 0.1, "num_bits": 8.0}}, errors.ConfigError, "must be an integer"),
    ({"lm_head": {"input_scale": 0}}, errors.ConfigError, "0 means not calibrated"),
    ({"lm_head": {"input_scale": -0.5}}, errors.ScaleError, "not negative"),
    ({"lm_head": {"input_scale": float("nan")}}, errors.ScaleError, "finite"),
    ({"lm_head": {"input_scale": 1e-40}}, errors.ScaleError, "reciprocal"),
    ({"lm_head": {"input_scale": 1e38, "output_scale": 1e-38}}, errors.ScaleError, "overflows float32"),
    ({"lm_head": {"input_scale": "0.1"}}, errors.ConfigError, "must be a number"),
    ({"lm_head": {"input_scale": True}}, errors.ConfigError, "must be a number"),
    ({"lm_head": {"scale": 0.1}}, errors.ConfigError, "must be an object of"),
    ({"lm_head": {}}, errors.ConfigError, "must be an object of"),
    ({"lm_head": 0.1}, errors.ConfigError, "must be an object of"),
]


@pytest.mark.parametrize(("given", "error", "rule"), REFUSED)
def test_refusals_name_the_file_and_the_key(
    given: dict[str, Any], error: type[errors.CheckpointError], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=rule):
        bytelane.load_model(GEMMA, overrides=given)
    file = tmp_path / "overrides.json"
    file.write_text(json.dumps(given))
    with pytest.raises(error, match=rule) as found:
        bytelane.load_model(GEMMA, overrides=file)
    assert found.value.file == str(file)
    assert found.value.tensor is not None


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": {"input_scale": 1}, "a": {"input_scale": 2}}', None])
def test_a_file_that_is_no_overrides(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "overrides.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(errors.ConfigError, match=r"overrides\.json"):
        bytelane.load_model(GEMMA, overrides=file)


def test_a_shared_float_weight_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    config = tiny.config("qwen3", tie_word_embeddings=True)
    tiny.write_random(tmp_path / "model", config, {name: LinearScheme(WeightScheme(4))})
    with pytest.raises(errors.ConfigError, match="shares the float weight"):
        bytelane.load_model(tmp_path / "model", overrides={"lm_head": {"input_scale": 0.1, "num_bits": 8}})


def test_a_weight_that_cannot_be_rounded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(GEMMA / "config.json", folder)
    tensors = load_file(GEMMA / "model.safetensors")
    tensors["model.per_layer_model_projection.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.ScaleError, match=r"model\.safetensors: model\.per_layer_model_projection"):
        bytelane.load_model(folder, overrides=PLE)


def test_no_overrides_change_nothing() -> None:
    checkpoint, _ = open_model(GEMMA)
    assert Overrides(None).resolve(checkpoint) == {}
    assert Overrides({}).resolve(checkpoint) == {}
    with pytest.raises(ValueError, match="without num_bits"):
        ScaleOverride().scheme()


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(GEMMA), *map(str, arguments)])
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    return out


def test_inspect_says_what_lacks_scales_and_what_an_override_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = json.loads(inspect(capsys, "--json"))
    assert before["no_scales"] == {"lm_head": ["input", "output"]}
    (note,) = before["notes"]
    assert "per_layer_model_projection" in note
    # What the note says can be pasted as it is.
    file = tmp_path / "overrides.json"
    file.write_text(note[note.index("{") :])
    assert json.loads(file.read_text()) == PLE
    after = json.loads(inspect(capsys, "--overrides", file, "--json"))
    assert (after["notes"], after["unquantized"]) == ([], [])
    (rounded,) = after["rounded_at_load"]
    assert (rounded["scheme"], rounded["bits"]) == ("w8a8o8", 8)
    shown = inspect(capsys, "--overrides", file)
    assert "(overridden)" in shown
    assert "rounded at load" in shown
    assert "no scales    lm_head (input and output)" in shown
