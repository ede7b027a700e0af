"""The command's root: what every subcommand shares, and how errors end a run.

Exit codes: 0 done; 1 the machine failed (disk full, out of memory); 2 the input was refused or the command misused;
3 `verify` found a difference;
130 interrupted.
"""

from __future__ import annotations

import json
import sys

import typer

from bytelane.cli import bench as bench_command
from bytelane.cli import compare as compare_command
from bytelane.cli import evaluate, inspect, make, run, serve
from bytelane.cli import report as report_command
from bytelane.cli import trace as trace_command
from bytelane.cli import tune as tune_command
from bytelane.cli import verify as verify_command

app = typer.Typer(
    name="bytelane",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""
Run, make and check **wNa8o8** language models: N-bit integer weights, static INT8 inputs and outputs, computed in true
integer arithmetic, bit for bit what the phone computes.

MODEL is always a folder with `config.json` and safetensors files, or a Hugging Face hub id.

Start with `bytelane inspect MODEL`, then `bytelane chat MODEL`. Every command takes `--json`.
""",
)

app.add_typer(bench_command.bench, name="bench")
app.command("inspect")(inspect.inspect)
app.command("explain")(inspect.explain)
app.command("run")(run.run)
app.command("chat")(run.chat)
app.command("eval")(evaluate.evaluate)
app.command("quantize")(make.quantize)
app.command("tune")(tune_command.tune)
app.command("convert")(make.convert)
app.command("trace")(trace_command.trace)
app.command("compare")(compare_command.compare)
app.command("report")(report_command.report)
app.command("verify")(verify_command.verify)
app.command("serve", context_settings=serve.PASSED_ON)(serve.serve)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        import bytelane

        typer.echo(f"bytelane {bytelane.__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command; never returns."""
    from bytelane.errors import CheckpointError, QuantizeError

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=arguments, prog_name="bytelane")
    except (CheckpointError, QuantizeError) as error:
        _fail(arguments, type(error).__name__, str(error), 2)
    except KeyboardInterrupt:
        _fail(arguments, "Interrupted", "interrupted; nothing was left half-written", 130)
    except OSError as error:
        _fail(arguments, type(error).__name__, str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _fail(arguments, "MemoryError", ": ".join(filter(None, ("out of memory", str(error)))), 1)


def _out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether it is memory that ran out: Python's or a native kernel's, or torch's on the CPU or on a device.

    torch's own class is named, not imported; on the CPU it raises a plain RuntimeError.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _fail(arguments: list[str], kind: str, message: str, code: int) -> None:
    if "--json" in arguments:
        print(json.dumps({"error": {"type": kind, "message": message}}))
    else:
        print(f"bytelane: {kind}: {message}", file=sys.stderr)
    sys.exit(code)
