"""What the commands that run a model share: loading it as the options ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from bytelane.cli.output import progress
from bytelane.generation import load_tokenizer
from bytelane.models import load_model, resolve_checkpoint
from bytelane.quantize.text import Split

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quiet() -> None:
    """Leave the terminal to this program: no progress bars or advice from transformers."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A `--dtype` as a torch dtype."""
    if name is None:
        return None
    if name not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, found {name}", param_hint="--dtype")
    return DTYPES[name]


def check_numerics(name: str) -> str:
    """A `--numerics`, refused if it is neither."""
    if name not in ("integer", "emulated"):
        raise typer.BadParameter(f"must be integer or emulated, found {name}", param_hint="--numerics")
    return name


def check_split(name: str) -> Split:
    """A `--split`, refused if it is none of the three."""
    if name not in get_args(Split):
        raise typer.BadParameter(f"must be one of {', '.join(get_args(Split))}, found {name}", param_hint="--split")
    return cast(Split, name)


def source_folder(source: str) -> Path:
    """A float model's place: a folder or GGUF file as it is, or a hub id fetched."""
    path = Path(source).expanduser()
    return path if path.exists() else resolve_checkpoint(source)


def set_threads(threads: int | None) -> None:
    """Apply `--threads`."""
    if threads is not None:
        torch.set_num_threads(threads)


def load(
    model: str,
    *,
    numerics: str,
    dtype: str | None,
    device: str,
    threads: int | None,
    overrides: Path | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """A model, its tokenizer and its folder, with a progress bar. Commands read text only, so towers are left out."""
    quiet()
    set_threads(threads)
    check_numerics(numerics)
    chosen_dtype = parse_dtype(dtype)
    directory = resolve_checkpoint(model)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    arguments: dict[str, Any] = {"numerics": numerics, "dtype": chosen_dtype, "device": device}
    with progress("loading") as report:
        loaded = load_model(
            directory,
            text_only=True,
            overrides=overrides,
            progress=report,
            trust_remote_code=trust_remote_code,
            **arguments,
        )
    return loaded, tokenizer, directory
