"""The trainable forms of bytelane's two layers.

A `TunedLinear` or `TunedEmbedding` holds float32 master weights and the logarithms of its scales, all learned. In
training mode it computes `bytelane.tune.fake`, with gradients. In evaluation mode it *is* the integer layer: its codes
and scales go into the `QuantLinear` or `QuantEmbedding` that an exported checkpoint would load as, and that layer runs.
So what evaluation measures is what ships, to the bit, and it has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.layers import QuantEmbedding, QuantLinear
from bytelane.packing import pack_rows
from bytelane.scheme import EmbeddingScheme, LinearScheme, WeightScheme, code_range
from bytelane.tune.fake import fake_linear, fake_quantize_rows, round_weight


def log_scale(value: Tensor | float) -> nn.Parameter:
    """A scale to learn: the float32 logarithm of a positive value."""
    return nn.Parameter(torch.as_tensor(value, dtype=torch.float32).log())


def _scale(log: Tensor | None) -> Tensor | None:
    return None if log is None else log.exp()


class _Tuned(nn.Module):
    """Master weights, weight scales, and the integer layer they make, kept until one of them changes."""

    weight: nn.Parameter
    log_weight_scale: nn.Parameter

    def __init__(self, weight: nn.Parameter, weight_scale: Tensor | nn.Parameter, scheme: WeightScheme) -> None:
        super().__init__()
        self.weight = weight
        self.log_weight_scale = weight_scale if isinstance(weight_scale, nn.Parameter) else log_scale(weight_scale)
        self._weight_scheme = scheme
        self._low, self._high = code_range(scheme.num_bits)
        self._made: tuple[tuple[Any, ...], nn.Module] | None = None

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """What a checkpoint stores of the weight: int8 codes `[rows, columns]`, float32 scales `[rows, groups]`."""
        scale = self.log_weight_scale.exp()
        codes, _ = round_weight(self.weight, scale, self._low, self._high)
        return codes.to(torch.int8), scale

    def _kept(self, make: Callable[[], Any]) -> Any:
        """The integer layer of the current parameters."""
        parts = [(id(p), p._version, p.device) for p in self.parameters()]
        key = (*parts, torch.is_inference_mode_enabled())
        if self._made is None or self._made[0] != key:
            self._made = (key, make())
        return self._made[1]

    def train(self, mode: bool = True) -> _Tuned:
        """Switch between training and evaluation."""
        self._made = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Without the integer layer: a copy makes its own."""
        return {**self.__dict__, "_made": None}


class TunedLinear(_Tuned):
    """A wNa8o8 linear layer in training.

    Parameters: `weight` float32 `[out, in]`, `log_weight_scale` float32 `[out, groups]`, `log_input_scale` and
    `log_output_scale` float32 `[]` or None, `bias` float32 `[out]` or None. Layers that read one tensor hold the same
    `log_input_scale` parameter; a head tied to its embedding holds the embedding's `weight` and `log_weight_scale`.

    Attributes:
        in_features: K.
        out_features: N.
        scheme: what is quantized, and how.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        weight_scale: Tensor | nn.Parameter,
        scheme: LinearScheme,
        *,
        log_input_scale: nn.Parameter | None = None,
        log_output_scale: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
    ) -> None:
        """Build from starting values.

        Args:
            weight: float32 `[out, in]`, trained in place.
            weight_scale: starting scales `[out, groups]`, or another layer's `log_weight_scale` to share.
            scheme: which sides are quantized must agree with the scales given.
            log_input_scale: see `log_scale`.
            log_output_scale: likewise.
            bias: float32 `[out]`, trained in place, or None.
        """
        super().__init__(weight, weight_scale, scheme.weight)
        if (log_input_scale is not None, log_output_scale is not None) != (
            scheme.quantize_input,
            scheme.quantize_output,
        ):
            raise ValueError(f"the scheme is {scheme.label}, the scales given say otherwise")
        self.out_features, self.in_features = weight.shape
        self.scheme = scheme
        self.log_input_scale = log_input_scale
        self.log_output_scale = log_output_scale
        self.bias = bias

    @property
    def input_scale(self) -> Tensor | None:
        """`s_in`, float32 `[]`, or None."""
        return _scale(self.log_input_scale)

    @property
    def output_scale(self) -> Tensor | None:
        """`s_out`, float32 `[]`, or None."""
        return _scale(self.log_output_scale)

    @torch.no_grad()
    def quantized(self, dtype: torch.dtype = torch.float32) -> QuantLinear:
        """The integer layer of the current parameters.

        Args:
            dtype: in which a checkpoint would store the bias.

        Raises:
            CheckpointError: a scale or bias the integer form has no value for.
        """
        codes, scale = self.codes()
        return QuantLinear.from_codes(
            codes,
            scale,
            num_bits=self.scheme.weight.num_bits,
            input_scale=self.input_scale,
            output_scale=self.output_scale,
            bias=None if self.bias is None else self.bias.to(dtype),
            group_size=self.scheme.weight.group_size,
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]` in the dtype of x; see the module's text for the two modes."""
        if not self.training:
            return self._kept(self.quantized)(x)  # type: ignore[no-any-return]
        return fake_linear(
            x,
            self.weight,
            self.log_weight_scale,
            self.log_input_scale,
            self.log_output_scale,
            self.bias,
            self._low,
            self._high,
        )

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.label}"


class TunedEmbedding(_Tuned):
    """A quantized embedding table in training; only the rows asked for are quantized.

    Parameters: `weight` float32 `[rows, dim]`, `log_weight_scale` float32 `[rows, groups]`.
    """

    def __init__(
        self, weight: nn.Parameter, weight_scale: Tensor, scheme: EmbeddingScheme, *, embed_scale: float = 1.0
    ) -> None:
        """Build from starting values; `embed_scale` is the architecture's own factor."""
        super().__init__(weight, weight_scale, scheme.weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.scheme = scheme
        self.embed_scale = embed_scale

    @torch.no_grad()
    def quantized(self, dtype: torch.dtype = torch.float32) -> QuantEmbedding:
        """The packed table of the current parameters, with rows in `dtype`."""
        codes, scale = self.codes()
        return QuantEmbedding(
            pack_rows(codes, self.scheme.weight.num_bits),
            scale,
            embedding_dim=self.embedding_dim,
            num_bits=self.scheme.weight.num_bits,
            group_size=self.scheme.weight.group_size,
            embed_scale=self.embed_scale,
            dtype=dtype,
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids of any shape to `[..., dim]`; see the module's text for the two modes."""
        if not self.training:
            return self._kept(self.quantized)(ids)  # type: ignore[no-any-return]
        scale = nn.functional.embedding(ids.reshape(-1), self.log_weight_scale).exp()
        rows = nn.functional.embedding(ids.reshape(-1), self.weight)
        quantized = fake_quantize_rows(rows, scale, self._low, self._high)
        return (quantized * self.embed_scale).reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme.label}"
