"""Conversion between the storages: nothing is recomputed, and going back gives what was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bytelane import errors
from bytelane.checkpoint import convert_checkpoint, open_checkpoint
from checkpoints import COMPRESSED, GEMMA, hand_made, skeleton_of
from test_checkpoint_write import check_same

GOLDEN = Path(__file__).parent / "data" / "gemma4-tiny-mobile"


def golden_skeleton(directory: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))


def test_golden_there_and_back(tmp_path: Path) -> None:
    source = open_checkpoint(GOLDEN, golden_skeleton(GOLDEN))
    report = convert_checkpoint(source, tmp_path / "ct", COMPRESSED)
    assert (report.modules, report.tensors, report.lost) == (len(source.modules), len(source.plain), ())
    there = open_checkpoint(tmp_path / "ct", golden_skeleton(tmp_path / "ct"))
    check_same(source, there)
    assert there.config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    convert_checkpoint(there, tmp_path / "back", GEMMA)
    back = open_checkpoint(tmp_path / "back", golden_skeleton(tmp_path / "back"))
    check_same(source, back, storages=True)
    ours, theirs = load_file(tmp_path / "back" / "model.safetensors"), load_file(GOLDEN / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("fmt", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_there_and_back(bits: int, fmt: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options: dict[str, Any] = {"embeddings": True, "kv": True, "tie_word_embeddings": True, "sides": (True, False)}
    made = hand_made(bits=bits, fmt=fmt, scale_dtype=dtype, hidden_size=40, head_dim=10, **options)
    skeleton = skeleton_of(made.model)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton)
    report = convert_checkpoint(source, tmp_path / "b", GEMMA)
    assert report.lost == ()
    assert any("float32" in note for note in report.kept) == (dtype != torch.float32)
    assert any("int-quantized" in note for note in report.kept) == (fmt == "int-quantized")
    there = open_checkpoint(tmp_path / "b", skeleton)
    check_same(source, there)
    convert_checkpoint(there, tmp_path / "c", COMPRESSED)
    back = open_checkpoint(tmp_path / "c", skeleton)
    check_same(source, back)
    assert {m.storage.value for m in back.modules.values()} == {"pack-quantized"}


@pytest.mark.parametrize("storage", [COMPRESSED, GEMMA])
def test_converting_to_the_same_storage_changes_nothing(storage: str, tmp_path: Path) -> None:
    made = hand_made(storage, 4, embeddings=True, kv=True)
    skeleton = skeleton_of(made.model)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton)
    convert_checkpoint(source, tmp_path / "b", storage)
    check_same(source, open_checkpoint(tmp_path / "b", skeleton), storages=True)


def test_dropped_kv_scales_are_reported(tmp_path: Path) -> None:
    made = hand_made(GEMMA, 4, kv=True)
    skeleton = skeleton_of(made.model)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton)
    report = convert_checkpoint(source, tmp_path / "b", COMPRESSED, drop_kv_scales=True)
    assert [n for n in report.lost if "KV-cache" in n]
    written = open_checkpoint(tmp_path / "b", skeleton)
    assert written.kv_scales == {}
    assert written.config["quantization_config"]["kv_cache_scheme"] is None


def test_tensors_the_model_does_not_take_are_reported(tmp_path: Path) -> None:
    made = hand_made()
    made.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    report = convert_checkpoint(source, tmp_path / "b", GEMMA)
    assert [n for n in report.lost if "inv_freq" in n]


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 4, "group": 32}])
def test_what_gemma_cannot_hold_is_refused_before_anything_is_written(options: dict[str, Any], tmp_path: Path) -> None:
    made = hand_made(**options)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    with pytest.raises(errors.NotRepresentableError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        convert_checkpoint(source, tmp_path / "b", GEMMA)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_group_as_long_as_the_row_is_a_channel(tmp_path: Path) -> None:
    made = hand_made(bits=4, group=32, hidden_size=32, intermediate_size=32, head_dim=8)
    skeleton = skeleton_of(made.model)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton)
    convert_checkpoint(source, tmp_path / "b", GEMMA)
    check_same(source, open_checkpoint(tmp_path / "b", skeleton))


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    made = hand_made(kv=True)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    seen: list[tuple[int, int]] = []
    convert_checkpoint(source, tmp_path / "b", GEMMA, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (source.total_bytes, source.total_bytes)
    assert seen == sorted(seen)


def test_the_model_configuration_is_kept(tmp_path: Path) -> None:
    made = hand_made()
    made.config["some_future_key"] = {"a": [1, 2]}
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    convert_checkpoint(source, tmp_path / "b", GEMMA)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written | {"quantization_config": None} == made.config | {"quantization_config": None}
