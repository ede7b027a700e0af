"""Tile shapes of the Triton kernels: one readable table by device class, and a rule for everything else.

A configuration never changes a bit of an integer layer, only its time. The rows follow sweeps of
`benchmarks/gpu_tune.py` on the device they name (benchmarks/results/gpu_tune_h100.json is one), but these, which are
carried over from their neighbours: 5 to 15 rows, 8 bits at 17 to 256 rows, and 4 bits from 1024 rows on but 4096 x
14336. Other devices take the same rows without the `RowsTile`s, with at most three stages, which fit their smaller
shared memory. Configurations are few on purpose: each is one compilation of a second or two (of a `RowsTile`, one for
each K), kept in Triton's cache on disk.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from bytelane.kernels.triton_codes import MAX_SCALED_FEATURES, planes


@dataclass(frozen=True)
class FusedTile:
    """Of `fused_linear`: output channels, blocks of codes, parts of a tile for different warps, warps, stages, overlap.

    `pdl` lets the launch begin while the one before still runs, on devices that can.
    """

    bn: int
    bb: int
    split: int
    warps: int
    stages: int
    pdl: bool = True


@dataclass(frozen=True)
class DecodeTile:
    """Of `decode_linear`: output channels, 4-byte words of each row at a time, warps, overlap."""

    bn: int
    bw: int
    warps: int
    pdl: bool = True


@dataclass(frozen=True)
class CodesTile:
    """Of `codes_linear`: output channels, rows, blocks of codes, channel tiles in a band, warps, stages, parts of K.

    `wave` is how many programs run at once: only the tiles after whole waves are cut into parts, in the table into as
    many as `last_wave_parts` says. 0 cuts every tile.
    """

    bn: int
    bm: int
    bb: int
    band: int
    warps: int
    stages: int
    splits: int = 1
    wave: int = 0


@dataclass(frozen=True)
class RowsTile:
    """Of `rows_linear`: output channels, warps, chunks of a row on their way at a time, parts of K.

    `ask` says whether the rest of each row is asked for at once, into the second-level cache; `early` whether the
    launch after may begin before this one has what it waits for.
    """

    bn: int
    warps: int
    depth: int
    splits: int = 1
    ask: bool = False
    early: bool = True


Tile = DecodeTile | FusedTile | CodesTile | RowsTile

DECODE_ROWS = 4
"""The most rows of `decode_linear`: byte dots cost one instruction for each row, four codes and channel."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Row:
    """A row of the table: the tile of layers within its limits. The first row that fits a layer counts.

    Attributes:
        rows: the most rows of activations (M).
        tile: its `bb` is the most blocks; a layer takes the largest power of two that divides its rows.
        bits: the width; None for any of 2, 4 and 8.
        out_features: the most output channels (N).
        least_in: the fewest inputs (K).
        most_in: the most.
        programs: with a `CodesTile` or a `RowsTile`, K is split until there are about so many programs; 0 for no
            splitting.
    """

    rows: int
    tile: Tile
    bits: int | None = None
    out_features: int = 1 << 40
    least_in: int = 0
    most_in: int = 1 << 40
    programs: int = 0


ANY = 1 << 40
NARROW = 4095
"""Layers with so few output channels leave multiprocessors idle unless K is shared out among warps or programs."""

TABLE: dict[str, tuple[Row, ...]] = {
    # H100, 132 multiprocessors
    "sm90": (
        # one row: byte dots, but where 2 bits leave few bytes to read
        Row(1, FusedTile(16, 1024, 8, 8, 4), bits=2, out_features=NARROW, least_in=4096),
        Row(1, DecodeTile(8, 1024, 8), bits=4, out_features=NARROW),
        Row(1, DecodeTile(4, 1024, 8), bits=8, out_features=NARROW),
        Row(1, DecodeTile(32, 128, 4), bits=2, least_in=4096),
        Row(1, DecodeTile(32, 128, 4), bits=4, least_in=4096),
        Row(1, DecodeTile(16, 128, 4), bits=8, least_in=4096),
        Row(1, DecodeTile(32, 128, 8), bits=4, least_in=2560),
        Row(1, DecodeTile(32, 128, 4), bits=4),
        Row(1, DecodeTile(32, 128, 8)),
        # one launch, on tensor cores but where 8 bits leave few sums to each byte
        Row(4, FusedTile(16, 512, 4, 4, 4), bits=2, out_features=NARROW, least_in=4096),
        Row(4, FusedTile(16, 1024, 8, 8, 4), out_features=NARROW, least_in=4096),
        Row(4, FusedTile(16, 512, 4, 4, 5), bits=2, out_features=NARROW),
        Row(4, FusedTile(16, 512, 8, 8, 4), bits=4, out_features=NARROW),
        Row(4, FusedTile(16, 1024, 8, 8, 4), bits=8, out_features=NARROW),
        Row(2, FusedTile(64, 128, 1, 4, 5), bits=2, least_in=2560),
        Row(2, FusedTile(64, 128, 1, 4, 3), bits=2),
        Row(4, FusedTile(128, 128, 1, 4, 5), bits=2, least_in=4096),
        Row(4, FusedTile(128, 128, 1, 4, 3), bits=2),
        Row(4, DecodeTile(16, 128, 4), bits=8, least_in=4096),
        Row(4, FusedTile(64, 128, 1, 4, 5), least_in=2560),
        Row(4, DecodeTile(16, 128, 4), bits=8),
        Row(4, FusedTile(64, 128, 1, 4, 5)),
        # two: quantizing long rows in every program costs more than a launch
        Row(16, RowsTile(64, 4, 3, ask=True), bits=4, out_features=NARROW, least_in=8192, programs=192),
        Row(16, RowsTile(64, 4, 6), bits=8, out_features=NARROW, least_in=8192, programs=192),
        Row(16, CodesTile(64, 16, 128, 8, 4, 4), out_features=NARROW, least_in=4096, programs=132),
        Row(16, FusedTile(16, 256, 4, 4, 4), out_features=NARROW),
        Row(16, FusedTile(128, 128, 1, 4, 3), bits=2, least_in=4096),
        Row(16, CodesTile(64, 16, 128, 8, 4, 4), bits=2, least_in=2560),
        Row(16, FusedTile(128, 128, 1, 4, 3), bits=2),
        # one, the weight's bytes straight into operands, of rows that a program quantizes whole
        Row(16, RowsTile(128, 8, 6), bits=4, least_in=2560, most_in=4096),
        Row(16, RowsTile(128, 8, 4), bits=4, most_in=4096),
        Row(16, RowsTile(64, 4, 8), bits=8, most_in=4095),
        Row(16, FusedTile(128, 128, 1, 4, 5)),
        Row(32, CodesTile(64, 32, 128, 8, 4, 4), programs=132),
        Row(64, CodesTile(64, 64, 128, 8, 4, 3), bits=2, programs=132),
        Row(64, CodesTile(64, 64, 128, 8, 4, 4), programs=132),
        Row(256, CodesTile(64, 64, 128, 8, 4, 3), bits=2, out_features=NARROW, programs=264),
        Row(256, CodesTile(64, 64, 128, 8, 4, 4), out_features=NARROW, programs=264),
        Row(256, CodesTile(128, 64, 64, 8, 4, 3), bits=2, out_features=12288),
        Row(256, CodesTile(128, 64, 64, 8, 4, 3), bits=4, out_features=12288),
        Row(256, CodesTile(128, 64, 128, 8, 4, 3), bits=8, out_features=12288),
        Row(256, CodesTile(128, 128, 64, 8, 4, 3), bits=2),
        Row(256, CodesTile(128, 128, 64, 8, 8, 4), bits=4),
        Row(1024, CodesTile(128, 64, 64, 8, 4, 3, wave=396), bits=2, out_features=NARROW),
        Row(ANY, CodesTile(128, 64, 64, 8, 4, 3), bits=2, out_features=NARROW),
        Row(ANY, CodesTile(128, 64, 128, 8, 8, 3), bits=4, out_features=NARROW),
        Row(1024, CodesTile(128, 64, 128, 8, 4, 3, wave=396), bits=8, out_features=NARROW),
        Row(ANY, CodesTile(128, 128, 128, 8, 4, 3, wave=264), bits=8, out_features=NARROW),
        Row(ANY, CodesTile(128, 128, 64, 8, 8, 3), bits=2),
        Row(1024, CodesTile(128, 128, 64, 8, 4, 3), bits=4),
        Row(ANY, CodesTile(128, 128, 64, 8, 8, 3), bits=4, least_in=4096),
        Row(ANY, CodesTile(128, 128, 64, 8, 4, 3), bits=4),
        Row(ANY, CodesTile(128, 128, 128, 8, 8, 3)),
    ),
}

PART = 4096
"""The most inputs of a program of `rows_linear`, which holds their codes in shared memory: 64 KiB of 16 rows."""

OTHERS = "sm90"
"""Whose rows a device class without its own takes."""


def device_class(device: torch.device) -> str:
    """`sm90` and the like; what runs elsewhere (Triton's interpreter) is called by the type of its device."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _group_blocks(num_bits: int, group_size: int) -> int:
    """Blocks of a tile that a group fills, or part of one: at least the 32 codes a dot takes."""
    return max(32, min(128, power_of_two(group_size // planes(num_bits))))


SHARED_BYTES = {"sm90": 200 << 10, "sm80": 150 << 10}
"""Shared memory a program may plan with; 90 KiB where nothing is said, which every device since Ampere has."""


def _within(tile: FusedTile, rows: int, num_bits: int, itemsize: int, shared: int) -> FusedTile:
    """The tile with fewer stages, then fewer blocks, until weights and activations of all stages fit."""
    stage = tile.bn * tile.bb + power_of_two(rows) * tile.bb * planes(num_bits) * itemsize
    if tile.stages * stage <= shared or tile.bb <= 32 * tile.split:
        return tile
    stages = tile.stages - 1 if tile.stages > 2 else tile.stages
    bb = tile.bb if stages < tile.stages else tile.bb // 2
    return _within(dataclasses.replace(tile, stages=stages, bb=bb), rows, num_bits, itemsize, shared)


def last_wave_parts(tiles: int, wave: int) -> int:
    """Parts of K for each of the tiles after whole waves: the fewest that leave little of the last waves idle.

    A part more costs sums written and read again, here 3 % of a tile's time.
    """
    left = tiles % wave
    return min(range(1, 7), key=lambda parts: -(-left * parts // wave) / parts + 0.03 * parts)


def _fitted(row: Row, rows: int, out_features: int, in_features: int, num_bits: int) -> Tile:
    """The tile of a row of the table, its blocks and splits made for a layer."""
    tile, blocks = row.tile, -(-in_features // planes(num_bits))
    if isinstance(tile, DecodeTile):
        words = in_features * num_bits // 32
        # a short row takes fewer warps, so that every thread still loads 16 bytes of it
        bw = max(min(tile.bw, power_of_two(words)), 128)
        return dataclasses.replace(tile, bw=bw, warps=max(tile.warps * bw // tile.bw, 1))
    if isinstance(tile, RowsTile):
        parts = min(row.programs // -(-out_features // tile.bn), 16)
        return dataclasses.replace(tile, splits=max(parts, -(-in_features // PART)))
    least = 32 * tile.split if isinstance(tile, FusedTile) else 32
    dividing = blocks & -blocks
    bb = min(tile.bb, dividing) if dividing >= 2 * least else tile.bb
    if isinstance(tile, FusedTile):
        return dataclasses.replace(tile, bb=bb)
    tiles = -(-out_features // tile.bn) * -(-rows // tile.bm)
    wanted = last_wave_parts(tiles, tile.wave) if tile.wave else min(8, row.programs // max(tiles, 1))
    return dataclasses.replace(tile, bb=bb, splits=max(1, min(wanted, blocks // (4 * bb))))


def _whole_words(in_features: int, num_bits: int, group_size: int) -> bool:
    """Whole bytes, one scale per channel, rows of whole 16 bytes, and sums of scaled codes that fit int32."""
    channels = group_size in (0, in_features)
    return (
        8 % num_bits == 0 and channels and 0 < in_features <= MAX_SCALED_FEATURES and in_features * num_bits % 128 == 0
    )


def decodable(rows: int, in_features: int, num_bits: int, group_size: int) -> bool:
    """Whether `decode_linear` takes a layer: few rows, whole bytes, one scale per channel, rows of whole 16 bytes."""
    return 0 < rows <= DECODE_ROWS and _whole_words(in_features, num_bits, group_size)


def straight(rows: int, in_features: int, num_bits: int, group_size: int) -> bool:
    """Whether `rows_linear` takes a layer: as `decode_linear`, but for the rows."""
    return 0 < rows <= 16 and _whole_words(in_features, num_bits, group_size)


@functools.lru_cache(maxsize=4096)
def linear_tile(
    device: str,
    rows: int,
    out_features: int,
    in_features: int,
    num_bits: int,
    group_size: int,
    launches: int = 0,
    itemsize: int = 2,
) -> Tile:
    """The tile of an integer layer.

    Args:
        device: its class, see `device_class`.
        rows: M.
        out_features: N.
        in_features: K.
        num_bits: the width.
        group_size: inputs in a group, 0 for one scale per channel.
        launches: 1 for a `FusedTile` (up to 16 rows), 2 for a `CodesTile`, 0 for whatever is best.
        itemsize: bytes of an activation.
    """
    if 8 % num_bits:
        return FusedTile(64, 32, 1, 4, 2) if launches != 2 and rows <= 16 else CodesTile(64, 64, 32, 8, 4, 2)
    if 0 < group_size < in_features:
        bb = _group_blocks(num_bits, group_size)
        codes = CodesTile(128, 64, bb, 8, 8, 3)
        tile: Tile = FusedTile(64, bb, 1, 4, 4) if launches != 2 and rows <= 16 else codes
    else:
        kind: tuple[type[Tile], ...] = {0: (FusedTile, CodesTile), 1: (FusedTile,), 2: (CodesTile,)}[launches]
        if launches == 0 and decodable(rows, in_features, num_bits, group_size):
            kind = (DecodeTile, *kind)
        if launches == 0 and device in TABLE and straight(rows, in_features, num_bits, group_size):
            kind = (RowsTile, *kind)
        found = next(
            row
            for row in TABLE.get(device, TABLE[OTHERS])
            if isinstance(row.tile, kind)
            and rows <= row.rows
            and row.bits in (None, num_bits)
            and out_features <= row.out_features
            and row.least_in <= in_features <= row.most_in
        )
        tile = _fitted(found, rows, out_features, in_features, num_bits)
    if isinstance(tile, FusedTile):
        return _within(tile, rows, num_bits, itemsize, SHARED_BYTES.get(device, 90 << 10))
    if isinstance(tile, DecodeTile | RowsTile):
        return tile
    return tile if device in TABLE else dataclasses.replace(tile, stages=min(tile.stages, 3))
