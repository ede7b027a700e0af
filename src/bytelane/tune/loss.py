"""What tuning minimizes: the distance of the student from the float model, and optionally from the text.

Over N predicted positions, with teacher probabilities p and student probabilities q,

    loss = a/N sum KL(p || q)  -  b/N sum log q(next token)  +  h/L sum_l mean |hs_l - ht_l|^2 / |ht_l|^2

The first term alone (a = 1, b = h = 0, the default) never looks at the text's own next tokens: the student learns to be
the float model, not to know the calibration text. The gradient by the logits, `(q - p) a/N + (q - onehot) b/N`, is
computed together with the loss, some positions at a time (on CUDA in one kernel, a row a program), so that one float32
copy of the logits never exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bytelane.evaluate import positions_at_once


def _row_losses(
    student: Tensor, teacher: Tensor | None, labels: Tensor, kl_weight: float, text_weight: float
) -> tuple[Tensor, Tensor]:
    """What `bytelane.tune.triton_fake.row_losses` computes, in torch's operations."""
    count, vocabulary = student.shape
    step = positions_at_once(vocabulary)
    gradient = torch.empty_like(student)
    losses = torch.zeros(count, dtype=torch.float32, device=student.device)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        log_q = torch.log_softmax(student[rows].to(torch.float32), -1)
        found = log_q.exp() * kl_weight
        if teacher is not None:
            log_p = torch.log_softmax(teacher[rows].to(torch.float32), -1)
            p = log_p.exp()
            losses[rows] += kl_weight * (p * (log_p - log_q)).sum(-1)
            found -= kl_weight * p
        if text_weight:
            weight = text_weight * (labels[rows, None] >= 0).to(torch.float32)
            chosen = labels[rows, None].clamp_min(0)
            losses[rows] -= (weight * log_q.gather(-1, chosen)).squeeze(-1)
            found += weight * log_q.exp()
            found.scatter_add_(-1, chosen, -weight)
        gradient[rows] = found / count
    return losses, gradient


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, kl_weight: float, text_weight: float
    ) -> Tensor:
        if student.is_cuda:
            from bytelane.tune.triton_fake import row_losses
        else:
            row_losses = _row_losses
        given = None if teacher is None else teacher.contiguous()
        losses, gradient = row_losses(student.contiguous(), given, labels, kl_weight, text_weight)
        ctx.save_for_backward(gradient)
        return losses.sum() / student.shape[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None


def logits_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, *, kl_weight: float = 1.0, text_weight: float = 0.0
) -> Tensor:
    """The first two terms, a float32 scalar.

    Args:
        student: logits `[n, vocabulary]`, any floating dtype; their gradient has the same.
        teacher: the float model's logits `[n, vocabulary]`, or None where `kl_weight` is 0.
        labels: int64 `[n]`, the tokens that follow; negative where none does, which leaves out the text's term.
        kl_weight: a.
        text_weight: b.
    """
    if teacher is None and kl_weight:
        raise ValueError("distillation needs the teacher's logits; give them, or kl_weight=0")
    return _LogitsLoss.apply(student, teacher if kl_weight else None, labels, kl_weight, text_weight)  # type: ignore[no-untyped-call, no-any-return]


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The third term without h: every layer's squared distance, relative to the teacher's states, token by token.

    Args:
        student: hidden states `[batch, tokens, width]`, the embeddings first.
        teacher: likewise.
    """
    terms = [
        ((s.to(torch.float32) - t).square().sum(-1) / t.square().sum(-1).clamp_min(1e-6)).mean()
        for s, t in zip(student, (t.to(torch.float32) for t in teacher), strict=True)
    ]
    return torch.stack(terms).mean()
