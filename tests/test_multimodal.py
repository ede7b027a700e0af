"""The multimodal wrapper as transformers saves it: all of it, or its language model alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

import bytelane
import tiny
import wrapper
from bytelane import QuantEmbedding, QuantLinear, errors
from bytelane.checkpoint import container, convert_checkpoint
from bytelane.layers import PackedTable
from bytelane.models import open_model
from bytelane.scheme import EmbeddingScheme, LinearScheme, WeightScheme

INPUTS = {"text": wrapper.text_inputs, "image": wrapper.image_inputs, "audio": wrapper.audio_inputs}
TOWERS = ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")


def in_both_storages(folder: Path, **options: Any) -> dict[str, Path]:
    found = {"gemma": wrapper.write_wrapper(folder / "gemma", **options)}
    found["compressed-tensors"] = folder / "compressed-tensors"
    checkpoint, _ = open_model(found["gemma"])
    with checkpoint:
        convert_checkpoint(checkpoint, found["compressed-tensors"], "compressed-tensors")
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model in both storages."""
    return in_both_storages(tmp_path_factory.mktemp("wrapper"), kv_scales=True)


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[torch.dtype, PreTrainedModel]:
    """The same model by transformers' own quantizer."""
    return {
        dtype: AutoModelForImageTextToText.from_pretrained(folders["gemma"], dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.mark.parametrize("storage", ["gemma", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emulated_logits_equal_transformers(
    folders: dict[str, Path], theirs: dict[torch.dtype, PreTrainedModel], storage: str, dtype: torch.dtype
) -> None:
    ours = bytelane.load_model(folders[storage], dtype=dtype, numerics="emulated")
    for make in INPUTS.values():
        found = wrapper.logits(ours, make())
        assert torch.isfinite(found).all()
        assert torch.equal(found, wrapper.logits(theirs[dtype], make()))


@pytest.mark.parametrize("storage", ["gemma", "compressed-tensors"])
def test_integer_logits_are_the_same_in_both_storages(folders: dict[str, Path], storage: str) -> None:
    ours, other = bytelane.load_model(folders[storage]), bytelane.load_model(folders["gemma"])
    for make in INPUTS.values():
        found = wrapper.logits(ours, make())
        assert torch.isfinite(found).all()
        assert torch.equal(found, wrapper.logits(other, make()))


def test_towers_are_quantized_and_their_clips_are_plain(folders: dict[str, Path]) -> None:
    checkpoint, _ = open_model(folders["gemma"])
    model = bytelane.load_model(folders["gemma"])
    towers = [n for n in checkpoint.modules if n.startswith(TOWERS)]
    assert {checkpoint.modules[n].scheme.label for n in towers} == {"w8a8o8"}
    clipped = model.model.vision_tower.encoder.layers[0].self_attn.q_proj
    assert isinstance(clipped.linear, QuantLinear)
    assert float(clipped.input_min) == -3.5
    assert float(clipped.output_max) == 5.0
    assert isinstance(model.model.language_model.embed_tokens, QuantEmbedding)
    assert model.lm_head.input_scale is None


@pytest.mark.parametrize("storage", ["gemma", "compressed-tensors"])
@pytest.mark.parametrize("numerics", ["integer", "emulated"])
def test_text_only_gives_the_wrappers_logits(folders: dict[str, Path], storage: str, numerics: str) -> None:
    whole = bytelane.load_model(folders[storage], numerics=numerics)
    text = bytelane.load_model(folders[storage], numerics=numerics, text_only=True)
    assert text.model.vision_tower is None
    assert {n for n, _ in text.named_buffers()} < {n for n, _ in whole.named_buffers()}
    inputs = wrapper.text_inputs()
    assert torch.equal(wrapper.logits(text, inputs), wrapper.logits(whole, inputs))
    if numerics == "emulated":
        return
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(text.generate(**inputs, **options), whole.generate(**inputs, **options))


@pytest.mark.parametrize("storage", ["gemma", "compressed-tensors"])
def test_text_only_never_reads_the_towers(
    folders: dict[str, Path], storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    tensor = container.TensorFiles.tensor

    def noted(self: container.TensorFiles, name: str) -> torch.Tensor:
        read.append(name)
        return tensor(self, name)

    monkeypatch.setattr(container.TensorFiles, "tensor", noted)
    bytelane.load_model(folders[storage], text_only=True)
    assert read
    assert not [n for n in read if n.startswith(TOWERS)]
    checkpoint, _ = open_model(folders[storage], text_only=True)
    assert all(n.startswith(TOWERS) for n in checkpoint.skipped)
    assert set(checkpoint.skipped) == {n for n in checkpoint._files.infos if n.startswith(TOWERS)}


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """A copy of a one-file checkpoint with its tensors changed in place."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    "name", ["model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.bias", "model.vision_tower.x", "model.extra"]
)
@pytest.mark.parametrize("text_only", [False, True])
def test_an_unknown_tensor_is_refused_all_the_same(
    folders: dict[str, Path], tmp_path: Path, name: str, text_only: bool
) -> None:
    folder = rewritten(folders["gemma"], tmp_path / "model", lambda t: t.update({name: torch.zeros(4)}))
    with pytest.raises(errors.UnexpectedTensorError, match=name.replace(".", r"\.")):
        bytelane.load_model(folder, text_only=text_only)


def test_text_only_needs_no_towers_in_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    def stripped(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(TOWERS)]:
            del tensors[name]

    folder = rewritten(folders["gemma"], tmp_path / "model", stripped)
    with pytest.raises(errors.MissingTensorError, match="_tower"):
        bytelane.load_model(folder)
    inputs, whole = wrapper.text_inputs(), bytelane.load_model(folders["gemma"])
    assert torch.equal(
        wrapper.logits(bytelane.load_model(folder, text_only=True), inputs), wrapper.logits(whole, inputs)
    )


def test_text_only_of_a_text_model_is_the_model(tmp_path: Path) -> None:
    config = tiny.config("llama")
    tiny.write_random(tmp_path / "model", config, tiny.default_schemes(config))
    whole, text = (bytelane.load_model(tmp_path / "model", text_only=t) for t in (False, True))
    inputs = wrapper.text_inputs()
    assert torch.equal(wrapper.logits(text, inputs), wrapper.logits(whole, inputs))


def test_group_scales_of_the_per_layer_table(tmp_path: Path) -> None:
    folder = wrapper.write_wrapper(tmp_path / "model", groups=3)
    # transformers makes room for one scale a row, so it is given the table's scales by hand.
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, ignore_mismatched_sizes=True)
    name = "model.language_model.embed_tokens_per_layer"
    scale = load_file(folder / "model.safetensors")[f"{name}.embedding_scale"]
    theirs.get_submodule(name).embedding_scale = torch.nn.Parameter(scale, requires_grad=False)
    ours = bytelane.load_model(folder, dtype=torch.float32, numerics="emulated")
    assert ours.get_submodule(name).scheme.weight.group_size == 8
    for make in INPUTS.values():
        assert torch.equal(wrapper.logits(ours, make()), wrapper.logits(theirs, make()))


@pytest.mark.parametrize("storage", ["gemma", "compressed-tensors"])
def test_a_tied_head_shares_the_wrappers_table(storage: str, tmp_path: Path) -> None:
    config = wrapper.config(tied=True)
    plan: dict[str, LinearScheme | EmbeddingScheme] = {
        "model.language_model.embed_tokens": EmbeddingScheme(WeightScheme(2)),
        "model.vision_tower.patch_embedder.input_proj": LinearScheme(WeightScheme(8)),
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear": LinearScheme(WeightScheme(8)),
    }
    tiny.write_random(tmp_path / "model", config, plan, storage=storage)
    whole, text = (bytelane.load_model(tmp_path / "model", text_only=t) for t in (False, True))
    for model in (whole, text):
        assert isinstance(model.lm_head, QuantLinear)
        assert model.lm_head.packed.data_ptr() == model.model.language_model.embed_tokens.packed.data_ptr()
    inputs = wrapper.text_inputs()
    assert torch.equal(wrapper.logits(text, inputs), wrapper.logits(whole, inputs))
    assert torch.isfinite(wrapper.logits(whole, wrapper.image_inputs())).all()


def table() -> QuantEmbedding:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (10, 4), dtype=torch.uint8, generator=generator)
    scale = torch.rand(10, 2, generator=generator)
    return QuantEmbedding(rows, scale, embedding_dim=8, num_bits=4, group_size=4, embed_scale=3.0)


def test_a_table_gives_rows_and_never_itself() -> None:
    packed = table()
    dense = torch.stack([packed.rows(torch.tensor(i)) for i in range(10)])
    weight = packed.weight
    assert isinstance(weight, PackedTable)
    assert (weight.shape, weight.dtype, weight.device.type, weight.requires_grad) == (
        (10, 8),
        dense.dtype,
        "cpu",
        False,
    )
    assert torch.equal(weight[3, :], dense[3])
    assert torch.equal(weight[-1], dense[-1])
    assert torch.equal(weight[torch.tensor([[1, 2], [0, -2]]), 2:5], dense[torch.tensor([[1, 2], [0, -2]]), 2:5])
    assert torch.equal(packed(torch.tensor([4])), dense[4:5] * 3.0)
    for index in (slice(None), (None, None, slice(None), slice(None)), torch.ones(10, dtype=torch.bool), (1, [2])):
        with pytest.raises(TypeError, match="never itself as a whole"):
            weight[index]  # type: ignore[index]
    for row in (10, -11):
        with pytest.raises((IndexError, RuntimeError)):
            weight[row]


def test_inputs_embeds_alone_are_refused_by_name(folders: dict[str, Path]) -> None:
    model = bytelane.load_model(folders["gemma"], text_only=True)
    embedded = model.get_input_embeddings()(torch.tensor([[3, 4]]))
    with pytest.raises(TypeError, match="inputs_embeds needs input_ids or per_layer_inputs"):
        model(inputs_embeds=embedded)


def hand_ordered(source: Path, target: Path, patterns: dict[str, int]) -> Path:
    raw = json.loads((source / "config.json").read_text())
    raw["quantization_config"]["module_quant_configs"] = {p: {"num_bits": n} for p, n in patterns.items()}
    target.mkdir()
    (target / "config.json").write_text(json.dumps(raw))
    (target / "model.safetensors").hardlink_to(source / "model.safetensors")
    return target


def test_an_ambiguous_map_is_settled_by_the_codes(folders: dict[str, Path], tmp_path: Path) -> None:
    """`mlp` is the first pattern that is found, `layers.2` the leftmost one: the codes are of the second."""
    common = {
        r"^lm_head$": 2,
        r"embed_tokens$": 2,
        r"embed_tokens_per_layer$": 4,
        r"vision|audio": 8,
        r"self_attn\.": 4,
    }
    per_layer = {r"per_layer_input_gate|per_layer_projection": 8}
    one = hand_ordered(
        folders["gemma"], tmp_path / "one", {**common, **per_layer, r"mlp\.": 4, r"language_model\.layers\.2\.": 2}
    )
    checkpoint, _ = open_model(one)
    widths = {n: m.scheme.weight.num_bits for n, m in checkpoint.modules.items()}
    assert widths["model.language_model.layers.1.mlp.up_proj"] == 4
    assert widths["model.language_model.layers.2.mlp.up_proj"] == 2
    two = hand_ordered(folders["gemma"], tmp_path / "two", {**common, **per_layer, r"mlp\.": 8, r"layers\.\d": 8})
    with pytest.raises(errors.TensorDtypeError, match=r"8-bit codes must be I8, found U8"):
        open_model(two)
