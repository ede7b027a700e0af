"""The native kernels (csrc/cpu/module.cpp): addresses as integers, sizes, and no tensor.

`isa` is an index into `isas()`; `path` is 0 (packed) or 1 (unpacked); a dtype is 0 (float32), 1 (bfloat16) or
2 (float16); an absent output scale or bias is address 0; `output_scales` says how many there are: 0, 1 or n. A wrong
size or an unsupported `isa` raises ValueError, an id outside a table IndexError.
"""

def isas() -> list[str]: ...
def supported(isa: str, /) -> bool: ...
def usable_threads(asked: int, /) -> int: ...
def advise_huge_pages(address: int, size: int, /) -> None: ...
def peak_dots(isa: int, bits: int, repeats: int, threads: int, /) -> int: ...
def read_all(isa: int, words: int, size: int, threads: int, /) -> int: ...
def quantize(isa: int, x: int, dtype: int, count: int, input_scale: int, q: int, threads: int, /) -> None: ...
def accumulate(
    isa: int, path: int, q: int, w: int, acc: int, m: int, n: int, k: int, bits: int, group_size: int, threads: int, /
) -> None: ...
def requantize(
    isa: int,
    acc: int,
    weight_scale: int,
    input_scale: int,
    output_scale: int,
    output_scales: int,
    bias: int,
    y: int,
    dtype: int,
    m: int,
    n: int,
    groups: int,
    threads: int,
    /,
) -> None: ...
def group_scales(
    isa: int,
    weight_scale: int,
    input_scale: int,
    output_scale: int,
    output_scales: int,
    r: int,
    n: int,
    groups: int,
    threads: int,
    /,
) -> None: ...

class BoundLinear:
    def __init__(
        self,
        isa: int,
        path: int,
        dtype: int,
        w: int,
        weight_scale: int,
        input_scale: int,
        output_scale: int,
        output_scales: int,
        bias: int,
        group_scales: int,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        /,
    ) -> None: ...
    def run(self, x: int, y: int, m: int, threads: int, /) -> None: ...

def weight_only(
    isa: int,
    x: int,
    dtype: int,
    w: int,
    weight_scale: int,
    output_scale: int,
    bias: int,
    y: int,
    m: int,
    n: int,
    k: int,
    bits: int,
    groups: int,
    threads: int,
    /,
) -> None: ...
def embedding(
    isa: int,
    ids: int,
    wide_ids: bool,
    count: int,
    w: int,
    row_stride: int,
    weight_scale: int,
    scale_stride: int,
    rows: int,
    dim: int,
    groups: int,
    bits: int,
    embed_scale: float,
    y: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def norm_rows(
    isa: int,
    x: int,
    x_stride: int,
    dtype: int,
    weight: int,
    weight_in_t: bool,
    eps: float,
    residual: int,
    scalar: int,
    y: int,
    rows: int,
    width: int,
    threads: int,
    /,
) -> None: ...
def head_rows(
    isa: int,
    x: int,
    x_stride: int,
    dtype: int,
    normalized: bool,
    weight: int,
    weight_in_t: bool,
    eps: float,
    cosine: int,
    sine: int,
    angles: int,
    y: int,
    rows: int,
    heads: int,
    dim: int,
    threads: int,
    /,
) -> None: ...
def gate_rows(
    isa: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    dtype: int,
    activation: int,
    y: int,
    rows: int,
    width: int,
    threads: int,
    /,
) -> None: ...
def dense(isa: int, x: int, w: int, bias: int, y: int, dtype: int, m: int, n: int, k: int, threads: int, /) -> None: ...
def store_codes(
    isa: int,
    x: int,
    x_stride: int,
    dtype: int,
    scale: int,
    codes: int,
    batch_stride: int,
    head_stride: int,
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    /,
) -> None: ...
def attention(*arguments: float) -> None:
    """Attention over stored keys and values.

    `isa, q, dtype`, keys, values (address, scale, batch, head and token stride each), mask (address, batch and query
    stride), `y, scaling, batch, queries, tokens, heads, kv_heads, dim, threads`.
    """

class DecoderLayer:
    """A decoder layer in the making, then to be run: csrc/cpu/decoder_layer.hpp."""

    def __init__(
        self,
        isa: int,
        dtype: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        dim: int,
        scaling: float,
        activation: int,
        /,
    ) -> None: ...
    def norm(self, name: str, weight: int, eps: float, weight_in_t: bool, /) -> None: ...
    def scalar(self, value: int, /) -> None: ...
    def integer(
        self,
        role: str,
        path: int,
        w: int,
        weight_scale: int,
        input_scale: int,
        output_scale: int,
        output_scales: int,
        bias: int,
        group_scales: int,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        /,
    ) -> None: ...
    def weight_only(
        self,
        role: str,
        w: int,
        weight_scale: int,
        output_scale: int,
        bias: int,
        n: int,
        k: int,
        bits: int,
        groups: int,
        /,
    ) -> None: ...
    def columns(self, name: str, group: int, first: int, /) -> None: ...
    def seal(self) -> None: ...
    def before(
        self, x: int, cosine: int, sine: int, angles: int, q: int, k: int, v: int, m: int, threads: int, /
    ) -> None: ...
    def after(self, *arguments: int) -> None:
        """From attention to the layer's output.

        `x, q`, keys, values and mask as for `attention`, `per_layer, per_layer_stride, y, batch, queries, tokens,
        threads`.
        """

class LayerStack:
    """Decoder layers that a token goes through one after the other."""

    def __init__(self) -> None: ...
    def add(self, layer: DecoderLayer, /) -> None: ...
    def step(
        self,
        x: int,
        slots: int,
        rows: int,
        angles: int,
        angle_count: int,
        per_layer: int,
        per_layer_step: int,
        y: int,
        threads: int,
        /,
    ) -> None: ...
