"""`report`: one HTML page about a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bytelane.cli.compare import TextOption
from bytelane.cli.output import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    OverridesOption,
    ThreadsOption,
    TrustOption,
    emit,
    progress,
    write_text,
)


def report(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    comparison: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `bytelane compare A MODEL -o FILE` wrote.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="A", help="Compare with this model first, as `bytelane compare A MODEL` does.")
    ] = None,
    text: TextOption = None,
    sensitivity: Annotated[
        bool,
        typer.Option(help="With --reference: one short run of A more for each layer, for what each does."),
    ] = True,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also time the model here: a prompt, then 32 tokens.")
    ] = False,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    overrides: OverridesOption = None,
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write one self-contained HTML page about a checkpoint: sizes, ranges, losses, kernels, speed.

    Without `--comparison` or `--reference` it shows what the headers and scales say, in a second. The page needs no
    network, and can be mailed or printed.

    Example: `bytelane report ./my-model-w4a8o8 --reference ./my-model --text wiki.txt --measure -o report.html`
    """
    from bytelane.cli.common import parse_dtype, quiet, set_threads
    from bytelane.models import resolve_checkpoint
    from bytelane.report.findings import comparison_json
    from bytelane.report.html import measure_speed, read_comparison, render, report_data
    from bytelane.report.subject import Subject, compare_subjects

    quiet()
    set_threads(threads)
    if comparison is not None and reference is not None:
        raise typer.BadParameter("give --comparison or --reference, not both", param_hint="--reference")
    found = None if comparison is None else read_comparison(comparison)
    if reference is not None:
        subjects = Subject.parse(reference), Subject.parse(model)
        with progress("comparing") as advance:
            result = compare_subjects(
                *subjects, text_files=text, dtype=parse_dtype(dtype), with_sensitivity=sensitivity, progress=advance
            )
        found = comparison_json(*subjects, result)
    speed = measure_speed(resolve_checkpoint(model)) if measure else None
    data = report_data(model, comparison=found, speed=speed, overrides=overrides, trust_remote_code=trust_remote_code)
    write_text(output, render(data))
    if json_output:
        emit({**data, "output": str(output)})
        return
    print(f"wrote {output}")
