"""`verify`: prove on this machine that kernels and checkpoint are what they should be."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytelane.cli.output import JsonOption, TrustOption, emit, progress, table, write_bytes

if TYPE_CHECKING:
    from bytelane.report.kernel_check import KernelCheck
    from bytelane.report.verify_checkpoint import CheckpointCheck, LayerCheck

DIFFERS = 3
"""Exit code: something is not what it should be."""


def verify(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A checkpoint to check as well.")] = None,
    kernels: Annotated[bool, typer.Option("--kernels/--no-kernels", help="Check the kernels of this machine.")] = True,
    samples: Annotated[int, typer.Option(min=0, help="Layers of MODEL to run against the oracle and LiteRT.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the problems and inputs.")] = 0,
    export_tflite: Annotated[
        str | None, typer.Option("--export-tflite", metavar="LAYER", help="Also write this layer as a .tflite model.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the .tflite goes.")] = Path(
        "layer.tflite"
    ),
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prove that every kernel equals an independent oracle here, and a checkpoint obeys the format.

    Kernels are compared bit for bit with a NumPy oracle that shares no code with them. Of MODEL, every code and scale
    is read and checked, and sampled layers are compared with the oracle and, where ai-edge-litert is installed, with
    the vendor's runtime itself. Exit codes: 0 all is right, 2 the checkpoint breaks a rule, 3 something differs.

    Example: `bytelane verify`, or `bytelane verify ./my-model --samples 20`
    """
    from bytelane.cli.common import quiet
    from bytelane.models import open_model
    from bytelane.report.verify import verify_kernels
    from bytelane.report.verify_checkpoint import tflite_of, verify_checkpoint

    quiet()
    if export_tflite is not None and model is None:
        raise typer.BadParameter("a layer is exported from a MODEL", param_hint="--export-tflite")
    checks: tuple[KernelCheck, ...] = ()
    if kernels:
        with progress("kernels") as report:
            checks = verify_kernels(seed=seed, progress=report)
    found = None
    if model is not None:
        checkpoint, _ = open_model(model, trust_remote_code=trust_remote_code)
        with checkpoint, progress("checkpoint") as report:
            found = verify_checkpoint(checkpoint, samples=samples, seed=seed, progress=report)
            if export_tflite is not None:
                write_bytes(output, tflite_of(checkpoint, export_tflite))
    right = not any(check.differing for check in checks) and (found is None or found.right)
    if json_output:
        emit(
            {
                "right": right,
                "kernels": [asdict(check) for check in checks],
                "checkpoint": None if found is None else asdict(found),
                "exported": None if export_tflite is None else str(output),
            }
        )
    else:
        _print(checks, found, right)
        if export_tflite is not None:
            print(f"wrote {output}: {export_tflite}")
    if not right:
        sys.exit(DIFFERS)


def _verdict(check: KernelCheck) -> str:
    if check.skipped is not None:
        return f"not run: {check.skipped}"
    return "equal" if not check.differing else f"DIFFERS: {check.first}"


def _vendor(layer: LayerCheck) -> str:
    if layer.vendor_differing is None:
        return f"not asked: {layer.vendor_skipped}"
    return "equal" if not layer.vendor_differing else f"DIFFERS in {layer.vendor_differing}"


def _oracle(layer: LayerCheck) -> str:
    if layer.codes_differ:
        return f"{layer.codes_differ} CODES DIFFER from the file"
    return "equal" if not layer.differing else f"DIFFERS in {layer.differing}"


def _print(checks: tuple[KernelCheck, ...], found: CheckpointCheck | None, right: bool) -> None:
    if checks:
        rows: list[tuple[Any, ...]] = [(c.op, c.kernel, c.problems, f"{c.values:,}", _verdict(c)) for c in checks]
        columns = ("op", "kernel", "problems", "outputs", "against the oracle")
        table("kernels", columns, rows, right=("problems", "outputs"))
    if found is not None:
        print(
            f"{found.model}: {found.codes:,} codes of {found.modules} modules and {found.plain_tensors} other tensors "
            f"read; all obey FORMAT.md"
        )
        rows = [(x.name, x.scheme, f"{x.values:,}", _oracle(x), _vendor(x)) for x in found.layers]
        columns = ("layer", "scheme", "outputs", "against the oracle", "against LiteRT")
        table(f"{len(rows)} sampled layers", columns, rows, right=("outputs",))
        for note in found.notes:
            print(f"note  {note}")
    ran = sum(1 for check in checks if check.skipped is None)
    print("all is right" + (f": {ran} of {len(checks)} kernels ran here" if checks else "") if right else "NOT RIGHT")
