"""bytelane as a transformers quantizer: the same model as `load_model`, through `from_pretrained`."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma4ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import bytelane
import tiny
import wrapper
from bytelane import QuantLinear, errors
from bytelane.checkpoint import convert_checkpoint
from bytelane.integrations import transformers as integration
from bytelane.integrations.transformers import BytelaneConfig
from bytelane.models import open_model
from bytelane.scheme import EmbeddingScheme, LinearScheme, WeightScheme

GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"
PLE = {"per_layer_model_projection$": {"input_scale": 0.038878, "output_scale": 0.002353, "num_bits": 8}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random multimodal model in both storages."""
    folder = tmp_path_factory.mktemp("integration")
    found = {"gemma": wrapper.write_wrapper(folder / "gemma", kv_scales=True)}
    found["compressed-tensors"] = folder / "compressed-tensors"
    checkpoint, _ = open_model(found["gemma"])
    with checkpoint:
        convert_checkpoint(checkpoint, found["compressed-tensors"], "compressed-tensors")
    return found


def load(path: Path, auto: Any = AutoModelForCausalLM, text_only: bool = False, **options: Any) -> PreTrainedModel:
    config = BytelaneConfig(**options).model_config(path, text_only=text_only)
    return auto.from_pretrained(path, config=config)


def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """The same layers, tensors and dtypes; neither is training, and nothing was left on the meta device."""
    assert not found.training
    ours, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    kinds = [{n: type(m) for n, m in model.named_modules()} for model in (found, expected)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("storage", ["gemma", "compressed-tensors"])
@pytest.mark.parametrize("numerics", ["integer", "emulated"])
@pytest.mark.parametrize("text_only", [False, True])
def test_equals_load_model(folders: dict[str, Path], storage: str, numerics: str, text_only: bool) -> None:
    found = load(folders[storage], numerics=numerics, text_only=text_only)
    expected = bytelane.load_model(folders[storage], numerics=numerics, text_only=text_only)
    assert_same(found, expected)
    for make in (wrapper.text_inputs,) if text_only else (wrapper.text_inputs, wrapper.image_inputs):
        assert torch.equal(wrapper.logits(found, make()), wrapper.logits(expected, make()))
    if numerics == "integer":
        options: dict[str, Any] = {**wrapper.text_inputs(), "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(found.generate(**options), expected.generate(**options))
    assert found.bytelane_kv_cache == expected.bytelane_kv_cache == ("int8" if numerics == "integer" else "float")


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, Gemma4ForConditionalGeneration])
def test_other_classes_and_bfloat16(folders: dict[str, Path], auto: Any) -> None:
    config = BytelaneConfig().model_config(folders["gemma"])
    found = auto.from_pretrained(folders["gemma"], config=config, dtype=torch.bfloat16, device_map="cpu")
    expected = bytelane.load_model(folders["gemma"], dtype=torch.bfloat16)
    assert_same(found, expected)
    for make in (wrapper.image_inputs, wrapper.audio_inputs):
        assert torch.equal(wrapper.logits(found, make()), wrapper.logits(expected, make()))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma4", "qwen3"])
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    config = tiny.config(architecture)
    tiny.write_random(tmp_path / "model", config, tiny.default_schemes(config))
    assert_same(load(tmp_path / "model"), bytelane.load_model(tmp_path / "model"))


@pytest.mark.parametrize("table", [True, False])
def test_tied_heads(table: bool, tmp_path: Path) -> None:
    name = "model.embed_tokens" if table else "model.layers.0.mlp.up_proj"
    scheme = EmbeddingScheme(WeightScheme(4)) if table else LinearScheme(WeightScheme(4))
    tiny.write_random(tmp_path / "model", tiny.config("qwen3", tie_word_embeddings=True), {name: scheme})
    found = load(tmp_path / "model")
    assert_same(found, bytelane.load_model(tmp_path / "model"))
    if table:
        assert found.lm_head.packed.data_ptr() == found.model.embed_tokens.packed.data_ptr()
    else:
        assert found.lm_head.weight is found.model.embed_tokens.weight


@pytest.mark.parametrize("given", ["mapping", "file"])
def test_overrides(given: str, tmp_path: Path) -> None:
    file = tmp_path / "overrides.json"
    file.write_text(json.dumps(PLE))
    found = load(GEMMA, overrides=PLE if given == "mapping" else file)
    assert isinstance(found.model.per_layer_model_projection, QuantLinear)
    assert_same(found, bytelane.load_model(GEMMA, overrides=file))


class DenseWatch(TorchDispatchMode):
    """Notes every float tensor with data that is as large as one of the quantized weights."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            real = isinstance(tensor, torch.Tensor) and not tensor.is_meta
            if real and tensor.dtype.is_floating_point and tensor.numel() in self.sizes:
                self.seen.append(str(func))
        return out


def test_dense_weights_never_exist(tmp_path: Path) -> None:
    config = tiny.config("llama", intermediate_size=1216)
    plan = {n: LinearScheme(WeightScheme(4)) for n in tiny.linear_names(config) if "mlp" in n}
    tiny.write_random(tmp_path / "model", config, plan)
    with DenseWatch({64 * 1216}) as watch:
        load(tmp_path / "model")
    assert watch.seen == []


def test_what_a_user_may_type_wrong(folders: dict[str, Path], tmp_path: Path) -> None:
    path = folders["gemma"]
    with pytest.raises(ValueError, match="GemmaQuantizationConfig but you are passing a BytelaneConfig"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=BytelaneConfig())
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        beside = AutoModelForCausalLM.from_pretrained(
            path, config=BytelaneConfig().model_config(path), quantization_config=BytelaneConfig("emulated")
        )
    assert beside.lm_head.numerics.value == "integer"
    with pytest.raises(ValueError, match="nonsense"):
        BytelaneConfig("nonsense")
    with pytest.raises(errors.ConfigError, match="must be bytelane, found gemma"):
        BytelaneConfig(quant_method="gemma")
    with pytest.raises(errors.ConfigError, match="onto one device"):
        AutoModelForCausalLM.from_pretrained(path, config=BytelaneConfig().model_config(path), device_map="auto")
    plain = tmp_path / "plain"
    tiny.float_model(tiny.config("llama")).save_pretrained(plain)
    with pytest.raises(errors.UnknownMethodError, match="not quantized"):
        BytelaneConfig().model_config(plain)


def test_a_loaded_model_is_not_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        load(folders["gemma"]).save_pretrained(tmp_path / "again")


def test_refusals_are_those_of_load_model(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    raw = json.loads((folders["gemma"] / "config.json").read_text())
    raw["quantization_config"]["num_bits"] = 4
    raw["quantization_config"]["module_quant_configs"] = {}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").hardlink_to(folders["gemma"] / "model.safetensors")
    with pytest.raises(errors.CheckpointError) as expected:
        bytelane.load_model(folder)
    with pytest.raises(type(expected.value)) as found:
        load(folder)
    assert str(found.value) == str(expected.value)


def test_registration_is_once_and_nothing_else_changes(folders: dict[str, Path]) -> None:
    assert importlib.import_module(integration.__name__) is integration
    assert AUTO_QUANTIZER_MAPPING["bytelane"] is integration.BytelaneQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["bytelane"] is BytelaneConfig
    # A model without the configuration is loaded by whoever it names itself.
    theirs = AutoModelForCausalLM.from_pretrained(folders["gemma"])
    assert not any(isinstance(m, QuantLinear) for m in theirs.modules())
    assert AutoConfig.from_pretrained(folders["gemma"]).quantization_config["quant_method"] == "gemma"


def test_loading_says_nothing(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folders["gemma"], text_only=True)
        load(folders["compressed-tensors"])
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


def test_a_placeholder_never_runs() -> None:
    with pytest.raises(RuntimeError, match="still being loaded"):
        nn.Sequential(integration._Awaiting())(torch.zeros(1))
