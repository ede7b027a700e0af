"""Every rule has a file that breaks it: hand-made, refused by its own class, naming file, tensor and rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bytelane import errors
from bytelane.checkpoint import open_checkpoint
from checkpoints import COMPRESSED, GEMMA, HandMade, hand_made, safetensors_bytes, skeleton_of

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn"


def refused(made: HandMade, directory: Path, error: type[errors.CheckpointError], *fragments: str) -> None:
    """Opening raises exactly this class, and the message names the file and each fragment."""
    made.write(directory)
    with pytest.raises(errors.CheckpointError) as caught:
        open_checkpoint(directory, skeleton_of(made.model))
    assert type(caught.value) is error, str(caught.value)
    message = str(caught.value)
    assert str(directory) in message
    for fragment in fragments:
        assert fragment in message


# --- configuration -------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def at(*path: str, **values: Any) -> Change:
    """A change of the quantization configuration: update the object at a path."""

    def change(quantization: dict[str, Any]) -> None:
        found = quantization
        for key in path:
            found = found[key]
        found.update(values)

    return change


GROUP = ("config_groups", "group_0")
WEIGHTS = (*GROUP, "weights")
INPUTS, OUTPUTS = (*GROUP, "input_activations"), (*GROUP, "output_activations")

CONFIGURATIONS: list[tuple[str, Change, type[errors.CheckpointError], str]] = [
    (COMPRESSED, at(quant_method="gptq"), errors.UnknownMethodError, "gptq"),
    (COMPRESSED, lambda q: q.pop("quant_method"), errors.UnknownMethodError, "quant_method"),
    (COMPRESSED, lambda q: q.pop("config_groups"), errors.ConfigError, "config_groups"),
    (COMPRESSED, at(config_groups={}), errors.ConfigError, "config_groups"),
    (COMPRESSED, at(config_groups={"group_0": 3}), errors.ConfigError, "group_0"),
    (COMPRESSED, at(*GROUP, targets="Linear"), errors.ConfigError, "targets"),
    (COMPRESSED, at(*GROUP, targets=["re:("]), errors.ConfigError, "regular expression"),
    (COMPRESSED, at(ignore=["re:*"]), errors.ConfigError, "ignore"),
    (COMPRESSED, at(*GROUP, weights=None), errors.ConfigError, "weights"),
    (COMPRESSED, at(*GROUP, weights=[4]), errors.ConfigError, "weights"),
    (COMPRESSED, at(*GROUP, surprise=1), errors.ConfigError, "surprise"),
    (COMPRESSED, at(*WEIGHTS, block_structure=[1, 2]), errors.ConfigError, "lock"),
    (COMPRESSED, at(quantization_status="frozen"), errors.ConfigError, "frozen"),
    (COMPRESSED, at(sparsity_config={"format": "sparse-24-bitmask"}), errors.ConfigError, "sparsity_config"),
    (COMPRESSED, at(transform_config={"config_groups": {"R1": {}}}), errors.ConfigError, "transform_config"),
    (COMPRESSED, at(config_groups={"NOSUCHPRESET": ["Linear"]}), errors.ConfigError, "NOSUCHPRESET"),
    (COMPRESSED, at(config_groups={"W8A8": ["Linear"]}), errors.DynamicActivationError, "W8A8"),
    (COMPRESSED, at(*WEIGHTS, dynamic=True), errors.ConfigError, "dynamic"),
    (COMPRESSED, at(*WEIGHTS, num_bits=1), errors.UnsupportedWidthError, "num_bits"),
    (COMPRESSED, at(*WEIGHTS, num_bits=9), errors.UnsupportedWidthError, "9"),
    (COMPRESSED, at(*WEIGHTS, num_bits="4"), errors.UnsupportedWidthError, "num_bits"),
    (COMPRESSED, at(*WEIGHTS, type="float"), errors.UnsupportedTypeError, "float"),
    (COMPRESSED, at(*WEIGHTS, symmetric=False), errors.AsymmetricError, "weights.symmetric"),
    (COMPRESSED, at(*WEIGHTS, strategy="tensor"), errors.UnsupportedStrategyError, "tensor"),
    (COMPRESSED, at(*WEIGHTS, strategy=None), errors.UnsupportedStrategyError, "tensor"),
    (COMPRESSED, at(*WEIGHTS, strategy="block"), errors.UnsupportedStrategyError, "block"),
    (COMPRESSED, at(*WEIGHTS, actorder="group"), errors.UnsupportedStrategyError, "actorder"),
    (COMPRESSED, at(*WEIGHTS, actorder=True), errors.UnsupportedStrategyError, "actorder"),
    (COMPRESSED, at(*WEIGHTS, strategy="group", group_size=None), errors.GroupSizeError, "group_size"),
    (COMPRESSED, at(*WEIGHTS, strategy="group", group_size=-2), errors.GroupSizeError, "-2"),
    (COMPRESSED, at(*WEIGHTS, group_size="x"), errors.GroupSizeError, "group_size"),
    (COMPRESSED, at(*WEIGHTS, strategy="group", group_size=48), errors.GroupSizeError, "does not divide"),
    (COMPRESSED, at(*INPUTS, num_bits=4), errors.UnsupportedWidthError, "input_activations.num_bits"),
    (COMPRESSED, at(*INPUTS, type="float"), errors.UnsupportedTypeError, "input_activations.type"),
    (COMPRESSED, at(*INPUTS, symmetric=False), errors.AsymmetricError, "input_activations"),
    (COMPRESSED, at(*INPUTS, dynamic=True), errors.DynamicActivationError, "input_activations"),
    (COMPRESSED, at(*INPUTS, dynamic="local"), errors.DynamicActivationError, "local"),
    (COMPRESSED, at(*INPUTS, strategy="token"), errors.UnsupportedStrategyError, "token"),
    (COMPRESSED, at(*OUTPUTS, dynamic=True), errors.DynamicActivationError, "output_activations"),
    (COMPRESSED, at(*OUTPUTS, strategy="channel"), errors.UnsupportedStrategyError, "output_activations"),
    (COMPRESSED, at(format="marlin-24"), errors.UnsupportedFormatError, "marlin-24"),
    (COMPRESSED, at(format="mixed-precision"), errors.UnsupportedFormatError, "format"),
    (COMPRESSED, at(*GROUP, format="float-quantized"), errors.UnsupportedFormatError, "float-quantized"),
    (COMPRESSED, lambda q: q.pop("format"), errors.UnsupportedFormatError, "format"),
    (COMPRESSED, at(kv_cache_scheme={"type": "float"}), errors.UnsupportedTypeError, "kv_cache_scheme"),
    (COMPRESSED, at(kv_cache_scheme={"num_bits": 4}), errors.UnsupportedWidthError, "kv_cache_scheme"),
    (COMPRESSED, at(kv_cache_scheme={"dynamic": True}), errors.DynamicActivationError, "kv_cache_scheme"),
    (COMPRESSED, at(kv_cache_scheme={"strategy": "attn_head"}), errors.UnsupportedStrategyError, "kv_cache_scheme"),
    (COMPRESSED, at(kv_cache_scheme={"num_bits": 8}), errors.MissingTensorError, "k_scale"),
    (COMPRESSED, at(*GROUP, targets=["Linear", "Embedding"]), errors.ConfigError, "model.embed_tokens"),
    (GEMMA, at(num_bits=3), errors.UnsupportedWidthError, "num_bits"),
    (GEMMA, at(num_bits=None), errors.UnsupportedWidthError, "num_bits"),
    (GEMMA, at(module_quant_configs={"mlp": {"num_bits": 6}}), errors.UnsupportedWidthError, "mlp"),
    (GEMMA, at(module_quant_configs={"mlp": {"group_size": 6}}), errors.ConfigError, "mlp"),
    (GEMMA, at(module_quant_configs=["mlp"]), errors.ConfigError, "module_quant_configs"),
    (GEMMA, at(module_quant_configs={"(": {"num_bits": 4}}), errors.ConfigError, "regular expression"),
    (GEMMA, at(modules_to_not_convert=["["]), errors.ConfigError, "modules_to_not_convert"),
    (GEMMA, at(modules_to_not_convert="lm_head"), errors.ConfigError, "modules_to_not_convert"),
    (GEMMA, at(quantize_embeddings=1), errors.ConfigError, "quantize_embeddings"),
]


@pytest.mark.parametrize(
    ("storage", "change", "error", "fragment"),
    CONFIGURATIONS,
    ids=[f"{i}-{c[0]}-{c[2].__name__}" for i, c in enumerate(CONFIGURATIONS)],
)
def test_configuration(
    storage: str, change: Change, error: type[errors.CheckpointError], fragment: str, tmp_path: Path
) -> None:
    made = hand_made(storage, 4)
    change(made.quantization)
    refused(made, tmp_path, error, fragment, "config.json" if error is not errors.MissingTensorError else "")


def test_no_quantization_at_all(tmp_path: Path) -> None:
    made = hand_made()
    del made.config["quantization_config"]
    refused(made, tmp_path, errors.UnknownMethodError, "config.json", "quantization_config")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', '"x"', "\udcff"])
def test_config_that_is_no_object(text: str, tmp_path: Path) -> None:
    made = hand_made()
    made.write(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(errors.ConfigError, match=r"config\.json"):
        open_checkpoint(tmp_path, skeleton_of(made.model))
    (tmp_path / "config.json").unlink()
    with pytest.raises(errors.ConfigError, match="does not exist"):
        open_checkpoint(tmp_path, skeleton_of(made.model))


# --- tensors -------------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]


def put(name: str, value: Any) -> Callable[[Tensors], object]:
    """Replace (or add) a tensor, given as a value or as a function of the old one."""
    return lambda t: t.update({name: value(t[name]) if callable(value) else torch.as_tensor(value)})


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.pop(name)


SMALL = 2.0**-140
"""A float32 denormal whose reciprocal is infinite."""

TENSORS: list[tuple[dict[str, Any], Callable[[Tensors], object], type[errors.CheckpointError], str]] = [
    ({}, drop(f"{UP}.weight_packed"), errors.MissingTensorError, f"{UP}.weight_packed"),
    ({}, drop(f"{UP}.weight_scale"), errors.MissingTensorError, f"{UP}.weight_scale"),
    ({}, drop(f"{UP}.weight_shape"), errors.MissingTensorError, f"{UP}.weight_shape"),
    ({}, drop(f"{UP}.input_scale"), errors.MissingTensorError, f"{UP}.input_scale"),
    ({}, drop(f"{UP}.output_scale"), errors.MissingTensorError, f"{UP}.output_scale"),
    ({}, drop("model.norm.weight"), errors.MissingTensorError, "model.norm.weight"),
    ({}, drop("lm_head.weight"), errors.MissingTensorError, "lm_head.weight"),
    ({"attention_bias": True}, drop(f"{ATTENTION}.q_proj.bias"), errors.MissingTensorError, "q_proj.bias"),
    ({"storage": GEMMA}, drop(f"{UP}.weight"), errors.MissingTensorError, f"{UP}.weight"),
    ({"storage": GEMMA}, drop(f"{UP}.weight_scale"), errors.MissingTensorError, f"{UP}.weight_scale"),
    ({"kv": True}, drop(f"{ATTENTION}.v_scale"), errors.MissingTensorError, f"{ATTENTION}.v_scale"),
    ({"storage": GEMMA, "kv": True}, drop(f"{ATTENTION}.k_cache_scale"), errors.MissingTensorError, "k_cache_scale"),
    ({}, put("model.extra.weight", 1.0), errors.UnexpectedTensorError, "model.extra.weight"),
    ({}, put(f"{UP}.weight_g_idx", [1]), errors.UnexpectedTensorError, "weight_g_idx"),
    ({}, put(f"{UP}.weight", torch.zeros(96, 64)), errors.UnexpectedTensorError, f"{UP}.weight"),
    ({}, put(f"{UP}.bias", torch.zeros(96)), errors.UnexpectedTensorError, f"{UP}.bias"),
    ({"sides": (True, False)}, put(f"{UP}.output_scale", [0.1]), errors.UnexpectedTensorError, "output_scale"),
    ({}, put(f"{ATTENTION}.k_scale", [0.1]), errors.UnexpectedTensorError, f"{ATTENTION}.k_scale"),
    ({"kv": True}, put(f"{UP}.k_scale", [0.1]), errors.MissingTensorError, f"{UP}.v_scale"),
    ({}, put(f"{UP}.weight_zero_point", torch.zeros(96, 1).char()), errors.AsymmetricError, "weight_zero_point"),
    ({}, put(f"{UP}.input_zero_point", torch.zeros(1).char()), errors.AsymmetricError, "input_zero_point"),
    ({}, put(f"{UP}.weight_packed", lambda t: t.to(torch.int64)), errors.TensorDtypeError, f"{UP}.weight_packed"),
    ({}, put(f"{UP}.weight_shape", lambda t: t.to(torch.int32)), errors.TensorDtypeError, f"{UP}.weight_shape"),
    ({}, put(f"{UP}.weight_scale", lambda t: t.double()), errors.TensorDtypeError, f"{UP}.weight_scale"),
    ({}, put(f"{UP}.input_scale", torch.tensor([1])), errors.TensorDtypeError, f"{UP}.input_scale"),
    ({}, put(f"{UP}.input_scale", torch.tensor([0.1]).double() + 1e-12), errors.TensorDtypeError, "float32"),
    ({}, put("model.norm.weight", torch.ones(64).int()), errors.TensorDtypeError, "model.norm.weight"),
    ({"fmt": "int-quantized"}, put(f"{UP}.weight", lambda t: t.float()), errors.TensorDtypeError, f"{UP}.weight"),
    ({"storage": GEMMA}, put(f"{UP}.weight", lambda t: t.char()), errors.TensorDtypeError, "U8"),
    ({"storage": GEMMA, "bits": 8}, put(f"{UP}.weight", lambda t: t.byte()), errors.TensorDtypeError, "I8"),
    ({"storage": GEMMA}, put(f"{UP}.weight_scale", lambda t: t.bfloat16()), errors.TensorDtypeError, "weight_scale"),
    ({}, put("model.norm.weight", torch.ones(63)), errors.TensorShapeError, "model.norm.weight"),
    ({}, put(f"{UP}.input_scale", torch.ones(2)), errors.TensorShapeError, f"{UP}.input_scale"),
    ({}, put(f"{UP}.weight_scale", lambda t: t[:5]), errors.TensorShapeError, f"{UP}.weight_scale"),
    ({"fmt": "int-quantized"}, put(f"{UP}.weight", lambda t: t[:, :5]), errors.TensorShapeError, f"{UP}.weight"),
    (
        {"attention_bias": True},
        put(f"{ATTENTION}.q_proj.bias", torch.zeros(3)),
        errors.TensorShapeError,
        f"{ATTENTION}.q_proj.bias",
    ),
    ({}, put(f"{UP}.weight_packed", lambda t: t[:, :5]), errors.PackedShapeError, f"{UP}.weight_packed"),
    ({}, put(f"{UP}.weight_packed", lambda t: t[:5]), errors.PackedShapeError, f"{UP}.weight_packed"),
    ({"storage": GEMMA}, put(f"{UP}.weight", lambda t: t[:, :5]), errors.PackedShapeError, f"{UP}.weight"),
    ({}, put(f"{UP}.weight_shape", torch.tensor([96, 63])), errors.WeightShapeError, "96, 63"),
    ({}, put(f"{UP}.weight_shape", torch.tensor([96, 64, 1])), errors.WeightShapeError, f"{UP}.weight_shape"),
    ({}, put(f"{UP}.weight_scale", lambda t: t.expand(96, 2)), errors.GroupSizeError, f"{UP}.weight_scale"),
    ({"group": 32}, put(f"{UP}.weight_scale", lambda t: t[:, :1]), errors.GroupSizeError, f"{UP}.weight_scale"),
    (
        {"storage": GEMMA, "embeddings": True},
        put("model.embed_tokens.embedding_scale", torch.ones(128, 3)),
        errors.GroupSizeError,
        "model.embed_tokens.embedding_scale",
    ),
    ({}, put(f"{UP}.weight_scale", lambda t: t.clone().index_fill_(0, torch.tensor(3), -1)), errors.ScaleError, UP),
    ({}, put(f"{UP}.weight_scale", lambda t: t * float("nan")), errors.ScaleError, f"{UP}.weight_scale"),
    ({}, put(f"{UP}.weight_scale", lambda t: t + float("inf")), errors.ScaleError, f"{UP}.weight_scale"),
    ({}, put(f"{UP}.input_scale", [-0.1]), errors.ScaleError, f"{UP}.input_scale"),
    ({}, put(f"{UP}.input_scale", [float("nan")]), errors.ScaleError, f"{UP}.input_scale"),
    ({}, put(f"{UP}.output_scale", [float("inf")]), errors.ScaleError, f"{UP}.output_scale"),
    ({}, put(f"{UP}.input_scale", [SMALL]), errors.ScaleError, "reciprocal"),
    ({}, put(f"{UP}.output_scale", [SMALL]), errors.ScaleError, "reciprocal"),
    ({}, lambda t: (put(f"{UP}.input_scale", [1e38])(t), put(f"{UP}.output_scale", [1e-38])(t)), errors.ScaleError, UP),
    ({"storage": GEMMA}, put(f"{UP}.input_activation_scale", -1.0), errors.ScaleError, "input_activation_scale"),
    ({"kv": True}, put(f"{ATTENTION}.k_scale", [-1.0]), errors.ScaleError, f"{ATTENTION}.k_scale"),
    ({"kv": True}, put(f"{ATTENTION}.k_scale", [0.0]), errors.ScaleError, ATTENTION),
]


@pytest.mark.parametrize(
    ("options", "change", "error", "fragment"),
    TENSORS,
    ids=[f"{i}-{c[2].__name__}" for i, c in enumerate(TENSORS)],
)
def test_tensor(
    options: dict[str, Any],
    change: Callable[[Tensors], object],
    error: type[errors.CheckpointError],
    fragment: str,
    tmp_path: Path,
) -> None:
    made = hand_made(**options)
    change(made.tensors)
    refused(made, tmp_path, error, fragment, "model.safetensors")


def test_unexpected_tensors_are_listed_up_to_five(tmp_path: Path) -> None:
    made = hand_made()
    for i in range(8):
        made.tensors[f"extra.{i}"] = torch.zeros(1)
    refused(made, tmp_path, errors.UnexpectedTensorError, "extra.0, extra.1, extra.2, extra.3, extra.4 and 3 more")


def test_width_of_another_group_is_seen_in_the_shapes(tmp_path: Path) -> None:
    made = hand_made(bits=4)
    made.group["weights"]["num_bits"] = 8
    refused(made, tmp_path, errors.PackedShapeError, "weight_packed")
    made = hand_made(GEMMA, bits=4)
    made.quantization["num_bits"] = 2
    refused(made, tmp_path / "gemma", errors.PackedShapeError, ".weight")


@pytest.mark.parametrize("bits", range(2, 8))
def test_codes_out_of_range_are_refused_when_read(bits: int, tmp_path: Path) -> None:
    made = hand_made(bits=bits, fmt="int-quantized")
    made.tensors[f"{UP}.weight"][5, 7] = 1 << (bits - 1)
    checkpoint = open_checkpoint(made.write(tmp_path), skeleton_of(made.model))
    checkpoint.read(DOWN)
    with pytest.raises(errors.CodeRangeError, match=f"model.safetensors: {UP}"):
        checkpoint.read(UP)


def test_too_many_input_features(tmp_path: Path) -> None:
    wide = 131072 + 32

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Linear(wide, 1, bias=False, device="meta")

    made = hand_made(bits=2)
    made.tensors = {
        "down_proj.weight_packed": torch.zeros(1, wide * 2 // 32, dtype=torch.int32),
        "down_proj.weight_shape": torch.tensor([1, wide]),
        "down_proj.weight_scale": torch.ones(1, 1),
        "down_proj.input_scale": torch.ones(1),
        "down_proj.output_scale": torch.ones(1),
    }
    made.write(tmp_path)
    with pytest.raises(errors.AccumulatorError, match=r"model\.safetensors: down_proj: .*131072"):
        open_checkpoint(tmp_path, Wide())


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_a_bias_that_overflows_int32_is_refused_when_read(value: float, tmp_path: Path) -> None:
    made = hand_made(attention_bias=True)
    name = f"{ATTENTION}.q_proj"
    made.tensors[f"{name}.bias"][2] = value
    checkpoint = open_checkpoint(made.write(tmp_path), skeleton_of(made.model))
    with pytest.raises(errors.AccumulatorError, match=name):
        checkpoint.read(name)


# --- the container -------------------------------------------------------------------------------------------------

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

FILES: list[tuple[str, bytes, type[errors.CheckpointError]]] = [
    ("empty", b"", errors.TruncatedFileError),
    ("half a length", b"\0\0\0", errors.TruncatedFileError),
    ("header cut", safetensors_bytes({"a": F32}, b"")[:20], errors.TruncatedFileError),
    ("data cut", safetensors_bytes({"a": F32}, b"\0" * 3), errors.TruncatedFileError),
    ("not safetensors", b"hello, this is not a safetensors file at all", errors.FileFormatError),
    ("no json", safetensors_bytes(b"{{{{", b""), errors.FileFormatError),
    ("no object", safetensors_bytes(b"[1, 2]", b""), errors.FileFormatError),
    ("no offsets", safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}, b""), errors.FileFormatError),
    ("unknown dtype", safetensors_bytes({"a": F32 | {"dtype": "Q4"}}, b"\0" * 4), errors.FileFormatError),
    (
        "overlap",
        safetensors_bytes({"a": F32, "b": F32 | {"data_offsets": [2, 6]}}, b"\0" * 6),
        errors.OverlappingTensorsError,
    ),
    (
        "hole",
        safetensors_bytes({"a": F32, "b": F32 | {"data_offsets": [8, 12]}}, b"\0" * 12),
        errors.OverlappingTensorsError,
    ),
    ("trailing bytes", safetensors_bytes({"a": F32}, b"\0" * 9), errors.OverlappingTensorsError),
    ("shape", safetensors_bytes({"a": F32 | {"shape": [2]}}, b"\0" * 4), errors.OverlappingTensorsError),
    ("backwards", safetensors_bytes({"a": F32 | {"data_offsets": [4, 0]}}, b"\0" * 4), errors.OverlappingTensorsError),
]


@pytest.mark.parametrize(("content", "error"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_malformed_safetensors(content: bytes, error: type[errors.CheckpointError], tmp_path: Path) -> None:
    made = hand_made()
    made.write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(errors.FileFormatError) as caught:
        open_checkpoint(tmp_path, skeleton_of(made.model))
    assert type(caught.value) is error, str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_every_truncation_of_a_real_file_is_refused(tmp_path: Path) -> None:
    made = hand_made()
    made.write(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    skeleton = skeleton_of(made.model)
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.unlink()  # never change a file that a map may still show
        file.write_bytes(whole[:size])
        with pytest.raises(errors.TruncatedFileError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path, skeleton)


def test_safetensors_only(tmp_path: Path) -> None:
    made = hand_made()
    made.write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(errors.FileFormatError, match="safetensors only"):
        open_checkpoint(tmp_path, skeleton_of(made.model))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(errors.FileFormatError, match=r"safetensors only.*pytorch_model\.bin"):
        open_checkpoint(tmp_path, skeleton_of(made.model))
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(errors.ShardIndexError, match=r"weights\.safetensors"):
        open_checkpoint(tmp_path, skeleton_of(made.model))


def sharded(directory: Path) -> tuple[HandMade, dict[str, str], list[str]]:
    """A checkpoint of two shards, its weight map and the shards' names."""
    made = hand_made()
    names = sorted(made.tensors)
    made.write(directory, shards=[names[::2], names[1::2]])
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return made, weight_map, sorted(set(weight_map.values()))


def index_refused(made: HandMade, directory: Path, index: object, fragment: str) -> None:
    (directory / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(errors.ShardIndexError) as caught:
        open_checkpoint(directory, skeleton_of(made.model))
    assert fragment in str(caught.value)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    index_refused(sharded(tmp_path)[0], tmp_path, index, "index.json")


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/out.safetensors", "sub/../../out.safetensors", "x.bin"])
def test_shards_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    made, weight_map, _ = sharded(folder)
    save_file({"a": torch.zeros(1)}, tmp_path / "out.safetensors")
    index_refused(made, folder, {"weight_map": weight_map | {"a": name}}, "out" if "out" in name else "x.bin")


def test_links_stay_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    made, weight_map, _ = sharded(folder)
    save_file({"a": torch.zeros(1)}, tmp_path / "out.safetensors")
    (folder / "in.safetensors").symlink_to(tmp_path / "out.safetensors")
    index_refused(made, folder, {"weight_map": weight_map | {"a": "in.safetensors"}}, "link out of the folder")


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    made, weight_map, (first, second) = sharded(tmp_path)
    name = next(n for n, shard in weight_map.items() if shard == first)
    index_refused(made, tmp_path, {"weight_map": weight_map | {name: "model-3.safetensors"}}, "does not exist")
    index_refused(made, tmp_path, {"weight_map": weight_map | {name: second}}, name)
    index_refused(made, tmp_path, {"weight_map": weight_map | {"more": second}}, "more")
    index_refused(made, tmp_path, {"weight_map": {n: s for n, s in weight_map.items() if n != name}}, "nowhere")


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    made = hand_made()
    names = sorted(made.tensors)
    made.write(tmp_path, shards=[names, names[:1]])
    with pytest.raises(errors.ShardIndexError, match=names[0]):
        open_checkpoint(tmp_path, skeleton_of(made.model))


def test_index_beside_a_single_file(tmp_path: Path) -> None:
    made, weight_map, _ = sharded(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    index_refused(made, tmp_path, {"weight_map": weight_map}, "also has")


def test_no_folder(tmp_path: Path) -> None:
    made = hand_made()
    with pytest.raises(errors.ConfigError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere", skeleton_of(made.model))
