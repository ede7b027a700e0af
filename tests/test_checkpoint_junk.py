"""Junk in any place of a configuration or a header is refused as a checkpoint's fault, or harmless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelane import errors
from bytelane.checkpoint import open_checkpoint
from checkpoints import COMPRESSED, GEMMA, hand_made, skeleton_of

JUNK: list[Any] = [None, True, 0, -1, 3, 2.5, 10**30, "", "x", "re:(", "int", [], [1], ["Linear"], {}, {"a": 1}, [[]]]


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix] * bool(prefix) + [p for key, child in inner for p in paths(child, (*prefix, key))]


@pytest.mark.parametrize("storage", [COMPRESSED, GEMMA])
def test_junk_anywhere_in_the_configuration_is_refused_or_harmless(storage: str, tmp_path: Path) -> None:
    """No value in any place of the quantization configuration gets past as another kind of error."""
    made = hand_made(storage, 4, kv=True)
    if storage == GEMMA:
        made.quantization["module_quant_configs"] = {"mlp": {"num_bits": 4}}
    made.write(tmp_path)
    skeleton = skeleton_of(made.model)
    refusals: list[str] = []
    for path in paths(made.quantization):
        for junk in JUNK:
            config = json.loads(json.dumps(made.config))
            found = config["quantization_config"]
            for key in path[:-1]:
                found = found[key]
            found[path[-1]] = junk
            (tmp_path / "config.json").write_text(json.dumps(config))
            try:
                open_checkpoint(tmp_path, skeleton)
            except errors.CheckpointError as error:
                refusals.append(str(error))
    assert len(refusals) > 50
    assert all(str(tmp_path) in message for message in refusals)


def test_junk_anywhere_in_a_header_is_refused_or_harmless(tmp_path: Path) -> None:
    made = hand_made()
    made.write(tmp_path)
    skeleton = skeleton_of(made.model)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    refusals: list[str] = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        place = int(torch.randint(0, 9000, (), generator=generator))
        byte = int(torch.randint(0, 256, (), generator=generator))
        file.unlink()  # never change a file that a map may still show
        file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        try:
            open_checkpoint(tmp_path, skeleton)
        except errors.CheckpointError as error:
            refusals.append(str(error))
    assert refusals
    assert all(str(tmp_path) in message for message in refusals)
