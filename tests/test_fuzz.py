"""Mutated checkpoints in small numbers (`tests/fuzz.py` runs them by the thousand), patterns that never end, kills."""

from __future__ import annotations

import collections
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fuzz
import mutators
from bytelane import errors
from bytelane.checkpoint import convert_checkpoint, exchange, expressions, open_checkpoint
from bytelane.checkpoint.exchange import replace_folder, staging_folder
from bytelane.checkpoint.expressions import check_ends, compiled, is_plain
from bytelane.models import load_config, load_model, open_model
from checkpoints import COMPRESSED, GEMMA, hand_made, skeleton_of

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(40)]


@pytest.mark.parametrize("seed", range(6))
def test_mutated_checkpoints_are_refused_or_right(seed: int) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    fuzz.holder(25, seed, outcomes)()
    assert outcomes.total() >= 20
    assert len(outcomes) >= 4, "they were meant to break in several ways"


def test_the_fuzzer_sees_a_layer_that_computes_something_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hand_made(COMPRESSED, 4).write(tmp_path)
    assert fuzz.hold(tmp_path, random.Random(0)) == "loaded"
    monkeypatch.setattr(
        "bytelane.layers.QuantLinear.forward", lambda self, x: torch.zeros(*x.shape[:-1], self.out_features)
    )
    with pytest.raises(AssertionError, match="outputs"):
        fuzz.hold(tmp_path, random.Random(0))


# --- patterns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        r"^model\.layers\.\d+\.mlp\.(gate_proj|up_proj)$",
        r"language_model\.layers\.(\d|1[0-4])\.mlp\.",
        r".*self_attn.*proj.*",
        r"^(?!.*(lm_head|vision)).*$",
        "^model\\.layers\\.(" + "|".join(map(str, range(80))) + r")\.mlp\.down_proj$",
        "lm_head",
        r"a[)]*b",
    ],
)
def test_patterns_that_writers_make_are_plain(pattern: str) -> None:
    assert is_plain(pattern)
    started = time.perf_counter()
    for name in NAMES:
        re.search(pattern, name)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "pattern", [p for p in mutators.EVIL if p.count("(") and len(p) < 100 and p not in ("[", r"(?P<n")]
)
def test_patterns_that_may_not_end_are_not_plain(pattern: str) -> None:
    assert not is_plain(pattern)


@pytest.mark.parametrize("storage", [COMPRESSED, GEMMA])
@pytest.mark.parametrize("pattern", [r"^((\w|\.)+)+#$", r"(?x) ( [\w.]+ ) + \#"])
def test_patterns_that_do_not_end_are_refused(
    storage: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 1.0)
    made = hand_made(storage, 4)
    if storage == GEMMA:
        made.quantization["module_quant_configs"] = {pattern: {"num_bits": 4}}
    else:
        made.quantization["ignore"].append(f"re:{pattern}")
    made.write(tmp_path)
    with pytest.raises(errors.ConfigError, match="takes more than 1 s") as refused:
        open_checkpoint(tmp_path, skeleton_of(made.model))
    assert str(tmp_path) in str(refused.value)


def test_doubtful_patterns_that_end_are_used(tmp_path: Path) -> None:
    made = hand_made(COMPRESSED, 4)
    made.group["targets"] = [r"re:^model\.layers(\.\w+)+$"]
    made.write(tmp_path)
    assert not is_plain(r"^model\.layers(\.\w+)+$")
    with open_checkpoint(tmp_path, skeleton_of(made.model)) as checkpoint:
        assert len(checkpoint.modules) == 14
    check_ends([r"(a+)+"], NAMES, "key", tmp_path)


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 5000, "a" * 70000])
def test_patterns_that_do_not_compile_are_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError) as refused:
        compiled(pattern, "key", tmp_path)
    assert len(str(refused.value)) < 1000


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[" * 100_000, "JSON"),
        ("1" * 5000, "JSON"),
        ('{"a": 1, "a": 2}', "twice"),
        ("{}", "transformers cannot read it"),
    ],
)
def test_configurations_that_are_none(text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(errors.ModelConfigError, match=rule):
        load_config(tmp_path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    import os

    hand_made(COMPRESSED, 4).write(tmp_path)
    model = skeleton_of(hand_made(COMPRESSED, 4).model)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(errors.FileFormatError, match="not a file"):
        open_checkpoint(tmp_path, model)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(errors.ModelConfigError, match="not a file"):
        load_config(tmp_path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts", "depth"])
@pytest.mark.parametrize("count", [1025, 2**31, 1e12])
def test_absurd_counts_are_refused_before_anything_is_built(key: str, count: float, tmp_path: Path) -> None:
    made = hand_made(COMPRESSED, 4)
    made.config["vision_config"] = {key: count}
    made.write(tmp_path)
    with pytest.raises(errors.ModelConfigError, match=rf"vision_config\.{key}: at most 1024"):
        load_config(tmp_path)


@pytest.mark.parametrize("value", [["float32"], 2.5, "float64", "int8"])
def test_odd_dtypes_are_refused(value: object, tmp_path: Path) -> None:
    made = hand_made(COMPRESSED, 4)
    made.config["dtype"] = value
    made.write(tmp_path)
    with pytest.raises(errors.CheckpointError):
        load_model(tmp_path)


# --- interrupted writes ------------------------------------------------------------------------------------------

_WRITER = """
import os, random, signal, sys, time
import torch
from bytelane.checkpoint import convert_checkpoint
from bytelane.models import open_model
torch.set_num_threads(1)
source, target, seed = sys.argv[1:]
seeded = random.Random(int(seed))
checkpoint, _ = open_model(source)
while True:
    child = os.fork()
    while not child:
        convert_checkpoint(checkpoint, target, "compressed-tensors", overwrite=True)
    time.sleep(0.02 + seeded.random() * 0.2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
    sys.stdin.readline()
"""


def test_a_killed_writer_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    """Both are the same model in different codes; whatever the moment, the folder is exactly one of them."""
    first, second = (hand_made(COMPRESSED, 4, seed=seed) for seed in (0, 1))
    first.write(tmp_path / "target")
    second.write(tmp_path / "source")
    skeleton = skeleton_of(first.model)
    layer = "model.layers.1.mlp.down_proj"
    known = []
    for folder in ("target", "source"):
        with open_checkpoint(tmp_path / folder, skeleton) as checkpoint:
            known.append(checkpoint.read(layer, copy=True).rows)
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "source"), str(tmp_path / "target"), "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        try:
            for _ in range(10):
                assert writer.stdout.readline() == "killed\n"
                with open_checkpoint(tmp_path / "target", skeleton) as checkpoint:
                    rows = checkpoint.read(layer, copy=True).rows
                assert any(torch.equal(rows, other) for other in known)
                writer.stdin.write("on\n")
                writer.stdin.flush()
        finally:
            writer.kill()
    assert torch.equal(rows, known[1])
    checkpoint, _ = open_model(tmp_path / "source")
    with checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "target", "compressed-tensors", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"], "what the killed ones left is cleared"


def test_only_what_no_process_is_writing_is_cleared(tmp_path: Path) -> None:
    target = tmp_path / "model"
    names = [".model.0123abcd.partial", ".model.other.partial", ".mode.0123abcd.partial", "model.0123abcd.partial"]
    for name in names:
        _folder(tmp_path / name, "left")
    (tmp_path / ".model.89abcdef.partial").symlink_to(tmp_path / names[3])
    with staging_folder(target) as first:
        (first / "file").write_text("first")
        with staging_folder(target) as second:
            assert first.exists()
            replace_folder(second, target)
        replace_folder(first, target)
    assert (target / "file").read_text() == "first"
    assert {p.name for p in tmp_path.iterdir()} == {"model", ".model.89abcdef.partial", *names[1:]}


def _folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize("exchanges", [True, False])
def test_folders_are_replaced(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(exchange, "_exchanged", lambda a, b: False)
    replace_folder(_folder(tmp_path / "new", "new"), tmp_path / "target")
    replace_folder(_folder(tmp_path / "newer", "newer"), tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_this_system_exchanges_names(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", "a"), _folder(tmp_path / "b", "b")
    if sys.platform.startswith("linux"):
        assert exchange._exchanged(a, b)
        assert (a / "file").read_text() == "b"
        with pytest.raises(OSError, match="No such file"):
            exchange._exchanged(a, tmp_path / "none")


def test_json_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytelane.checkpoint.container.MAX_JSON_BYTES", 100)
    (tmp_path / "config.json").write_text(json.dumps({"a": "b" * 200}))
    with pytest.raises(errors.ModelConfigError, match="at most 100 bytes"):
        load_config(tmp_path)
