"""`run`, `chat` and `eval`: use a checkpoint."""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bytelane.cli.output import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    NumericsOption,
    OverridesOption,
    ThreadsOption,
    TrustOption,
    emit,
    emit_line,
    progress,
    remarks,
    size,
    table,
)

MaxTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after this many tokens.")]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")]
TemperatureOption = Annotated[float | None, typer.Option(min=0.0, help="Sampling temperature.")]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")]
TopPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest p of probability.")
]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the sampling.")]
SystemOption = Annotated[str | None, typer.Option("--system", help="A system message.")]


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": prompt}]


def _sampling(greedy: bool, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None) -> Any:
    from bytelane.sampling import Sampling

    return Sampling(greedy or temperature == 0, temperature, top_k, top_p, None, seed)


def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads standard input.")],
    max_new_tokens: MaxTokensOption = 256,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: SystemOption = None,
    greedy: GreedyOption = False,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    numerics: NumericsOption = "integer",
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    overrides: OverridesOption = None,
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Answer one prompt, streaming, and print tokens per second and memory.

    Sampling follows the checkpoint's generation configuration unless an option says otherwise.

    Example: `bytelane run ./my-model "What is the capital of France?" --greedy`
    """
    from bytelane.cli.common import load
    from bytelane.generation import encode, generate, peak_memory_bytes

    loaded, tokenizer, directory = load(
        model,
        numerics=numerics,
        dtype=dtype,
        device=device,
        threads=threads,
        overrides=overrides,
        trust_remote_code=trust_remote_code,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encode(tokenizer, text if raw else _messages(system, text), raw=raw)
    answer, stats = generate(
        loaded,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=_sampling(greedy, temperature, top_k, top_p, seed),
        on_text=(lambda _: None) if json_output else _write,
    )
    memory = peak_memory_bytes()
    if json_output:
        emit({"model": str(directory), "numerics": numerics, "text": answer, **stats.as_dict(), "peak_memory": memory})
        return
    print()
    remarks().print(_figures(stats, memory), style="dim", highlight=False)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _figures(stats: Any, memory: int) -> str:
    reused = f" (and kept {stats.reused_tokens} of earlier turns)" if stats.reused_tokens else ""
    again = ", the whole conversation again" if stats.restarted else ""
    return (
        f"read {stats.read_tokens} tokens{reused}{again} at {stats.prefill_rate:.1f}/s, wrote {stats.new_tokens} at "
        f"{stats.decode_rate:.1f}/s, peak memory {size(memory)}"
    )


def chat(
    model: ModelArgument,
    max_new_tokens: MaxTokensOption = 1024,
    system: SystemOption = None,
    greedy: GreedyOption = False,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    numerics: NumericsOption = "integer",
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    overrides: OverridesOption = None,
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Talk with a model.

    Ctrl-C stops the answer being written; at the prompt, Ctrl-C or Ctrl-D ends the chat. `/reset` forgets the
    conversation, `/exit` ends it. With `--json`, each line of standard input is a message and each answer is a line of
    JSON.
    """
    from bytelane.cli.common import load
    from bytelane.generation import ChatSession, peak_memory_bytes

    loaded, tokenizer, _ = load(
        model,
        numerics=numerics,
        dtype=dtype,
        device=device,
        threads=threads,
        overrides=overrides,
        trust_remote_code=trust_remote_code,
    )
    sampling = _sampling(greedy, temperature, top_k, top_p, seed)
    session = ChatSession(loaded, tokenizer, system=system)
    while (line := _ask(json_output)) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            session.reset()
            continue
        if not line:
            continue
        with _Interrupts() as interrupts:
            answer, stats = session.ask(
                line,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                on_text=(lambda _: None) if json_output else _write,
                stopped=interrupts.seen,
            )
        if json_output:
            emit_line({"text": answer, **stats.as_dict(), "peak_memory": peak_memory_bytes()})
            continue
        print()
        remarks().print(_figures(stats, peak_memory_bytes()), style="dim", highlight=False)


class _Interrupts:
    """While it is open, Ctrl-C sets a flag instead of raising."""

    def __enter__(self) -> _Interrupts:
        self._flag = False
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self._flag = True

    def seen(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._flag


def _ask(json_output: bool) -> str | None:
    """The next message, or None at the end."""
    if json_output or not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def evaluate(
    model: ModelArgument,
    text: Annotated[list[Path], typer.Argument(help="Text files (.txt, .utf8, .jsonl) nobody calibrated on.")],
    reference: Annotated[
        str | None, typer.Option(help="A float model (folder or hub id) to put beside it; `--gguf` names a file in it.")
    ] = None,
    gguf: Annotated[str | None, typer.Option(help="The GGUF file in the reference's folder.")] = None,
    emulated: Annotated[bool, typer.Option("--emulated", help="Also run the float emulation.")] = False,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window; each window starts afresh.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="Read at most this many tokens.")] = 20_000,
    split: Annotated[
        str,
        typer.Option(help="For files of `<doc>` elements: **evaluation** (every fourth), **calibration** or **all**."),
    ] = "all",
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    overrides: OverridesOption = None,
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Perplexity on text, with the reference and the integer model side by side.

    Every model reads the same windows. Lower is better; the ratio to the last row, which is the reference where there
    is one, is what quantization costs. The loss in nats a token comes with its standard error, paired window by window.

    Example: `bytelane eval ./my-model-w8a8o8 wiki.txt --reference ./my-model`
    """
    import torch

    from bytelane.cli.common import check_split, load, parse_dtype, source_folder
    from bytelane.evaluate import PerplexityResult, compare_results, perplexity
    from bytelane.quantize.pipeline import load_float_model
    from bytelane.quantize.text import read_files, windows

    runs = ["integer", *(["emulated"] if emulated else [])]
    results: list[dict[str, Any]] = []
    scores: list[PerplexityResult] = []
    made = None
    for numerics in runs:
        loaded, tokenizer, directory = load(
            model,
            numerics=numerics,
            dtype=dtype,
            device=device,
            threads=threads,
            overrides=overrides,
            trust_remote_code=trust_remote_code,
        )
        if made is None:
            documents = read_files(text, check_split(split))
            made = windows(tokenizer, documents, length=window, limit=max(1, max_tokens // window))
        with progress(f"{numerics} perplexity") as report:
            found = perplexity(loaded, made, progress=report)
        results.append({"model": str(directory), "numerics": numerics, **asdict(found)})
        scores.append(found)
        del loaded
    assert made is not None
    if reference is not None:
        float_model, _ = load_float_model(
            source_folder(reference), gguf_file=gguf, dtype=parse_dtype(dtype) or torch.bfloat16, device=device
        )
        with progress("reference perplexity") as report:
            found = perplexity(float_model, made, progress=report)
        results.append({"model": reference, "numerics": str(float_model.dtype).removeprefix("torch."), **asdict(found)})
        scores.append(found)
    base = results[-1]["perplexity"]
    for r, score in zip(results, scores, strict=True):
        r["ratio"] = r["perplexity"] / base
        paired = compare_results(scores[-1], score)
        single = math.isnan(paired.standard_error)
        r["nll_increase"], r["standard_error"] = paired.nll_increase, None if single else paired.standard_error
    if json_output:
        emit({"window": window, "results": results})
        return
    table(
        f"perplexity, {window}-token windows, {results[0]['tokens']} predicted tokens",
        ("model", "numerics", "perplexity", "ratio", "nats more a token", "tokens/s"),
        [
            (
                r["model"],
                r["numerics"],
                f"{r['perplexity']:.3f}",
                f"{r['ratio']:.3f}",
                _increase(r) if r is not results[-1] else "-",
                f"{r['tokens_per_second']:.0f}",
            )
            for r in results
        ],
        right=("perplexity", "ratio", "nats more a token", "tokens/s"),
    )


def _increase(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['nll_increase']:+.4f}" + ("" if error is None else f" +- {error:.4f}")
