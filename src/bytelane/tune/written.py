"""Text that the float model writes itself, to tune on: there is as much as one likes of it.

The teacher's own samples are where its predictions are to be learned (LLM-QAT, Liu et al. 2023), and many of them are
read once where the windows of a small text are read again in every epoch. Each is begun by a window of the given text,
so it stays with that text's subjects and style, and is sampled at temperature 1, with nothing cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bytelane.tune.teacher import TuningError

BEGINNING = 32
"""Tokens of a given window that begin a written one."""

WRITE_BATCH = 64
"""Windows written at a time. On a GPU a step takes hardly longer for a thousand, where their keys and values fit."""


@torch.no_grad()
def written_windows(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    count: int,
    *,
    batch: int = WRITE_BATCH,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Windows that a model continues from the beginnings of others.

    Args:
        model: the float model, in evaluation mode.
        windows: int64 `[length]` each, all of one length; used in turn.
        count: how many to write.
        batch: how many at a time; the keys and values of all of them are held.
        seed: of the sampling. On one device, with one batch, the same seed writes the same text.
        progress: called with the windows written so far.

    Returns:
        int64 `[length]` each, on the CPU.

    Raises:
        TuningError: the windows are too short to begin and to be continued.
    """
    length = windows[0].numel()
    if length <= BEGINNING:
        raise TuningError(f"a written window begins with {BEGINNING} tokens of another; windows of {length} leave none")
    device = next(model.parameters()).device
    found: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(found) < count:
            chosen = range(len(found), min(len(found) + batch, count))
            begun = torch.stack([windows[i % len(windows)][:BEGINNING] for i in chosen]).to(device)
            more = length - BEGINNING
            made: Any = cast(Any, model).generate(
                begun,
                attention_mask=torch.ones_like(begun),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                min_new_tokens=more,  # no end of text before
                max_new_tokens=more,
                pad_token_id=0,  # not used: no sequence ends early
            )
            found += list(made.cpu())
            if progress is not None:
                progress(len(found))
    return found
