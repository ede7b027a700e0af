"""What the GPU kernels need of this process: Triton, and a device new enough. Importing this imports neither."""

from __future__ import annotations

import importlib.util

import torch

ISAS = {"sm100": (10, 0), "sm90": (9, 0), "sm89": (8, 9), "sm80": (8, 0)}
"""Compute capabilities by name, newest first. Code for an older one runs on a newer one."""

TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
"""Whether torch is built for CUDA and Triton is installed, which such builds bring (3.6 with torch 2.11)."""


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    return device.type == "cuda" and TRITON and bool(supported_isas())


def supported_isas() -> tuple[str, ...]:
    """Those of `ISAS` that the current CUDA device has; none without a device."""
    if not torch.cuda.is_available():
        return ()
    capability = torch.cuda.get_device_capability()
    return tuple(name for name, least in ISAS.items() if capability >= least)
