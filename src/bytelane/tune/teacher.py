"""The float model in distillation: its predictions of a step's windows, computed anew or from what was kept of it.

Of a causal language model whose predictions are its head on its last hidden state, the states of a whole text are few
numbers, a thousandth of the predictions themselves: 1.2 KB a token of 576 features in bfloat16. Kept once, they leave
one matmul of the teacher in a step.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bytelane.errors import QuantizeError


class TuningError(QuantizeError):
    """The training cannot start or go on."""


class Teacher:
    """A float model and, where they are kept, its last hidden states.

    Attributes:
        model: in evaluation mode, without gradients.
        states: `[windows, tokens, width]`, or None where every step computes the predictions anew.
    """

    def __init__(self, model: nn.Module, run: Accelerator) -> None:
        """Put a model on the run's device."""
        self.model: Any = model.to(run.device).requires_grad_(False).eval()
        self.states: Tensor | None = None
        self._run = run

    @torch.no_grad()
    def keep(self, text: Tensor, batch: int) -> None:
        """Compute the states of `text`, int64 `[windows, tokens]`, `batch` windows at a time.

        Raises:
            TuningError: the model's predictions are more than its head on its last hidden state.
        """
        with self._run.autocast():
            for start in range(0, text.shape[0], batch):
                ids = text[start : start + batch]
                found = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
                if self.states is None:
                    # The head rounds its input to autocast's dtype anyway.
                    kind = ids.device.type
                    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else found.dtype
                    self.states = torch.empty((text.shape[0], *found.shape[1:]), dtype=dtype, device=found.device)
                    again = self.model.get_output_embeddings()(found.to(dtype))
                    if not torch.equal(self.model(input_ids=ids, use_cache=False).logits, again):
                        raise TuningError(
                            f"{type(self.model).__name__} does more than apply its head to its last hidden state, "
                            "so nothing can be kept of it; leave `keep_teacher` out"
                        )
                self.states[start : start + batch] = found

    @torch.no_grad()
    def predict(self, ids: Tensor, states: Tensor | None, **kwargs: Any) -> Any:
        """What the model returns for ids `[batch, tokens]`, or only `logits` from the states kept of them."""
        if states is None:
            return self.model(input_ids=ids, **kwargs)
        return Predicted(self.model.get_output_embeddings()(states))


class Predicted:
    """Predictions `[batch, tokens, vocabulary]` as a model's output has them."""

    hidden_states: None = None

    def __init__(self, logits: Tensor) -> None:
        """Hold them."""
        self.logits = logits
