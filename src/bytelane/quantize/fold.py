r"""Changes of basis, folded into the float model's weights before anything is observed; its function stays the same.

A static int8 scale serves every channel and every token of a tensor, so one loud channel costs all others their steps.
Two things are done about it, both exact in real arithmetic, both free at run time.

**Equalization** divides channel j of a tensor by `s_j` where it is written and multiplies column j of the weights that
read it:

    tensor                     written by                      read by
    input of q, k, v           the norm's weight               q, k, v        (the norm's output has no other reader)
    input of gate, up          the norm's weight               gate, up
    input of down              rows of up                      down           (gate * up is linear in up)
    output of v, input of o    rows of v (and its bias)        o              (attention is linear in v)
    output of k, of q          rows of k                       rows of q      (a rotary pair shares s; no q/k norm)

with `s_j = sqrt(amax |x_j| / amax |W_:j|)`, which makes both sides equally wide, and for q and k
`s_j = sqrt(amax |k_j| / amax |q_j|)`.

**Rotation** multiplies the residual stream by an orthogonal matrix R (a Hadamard matrix where the width is a power of
two). A value V in one of n channels becomes about `V / sqrt(n)` in each, which is what lets a static range hold the
massive activations of a first token. `rms(x R) = rms(x)`, so RMSNorm commutes with R once its weight g is folded into
the linears that read it:

    embedding E R        reader W diag(g) R        writer R^T W        head W diag(g) R

Which matrix makes a difference where even the spread value is too loud to be covered and must be clipped: clipping
changes where the vector points, and after the next norm that is all that is left of it. So the loudest vector u that a
layer writes into the stream is found first, and R is made to turn it into `+-|u| / sqrt(n)` in every channel alike:
clipped, it is shorter and points where it did. (More exactly: u is replaced by what should be left of it, see
`Loudest.clipped`.)

A head that was tied to the embedding gets a weight of its own by this: its columns hold the last norm's g.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.errors import QuantizeError
from bytelane.quantize.blocks import Block, blocks, norm_gain

CLIPPED = 20.0
"""Length of the loudest vector, once it is clipped, over that of the residual stream it is added to. Shorter, and what
later layers add turns the sum; longer, and a range that holds it has coarser steps for all other tokens."""

_CHUNK_ROWS = 8192
"""Rows rotated at a time in float64: bounds the scratch of a large embedding table."""


class FoldError(QuantizeError):
    """The architecture does not allow what was asked."""


def rotation(width: int) -> Tensor:
    """An orthogonal matrix whose entries are all small: float64 `[width, width]`.

    `diag(signs) (H (x) C)`: H the Hadamard matrix of the largest power of two that divides `width`, C the orthonormal
    DCT-II of what is left, signs from a fixed seed. The largest entry is at most `sqrt(2 / width)`.
    """
    power = width & -width
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    odd = width // power
    k = torch.arange(odd, dtype=torch.float64)
    cosine = torch.cos(math.pi / odd * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / odd)
    cosine[0] /= math.sqrt(2)
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs[:, None] * torch.kron(hadamard / math.sqrt(power), cosine)


def aligned_rotation(vector: Tensor) -> Tensor:
    """A `rotation` that turns a vector into one whose entries are all the same: float64 `[width, width]`.

    A reflection first turns the vector onto the first axis, which `rotation` turns into an even vector.

    Args:
        vector: `[width]`, finite; a zero vector gives `rotation(width)`.
    """
    matrix = rotation(vector.numel())
    normal = vector.detach().to("cpu", torch.float64)
    length = float(normal.norm())
    if length == 0.0:
        return matrix
    normal = normal / length
    normal[0] += math.copysign(1.0, float(normal[0]))  # away from zero: no digit is lost
    return matrix - torch.outer(normal * (2.0 / float(normal @ normal)), normal @ matrix)


def _times(weight: Tensor, matrix: Tensor) -> Tensor:
    """`weight @ matrix` in float64, in the weight's dtype, a few rows at a time."""
    matrix = matrix.to(weight.device)
    return torch.cat([(part.to(torch.float64) @ matrix).to(weight.dtype) for part in weight.split(_CHUNK_ROWS)])


def _gain(norm: nn.Module, what: str) -> tuple[Tensor, float]:
    found = norm_gain(norm)
    if found is None:
        raise FoldError(f"{what} is a {type(norm).__name__}, which is no RMSNorm; nothing can be folded into it")
    return found


def _rotatable(model: Any, found: Sequence[Block]) -> tuple[nn.Embedding, nn.Linear, nn.Module]:
    base = getattr(model, "base_model", model)
    norm, head = getattr(base, "norm", None), model.get_output_embeddings()
    table = model.get_input_embeddings()
    layers = getattr(base, "layers", ())
    if len(found) != len(layers) or not found or not all(b.plain_residual for b in found):
        raise FoldError(
            f"{type(model).__name__}: its residual stream cannot be rotated, since a norm or another input is in the "
            f"way; leave `rotate` out"
        )
    if type(table) is not nn.Embedding or not isinstance(head, nn.Linear) or not isinstance(norm, nn.Module):
        raise FoldError(
            f"{type(model).__name__}: rotation needs a plain embedding table, a final norm and a linear head; "
            f"leave `rotate` out"
        )
    return table, head, norm


@dataclass
class Loudest:
    """The longest vector that a layer writes into the residual stream.

    Attributes:
        vector: float32 `[width]`.
        before: what it is added to, likewise.
    """

    vector: Tensor
    before: Tensor

    def clipped(self) -> Tensor:
        """What a static range should turn the vector into: float32 `[width]`.

        A sum `before + vector` is read through a norm, so `a (before + vector)` is read as the same: the vector may
        shrink to `a (before + vector) - before`. Here `a` is such that `CLIPPED` times the length of what was there
        before is left, or 1 where the vector is no longer than that.
        """
        length = float(self.vector.norm())
        factor = min(1.0, CLIPPED * float(self.before.norm()) / length) if length > 0.0 else 1.0
        return factor * (self.before + self.vector) - self.before


@torch.no_grad()
def find_loudest(model: nn.Module, windows: Sequence[Tensor]) -> Loudest:
    """The longest vector of all tokens and of all layers that write into the residual stream.

    Args:
        model: the float model.
        windows: int64 `[length]` token ids each; massive activations come with the first token of any.

    Raises:
        FoldError: the model has no layers of the kind that is rotated.
    """
    found: list[Loudest] = []
    streams: list[Tensor] = []

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        streams[:] = [args[0].detach().flatten(0, -2)]

    def written(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        rows = output.detach().flatten(0, -2).to(torch.float32)
        at = int(rows.norm(dim=-1).argmax())
        if not found or rows[at].norm() > found[0].vector.norm():
            found[:] = [Loudest(rows[at].clone(), streams[0][at].to(torch.float32).clone())]

    handles = []
    for b in blocks(model):
        handles += [norm.register_forward_pre_hook(read) for norm in (b.attention_norm, b.mlp_norm)]
        handles += [linear.register_forward_hook(written) for linear in (b.o, b.down)]
    device = next(model.parameters()).device
    try:
        for window in windows:
            model(input_ids=window[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise FoldError(f"{type(model).__name__}: none of its layers writes into a residual stream; leave `rotate` out")
    return found[0]


@torch.no_grad()
def rotate(model: Any, windows: Sequence[Tensor] = ()) -> None:
    """Rotate the residual stream of a Llama-like model in place; unties a tied head.

    Args:
        model: the float model.
        windows: int64 `[length]` token ids each, to find the loudest vector in, which then becomes the same in every
            channel; without any the rotation is blind.

    Raises:
        FoldError: the architecture has something in the way.
    """
    found = list(blocks(model))
    table, head, last = _rotatable(model, found)
    gains = [_gain(n, f"a norm of {b.name}") for b in found for n in (b.attention_norm, b.mlp_norm)]
    final = _gain(last, "the final norm")
    matrix = aligned_rotation(find_loudest(model, windows).clipped()) if windows else rotation(table.embedding_dim)
    if head.weight is table.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False

    def read(linears: Sequence[nn.Linear | None], gain: tuple[Tensor, float]) -> None:
        weight, constant = gain
        diagonal = (constant + weight.detach().to(torch.float64))[:, None] * matrix.to(weight.device)
        for linear in linears:
            if linear is not None:
                linear.weight.copy_(_times(linear.weight, diagonal))
        weight.fill_(1.0 - constant)

    def write(linear: nn.Linear) -> None:
        linear.weight.copy_(_times(linear.weight.T.contiguous(), matrix).T)
        if linear.bias is not None:
            linear.bias.copy_(_times(linear.bias[None], matrix)[0])

    table.weight.copy_(_times(table.weight, matrix))
    for block, attention, mlp in zip(found, gains[0::2], gains[1::2], strict=True):
        read((block.q, block.k, block.v), attention)
        read((block.gate, block.up), mlp)
        write(block.o)
        write(block.down)
    read((head,), final)


CHECKED_TOKENS = 64
"""Tokens of the first window that a folded model is compared on."""

_DIFFERENCES = {torch.float32: 2.0**-8, torch.float64: 2.0**-8}
"""Allowed relative difference of the logits. Some ten thousand roundings of 2^-24 stand between them and massive
activations cancel; a fold that does not fit the architecture is wrong by a whole."""
_COARSE_DIFFERENCE = 0.25
"""In 16-bit dtypes the folded weights themselves are rounded to 8 or 11 bits."""


@torch.no_grad()
def check_same_function(model: Any, folded: Any, window: Tensor) -> None:
    """Refuse a fold that changed what the model computes: an architecture unlike what its names say.

    Args:
        model: the float model.
        folded: the same after `rotate` or `equalize`.
        window: int64 `[length]` token ids.

    Raises:
        FoldError: the logits differ by more than rounding.
    """
    ids = window[None, :CHECKED_TOKENS].to(next(model.parameters()).device)
    before = model(input_ids=ids, use_cache=False).logits.to(torch.float32)
    after = folded(input_ids=ids, use_cache=False).logits.to(torch.float32)
    difference = float((after - before).norm() / before.norm())
    if not difference <= _DIFFERENCES.get(model.dtype, _COARSE_DIFFERENCE):
        raise FoldError(
            f"{type(model).__name__}: equalized or rotated it computes something else (its logits differ by "
            f"{difference:.1%}): its layers are not as their names say, or its dtype {model.dtype} is too coarse; "
            f"leave `equalize` and `rotate` out"
        )


class _Maxima:
    """Hooks that keep `amax |x_j|` of the inputs or outputs of linears, per channel."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self, linear: nn.Linear, *, output: bool) -> None:
        kept = self.outputs if output else self.inputs

        def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            x = result if output else args[0]
            found = x.detach().abs().flatten(0, -2).amax(0).float()
            kept[module] = torch.maximum(found, kept[module]) if module in kept else found

        self._handles.append(linear.register_forward_hook(hook))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _columns(linears: Sequence[nn.Linear]) -> Tensor:
    return torch.stack([linear.weight.detach().float().abs().amax(0) for linear in linears]).amax(0)


def _balance(loud: Tensor, quiet: Tensor) -> Tensor:
    """`sqrt(loud / quiet)` with a geometric mean of 1; a channel that is dead on either side keeps 1."""
    alive = (loud > 0) & (quiet > 0)
    if not bool(alive.any()):
        return torch.ones_like(loud)
    log = 0.5 * (torch.log(loud.clamp_min(1e-30)) - torch.log(quiet.clamp_min(1e-30)))
    log = torch.where(alive, log - log[alive].mean(), torch.zeros_like(log))
    return torch.exp(log.clamp(-10.0, 10.0))


def _scale_rows(linear: nn.Linear, factor: Tensor) -> None:
    linear.weight.mul_(factor[:, None].to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias.mul_(factor.to(linear.bias.dtype))


def _scale_columns(linears: Sequence[nn.Linear], factor: Tensor) -> None:
    for linear in linears:
        linear.weight.mul_(factor.to(linear.weight.dtype))


@torch.no_grad()
def equalize(
    model: nn.Module, windows: Sequence[Tensor], *, progress: Callable[[int], None] | None = None
) -> dict[str, int]:
    """Equalize channels in place, wherever the architecture allows.

    Args:
        model: the float model.
        windows: int64 `[length]` token ids each, to see how loud each channel is.
        progress: called with the windows read.

    Returns:
        How many tensors were equalized, by kind (`"norm"`, `"down"`, `"value"`, `"query/key"`).
    """
    found = list(blocks(model))
    maxima = _Maxima()
    for b in found:
        for linear in (b.q, b.gate, b.o, b.down):
            maxima.watch(linear, output=False)
        for projection in (b.q, b.k):
            if projection is not None:
                maxima.watch(projection, output=True)
    device = next(model.parameters()).device
    try:
        for done, window in enumerate(windows, start=1):
            model(input_ids=window[None].to(device), use_cache=False)
            if progress is not None:
                progress(done)
    finally:
        maxima.remove()
    counts = dict.fromkeys(("norm", "down", "value", "query/key"), 0)
    for b in found:
        for norm, readers in (
            (b.attention_norm, [x for x in (b.q, b.k, b.v) if x is not None]),
            (b.mlp_norm, [b.gate, b.up]),
        ):
            gain = norm_gain(norm)
            if gain is None or readers[0] not in maxima.inputs:
                continue
            weight, constant = gain
            factor = _balance(maxima.inputs[readers[0]], _columns(readers))
            weight.copy_(((constant + weight.float()) / factor - constant).to(weight.dtype))
            _scale_columns(readers, factor)
            counts["norm"] += 1
        if b.down in maxima.inputs:
            factor = _balance(maxima.inputs[b.down], _columns([b.down]))
            _scale_rows(b.up, 1 / factor)
            _scale_columns([b.down], factor)
            counts["down"] += 1
        if b.v is not None and b.plain_values and b.o in maxima.inputs:
            counts["value"] += _equalize_values(b, maxima.inputs[b.o])
        if b.k is not None and b.plain_heads and b.k in maxima.outputs:
            _equalize_keys(b, maxima.outputs[b.q], maxima.outputs[b.k])
            counts["query/key"] += 1
    return counts


def _per_key_head(x: Tensor, block: Block, key_heads: int) -> Tensor:
    """Channels of query heads, the largest of those that share a key head: `[heads * d]` to `[key_heads, d]`."""
    return x.reshape(key_heads, -1, block.head_dim).amax(1)


def _equalize_values(block: Block, loud: Tensor) -> int:
    v, o = block.v, block.o
    assert v is not None
    heads = v.out_features // block.head_dim
    if o.in_features % v.out_features:
        return 0
    factor = _balance(_per_key_head(loud, block, heads).flatten(), _per_key_head(_columns([o]), block, heads).flatten())
    _scale_rows(v, 1 / factor)
    repeat = o.in_features // v.out_features
    _scale_columns([o], factor.reshape(heads, 1, -1).expand(-1, repeat, -1).flatten())
    return 1


def _equalize_keys(block: Block, query: Tensor, key: Tensor) -> None:
    k = block.k
    assert k is not None
    heads, half = k.out_features // block.head_dim, block.head_dim // 2
    loud = key.reshape(heads, 2, half).amax(1)
    quiet = _per_key_head(query, block, heads).reshape(heads, 2, half).amax(1)
    factor = _balance(loud.flatten(), quiet.flatten()).reshape(heads, 1, half).expand(-1, 2, -1).reshape(heads, -1)
    _scale_rows(k, 1 / factor.flatten())
    repeat = block.q.out_features // k.out_features
    _scale_rows(block.q, factor[:, None].expand(-1, repeat, -1).flatten())
