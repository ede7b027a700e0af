"""The scripts that make the shipped model, end to end at toy size: text, tokenizer, both stages, a checkpoint."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bytelane.generation import encode, generate, load_tokenizer
from bytelane.models import load_model, open_model
from bytelane.packing import unpack_rows
from bytelane.sampling import Sampling

EXAMPLES = Path(__file__).parent.parent / "examples" / "small"
NAMES = ("stories", "facts", "corpus", "model", "train", "export")
STEPS = 4


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts as modules; they import each other by bare names."""
    sys.path.insert(0, str(EXAMPLES))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES if name != "facts"})
    sys.path.remove(str(EXAMPLES))
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(scripts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `corpus.py` writes, of made documents alone and few of them."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = scripts.corpus.train_tokenizer(scripts.corpus.made(60, 0))
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, count, seed in (("train", 60, 0), ("heldout", 20, 1)):
        rows = scripts.corpus.rows(tokenizer, ((text, False) for text in scripts.corpus.made(count, seed)))
        np.save(folder / f"{name}.npy", rows[:8])
    return folder


def train(scripts: Any, data: Path, out: Path, *extra: str) -> None:
    """`train.py`, as its command line is."""
    given = ["train.py", str(data), str(out), "--toy", "--batch", "1", "--save-seconds", "0", *extra]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*given, "--float-steps", str(STEPS), "--steps", str(STEPS)])
        patch.setattr(scripts.train, "PROMPTS", ())
        patch.setattr(torch.cuda, "is_available", lambda: False)
        scripts.train.main()


def weights(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob(f"{stem}.*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def trained(scripts: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(scripts, data, folder)
    return folder


@pytest.mark.parametrize("stage", ["float", "quantized"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    stage: str, scripts: Any, data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = scripts.train._state

    def stopped(path: Path, model: Any, adam: Any, step: int) -> None:
        save(path, model, adam, step)
        if path.name == f"state-{stage}.safetensors" and step == STEPS // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(scripts.train, "_state", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(scripts, data, tmp_path)
    assert not weights(tmp_path, "quantized")
    monkeypatch.setattr(scripts.train, "_state", save)
    train(scripts, data, tmp_path, "--resume")
    for stem in ("float", "quantized"):
        here, there = weights(tmp_path, stem), weights(trained, stem)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], tensor) for name, tensor in there.items())
    assert not list(tmp_path.glob("*.partial"))


def test_the_checkpoint_is_what_was_trained(scripts: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    out = scripts.export.export(data, trained, tmp_path / "out", toy=True)
    held = weights(trained, "quantized")
    checkpoint, _ = open_model(out)
    with checkpoint:
        assert len(checkpoint.modules) == len([n for n in held if n.endswith(".log_scale")])
        assert len(checkpoint.kv_scales) == 4
        for name, module in checkpoint.modules.items():
            bits, tensors = module.scheme.weight.num_bits, checkpoint.read(name)
            scale = held[f"{name}.log_scale"].exp()
            assert torch.equal(tensors.weight_scale, scale), name
            codes = torch.round(held[f"{name}.weight"] * torch.reciprocal(scale))
            codes = codes.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1).to(torch.int8)
            assert torch.equal(unpack_rows(tensors.rows, bits, module.shape[1]), codes), name
            if tensors.input_scale is not None:
                assert torch.equal(tensors.input_scale, held[f"{name}.log_in"].exp()), name
                assert torch.equal(tensors.output_scale, held[f"{name}.log_out"].exp()), name
    model, tokenizer = load_model(out), load_tokenizer(out)
    ids = encode(tokenizer, [{"role": "user", "content": "Who are you?"}])
    _, stats = generate(
        model,
        tokenizer,
        ids,
        max_new_tokens=3,
        on_text=lambda _: None,
        sampling=Sampling(True, None, None, None, None, None),
    )
    assert 1 <= stats.new_tokens <= 3
