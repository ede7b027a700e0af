"""`run` and `chat`: use a checkpoint."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytelane.cli.options import RunOptions, spread
from bytelane.cli.output import (
    JsonOption,
    ModelArgument,
    emit,
    emit_line,
    remarks,
    size,
)

if TYPE_CHECKING:
    from bytelane.sampling import Sampling

MaxTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after this many tokens.")]


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are asked for and sampled."""

    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sampling temperature.")] = None
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")] = None
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest p of probability.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None
    graph: Annotated[
        bool, typer.Option(help="On CUDA, capture the decoding step as a CUDA graph where the model allows it.")
    ] = True

    def sampling(self) -> Sampling:
        """As a request."""
        from bytelane.sampling import Sampling

        greedy = self.greedy or self.temperature == 0
        return Sampling(greedy, self.temperature, self.top_k, self.top_p, None, self.seed)


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": prompt}]


@spread
def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads standard input.")],
    max_new_tokens: MaxTokensOption = 256,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    *,
    asked: AnswerOptions,
    options: RunOptions,
    json_output: JsonOption = False,
) -> None:
    """Answer one prompt, streaming, and print tokens per second and memory.

    Sampling follows the checkpoint's generation configuration unless an option says otherwise.

    Example: `bytelane run ./my-model "What is the capital of France?" --greedy`
    """
    from bytelane.cli.common import load, prepare
    from bytelane.generation import PREFILL_TOKENS, decoding, encode, generate, peak_memory_bytes

    loaded, tokenizer, directory = load(model, options)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encode(tokenizer, text if raw else _messages(asked.system, text), raw=raw)
    prepare(loaded, {1, min(ids.shape[1], PREFILL_TOKENS), ids.shape[1] % PREFILL_TOKENS} - {0})
    answer, stats = generate(
        loaded,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=asked.sampling(),
        on_text=(lambda _: None) if json_output else _write,
        graph=asked.graph,
    )
    memory = peak_memory_bytes()
    if json_output:
        ways = {
            "numerics": options.numerics,
            "kv_cache": loaded.bytelane_kv_cache,
            "float_ops": loaded.bytelane_float_ops,
            "decoding": decoding(loaded, graph=asked.graph)[0],
        }
        emit({"model": str(directory), **ways, "text": answer, **stats.as_dict(), "peak_memory": memory})
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


@spread
def chat(
    model: ModelArgument,
    max_new_tokens: MaxTokensOption = 1024,
    *,
    asked: AnswerOptions,
    options: RunOptions,
    json_output: JsonOption = False,
) -> None:
    """Talk with a model.

    Ctrl-C stops the answer being written; at the prompt, Ctrl-C or Ctrl-D ends the chat. `/reset` forgets the
    conversation, `/exit` ends it. With `--json`, each line of standard input is a message and each answer is a line of
    JSON.
    """
    from bytelane.cli.common import load, prepare
    from bytelane.generation import ChatSession, peak_memory_bytes

    loaded, tokenizer, _ = load(model, options)
    prepare(loaded)
    sampling = asked.sampling()
    session = ChatSession(loaded, tokenizer, system=asked.system, graph=asked.graph)
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
