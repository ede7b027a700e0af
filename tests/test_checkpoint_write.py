"""Writing checkpoints: what is in the files, and what is on the disk when writing does not finish."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bytelane import errors
from bytelane.checkpoint import (
    Checkpoint,
    KVScales,
    QuantizedModule,
    QuantizedTensors,
    open_checkpoint,
    write_checkpoint,
)
from bytelane.checkpoint.configuration import compressed_config, gemma_config
from bytelane.checkpoint.patterns import compact, matches
from bytelane.packing import pack_rows
from bytelane.scheme import EmbeddingScheme, Kind, LinearScheme, Storage, WeightScheme
from checkpoints import COMPRESSED, GEMMA, hand_made, skeleton_of

UP = "model.layers.0.mlp.up_proj"


def contents(source: Checkpoint) -> dict[str, Any]:
    """The arguments that write a checkpoint's contents once more."""
    return {
        "config": source.config,
        "modules": ((m, source.read(n)) for n, m in source.modules.items()),
        "plain": ((n, source.read_plain(n)) for n in source.plain),
        "kv_scales": source.kv_scales,
        "unquantized": source.ignored,
        "tied": source.tied,
    }


def check_same(one: Checkpoint, other: Checkpoint, *, storages: bool = False) -> None:
    """Equal codes, scales, schemes, plain tensors, KV scales and ties."""
    assert list(one.modules) == list(other.modules)
    for name, module in one.modules.items():
        twin = other.modules[name]
        assert dataclasses.replace(module, storage=twin.storage) == twin
        assert not storages or module.storage is twin.storage
        a, b = one.read(name), other.read(name)
        assert torch.equal(a.rows, b.rows)
        for left, right in (
            (a.weight_scale, b.weight_scale),
            (a.input_scale, b.input_scale),
            (a.output_scale, b.output_scale),
            (a.bias, b.bias),
        ):
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left.double(), right.double())
    assert list(one.plain) == list(other.plain)
    for name in one.plain:
        assert torch.equal(one.read_plain(name), other.read_plain(name))
    assert (one.kv_scales, one.tied, one.ignored) == (other.kv_scales, other.tied, other.ignored)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("fmt", ["pack-quantized", "int-quantized"])
def test_compressed_tensors_round_trip(bits: int, group: int | None, fmt: str, tmp_path: Path) -> None:
    made = hand_made(bits=bits, group=group, fmt=fmt, embeddings=True, kv=True, attention_bias=True)
    skeleton = skeleton_of(made.model)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton)
    write_checkpoint(tmp_path / "b", storage=COMPRESSED, **contents(source))
    check_same(source, open_checkpoint(tmp_path / "b", skeleton), storages=True)
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in written.items()} == {
        n: (t.dtype, t.shape) for n, t in made.tensors.items()
    }
    quantization = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == fmt
    assert {g["format"] for g in quantization["config_groups"].values()} == {fmt}
    assert quantization["quantization_status"] == "compressed"
    assert quantization["ignore"] == ["lm_head"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tie", [False, True])
def test_gemma_round_trip(bits: int, tie: bool, tmp_path: Path) -> None:
    options = {"kv": True, "attention_bias": True, "tie_word_embeddings": tie, "sides": (True, False)}
    made = hand_made(GEMMA, bits, embeddings=True, head=True, **options)
    skeleton = skeleton_of(made.model)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton)
    write_checkpoint(tmp_path / "b", storage=GEMMA, **contents(source))
    check_same(source, open_checkpoint(tmp_path / "b", skeleton), storages=True)
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert set(written) == set(made.tensors)
    for name, tensor in written.items():
        assert torch.equal(tensor.flatten(), made.tensors[name].flatten()), name
        assert not name.endswith("_cache_scale") or tensor.shape == ()


def test_mixed_formats_and_widths(tmp_path: Path) -> None:
    made = hand_made(bits=4)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))

    def modules() -> Iterator[tuple[QuantizedModule, QuantizedTensors]]:
        for i, (name, module) in enumerate(source.modules.items()):
            if i % 3:
                yield module, source.read(name)
                continue
            bits, scheme = 8, LinearScheme(WeightScheme(8), False, True)
            codes = torch.full(module.shape, i - 7, dtype=torch.int8)
            tensors = dataclasses.replace(source.read(name), rows=pack_rows(codes, bits), input_scale=None)
            yield dataclasses.replace(module, scheme=scheme, storage=Storage.INT_QUANTIZED), tensors

    write_checkpoint(tmp_path / "b", storage=COMPRESSED, **(contents(source) | {"modules": modules()}))
    written = open_checkpoint(tmp_path / "b", skeleton_of(made.model))
    assert written.config["quantization_config"]["format"] == "mixed-precision"
    expected = [m.storage for m, _ in modules()]
    assert [m.storage for m in written.modules.values()] == expected
    assert [m.scheme for m in written.modules.values()] == [m.scheme for m, _ in modules()]


# --- shards, copies, completeness ----------------------------------------------------------------------------------


def test_shards(tmp_path: Path) -> None:
    made = hand_made()
    skeleton = skeleton_of(made.model)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton)
    seen: list[int] = []
    write_checkpoint(
        tmp_path / "b", storage=COMPRESSED, max_shard_bytes=20_000, progress=seen.append, **contents(source)
    )
    files = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == seen[-1] == source.total_bytes
    assert seen == sorted(seen)
    for file in files:
        tensors = load_file(tmp_path / "b" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    check_same(source, open_checkpoint(tmp_path / "b", skeleton))


def test_small_files_go_along_and_code_does_not(tmp_path: Path) -> None:
    made = hand_made()
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    taken = [
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.model",
        "LICENSE",
        "merges.txt",
    ]
    left = [
        "modeling_x.py",
        "pytorch_model.bin",
        "x.pt",
        "other.safetensors",
        "pytorch_model.bin.index.json",
        ".hidden.json",
    ]
    for name in taken + left:
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "a" / "additional_chat_templates").mkdir()
    (tmp_path / "a" / "additional_chat_templates" / "tool.jinja").write_text("tool")
    write_checkpoint(tmp_path / "b", storage=COMPRESSED, copy_from=tmp_path / "a", **contents(source))
    found = {str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert found == {*taken, "config.json", "model.safetensors", "additional_chat_templates/tool.jinja"}
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "a" / "link.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(errors.FileFormatError, match=r"link\.txt"):
        write_checkpoint(tmp_path / "c", storage=COMPRESSED, copy_from=tmp_path / "a", **contents(source))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "secret.txt"]


def interrupted(source: Checkpoint, error: BaseException) -> dict[str, Any]:
    """The contents of a checkpoint, broken off in the middle of the plain tensors."""

    def plain() -> Iterator[tuple[str, torch.Tensor]]:
        for i, name in enumerate(source.plain):
            if i == 2:
                raise error
            yield name, source.read_plain(name)

    return contents(source) | {"plain": plain()}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError("disk full")])
def test_an_interrupted_write_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    made = hand_made()
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "b", storage=COMPRESSED, max_shard_bytes=9000, **interrupted(source, error))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    made = hand_made()
    skeleton = skeleton_of(made.model)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton)
    write_checkpoint(tmp_path / "b", storage=COMPRESSED, **contents(source))
    before = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "b", storage=COMPRESSED, overwrite=True, **interrupted(source, KeyboardInterrupt()))
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_checkpoint_can_replace_the_one_it_is_read_from(tmp_path: Path) -> None:
    made = hand_made(GEMMA, 4)
    skeleton = skeleton_of(made.model)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton)
    write_checkpoint(tmp_path / "a", storage=COMPRESSED, overwrite=True, **contents(source))
    check_same(source, open_checkpoint(tmp_path / "a", skeleton))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    made = hand_made()
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    (tmp_path / "b").mkdir()
    write_checkpoint(tmp_path / "b", storage=COMPRESSED, **contents(source))
    with pytest.raises(errors.OutputExistsError, match="not empty"):
        write_checkpoint(tmp_path / "b", storage=COMPRESSED, **contents(source))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("years of work")
    with pytest.raises(errors.OutputExistsError, match="no checkpoint"):
        write_checkpoint(tmp_path / "c", storage=COMPRESSED, overwrite=True, **contents(source))
    with pytest.raises(errors.OutputExistsError, match="not a folder"):
        write_checkpoint(tmp_path / "c" / "thesis.tex", storage=COMPRESSED, overwrite=True, **contents(source))


# --- refusals ------------------------------------------------------------------------------------------------------


def module(name: str = UP, bits: int = 4, group: int | None = None, **changes: Any) -> QuantizedModule:
    scheme = LinearScheme(WeightScheme(bits, group), False, False)
    values = {"kind": Kind.LINEAR, "shape": (4, 32), "scheme": scheme, "storage": Storage.PACK_QUANTIZED}
    return QuantizedModule(name, **(values | changes))


GOOD = QuantizedTensors(torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1))
"""Tensors of `module()`."""


@pytest.mark.parametrize(
    ("storage", "described", "tensors", "error"),
    [
        ("gguf", module(), GOOD, errors.UnknownMethodError),
        (GEMMA, module(bits=3), dataclasses.replace(GOOD, rows=GOOD.rows[:, :12]), errors.NotRepresentableError),
        (
            GEMMA,
            module(group=16),
            dataclasses.replace(GOOD, weight_scale=torch.ones(4, 2)),
            errors.NotRepresentableError,
        ),
        (COMPRESSED, module(bits=3), GOOD, errors.PackedShapeError),
        (COMPRESSED, module(), dataclasses.replace(GOOD, rows=GOOD.rows.char()), errors.PackedShapeError),
        (COMPRESSED, module(group=16), GOOD, errors.GroupSizeError),
        (COMPRESSED, module(), dataclasses.replace(GOOD, weight_scale=torch.ones(4)), errors.TensorShapeError),
        (COMPRESSED, module(), dataclasses.replace(GOOD, weight_scale=-torch.ones(4, 1)), errors.ScaleError),
        (
            COMPRESSED,
            module(),
            dataclasses.replace(GOOD, weight_scale=torch.ones(4, 1).double()),
            errors.TensorDtypeError,
        ),
        (COMPRESSED, module(), dataclasses.replace(GOOD, input_scale=torch.tensor(0.1)), errors.ScaleError),
        (COMPRESSED, module(), dataclasses.replace(GOOD, bias=torch.ones(4)), errors.TensorShapeError),
        (COMPRESSED, module(bias=True), dataclasses.replace(GOOD, bias=torch.ones(3)), errors.TensorShapeError),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    storage: str,
    described: QuantizedModule,
    tensors: QuantizedTensors,
    error: type[errors.CheckpointError],
    tmp_path: Path,
) -> None:
    with pytest.raises(errors.CheckpointError) as caught:
        write_checkpoint(tmp_path / "b", config={}, storage=storage, modules=[(described, tensors)], plain=())
    assert type(caught.value) is error, str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_names_are_written_once(tmp_path: Path) -> None:
    def write(**changes: Any) -> None:
        values: dict[str, Any] = {"modules": [(module(), GOOD)], "plain": ()}
        write_checkpoint(tmp_path / "b", config={}, storage=COMPRESSED, **(values | changes))

    with pytest.raises(errors.UnexpectedTensorError, match="written twice"):
        write(modules=[(module(), GOOD), (module(), GOOD)])
    with pytest.raises(errors.ConfigError, match="both quantized and left out"):
        write(unquantized=[UP])
    with pytest.raises(errors.ConfigError, match="not written"):
        write(tied={"lm_head": "model.embed_tokens"})
    with pytest.raises(errors.ScaleError, match="positive"):
        write(kv_scales={"model.layers.0.self_attn": KVScales(0.0, 0.1)})
    assert list(tmp_path.iterdir()) == []


# --- configurations ------------------------------------------------------------------------------------------------

LAYERS = 12
NAMES = [
    "model.embed_tokens",
    *(f"model.layers.{i}.{p}" for i in range(LAYERS) for p in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")),
    "lm_head",
]


def check_compact(wanted: list[str], universe: list[str]) -> list[str]:
    entries = compact(wanted, universe)
    for name in universe:
        assert sum(matches(e, name) for e in entries) == (name in wanted), name
    return entries


def test_patterns_are_few_and_readable() -> None:
    assert check_compact(NAMES, NAMES) == [
        "model.embed_tokens",
        r"^model\.layers\.\d+\.self_attn\.(q_proj|k_proj)$",
        r"^model\.layers\.\d+\.mlp\.up_proj$",
        "lm_head",
    ]
    some = [n for n in NAMES if ".1." in n or ".10." in n]
    assert check_compact(some, NAMES) == [
        r"^model\.layers\.(1|10)\.self_attn\.(q_proj|k_proj)$",
        r"^model\.layers\.(1|10)\.mlp\.up_proj$",
    ]
    assert check_compact(["model.layers.1.mlp.up_proj"], NAMES) == ["model.layers.1.mlp.up_proj"]
    assert check_compact([], NAMES) == []


def test_patterns_of_experts_and_numbered_modules() -> None:
    experts = [f"model.layers.{i}.mlp.experts.{e}.{p}" for i in range(3) for e in range(4) for p in ("up", "down")]
    universe = [*experts, "layers.0", "layers.1", "layers.2"]
    assert check_compact(experts, universe) == [r"^model\.layers\.\d+\.mlp\.experts\.\d+\.(up|down)$"]
    check_compact(["layers.0", "layers.2"], universe)
    check_compact(universe, universe)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        chosen = torch.rand(len(universe), generator=generator) < torch.rand((), generator=generator)
        check_compact([n for n, c in zip(universe, chosen.tolist(), strict=True) if c], universe)


def test_gemma_names_that_contain_others_are_told_apart() -> None:
    """A bare entry would match by prefix and by suffix."""
    config = gemma_config([module("tower.proj"), module("head.1")], ["proj", "head"])
    assert config["modules_to_not_convert"] == ["^proj$", "^head$"]


def test_gemma_default_width_is_the_most_common() -> None:
    config = gemma_config([module(n, 8 if "self_attn" in n else 4) for n in NAMES], [])
    assert config["num_bits"] == 8
    assert config["module_quant_configs"] == {
        r"^model\.embed_tokens$": {"num_bits": 4},
        r"^model\.layers\.\d+\.mlp\.up_proj$": {"num_bits": 4},
        "^lm_head$": {"num_bits": 4},
    }
    assert config["modules_to_not_convert"] == []
    assert config["quantize_embeddings"] is False


def test_compressed_groups_are_the_unique_schemes() -> None:
    table = module("model.embed_tokens", kind=Kind.EMBEDDING, scheme=EmbeddingScheme(WeightScheme(4)))
    linears = [module(n, 2 if "mlp" in n else 4) for n in NAMES[1:-1]]
    config = compressed_config([table, *linears], ["lm_head"], kv_scales=True)
    groups = config["config_groups"].values()
    assert [(g["weights"]["num_bits"], g["targets"]) for g in groups] == [
        (4, ["model.embed_tokens"]),
        (4, [r"re:^model\.layers\.\d+\.self_attn\.(q_proj|k_proj)$"]),
        (2, [r"re:^model\.layers\.\d+\.mlp\.up_proj$"]),
    ]
    assert config["ignore"] == ["lm_head"]
    assert config["kv_cache_scheme"]["num_bits"] == 8


def test_a_name_that_reads_as_a_pattern_is_refused() -> None:
    with pytest.raises(errors.NotRepresentableError, match="told from others"):
        compressed_config([module("re:.*"), module("other", 8)], [])
