"""What runs each layer of a checkpoint, and what a token costs: the answer of `bytelane explain`.

A layer's blocking is worked out here from the same constants as the drivers in csrc/cpu/matmul.hpp, matmul_quads.hpp
and matmul_panels.hpp (a test holds the two together). Bytes per token are those a decoder must read for one token of
one sequence whatever else it does: packed codes and weight scales of every layer, one row of each embedding table, and
every other weight matrix in its float form. The time of a token can never be less than these bytes over the machine's
bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from bytelane.checkpoint import Checkpoint, QuantizedModule
from bytelane.decoder import refusals
from bytelane.dispatch import Kernel, Problem, explain
from bytelane.overrides import ScaleOverride
from bytelane.scheme import Kind, LinearScheme, row_bytes

PANEL = 64  # kPanel: output channels in a panel at most
STEP = 16  # kStep: channels that requantize together
MAX_TILE = 4  # kMaxTile
PANEL_ROWS = 8  # kPanelRows
SERIAL_BYTES = 48 << 10  # kSerialBytes
TILE_BYTES = 32 << 10  # kTileBytes
QUAD_CHANNELS = {"avx2": 2}  # quad_channels: weight rows side by side; others have 4
# quad_rows, of a tile; others have 2
QUAD_ROWS = {"avx512amx": 6, "avx512vbmi": 6, "avx512vnni": 6, "avx2": 6, "dotprod": 6}
FEW_ROWS = {"avx2": 2}  # few_rows: so few have a tile of their own,
FEW_CHANNELS = {"avx2": 4}  # few_channels
# most_quad_rows: quads beat panels; others 0
MOST_QUAD_ROWS = {"avx512amx": 12, "avx512vbmi": 20, "avx512vnni": 20, "avx2": 48}
GROUP_PANEL_ROWS = {"avx2": 5}  # group_panel_rows: groups go to panels from here on; others as without groups
# most_spread_rows, of those that spread other widths in registers
MOST_SPREAD_ROWS = {"avx512amx": 12, "avx512vbmi": 64, "avx2": 8}
IN_TILE_REGISTERS = {"avx512amx"}  # multiply panels without groups in them


@dataclass(frozen=True)
class Plan:
    """How a layer is cut up.

    Attributes:
        blocking: in words.
        threads: that share its output channels.
    """

    blocking: str
    threads: int


def plan_linear(kernel: Kernel, k: int, n: int, m: int, bits: int, threads: int, group_size: int = 0) -> Plan:
    """How the native integer linear cuts `[m, k] x [n, k]` up.

    Args:
        kernel: of the table, a native one of the operation `linear`.
        k: in_features.
        n: out_features.
        m: rows of activations.
        bits: width of the weights.
        threads: that may be used.
        group_size: inputs per weight scale; 0 for one scale per channel.
    """
    packed = kernel.name.endswith(".packed")
    size = row_bytes(k, bits)
    isa = kernel.isa or ""
    spreads = isa in MOST_SPREAD_ROWS and not packed and not group_size
    panel_rows = PANEL_ROWS if bits < 8 and (packed or spreads) else PANEL_ROWS * 3 // 2
    transposed = m >= (GROUP_PANEL_ROWS.get(isa, panel_rows) if group_size else panel_rows)
    in_place = "dotted as they lie" if packed else "spread in registers"
    if packed:
        side_by_side = not group_size and (not transposed or m <= MOST_QUAD_ROWS.get(isa, 0))
    else:
        side_by_side = spreads and m <= MOST_SPREAD_ROWS[isa]
    if m > 1 and side_by_side:
        tile = -(-m // -(-m // QUAD_ROWS.get(isa, 2)))
        threads = 1 if size * n * m < SERIAL_BYTES else min(threads, -(-n // STEP))
        channels = (FEW_CHANNELS if m <= FEW_ROWS.get(isa, 0) else QUAD_CHANNELS).get(isa, 4)
        return Plan(f"{channels} channels x {tile} rows a tile, codes {in_place}", threads)
    if transposed:
        panels = -(-n // PANEL)
        how = f"panels of {PANEL} channels, spread to bytes and transposed once for all rows"
        if isa in IN_TILE_REGISTERS and not group_size:
            how += ", multiplied in tile registers"
        return Plan(how, min(threads, panels))
    threads = 1 if size * n * m < SERIAL_BYTES else threads
    panel = PANEL
    while m > MAX_TILE and panel > STEP and panel * size > TILE_BYTES:
        panel //= 2
    while panel > MAX_TILE * 2 and n < panel * 4 * threads and threads > 1:
        panel //= 2
    how = in_place if packed or spreads else "spread to bytes on the way"
    if group_size and group_size < k:
        wide, tile = f"{panel} channels, four of them", min(m, MAX_TILE)
        how = f"{how}, {k // group_size} groups"
    else:
        wide, tile = f"{panel} channels", -(-m // -(-m // MAX_TILE))
    return Plan(f"{wide} x {tile} row{'s' * (tile > 1)} a tile, codes {how}", max(1, min(threads, -(-n // panel))))


@dataclass(frozen=True)
class _Place:
    name: str
    op: str
    module: QuantizedModule
    scheme: str


def _places(checkpoint: Checkpoint, resolved: dict[str, ScaleOverride]) -> Iterator[_Place]:
    for module in checkpoint.modules.values():
        scheme = module.scheme
        if module.kind is not Kind.LINEAR or not isinstance(scheme, LinearScheme):
            yield _Place(module.name, "embedding", module, scheme.label)
            continue
        scales = checkpoint.read_scales(module.name)
        sides = resolved.get(module.name, ScaleOverride()).sides(scales.input_scale, scales.output_scale)
        scheme = LinearScheme(scheme.weight, sides[0] is not None, sides[1] is not None)
        yield _Place(module.name, "linear" if scheme.quantize_input else "linear_weight_only", module, scheme.label)
    for head, source in checkpoint.tied.items():
        module, given = checkpoint.modules[source], resolved.get(head, ScaleOverride())
        scheme = LinearScheme(module.scheme.weight, given.input_scale is not None, given.output_scale is not None)
        yield _Place(head, "linear" if scheme.quantize_input else "linear_weight_only", module, scheme.label)


def token_bytes(module: QuantizedModule, op: str) -> int:
    """Bytes of a module that one token reads: one row of a table, all of a matrix; scales as float32."""
    rows = 1 if op == "embedding" else module.shape[0]
    return rows * (row_bytes(module.shape[1], module.scheme.weight.num_bits) + 4 * module.groups)


def describe_layers(
    checkpoint: Checkpoint,
    resolved: dict[str, ScaleOverride],
    dtype: torch.dtype,
    device: str,
    rows: list[int],
    threads: int,
) -> dict[str, Any]:
    """Each layer's kernel, blocking and bytes per token, and the whole.

    Args:
        checkpoint: the open checkpoint; headers and scales are read.
        resolved: overrides by layer, as `Overrides.resolve` gives them.
        dtype: of activations.
        device: the device type.
        rows: the numbers of rows (M) to ask for.
        threads: that may be used on the CPU.
    """
    places = list(_places(checkpoint, resolved))
    quantized = sum(token_bytes(p.module, p.op) for p in places)
    tables = {p.name for p in places if p.op == "embedding"}
    plain = {
        name: checkpoint.plain_bytes(name)
        for name, info in checkpoint.plain.items()
        if len(info.shape) == 2 and "embed" not in name.rpartition(".")[0].rpartition(".")[2]
    }
    total = quantized + sum(plain.values())
    layers: list[dict[str, Any]] = []
    for m in rows:
        for p in places:
            weight = p.module.scheme.weight
            group = weight.group_size or 0 if p.op == "linear" else 0
            choice = explain(Problem(p.op, device, dtype, weight.num_bits, group, m))
            n, k = p.module.shape
            native = choice.kernel.device == "cpu" and p.op == "linear"
            plan = plan_linear(choice.kernel, k, n, m, weight.num_bits, threads, group) if native else None
            layers.append(
                {
                    "name": p.name,
                    "op": p.op,
                    "scheme": p.scheme,
                    "shape": [n, k],
                    "rows": m,
                    "kernel": choice.kernel.name,
                    "isa": choice.kernel.isa,
                    "about": choice.kernel.about,
                    "blocking": None if plan is None else plan.blocking,
                    "threads": None if plan is None else plan.threads,
                    "bytes_per_token": token_bytes(p.module, p.op),
                    "share": token_bytes(p.module, p.op) / total,
                }
            )
    return {
        "layers": layers,
        "totals": {
            "bytes_per_token": total,
            "quantized_bytes_per_token": quantized,
            "float_bytes_per_token": sum(plain.values()),
            "float_matrices": sorted(plain),
            "tables": sorted(tables),
        },
    }


def describe_decoder(model: PreTrainedModel) -> dict[str, Any]:
    """Which decoder layers of a loaded model run natively, and why the others do not."""
    decoder: Any = model.get_decoder()
    refused = refusals(model)
    return {"decoder_layers": len(getattr(decoder, "layers", ())), "not_native": refused}
