"""What of the vLLM plugin needs no vLLM: the version window, which checkpoints it takes, cutting and checking parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from bytelane import errors
from bytelane.cli import main
from bytelane.integrations.vllm.parts import Part, Span, cut_inputs
from bytelane.integrations.vllm.plugin import SWITCH, refusal, release
from bytelane.integrations.vllm.table import Header, ModuleTable, serves
from bytelane.packing import pack_rows, unpack_rows
from bytelane.scheme import Kind
from bytelane.shipped import SHIPPED_NAME, shipped_model
from checkpoints import COMPRESSED, GEMMA, HandMade, hand_made

LAYER = "model.layers.0.mlp.down_proj"
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.post1", "0.32.0+cpu", "0.32.5rc1"])
def test_versions_inside_the_window(version: str) -> None:
    assert refusal(version, None) is None
    assert refusal(version, "1") is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "0.4", "dev", None])
def test_versions_outside_are_named(version: str | None) -> None:
    assert str(version or "unknown") in str(refusal(version, None))


@pytest.mark.parametrize("value", ["0", "off", "False", " no "])
def test_the_switch_is_silent(value: str) -> None:
    assert refusal("0.32.0", value) == ""
    assert refusal("9.9", value) == ""


def test_release_numbers() -> None:
    assert release("0.32.0.post1+cpu") == (0, 32, 0)
    assert release("0.33.0rc1") == (0, 33, 0)


def int8(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False, **changes}


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"input_activations": int8(), "output_activations": int8()}, True),
        ({"input_activations": None, "output_activations": int8()}, True),
        ({"input_activations": int8(), "output_activations": None}, False),
        ({"input_activations": None}, False),
        ({"output_activations": int8(type="float")}, False),
    ],
)
def test_the_output_side_makes_it_this_scheme(group: dict[str, Any], expected: bool) -> None:
    assert serves({"quant_method": COMPRESSED, "config_groups": {"group_0": group}}) is expected


def test_other_methods_are_not_this_scheme() -> None:
    assert serves({"quant_method": GEMMA, "num_bits": 4})
    assert not serves({"quant_method": "awq"})


def table_of(made: HandMade) -> ModuleTable:
    table = ModuleTable(made.quantization, "folder")
    table.read_headers({n: Header(DTYPES[t.dtype], tuple(t.shape)) for n, t in made.tensors.items()})
    return table


@pytest.mark.parametrize("spoil", ["symmetric", "dynamic", "num_bits"])
def test_a_broken_configuration_is_refused_as_everywhere(spoil: str) -> None:
    made = hand_made()
    made.group["input_activations"][spoil] = {"symmetric": False, "dynamic": True, "num_bits": 4}[spoil]
    kinds = {"symmetric": errors.AsymmetricError, "dynamic": errors.DynamicActivationError}
    with pytest.raises(kinds.get(spoil, errors.UnsupportedWidthError)):
        table_of(made)


def test_layers_by_name() -> None:
    made = hand_made(bits=3, group=16, embeddings=True)
    table = table_of(made)
    layout = table.layout(LAYER, Kind.LINEAR, (64, 96))
    assert layout is not None
    assert (layout.num_bits, layout.group_size, layout.weight) == (3, 16, f"{LAYER}.weight_packed")
    assert table.layout("lm_head", Kind.LINEAR, (128, 64)) is None
    assert table.embedding_name(128) == "model.embed_tokens"
    assert table.embedding_name(129) is None
    table.rename(lambda name: name.replace("model.", "language_model.model."))
    assert table.stored_name(f"language_{LAYER}") == LAYER


def test_the_text_half_of_a_multimodal_checkpoint_is_found() -> None:
    made = hand_made(GEMMA)
    renamed = {n.replace("model.", "model.language_model."): t for n, t in made.tensors.items()}
    renamed |= {f"model.vision_tower.encoder{n.removeprefix('model')}": t for n, t in made.tensors.items()}
    made.tensors = renamed
    assert table_of(made).stored_name(LAYER) == LAYER.replace("model.", "model.language_model.")


def test_a_layer_without_codes_is_refused() -> None:
    made = hand_made()
    del made.tensors[f"{LAYER}.weight_scale"]
    with pytest.raises(errors.MissingTensorError, match=r"down_proj\.weight_scale"):
        table_of(made).layout(LAYER, Kind.LINEAR, (64, 96))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("ranks", [2, 4])
def test_cutting_inputs_cuts_codes(bits: int, ranks: int) -> None:
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (3, 92), dtype=torch.int8)
    pieces = []
    for rank in range(ranks):
        span = Span.shard(92 // ranks, 92, rank, ranks, "layer")
        cut = cut_inputs(pack_rows(codes, bits), bits, span)
        pieces.append(unpack_rows(cut, bits, span.size))
        assert torch.equal(cut, pack_rows(pieces[-1], bits)), "the bits past the last code are 0"
    assert torch.equal(torch.cat(pieces, -1), codes)


def test_heads_that_ranks_share() -> None:
    assert [Span.shard(32, 64, r, 4, "k").start for r in range(4)] == [0, 0, 32, 32]
    assert [Span.shard(64, 64, r, 4, "replicated").start for r in range(4)] == [0] * 4
    with pytest.raises(errors.ShardingError, match="96"):
        Span.shard(64, 96, 0, 2, "k")
    with pytest.raises(errors.ShardingError, match="3 ranks"):
        Span.shard(32, 64, 0, 3, "k")


def test_a_group_is_not_split() -> None:
    layout = table_of(hand_made(group=16)).layout(LAYER, Kind.LINEAR, (64, 96))
    assert layout is not None
    Part(layout, Span(0, 64, 64), Span(48, 48, 96), Path("folder"))
    with pytest.raises(errors.ShardingError, match="whole groups of 16"):
        Part(layout, Span(0, 64, 64), Span(24, 24, 96), Path("folder"))


def taken(made: HandMade, name: str = LAYER, ranks: int = 1, rank: int = 0, **changed: Tensor) -> Part:
    table = table_of(made)
    rows, columns = made.codes[name].shape
    layout = table.layout(name, Kind.LINEAR, (rows, columns))
    assert layout is not None
    inputs = Span.shard(columns // ranks, columns, rank, ranks, name)
    part = Part(layout, Span(0, rows, rows), inputs, Path("folder"))
    for role, leaf in part.leaves.items():
        tensor = changed.get(role, made.tensors[f"{name}.{leaf}"])
        if tensor.numel():
            part.take(role, tensor)
    return part


@pytest.mark.parametrize("options", [{"bits": 5}, {"bits": 3, "padded": True}, {"bits": 8, "fmt": "int-quantized"}])
def test_partial_sums_of_ranks_add_up_to_the_oracles(options: dict[str, Any]) -> None:
    made = hand_made(**options)
    codes = made.codes[LAYER]
    q = torch.randint(-128, 128, (4, codes.shape[1]), dtype=torch.int8)
    total = torch.zeros(4, codes.shape[0], 1, dtype=torch.int32)
    for rank in range(2):
        sealed = taken(made, ranks=2, rank=rank).seal()
        share = q.chunk(2, -1)[rank].contiguous()
        total += torch.ops.bytelane.accumulate(share, sealed.rows, options["bits"], 0)
        assert torch.equal(sealed.weight_scale, made.tensors[f"{LAYER}.weight_scale"])
    expected = oracle.accumulate(q.numpy(), codes.numpy())
    assert np.array_equal(total.numpy().reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"weight": torch.zeros(64, 11, dtype=torch.int32)}, errors.PackedShapeError),
        ({"weight": torch.zeros(64, 12)}, errors.TensorDtypeError),
        ({"weight": torch.zeros(0, dtype=torch.int32)}, errors.MissingTensorError),
        ({"scale": torch.full((64, 1), -1.0)}, errors.ScaleError),
        ({"scale": torch.ones(64, 2)}, errors.GroupSizeError),
        ({"shape": torch.tensor([64, 95])}, errors.WeightShapeError),
        ({"input": torch.tensor([float("nan")])}, errors.ScaleError),
        ({"output": torch.tensor([0.1, 0.1])}, errors.TensorShapeError),
        ({"output": torch.zeros(0)}, errors.MissingTensorError),
    ],
)
def test_broken_tensors_are_refused_by_name(changed: dict[str, Tensor], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^folder: .*down_proj"):
        taken(hand_made(bits=4), **changed).seal()


def test_a_scale_of_zero_is_no_scale() -> None:
    sealed = taken(hand_made(GEMMA, bits=4, sides=(True, False))).seal()
    assert sealed.input_scale is not None
    assert sealed.output_scale is None


def test_serve_says_how_to_install_vllm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tmp_path)])
    assert ended.value.code == 2
    assert "pip install" in capfd.readouterr().err


def serve(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out.rstrip(), " ".join(err.split())


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytelane.cli.serve.vllm_version", lambda: "0.32.0")


@pytest.mark.usefixtures("with_vllm")
def test_serve_passes_options_on_and_checks_the_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = hand_made().write(tmp_path / "model")
    code, out, _ = serve(capfd, str(made), "--dry-run", "--port", "8001", "--tensor-parallel-size", "2")
    assert code == 0
    assert out.endswith(f"{made} --port 8001 --tensor-parallel-size 2")
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["output_activations"] = None
    (made / "config.json").write_text(json.dumps(config))
    code, _, err = serve(capfd, str(made))
    assert code == 2
    assert "not a wNa8o8 checkpoint" in err
    monkeypatch.setenv(SWITCH, "0")
    assert SWITCH in serve(capfd, str(made))[2]


@pytest.mark.usefixtures("with_vllm")
def test_serve_knows_the_shipped_model_by_its_name(capfd: pytest.CaptureFixture[str]) -> None:
    name = "--served-model-name"
    assert serve(capfd, SHIPPED_NAME, "--dry-run")[1].endswith(f"{shipped_model()} {name} {SHIPPED_NAME}")
    assert serve(capfd, SHIPPED_NAME, "--dry-run", name, "x")[1].endswith(f"{shipped_model()} {name} x")
    assert serve(capfd, SHIPPED_NAME, "--dry-run", f"{name}=x")[1].endswith(f"{shipped_model()} {name}=x")


@pytest.mark.usefixtures("with_vllm")
def test_serve_refuses_a_folder_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for missing in (str(tmp_path / "absent"), "./absent", "a/b/c"):
        code, _, err = serve(capfd, missing)
        assert (code, "no such folder" in err) == (2, True), missing
    code, _, err = serve(capfd, str(tmp_path))
    assert code == 2
    assert "config.json" in err
    assert serve(capfd, "someone/model", "--dry-run")[0] == 0, "a hub id is vLLM's to fetch"


@pytest.mark.usefixtures("with_vllm")
def test_serve_says_what_towers_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = hand_made(GEMMA).write(tmp_path / "model")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "vision_config": {"hidden_size": 768}}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = serve(capfd, str(made))
    assert code == 2
    assert "torchvision" in err
    assert "Gemma4ForCausalLM" in err
    overridden = ("--hf-overrides", '{"architectures": ["Gemma4ForCausalLM"]}')
    assert serve(capfd, str(made), "--dry-run", *overridden)[0] == 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert serve(capfd, str(made), "--dry-run")[0] == 0
