"""The state of an interrupted tuning: parameters and optimizer moments, all of it or nothing.

A state is a folder: `state.safetensors` with every parameter (`parameter.NAME`) and AdamW's moments
(`exp_avg.NAME`, `exp_avg_sq.NAME`), and `state.json` with the steps done and what the run was started with. It is
written beside its place and then renamed into it, so a run killed while it saves leaves the last complete state. A run
resumes only from a state of the same settings, recipe and text; then it ends, on the same device and number of threads,
in the parameters it would have had without the interruption. There is no pickle in it.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bytelane.checkpoint.exchange import replace_folder
from bytelane.errors import ConfigError, FileFormatError, OutputExistsError

TENSORS_NAME = "state.safetensors"
RECORD_NAME = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_state_folder(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that a run must not write to, before it starts.

    Raises:
        OutputExistsError: it holds a state that is not to be resumed, or something else.
        FileFormatError: there is no state to resume.
    """
    has_state = (folder / RECORD_NAME).is_file()
    if resume and not has_state:
        raise FileFormatError(f"no {RECORD_NAME}, so nothing to resume", file=folder)
    if not resume and has_state:
        raise OutputExistsError("holds the state of another run; resume it, or choose another folder", file=folder)
    if not has_state and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError("exists and holds no state of a run", file=folder)


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]) -> None:
    """Write a state, in the place of the one that is there.

    Args:
        folder: where.
        model: its named parameters are saved.
        optimizer: an AdamW over those parameters.
        record: JSON values beside the tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"parameter.{name}"] = parameter.detach().cpu().contiguous()
        held = optimizer.state.get(parameter, {})
        for moment in MOMENTS:
            if moment in held:
                tensors[f"{moment}.{name}"] = held[moment].detach().cpu().contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    staged.mkdir()
    try:
        save_file(tensors, staged / TENSORS_NAME)
        (staged / RECORD_NAME).write_text(json.dumps(dict(record), indent=2) + "\n", encoding="utf-8")
        replace_folder(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def read_record(folder: Path) -> dict[str, Any]:
    """The JSON values of a state.

    Raises:
        FileFormatError: not JSON.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"not JSON: {error}", file=folder / RECORD_NAME) from error
    return record


def check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a state that another run made.

    Raises:
        ConfigError: names the first value that differs.
    """
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ConfigError(
                f"the state was made with {found.get(key)!r}, this run has {value!r}; resume with the same",
                file=folder / RECORD_NAME,
                tensor=key,
            )


@torch.no_grad()
def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Put a state back.

    Args:
        folder: of the state.
        model: gets the parameters.
        optimizer: an AdamW over the model's parameters; gets their moments.
        steps: how many the optimizer had taken.

    Raises:
        ConfigError: the tensors are not those of this model; nothing is changed.
    """
    tensors = load_file(folder / TENSORS_NAME)
    parameters = dict(model.named_parameters())
    wanted = {f"parameter.{name}": p.shape for name, p in parameters.items()}
    found = {name: t.shape for name, t in tensors.items() if name.startswith("parameter.")}
    if wanted != found:
        odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ConfigError("the state is of another model", file=folder / TENSORS_NAME, tensor=odd[0])
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])
        if f"{MOMENTS[0]}.{name}" in tensors:
            held: dict[str, Any] = {"step": torch.tensor(float(steps), device=_step_device(optimizer, parameter))}
            for moment in MOMENTS:
                held[moment] = tensors[f"{moment}.{name}"].to(parameter.device)
            optimizer.state[parameter] = held


def _step_device(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.device:
    """Where AdamW keeps its step: on the device for its fused form, else on the CPU."""
    return parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
