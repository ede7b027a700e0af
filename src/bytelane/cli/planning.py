"""Plans on the command line: the options that make one, and how one is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytelane.cli.output import size, table

if TYPE_CHECKING:
    from bytelane.quantize import BitPlan, Budget

SizeBudgetOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Choose widths for a checkpoint of at most this, such as 60MB.")
]
AverageBitsOption = Annotated[float | None, typer.Option(help="Choose widths with at most this average.")]
LossBudgetOption = Annotated[
    float | None, typer.Option(help="Choose the smallest widths expected to cost at most this, in nats a token.")
]
WidthsOption = Annotated[
    str | None, typer.Option(metavar="N,N", help="Widths to choose from; what the storage holds of 2,3,4,5,6,8.")
]
LossesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Keeps the measured losses: an interrupted measurement goes on, another budget needs none."
    ),
]
WritePlanOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the plan, to read, to edit and to give to --plan.")
]


def chosen_budget(size_budget: str | None, average_bits: float | None, loss_budget: float | None) -> Budget | None:
    """The budget that was given, or None.

    Raises:
        BudgetError: more than one, or a value that is no budget.
    """
    from bytelane.quantize import Budget, parse_size

    if size_budget is None and average_bits is None and loss_budget is None:
        return None
    limit = None if size_budget is None else parse_size(size_budget)
    return Budget(size=limit, average_bits=average_bits, loss=loss_budget)


def parse_widths(text: str | None) -> list[int] | None:
    """`"2,4,8"` as numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"widths are numbers with commas between, found {text!r}", param_hint="--widths")
    return [int(part) for part in parts]


def plan_in(path: Path) -> bool:
    """Whether a path is a file that says it is a plan."""
    from bytelane.quantize import is_plan

    if not path.is_file() or path.suffix != ".json":
        return False
    try:
        return is_plan(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        return False


def describe_plan(plan: BitPlan) -> dict[str, Any]:
    """A plan as JSON values, with what follows from it."""
    return {
        **plan.model_dump(mode="json", exclude={"layers"}),
        "layers": [plan.line(layer) for layer in plan.layers],
        "totals": {
            "layers": len(plan.layers),
            "bytes": plan.bytes,
            "average_bits": round(plan.average_bits, 4),
            "loss": float(f"{plan.loss:.4g}"),
            "by_bits": {str(bits): count for bits, count in plan.by_bits.items()},
        },
    }


def print_plan(plan: BitPlan) -> None:
    """A plan as a table, its totals below."""
    rows = [
        (
            layer.name,
            "float" if layer.bits is None else layer.bits,
            f"{layer.shape[0]} x {layer.shape[1]}",
            layer.granularity if layer.granularity == "channel" else f"group:{layer.granularity}",
            "-" if layer.kind == "embedding" else "int8" if layer.input else "float",
            "-" if layer.kind == "embedding" else "int8" if layer.output else "float",
            size(plan.layer_bytes(layer)),
            "-" if layer.loss is None else f"{layer.loss:.2g}",
            "  ".join(f"{bits}: {loss:.2g}" for bits, loss in layer.losses.items()),
        )
        for layer in plan.layers
    ]
    table(
        f"plan for {plan.model}",
        ("layer", "bits", "out x in", "scales", "input", "output", "bytes", "loss", "loss at each width"),
        rows,
        right=("bits", "bytes", "loss"),
    )
    print("\n".join(plan_lines(plan)))


def plan_lines(plan: BitPlan) -> list[str]:
    """A plan's totals in words."""
    widths = ", ".join(f"{count} x {bits}" for bits, count in plan.by_bits.items())
    asked = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in plan.budget.items())
    return [
        f"bits         {plan.average_bits:.2f} on average: {widths}",
        f"size         {size(plan.bytes)}, {size(plan.other_bytes)} of them not in layers of the plan"
        + (f"; asked for: {asked}" if asked else ""),
        f"loss         {plan.loss:.3g} nats a token more than in float, as measured layer by layer",
    ]


def compare_to_plan(summary: dict[str, Any], plan: BitPlan, file: Path) -> list[str]:
    """Where a checkpoint is not what a plan says: one line a difference."""
    held = {r["name"]: r for r in summary["layers"]}
    found = []
    for layer in plan.layers:
        r = held.pop(layer.name, None)
        wanted = (
            None if layer.bits is None else (layer.bits, _granularity(layer.granularity), layer.input, layer.output)
        )
        got = None
        if r is not None:
            sides = (r["input_scale"] is not None, r["output_scale"] is not None)
            got = (r["bits"], r["granularity"], *(sides if r["kind"] == "linear" else (False, False)))
        if wanted != got:
            found.append(f"{layer.name}: {_said(got)}, where {file} says {_said(wanted)}")
    found += [f"{name}: quantized, and not in {file}" for name in held]
    return found


def _granularity(value: int | str) -> str:
    return value if isinstance(value, str) else f"group:{value}"


def _said(what: tuple[int, str, bool, bool] | None) -> str:
    if what is None:
        return "in float"
    bits, granularity, *sides = what
    return f"{bits} bits, {granularity}, " + ", ".join(
        f"{name} {'int8' if on else 'float'}" for name, on in zip(("input", "output"), sides, strict=True)
    )
