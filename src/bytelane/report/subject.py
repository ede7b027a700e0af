"""The two models of a comparison, as the command line names them, and the text they read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bytelane.decoder import install_decoder
from bytelane.errors import ConfigError
from bytelane.generation import load_tokenizer
from bytelane.models import load_model, resolve_checkpoint
from bytelane.quantize.pipeline import load_float_model
from bytelane.quantize.text import Split, read_files, windows
from bytelane.report.compare import CompareResult, Progress, compare_models, sensitivity
from bytelane.trace import Way, load_way

SENSITIVITY_TOKENS = 64
"""Tokens read once for every layer when sensitivities are measured."""


@dataclass(frozen=True)
class Subject:
    """One of the two models: `MODEL`, `MODEL@integer`, `MODEL@emulated` or `MODEL@transformers`.

    Attributes:
        model: a folder, a GGUF file, or a hub id.
        runtime: `float` for a model that is not quantized.
    """

    model: str
    runtime: Literal["float", "integer", "emulated", "transformers"]

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Read what the command line says; a model that is not quantized is `float`.

        Raises:
            CheckpointError: no such model, an unknown runtime, a runtime for a float model, or an option of `trace`.
        """
        if text.endswith(".gguf"):
            return cls(text, "float")
        way = Way.parse(text)
        if way != Way(way.model, way.runtime):
            raise ConfigError("threads, batch and chunk belong to `trace`; windows are read whole", tensor=text)
        file = resolve_checkpoint(way.model) / "config.json"
        if file.is_file() and _is_quantized(file):
            return cls(way.model, way.runtime)
        if way.model != text:
            raise ConfigError(f"{way.runtime} numerics need a quantized checkpoint, this is none", file=way.model)
        return cls(way.model, "float")

    @property
    def label(self) -> str:
        """Short, for tables: the folder's name and the runtime."""
        return f"{Path(self.model).name}@{self.runtime}"

    def load(self, dtype: torch.dtype | None, device: str = "cpu", *, native: bool = True) -> PreTrainedModel:
        """The model on a device, in eval mode.

        Args:
            dtype: of activations; None for the model's own, bfloat16 for a float model.
            device: where it goes.
            native: what lies between the layers is bytelane's where it can be, in either numerics, so that two of them
                differ in the layers' arithmetic alone; otherwise it is torch's, as in transformers' own runtime.

        Raises:
            CheckpointError: the checkpoint is refused.
        """
        if self.runtime == "float":
            return load_float_model(_float_folder(self.model), dtype=dtype or torch.bfloat16, device=device)[0]
        if self.runtime == "transformers":
            return load_way(Way(self.model, self.runtime), dtype).to(device)
        model = load_model(
            self.model, numerics=self.runtime, dtype=dtype, device=device, text_only=True, float_ops="torch"
        )
        if native:
            install_decoder(model)
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            FileFormatError: it has none.
        """
        path = Path(self.model).expanduser()
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return load_tokenizer(resolve_checkpoint(self.model))


def _is_quantized(file: Path) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"not readable as JSON: {error}", file=file) from error
    return isinstance(found, dict) and found.get("quantization_config") is not None


def _float_folder(model: str) -> Path:
    path = Path(model).expanduser()
    return path if path.exists() else resolve_checkpoint(model)


def sample_text() -> str:
    """A page of prose, dialogue and code that ships with bytelane, for when no text is given."""
    return (resources.files("bytelane.report") / "sample.txt").read_text(encoding="utf-8")


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[Path] | None,
    *,
    split: Split = "all",
    window: int = 256,
    max_tokens: int = 4096,
) -> list[Tensor]:
    """Windows of token ids of some text files, or of the sample text.

    The sample is short: its windows are as long as it allows when that is less than `window`.

    Raises:
        TextError: too little text.
        FileFormatError: a file that is not text.
    """
    limit = max(1, max_tokens // window)
    if files:
        return windows(tokenizer, read_files(files, split), length=window, limit=limit)
    text = sample_text()
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return windows(tokenizer, [text], length=min(window, count), limit=limit)


def compare_subjects(
    first: Subject,
    second: Subject,
    *,
    text_files: Sequence[Path] | None = None,
    split: Split = "all",
    window: int = 256,
    max_tokens: int = 4096,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    with_sensitivity: bool = False,
    progress: Progress | None = None,
) -> CompareResult:
    """Load two models, read the text with B's tokenizer, and compare.

    Args:
        first: the reference.
        second: the model to judge.
        text_files: see `bytelane.quantize.text`; None for the sample text.
        split: which documents of the text.
        window: tokens in a window.
        max_tokens: read at most this many tokens.
        dtype: of activations; None for each model's own.
        device: where both run.
        with_sensitivity: see `bytelane.report.compare.sensitivity`; read on the first tokens of the first window.
        progress: called with steps done and steps in all: windows, then layers.

    Raises:
        CheckpointError: a model is refused, or the two do not fit each other.
        QuantizeError: the text is of no use.
    """
    made = text_windows(second.tokenizer(), text_files, split=split, window=window, max_tokens=max_tokens)
    native = "transformers" not in (first.runtime, second.runtime)
    a, b = (subject.load(dtype, device, native=native) for subject in (first, second))
    result = compare_models(a, b, made, progress=progress)
    if not with_sensitivity:
        return result
    names = [layer.name for layer in result.layers]
    found = sensitivity(a, b, made[0][:SENSITIVITY_TOKENS], names, progress)
    return replace(result, layers=tuple(replace(layer, sensitivity=found[layer.name]) for layer in result.layers))
