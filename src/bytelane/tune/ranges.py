"""Where tuning starts: weight scales of least squared error.

Activation ranges come from the recipe, as in `bytelane quantize`. A weight scale that clips nothing wastes a 2-bit grid
on one outlier, so each row or group starts at the best of a grid of shrunken scales: the one with the smallest
`sum (c s - w)^2`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bytelane.quantize.rounding import round_to_nearest
from bytelane.scheme import WeightScheme, code_range
from bytelane.tune.fake import grouped, round_weight

SHRINK = tuple(1.0 - 0.025 * i for i in range(33))
"""What a scale that clips nothing is multiplied by: 1 down to 0.2."""


@torch.no_grad()
def start_weight_scale(weight: Tensor, scheme: WeightScheme, name: str = "weight") -> Tensor:
    """The scales `[rows, groups]`, float32, of least squared error on a grid below the one that clips nothing.

    Args:
        weight: `[rows, columns]`, floating point.
        scheme: width and granularity.
        name: named in errors.

    Raises:
        CheckpointError: as for `round_to_nearest`.
    """
    _, widest = round_to_nearest(weight, scheme, name)
    low, high = code_range(scheme.num_bits)
    w = weight.detach().to(torch.float32)
    best, least = widest, torch.full_like(widest, torch.inf)
    for factor in SHRINK:
        scale = widest * factor
        codes, _ = round_weight(w, scale, low, high)
        error = (grouped(codes, scale) * scale[..., None] - grouped(w, scale)).square().sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
