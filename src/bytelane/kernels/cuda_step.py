"""One token between the linear layers, on CUDA tensors: the launches of triton_step.py.

All tensors of a call lie on one device, contiguous, and have one activation dtype T: float32, bfloat16 or float16.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bytelane.kernels.cuda_norm import MAX_WIDTH, NormForm
from bytelane.kernels.triton_configs import power_of_two
from bytelane.kernels.triton_launch import Launch, overlaps, require
from bytelane.kernels.triton_step import attend_joined, attend_parts, gate_row, join_row, step_heads

__all__ = ["CacheRows", "HeadNorms", "attend", "gate", "heads", "join"]

PARTS_AT_ONCE = 16
"""Parts of a head that are joined in one step."""


class HeadNorms(NamedTuple):
    """The norms of heads.

    Attributes:
        q: weight `[dim]` of the queries' norm, None for no norm.
        k: of the keys' norm, which there is where there is one of queries.
        v: of the values' norm; None for a norm without a weight.
        normed_values: whether the values have a norm.
        form: how all of them round.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    normed_values: bool
    form: NormForm


class CacheRows(NamedTuple):
    """Keys and values of one sequence: `[KV heads, length, dim]` int8 with a float32 scale each, or of T without."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None


@functools.lru_cache(maxsize=1024)
def _heads_launch(
    counts: tuple[int, int],
    dim: int,
    length: int,
    form: NormForm,
    norms: tuple[bool, bool, bool],
    codes: bool,
    pdl: bool,
) -> Launch:
    block = power_of_two(dim)
    q_norm, v_norm, v_weight = norms
    constants = {
        "Q_NORM": q_norm,
        "V_NORM": v_norm,
        "V_WEIGHT": v_weight,
        "IN_T": form.weight_in_t,
        "PLUS_ONE": form.plus_one,
        "CODES": codes,
        "BLOCK": block,
        "PDL": pdl,
    }
    numbers = (*counts, dim, length, form.eps)
    return Launch(step_heads, (sum(counts) + counts[1], 1), numbers, constants, max(1, min(4, block // 64)), 1, pdl)


def heads(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    norms: HeadNorms,
    angles: tuple[Tensor, Tensor],
    position: Tensor,
    cache: CacheRows,
) -> Tensor:
    """Normalize and rotate one token's heads, and write its keys and values to their place of the cache.

    Args:
        q: `[heads * dim]`.
        k: `[KV heads * dim]`, or None, as `v`, where the cache has this token already.
        v: likewise.
        norms: of the heads.
        angles: cosines and sines `[dim]`.
        position: int64 `[]` or one element, the place of the token.
        cache: written unless `k` is None.

    Returns:
        The queries `[heads, dim]`: the bits of `float_ops.head_rows`, as those of keys and values.
    """
    kv_heads, length, dim = cache.keys.shape
    y = torch.empty((q.numel() // dim, dim), dtype=q.dtype, device=q.device)
    require(position, torch.int64, 1, "position")
    for angle in angles:
        require(angle, q.dtype, dim, "angles")
    codes = cache.key_scale is not None
    written = k is not None and v is not None
    launch = _heads_launch(
        (y.shape[0], kv_heads if written else 0),
        dim,
        length,
        norms.form,
        (norms.q is not None, norms.normed_values, norms.v is not None),
        codes,
        overlaps(q.device),
    )
    # q stands for each tensor that is absent, and is not read in its place
    launch(
        q,
        q if k is None else k,
        q if v is None else v,
        q if norms.q is None else norms.q,
        q if norms.k is None else norms.k,
        q if norms.v is None else norms.v,
        *angles,
        position,
        q if cache.key_scale is None else cache.key_scale,
        q if cache.value_scale is None else cache.value_scale,
        y,
        cache.keys,
        cache.values,
    )
    return y


@functools.lru_cache(maxsize=1024)
def _attention_launches(
    count: int, kv_heads: int, dim: int, length: int, window: int, scaling: float, codes: bool, pdl: bool
) -> tuple[Launch, Launch, int]:
    block = power_of_two(dim)
    keys = 64 if block <= 128 else 32
    parts = triton.cdiv(length, keys)
    warps = 4 if block <= 128 else 8
    numbers = (count // kv_heads, dim, length, window, scaling)
    sizes = {"CODES": codes, "BT": keys, "BLOCK": block, "PDL": pdl}
    first = Launch(attend_parts, (count, parts), numbers, sizes, warps, 1, pdl)
    sizes = {"CODES": codes, "BP": PARTS_AT_ONCE, "BLOCK": block, "PDL": pdl}
    return first, Launch(attend_joined, (count, 1), (parts, dim), sizes, 4, 1, pdl), parts


def attend(q: Tensor, cache: CacheRows, position: Tensor, scaling: float, window: int = 0) -> Tensor:
    """Softmax attention of one token over the keys up to its own place.

    Args:
        q: `[heads, dim]`, normalized and rotated.
        cache: holds this token's keys and values too.
        position: int64, one element: the place of the token.
        scaling: of the scores.
        window: how many keys it sees, its own among them; 0 for all.

    Returns:
        `[heads * dim]`. Its bits do not depend on the cache's length.
    """
    kv_heads, length, dim = cache.keys.shape
    count = q.shape[0]
    require(position, torch.int64, 1, "position")
    codes = cache.key_scale is not None
    launches = _attention_launches(count, kv_heads, dim, length, window, scaling, codes, overlaps(q.device))
    parts_of, joined, parts = launches
    most, total = torch.empty((2, count, parts), dtype=torch.float32, device=q.device)
    sums = torch.empty((count, parts, dim), dtype=torch.float32, device=q.device)
    y = torch.empty(count * dim, dtype=q.dtype, device=q.device)
    key_scale = q if cache.key_scale is None else cache.key_scale
    value_scale = q if cache.value_scale is None else cache.value_scale
    parts_of(q, cache.keys, cache.values, position, key_scale, most, total, sums)
    joined(most, total, sums, value_scale, y)
    return y


@functools.lru_cache(maxsize=256)
def _gate_launch(width: int, silu: bool, pdl: bool) -> Launch:
    block = min(power_of_two(width), 512)
    constants = {"SILU": silu, "BLOCK": block, "PDL": pdl}
    return Launch(gate_row, (triton.cdiv(width, block), 1), (width,), constants, 4, 1, pdl)


def gate(gates: Tensor, up: Tensor, activation: str) -> Tensor:
    """`T(T(act(gate)) * up)`: the bits of `float_ops.gate_rows`.

    Args:
        gates: `[width]`.
        up: `[width]`.
        activation: one of `float_ops.ACTIVATIONS`.
    """
    width = gates.numel()
    require(up, gates.dtype, width, "up")
    y = torch.empty(width, dtype=gates.dtype, device=gates.device)
    _gate_launch(width, activation == "silu", overlaps(gates.device))(gates, up, y)
    return y


@functools.lru_cache(maxsize=256)
def _join_launch(width: int, eps: tuple[float, float], form: tuple[bool, ...], pdl: bool) -> Launch:
    block = power_of_two(width)
    constants = dict(zip(("NORM", "SCALAR", "NEXT", "IN_T", "PLUS_ONE"), form, strict=True))
    warps = max(1, min(8, block // 256))
    return Launch(join_row, (1, 1), (width, *eps), {**constants, "BLOCK": block, "PDL": pdl}, warps, 1, pdl)


def join(
    stream: Tensor,
    branch: Tensor,
    norm: tuple[Tensor, NormForm] | None,
    scalar: Tensor | None,
    after: tuple[Tensor, NormForm] | None,
) -> tuple[Tensor, Tensor]:
    """`h = T(stream + norm(branch))`, `T(h * scalar)`, and `after(h)`: the bits of `float_ops.norm_rows`.

    Args:
        stream: `[width]`, at most `MAX_WIDTH` wide.
        branch: `[width]`.
        norm: of the branch, a weight and its form; None for none.
        scalar: one element of T, or None.
        after: the norm of whoever reads the sum next; None for none.

    Returns:
        The sum, and its norm (without `after`, the sum once more).
    """
    width = stream.numel()
    if width > MAX_WIDTH:
        raise ValueError(f"rows of up to {MAX_WIDTH} are normalized, found {width}")
    require(branch, stream.dtype, width, "branch")
    forms = [found[1] for found in (norm, after) if found is not None]
    orders = {(form.weight_in_t, form.plus_one) for form in forms} or {(False, False)}
    if len(orders) > 1:
        raise ValueError("both norms of a sum round in one order")
    ((in_t, plus_one),) = orders
    eps = (0.0 if norm is None else norm[1].eps, 0.0 if after is None else after[1].eps)
    form = (norm is not None, scalar is not None, after is not None, in_t, plus_one)
    y = torch.empty(width, dtype=stream.dtype, device=stream.device)
    n = y if after is None else torch.empty_like(y)
    _join_launch(width, eps, form, overlaps(stream.device))(
        stream,
        branch,
        stream if norm is None else norm[0],
        stream if scalar is None else scalar,
        stream if after is None else after[0],
        y,
        n,
    )
    return y, n
