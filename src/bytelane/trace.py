"""Run one prompt two ways and see, layer by layer, where the numbers part.

Each way is a checkpoint with a numerics and, if wanted, another way of feeding the same tokens: threads, batch copies,
prefill in chunks. Every linear layer's input and output is kept from the first run and compared with the second's, as
int8 codes where the layer has a scale on that side and as values where it has none:

    codes of x    the layer's own quantization of its input, clamp(rne(f32(x) * f32(1 / s_in)), -128, 127)
    codes of y    rne(y / s_out): exact, since y is a code times s_out, and 8 bits fit any activation dtype

The integer layers give the same codes for the same input codes, whatever the threads, batch or chunks. What lies
between them is float: norms, rotary embedding, attention, activation functions, residual sums, and layers without an
input scale. Both runs compute it the same way, so that the layers' arithmetic is what is compared: by bytelane's
kernels where the architecture has them (`bytelane.decoder`), by torch where one side is transformers' own quantizer. A
difference that starts at a layer's *input* came from the float operations; one that starts at an *output* with equal
inputs came from the layer's own arithmetic. Between two integer runs of one checkpoint the second never happens, and
with bytelane's kernels neither does the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bytelane import numerics
from bytelane.cache import cache_keyword
from bytelane.decoder import install_decoder
from bytelane.errors import ConfigError
from bytelane.layers import QuantLinear
from bytelane.models import load_model, resolve_checkpoint

Runtime = Literal["integer", "emulated", "transformers"]

_WAY = re.compile(r"(?P<model>.*?)(?:@(?P<options>[a-z]+(?:,[a-z]+=\d+)*))?")


@dataclass(frozen=True)
class Way:
    """One way to run a prompt: `MODEL@numerics,option=n`.

    Attributes:
        model: a checkpoint folder or hub id.
        runtime: `integer` or `emulated` by bytelane, or `transformers` for its own quantizer.
        threads: CPU threads; 0 for torch's choice.
        batch: copies of the prompt in one batch; the first is compared.
        chunk: tokens in a prefill step; 0 for all at once.
    """

    model: str
    runtime: Runtime = "integer"
    threads: int = 0
    batch: int = 1
    chunk: int = 0

    @classmethod
    def parse(cls, text: str) -> Way:
        """Read `MODEL`, `MODEL@emulated` or `MODEL@integer,chunk=16,batch=3,threads=1`.

        Raises:
            ConfigError: an unknown runtime or option.
        """
        match = _WAY.fullmatch(text)
        assert match is not None  # the pattern matches any text
        runtime, *pairs = (match["options"] or "integer").split(",")
        if runtime not in get_args(Runtime):
            raise ConfigError(f"a runtime is one of {', '.join(get_args(Runtime))}, found {runtime!r}", tensor=text)
        options = {key: int(value) for key, value in (pair.split("=") for pair in pairs)}
        unknown = options.keys() - {"threads", "batch", "chunk"}
        if unknown or options.get("batch", 1) < 1:
            raise ConfigError("options are threads=N, batch=N (at least 1) and chunk=N", tensor=text)
        return cls(match["model"], runtime, **options)  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """Short, for tables."""
        parts = [f"{k}={v}" for k, v in (("threads", self.threads), ("chunk", self.chunk)) if v]
        parts += [f"batch={self.batch}"] if self.batch > 1 else []
        return ",".join([self.runtime, *parts])


@dataclass(frozen=True)
class SideDifference:
    """How one side of one layer differs between two runs.

    Attributes:
        differing: elements that differ: codes where the side has a scale, values where it has none.
        elements: elements compared.
        largest_code: the largest difference of codes; None for a side without a scale.
        largest_value: the largest absolute difference of values.
        first_position: the first token with a difference; None without any.
    """

    differing: int
    elements: int
    largest_code: int | None
    largest_value: float
    first_position: int | None

    @property
    def share(self) -> float:
        """Differing elements over all."""
        return self.differing / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class LayerDifference:
    """One layer in the order of execution."""

    name: str
    input: SideDifference
    output: SideDifference


@dataclass(frozen=True)
class TraceResult:
    """Two runs compared.

    Attributes:
        layers: in the order the first run executed them.
        logits: the logits' difference.
        argmax_agreement: share of positions whose likeliest token is the same.
        tokens: of the prompt.
    """

    layers: tuple[LayerDifference, ...]
    logits: SideDifference
    argmax_agreement: float
    tokens: int

    @property
    def first(self) -> tuple[str, str] | None:
        """The first layer with a difference and the side it starts on; None when all is equal."""
        for layer in self.layers:
            if layer.input.differing:
                return layer.name, "input"
            if layer.output.differing:
                return layer.name, "output"
        return ("logits", "output") if self.logits.differing else None


@dataclass
class _Record:
    """What one layer read and wrote for the first sequence: `[tokens, features]`, and the scales that make codes of it.

    A side with a scale is kept as int8 codes beside its values in the activation dtype.
    """

    x: list[Tensor]
    y: list[Tensor]
    input_scale: Tensor | None
    output_scale: Tensor | None


def _scale(module: nn.Module, name: str, theirs: str) -> Tensor | None:
    scale = getattr(module, name, None)
    scale = getattr(module, theirs, None) if scale is None else scale
    return None if scale is None or not float(scale) else scale.detach().to(torch.float32).reshape(())


class _Tape:
    """Hooks on every linear layer of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.records: dict[str, _Record] = {}
        self._handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | QuantLinear)
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            record = self.records.get(name)
            if record is None:
                s_in = _scale(module, "input_scale", "input_activation_scale")
                s_out = _scale(module, "output_scale", "output_activation_scale")
                record = self.records[name] = _Record([], [], s_in, s_out)
            record.x.append(arguments[0][0].detach().reshape(-1, arguments[0].shape[-1]).clone())
            record.y.append(output[0].detach().reshape(-1, output.shape[-1]).clone())

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def load_way(way: Way, dtype: torch.dtype | None, *, native: bool = True) -> PreTrainedModel:
    """The model of a way, in eval mode; with `native`, what lies between the layers is bytelane's where it can be.

    Raises:
        CheckpointError: the checkpoint is refused.
    """
    if way.runtime != "transformers":
        model = load_model(way.model, numerics=way.runtime, dtype=dtype, float_ops="torch")
        if native:
            install_decoder(model)  # in emulated numerics too: the layers' own arithmetic alone shall differ
        return model
    folder = resolve_checkpoint(way.model)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    except (ValueError, ImportError, RuntimeError) as error:  # how its quantizers say that a checkpoint is not for them
        raise ConfigError(f"transformers does not load this checkpoint by itself: {error}", file=way.model) from error


@torch.inference_mode()
def run(
    way: Way, ids: Tensor, *, dtype: torch.dtype | None = None, native: bool = True
) -> tuple[dict[str, Any], Tensor]:
    """Feed token ids `[n]` one way; with `native`, what lies between the layers is bytelane's where it can be.

    Returns:
        The layers' records in execution order, and the logits `[n, vocabulary]` in float32.

    Raises:
        CheckpointError: the checkpoint is refused.
    """
    model = load_way(way, dtype, native=native)
    tape = _Tape(model)
    threads = torch.get_num_threads()
    batch = ids[None].expand(way.batch, -1)
    logits: list[Tensor] = []
    past = None
    try:
        if way.threads:
            torch.set_num_threads(way.threads)
        for part in batch.split(way.chunk or batch.shape[1], dim=1):
            output = model(part, **{cache_keyword(model): past}, use_cache=True)
            past = output[cache_keyword(model)]
            logits.append(output.logits[0].to(torch.float32))
    finally:
        torch.set_num_threads(threads)
        tape.close()
    return dict(tape.records), torch.cat(logits)


def _compare(a: Tensor, b: Tensor, codes_a: Tensor | None, codes_b: Tensor | None) -> SideDifference:
    left, right = a.to(torch.float32), b.to(torch.float32)
    coded = codes_a is not None and codes_b is not None
    differs = codes_a != codes_b if coded else left != right
    assert isinstance(differs, Tensor)
    rows = differs.any(dim=-1).nonzero()
    gap = (left - right).abs()
    largest = None
    if codes_a is not None and codes_b is not None:
        largest = int((codes_a.int() - codes_b.int()).abs().max()) if differs.numel() else 0
    return SideDifference(
        differing=int(differs.sum()),
        elements=differs.numel(),
        largest_code=largest,
        largest_value=float(gap.max()) if gap.numel() else 0.0,
        first_position=int(rows[0]) if len(rows) else None,
    )


def _output_codes(y: Tensor, scale: Tensor | None) -> Tensor | None:
    return None if scale is None else torch.round(y.to(torch.float32) / scale).to(torch.int16)


def compare(first: tuple[dict[str, Any], Tensor], second: tuple[dict[str, Any], Tensor]) -> TraceResult:
    """Compare two runs of the same tokens; layers are matched by name.

    Raises:
        ConfigError: the runs have no layer in common.
    """
    (records_a, logits_a), (records_b, logits_b) = first, second
    layers = []
    for name, a in records_a.items():
        b = records_b.get(name)
        if b is None:
            continue
        xa, xb, ya, yb = (torch.cat(t) for t in (a.x, b.x, a.y, b.y))
        if xa.shape != xb.shape or ya.shape != yb.shape:
            raise ConfigError(f"the two models differ in shape: {tuple(xa.shape)} and {tuple(xb.shape)}", tensor=name)
        ins = [None if r.input_scale is None else numerics.quantize(x, r.input_scale) for r, x in ((a, xa), (b, xb))]
        outs = [_output_codes(ya, a.output_scale), _output_codes(yb, b.output_scale)]
        layers.append(LayerDifference(name, _compare(xa, xb, *ins), _compare(ya, yb, *outs)))
    if not layers:
        raise ConfigError("the two models have no linear layer in common", tensor="trace")
    agreement = float((logits_a.argmax(-1) == logits_b.argmax(-1)).to(torch.float32).mean())
    return TraceResult(tuple(layers), _compare(logits_a, logits_b, None, None), agreement, logits_a.shape[0])


def trace(first: Way, second: Way, ids: Tensor, *, dtype: torch.dtype | None = None) -> TraceResult:
    """Run token ids `[n]` both ways, one after the other, and compare. See `run` and `compare` for the errors."""
    native = "transformers" not in (first.runtime, second.runtime)
    return compare(run(first, ids, dtype=dtype, native=native), run(second, ids, dtype=dtype, native=native))
