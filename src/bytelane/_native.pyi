"""The native kernels (csrc/cpu/module.cpp): addresses as integers, sizes, and no tensor.

`isa` is an index into `isas()`; `path` is 0 (packed) or 1 (unpacked); a dtype is 0 (float32), 1 (bfloat16) or
2 (float16); an absent output scale or bias is address 0; `output_scales` says how many there are: 0, 1 or n. A wrong
size or an unsupported `isa` raises ValueError, an id outside a table IndexError.
"""

def isas() -> list[str]: ...
def supported(isa: str, /) -> bool: ...
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
def linear(
    isa: int,
    path: int,
    x: int,
    dtype: int,
    w: int,
    weight_scale: int,
    input_scale: int,
    output_scale: int,
    output_scales: int,
    bias: int,
    y: int,
    m: int,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    threads: int,
    /,
) -> None: ...
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
