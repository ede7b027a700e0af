"""Opening and reading valid checkpoints of both storages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from bytelane.checkpoint import Checkpoint, KVScales, open_checkpoint
from bytelane.packing import pack_rows, unpack_rows
from bytelane.scheme import EmbeddingScheme, Kind, LinearScheme, Storage, WeightScheme
from checkpoints import COMPRESSED, GEMMA, HandMade, hand_made, skeleton_of

LINEARS = 14
"""Linears in the two layers of the tiny model."""

GOLDEN = Path(__file__).parent / "data" / "gemma4-tiny-mobile"


def opened(made: HandMade, directory: Path) -> Checkpoint:
    return open_checkpoint(made.write(directory), skeleton_of(made.model))


def check_equal(checkpoint: Checkpoint, made: HandMade) -> None:
    """Codes, scales and plain tensors are those the checkpoint was made of."""
    assert set(checkpoint.modules) == set(made.codes)
    for name, module in checkpoint.modules.items():
        bits = module.scheme.weight.num_bits
        tensors = checkpoint.read(name)
        assert torch.equal(tensors.rows, pack_rows(made.codes[name], bits))
        assert torch.equal(unpack_rows(tensors.rows, bits, module.shape[1]), made.codes[name])
        stored = made.tensors.get(f"{name}.weight_scale", made.tensors.get(f"{name}.embedding_scale"))
        assert stored is not None
        assert tensors.weight_scale.dtype == stored.dtype
        assert torch.equal(tensors.weight_scale, stored)
    for name in checkpoint.plain:
        assert torch.equal(checkpoint.read_plain(name), made.tensors[name])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("sides", [(True, True), (False, True), (True, False), (False, False)])
def test_pack_quantized(bits: int, group: int | None, sides: tuple[bool, bool], tmp_path: Path) -> None:
    made = hand_made(bits=bits, group=group, sides=sides)
    checkpoint = opened(made, tmp_path)
    check_equal(checkpoint, made)
    assert checkpoint.storage_name == COMPRESSED
    assert len(checkpoint.modules) == LINEARS
    assert checkpoint.ignored == ("model.embed_tokens", "lm_head")
    name = "model.layers.1.mlp.down_proj"
    module = checkpoint.modules[name]
    assert module.scheme == LinearScheme(WeightScheme(bits, group), *sides)
    assert (module.kind, module.shape, module.storage) == (Kind.LINEAR, (64, 96), Storage.PACK_QUANTIZED)
    tensors = checkpoint.read(name)
    for side, value, wanted in zip(
        ("input", "output"), (tensors.input_scale, tensors.output_scale), sides, strict=True
    ):
        assert (value is not None) == wanted
        if value is not None:
            assert value.shape == ()
            assert torch.equal(value, made.tensors[f"{name}.{side}_scale"][0])


@pytest.mark.parametrize("bits", range(2, 9))
def test_padded_rows_and_int8_codes(bits: int, tmp_path: Path) -> None:
    changes = {"hidden_size": 40, "intermediate_size": 36, "head_dim": 10}
    for i, options in enumerate(({"padded": True}, {"padded": False}, {"fmt": "int-quantized"})):
        made = hand_made(bits=bits, **options, **changes)
        check_equal(opened(made, tmp_path / str(i)), made)


def test_bits_past_the_last_code_do_not_matter(tmp_path: Path) -> None:
    made = hand_made(bits=3, intermediate_size=33)
    name = "model.layers.0.mlp.down_proj"
    packed = made.tensors[f"{name}.weight_packed"]  # 33 codes of 3 bits: 99 bits of 128
    packed[:, 3] |= -1 << 3
    check_equal(opened(made, tmp_path), made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scale_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    made = hand_made(scale_dtype=dtype)
    checkpoint = opened(made, tmp_path)
    check_equal(checkpoint, made)
    assert checkpoint.read_scales("model.layers.0.mlp.up_proj").weight_scale.dtype == dtype


def test_scales_of_other_shapes_and_dtypes(tmp_path: Path) -> None:
    made = hand_made()
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    made.tensors[f"{up}.weight_scale"] = made.tensors[f"{up}.weight_scale"].reshape(-1)
    made.tensors[f"{up}.input_scale"] = torch.tensor(0.5, dtype=torch.float64)
    made.tensors[f"{down}.input_scale"] = torch.tensor([0.25], dtype=torch.bfloat16)
    made.tensors[f"{down}.output_scale"] = torch.tensor([0.0])
    checkpoint = opened(made, tmp_path)
    assert checkpoint.read(up).weight_scale.shape == (96, 1)
    assert float(checkpoint.read(up).input_scale) == 0.5
    assert checkpoint.read(down).input_scale.dtype == torch.float32
    assert checkpoint.read(down).output_scale is None
    assert checkpoint.modules[down].scheme == LinearScheme(WeightScheme(4), True, False)


def test_a_channel_of_scale_zero_is_accepted(tmp_path: Path) -> None:
    made = hand_made()
    made.tensors["model.layers.0.mlp.up_proj.weight_scale"][3] = 0
    check_equal(opened(made, tmp_path), made)


@pytest.mark.parametrize("storage", [COMPRESSED, GEMMA])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_embeddings_head_and_kv_scales(storage: str, bits: int, tmp_path: Path) -> None:
    made = hand_made(storage, bits, embeddings=True, head=True, kv=True)
    checkpoint = opened(made, tmp_path)
    check_equal(checkpoint, made)
    assert checkpoint.ignored == ()
    assert checkpoint.modules["model.embed_tokens"].scheme == EmbeddingScheme(WeightScheme(bits))
    assert next(iter(checkpoint.modules)) == "model.embed_tokens"
    leaf = "k_scale" if storage == COMPRESSED else "k_cache_scale"
    expected = float(made.tensors[f"model.layers.1.self_attn.{leaf}"])
    assert list(checkpoint.kv_scales) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert checkpoint.kv_scales["model.layers.1.self_attn"].k == expected


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sides", [(True, True), (False, False)])
def test_gemma_linears(bits: int, sides: tuple[bool, bool], tmp_path: Path) -> None:
    made = hand_made(GEMMA, bits, sides=sides, attention_bias=True)
    checkpoint = opened(made, tmp_path)
    check_equal(checkpoint, made)
    module = checkpoint.modules["model.layers.0.self_attn.q_proj"]
    assert module.scheme == LinearScheme(WeightScheme(bits), *sides)
    assert module.bias
    bias = checkpoint.read(module.name).bias
    assert torch.equal(bias, made.tensors["model.layers.0.self_attn.q_proj.bias"])


def test_gemma_activation_scales_may_be_absent(tmp_path: Path) -> None:
    made = hand_made(GEMMA, 4)
    made.tensors = {k: v for k, v in made.tensors.items() if not k.endswith("activation_scale")}
    checkpoint = opened(made, tmp_path)
    assert {m.scheme for m in checkpoint.modules.values()} == {LinearScheme(WeightScheme(4), False, False)}


def test_gemma_embedding_groups_come_from_the_scale(tmp_path: Path) -> None:
    made = hand_made(GEMMA, 4, embeddings=True)
    made.tensors["model.embed_tokens.embedding_scale"] = torch.rand(128, 4)
    checkpoint = opened(made, tmp_path)
    assert checkpoint.modules["model.embed_tokens"].scheme == EmbeddingScheme(WeightScheme(4, 16))


def test_gemma_first_matching_width_wins(tmp_path: Path) -> None:
    made, eight = hand_made(GEMMA, 4), hand_made(GEMMA, 8)
    made.quantization["module_quant_configs"] = {
        r"layers\.1\.mlp\.": {"num_bits": 8},
        r"layers\.\d+\.mlp\.": {"num_bits": 4},
    }
    for name in ("gate_proj", "up_proj", "down_proj"):
        key = f"model.layers.1.mlp.{name}"
        made.tensors[f"{key}.weight"], made.codes[key] = eight.tensors[f"{key}.weight"], eight.codes[key]
    check_equal(opened(made, tmp_path), made)


def test_gemma_left_out_modules_are_those_of_transformers(tmp_path: Path) -> None:
    """Without a list the head stays dense; entries match as prefix, regular expression and suffix."""
    made = hand_made(GEMMA, 4)
    del made.quantization["modules_to_not_convert"]
    assert opened(made, tmp_path / "default").ignored == ("model.embed_tokens", "lm_head")
    dense = skeleton_of(made.model).state_dict()
    for entry, count in (("model.layers.1", 7), (r"model.layers.\d+.mlp", 6), ("q_proj", 2)):
        made = hand_made(GEMMA, 4)
        made.quantization["modules_to_not_convert"] = ["lm_head", entry]
        suffix = entry == "q_proj"
        for name in list(made.codes):
            if name.endswith("q_proj") if suffix else (".mlp." in name if "mlp" in entry else "layers.1." in name):
                made.tensors = {k: v for k, v in made.tensors.items() if not k.startswith(f"{name}.")}
                made.tensors[f"{name}.weight"] = torch.zeros(dense[f"{name}.weight"].shape)
                del made.codes[name]
        assert len(made.codes) == LINEARS - count
        check_equal(opened(made, tmp_path / entry.replace("\\", "_")), made)


def test_a_groups_own_format_wins(tmp_path: Path) -> None:
    made = hand_made(bits=8, fmt="int-quantized")
    made.quantization["format"] = "mixed-precision"
    made.group["format"] = "int-quantized"
    checkpoint = opened(made, tmp_path)
    check_equal(checkpoint, made)
    assert {m.storage for m in checkpoint.modules.values()} == {Storage.INT_QUANTIZED}


def test_the_most_specific_target_wins(tmp_path: Path) -> None:
    made, two = hand_made(bits=4), hand_made(bits=2)
    made.quantization["config_groups"] = {
        "class": made.group,
        "pattern": {**two.group, "targets": [r"re:.*down_proj$"]},
        "name": {**made.group, "targets": ["model.layers.1.mlp.down_proj"]},
    }
    name = "model.layers.0.mlp.down_proj"
    made.tensors |= {k: v for k, v in two.tensors.items() if k.startswith(f"{name}.")}
    made.codes[name] = two.codes[name]
    check_equal(opened(made, tmp_path), made)


def test_accepted_spellings_of_the_configuration(tmp_path: Path) -> None:
    """What the package accepts without a change of meaning is accepted."""
    made = hand_made()
    made.group["weights"] |= {"strategy": None, "group_size": -1, "actorder": "static", "observer": "mse"}
    made.group["input_activations"]["strategy"] = None
    made.quantization["ignore"] = [r"re:.*lm_head"]
    del made.quantization["quantization_status"]
    made.config["quantization_config"] |= {
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.17.0",
        "kv_cache_scheme": None,
    }
    check_equal(opened(made, tmp_path), made)


@pytest.mark.parametrize("storage", [COMPRESSED, GEMMA])
def test_tied_head_shares_a_quantized_table(storage: str, tmp_path: Path) -> None:
    made = hand_made(storage, 4, embeddings=True, tie_word_embeddings=True)
    checkpoint = opened(made, tmp_path)
    check_equal(checkpoint, made)
    assert checkpoint.tied == {"lm_head": "model.embed_tokens"}
    assert checkpoint.ignored == ()


def test_tied_head_of_a_plain_table_is_left_to_the_model(tmp_path: Path) -> None:
    made = hand_made(tie_word_embeddings=True)
    checkpoint = opened(made, tmp_path / "absent")
    assert (checkpoint.tied, checkpoint.ignored) == ({}, ("model.embed_tokens", "lm_head"))
    made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" in opened(made, tmp_path / "present").plain


def test_tied_head_with_its_own_codes_is_a_module(tmp_path: Path) -> None:
    untied = hand_made(embeddings=True, head=True)
    made = hand_made(embeddings=True, head=True, tie_word_embeddings=True)
    made.tensors |= {k: v for k, v in untied.tensors.items() if k.startswith("lm_head.")}
    made.codes["lm_head"] = untied.codes["lm_head"]
    checkpoint = opened(made, tmp_path)
    assert checkpoint.tied == {}
    assert "lm_head" in checkpoint.modules


def test_shards(tmp_path: Path) -> None:
    made = hand_made()
    names = sorted(made.tensors)
    made.write(tmp_path, shards=[names[::3], names[1::3], names[2::3]])
    check_equal(open_checkpoint(tmp_path, skeleton_of(made.model)), made)


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    """The hub cache keeps a snapshot's files as links into the blobs beside it."""
    made = hand_made()
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    names = sorted(made.tensors)
    made.write(snapshot, shards=[names[::2], names[1::2]])
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.glob("*.safetensors"))):
        file.rename(blobs / f"{i:064x}")
        file.symlink_to(blobs / f"{i:064x}")
    check_equal(open_checkpoint(snapshot, skeleton_of(made.model)), made)


def test_plain_dtypes_and_ignorable_tensors(tmp_path: Path) -> None:
    made = hand_made()
    made.tensors["model.norm.weight"] = made.tensors["model.norm.weight"].to(torch.bfloat16)
    made.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    checkpoint = opened(made, tmp_path)
    assert checkpoint.read_plain("model.norm.weight").dtype == torch.bfloat16
    assert checkpoint.plain["model.norm.weight"].dtype == "BF16"
    assert checkpoint.unused == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_rows_are_views_of_the_file_where_the_bytes_agree(tmp_path: Path) -> None:
    for i, (made, name) in enumerate(
        (
            (hand_made(GEMMA, 4, embeddings=True), "model.embed_tokens"),
            (hand_made(GEMMA, 2, embeddings=True), "model.embed_tokens"),
            (hand_made(bits=4, embeddings=True), "model.embed_tokens"),
        )
    ):
        checkpoint = opened(made, tmp_path / str(i))
        one, other = checkpoint.read(name).rows, checkpoint.read(name).rows
        assert one.data_ptr() == other.data_ptr()


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    made = hand_made(GEMMA, 4)
    name = "model.layers.0.mlp.up_proj"
    with opened(made, tmp_path) as checkpoint:
        rows = checkpoint.read(name).rows
    assert torch.equal(rows, pack_rows(made.codes[name], 4))
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read(name)


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    made = hand_made(GEMMA, 4, embeddings=True)
    assert opened(made, tmp_path).total_bytes == sum(t.nbytes for t in made.tensors.values())


def test_golden_checkpoint() -> None:
    """A mobile Gemma 4, whose layers 4 and 5 reuse the keys and values of others."""
    config = AutoConfig.from_pretrained(GOLDEN)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    checkpoint = open_checkpoint(GOLDEN, skeleton)
    stored = load_file(GOLDEN / "model.safetensors")
    assert checkpoint.storage_name == GEMMA
    assert checkpoint.ignored == ("model.per_layer_model_projection",)
    assert checkpoint.modules["lm_head"].scheme.label == "w2a16o16"
    assert checkpoint.modules["model.embed_tokens_per_layer"].scheme == EmbeddingScheme(WeightScheme(4))
    assert checkpoint.modules["model.layers.3.mlp.up_proj"].scheme.label == "w2a8o8"
    assert checkpoint.modules["model.layers.0.per_layer_input_gate"].scheme.label == "w8a8o8"
    for name, module in checkpoint.modules.items():
        tensors = checkpoint.read(name)
        key = f"{name}.weight" if module.kind is Kind.LINEAR else f"{name}.embedding_quantized"
        expected = stored[key]
        assert torch.equal(
            tensors.rows, expected.view(torch.uint8) ^ 0x80 if expected.dtype == torch.int8 else expected
        )
    assert list(checkpoint.kv_scales) == [f"model.layers.{i}.self_attn" for i in range(4)]
    first = checkpoint.kv_scales["model.layers.0.self_attn"]
    assert first == KVScales(*(float(stored[f"model.layers.0.self_attn.{x}_cache_scale"]) for x in "kv"))
    assert set(checkpoint.plain) == {n for n, t in stored.items() if t.dtype == torch.bfloat16}
