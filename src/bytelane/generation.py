"""Streaming generation with the figures a person wants beside it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jinja2 import TemplateError
from transformers import (
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextStreamer,
)

from bytelane.cache import cache_keyword, make_cache, rewind
from bytelane.decoder import DecodeStack
from bytelane.errors import FileFormatError
from bytelane.sampling import Chooser, Sampling, end_tokens, unhandled
from bytelane.step_graph import StepGraph, refusal

Message = dict[str, str]

PREFILL_TOKENS = 1024
"""Tokens of a prompt that go through the model at once."""

GRAPH_POSITIONS = 256
"""Positions of a captured step's cache at first. They double when they are full, because every step reads them all."""

Way = Literal["native", "graph", "transformers"]
"""How tokens follow each other: `_decode`, `_decode_graph` or transformers' `generate`."""


def decoding(model: PreTrainedModel, *, graph: bool = True) -> tuple[Way, str]:
    """How `generate` and chats decode this model, and why.

    Args:
        model: as `load_model` returns it.
        graph: whether a step may be captured.

    Returns:
        `"native"` where bytelane runs what lies between the layers (on the CPU), `"graph"` where the step is captured
        as a CUDA graph (`step_graph.refusal` has the rule), otherwise `"transformers"`; and the reason.
    """
    config = model.generation_config
    others = ["generation_config"] if config is None else unhandled(config)
    if others:
        return "transformers", f"its generation configuration asks for {', '.join(others)}"
    if getattr(model, "bytelane_float_ops", "torch") == "native":
        return "native", "bytelane's kernels compute all of the model"
    reason = refusal(model) if graph else "captured steps are switched off"
    return ("graph", "its step can be captured") if reason is None else ("transformers", reason)


@dataclass(frozen=True)
class GenerationStats:
    """What a generation cost.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens written.
        prefill_seconds: until the first new token.
        decode_seconds: from the first new token to the last.
        reused_tokens: tokens of the prompt that were in the cache already and were not read again.
        restarted: a cache of the conversation's earlier turns could not be cut back to what this prompt begins with,
            and everything was read again.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    reused_tokens: int = 0
    restarted: bool = False

    @property
    def read_tokens(self) -> int:
        """Prompt tokens the model was run on."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens read a second."""
        return self.read_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second after the first."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def as_dict(self) -> dict[str, float]:
        """For `--json`."""
        return {**asdict(self), "prefill_rate": self.prefill_rate, "decode_rate": self.decode_rate}


class _Streamer(TextStreamer):
    """Hands finished text on and notes when tokens arrive."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


class _Stop(StoppingCriteria):
    """Ends the generation once a caller's flag is set."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped(), dtype=torch.bool, device=input_ids.device)


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        FileFormatError: the folder has none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FileFormatError(f"no tokenizer that transformers can read: {error}", file=directory) from error


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], *, raw: bool = False) -> torch.Tensor:
    """Token ids `[1, n]` of a prompt: through the chat template, or as plain text when `raw` or without a template.

    Raises:
        FileFormatError: the checkpoint's chat template is none, or refuses the messages.
    """
    if isinstance(prompt, str) and (raw or tokenizer.chat_template is None):
        return tokenizer(prompt, return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template is None:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
        return tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise FileFormatError(
            f"the chat template does not take these messages: {error}", file=tokenizer.name_or_path
        ) from error
    return encoded["input_ids"]  # type: ignore[no-any-return]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    on_text: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
    graph: bool = True,
) -> tuple[str, GenerationStats]:
    """Generate after `input_ids` `[1, n]`, streaming text to `on_text` as it is decoded.

    Stops at any of the generation configuration's end tokens, at `max_new_tokens`, or once `stopped()` is true. On a
    CUDA device the step is captured where it can be, unless `graph` is false; `decoding` says which it is.

    Returns:
        The text and what it cost.
    """
    held = _empty(model, graph)
    output, stats = _generate(model, tokenizer, input_ids, held, max_new_tokens, sampling, on_text, stopped)
    return _new_text(tokenizer, output, stats), stats


Held: TypeAlias = Cache | StepGraph
"""What a model has read: a cache, or a captured step with its own."""


def _empty(model: PreTrainedModel, graph: bool) -> Held:
    """What to begin with: nothing read."""
    way, _ = decoding(model, graph=graph)
    return StepGraph(model, GRAPH_POSITIONS) if way == "graph" else make_cache(model)


def _tokens_in(held: Held) -> int:
    return held.used if isinstance(held, StepGraph) else int(held.get_seq_length())


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    held: Held,
    max_new_tokens: int,
    sampling: Sampling,
    on_text: Callable[[str], None],
    stopped: Callable[[], bool],
) -> tuple[torch.Tensor, GenerationStats]:
    """The tokens `[n + new]`, prompt included, and what they cost; `held` has read some first tokens of the prompt."""
    streamer = _Streamer(tokenizer, on_text)
    ids = input_ids.to(model.device)
    reused = _tokens_in(held)
    start = time.perf_counter()
    with torch.inference_mode():
        if isinstance(held, StepGraph):
            output = _decode_graph(model, ids, held, max_new_tokens, sampling, streamer, stopped)
        elif decoding(model, graph=False)[0] == "native":
            output = _decode(model, ids, held, max_new_tokens, sampling, streamer, stopped)
        else:
            output = _transformers_generate(model, tokenizer, ids, held, max_new_tokens, sampling, streamer, stopped)
    times = streamer.times or [time.perf_counter()]
    new = output.shape[1] - ids.shape[1]
    return output[0], GenerationStats(ids.shape[1], new, times[0] - start, times[-1] - times[0], reused)


def _decode(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: Cache,
    max_new_tokens: int,
    sampling: Sampling,
    streamer: _Streamer,
    stopped: Callable[[], bool],
) -> torch.Tensor:
    """Token by token, with little between the model's calls: for models whose layers bytelane runs as a whole.

    The prompt goes in by pieces, which bounds memory and changes no bit.
    """
    run: Any = model
    given = {cache_keyword(model): cache, "use_cache": True, "logits_to_keep": 1}
    for piece in ids[:, cache.get_seq_length() :].split(PREFILL_TOKENS, dim=1):
        logits = run(piece, **given).logits
    stack = DecodeStack.of(model)
    if stack is not None and not stack.takes(cache):
        stack = None

    def step(token: int) -> torch.Tensor:
        if stack is not None:
            return stack.step(token, cache)
        found: torch.Tensor = run(ids.new_tensor([[token]]), **given).logits[0, -1]
        return found

    return _answer(model, ids, logits[0, -1], step, max_new_tokens, sampling, streamer, stopped)


def _decode_graph(
    model: PreTrainedModel,
    ids: torch.Tensor,
    graph: StepGraph,
    max_new_tokens: int,
    sampling: Sampling,
    streamer: _Streamer,
    stopped: Callable[[], bool],
) -> torch.Tensor:
    """Token by token, each a replay of the captured step; there is always room for one more."""

    def room(tokens: int) -> None:
        length = graph.length
        while length < tokens:
            length *= 2
        if length > graph.length:
            graph.grow(length)

    room(ids.shape[1] + 1)
    for piece in ids[0, graph.used :].split(PREFILL_TOKENS):
        last = graph.read(piece)

    def step(token: int) -> torch.Tensor:
        room(graph.used + 1)
        return graph.step(token)

    return _answer(model, ids, last, step, max_new_tokens, sampling, streamer, stopped)


def _answer(
    model: PreTrainedModel,
    ids: torch.Tensor,
    last: torch.Tensor,
    step: Callable[[int], torch.Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: _Streamer,
    stopped: Callable[[], bool],
) -> torch.Tensor:
    """Tokens `[1, n + new]`: chosen from the logits `last`, then from those of `step`, until something ends it."""
    config: Any = model.generation_config
    chooser, ends = Chooser.of(sampling, config), end_tokens(config)
    streamer.put(ids)
    tokens: list[int] = ids[0].tolist()
    prompt = len(tokens)
    while True:
        token = chooser.choose(last, tokens)
        tokens.append(token)
        streamer.put(torch.tensor([token]))
        if token in ends or len(tokens) - prompt >= max_new_tokens or stopped():
            break
        last = step(token)
    streamer.end()
    return ids.new_tensor([tokens])


def _transformers_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    cache: Cache,
    max_new_tokens: int,
    sampling: Sampling,
    streamer: _Streamer,
    stopped: Callable[[], bool],
) -> torch.Tensor:
    """By transformers' `generate`: any architecture, every setting of a generation configuration."""
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    run: Any = model
    output: torch.Tensor = run.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        stopping_criteria=[_Stop(stopped)],
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **{cache_keyword(model): cache},
        **sampling.arguments(),
    )
    return output


def _new_text(tokenizer: PreTrainedTokenizerBase, output: torch.Tensor, stats: GenerationStats) -> str:
    return str(tokenizer.decode(output[stats.prompt_tokens :], skip_special_tokens=True))


class ChatSession:
    """A conversation whose cache outlives the turns, so that each turn reads only what is new.

    Every turn renders the whole conversation through the chat template, as if nothing were cached, and compares its
    tokens with those the cache holds. The longest common prefix is kept; the cache is cut back where the two part
    (templates drop thoughts, trim answers, or tokenize them differently from how they were written). Where it cannot
    be cut, because a sliding window has already dropped tokens that would be back in view, the conversation is read
    again from its start into a fresh cache, and the turn's figures say so.

    Attributes:
        messages: the conversation so far, the system message included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        graph: bool = True,
    ) -> None:
        """Begin a conversation.

        Args:
            model: as `load_model` returns it.
            tokenizer: the model's.
            system: a system message.
            graph: as for `generate`. A captured step can always be cut back: its cache drops nothing.
        """
        self._graph = graph
        self.model = model
        self.tokenizer = tokenizer
        self._start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and its cache."""
        self.messages = list(self._start)
        self._drop_cache()

    def _drop_cache(self) -> None:
        self._cache: Held | None = None
        self._cached: list[int] = []

    def ask(
        self,
        text: str,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        on_text: Callable[[str], None] = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[str, GenerationStats]:
        """Add a message, and generate and add the answer; stops as `generate` does.

        When the generation raises, the conversation stays as it was before the message.

        Returns:
            The answer and what it cost.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = encode(self.tokenizer, asked)
        cache, restarted = self._prepared(ids[0].tolist())
        # A generation that raises leaves layers of different lengths behind: only a finished one's cache is kept.
        self._drop_cache()
        output, stats = _generate(self.model, self.tokenizer, ids, cache, max_new_tokens, sampling, on_text, stopped)
        # The last token was chosen but never run, so it is not in the cache: the cache's own length is what counts.
        self._cache, self._cached = cache, output[: _tokens_in(cache)].tolist()
        answer = _new_text(self.tokenizer, output, stats)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer, replace(stats, restarted=restarted)

    def _prepared(self, ids: list[int]) -> tuple[Held, bool]:
        """A cache that holds only first tokens of `ids`, and whether an older one had to be given up for it."""
        # At least one token is left to run: the answer's first token comes from its logits.
        pairs = zip(self._cached, ids[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if isinstance(self._cache, StepGraph):
            self._cache.rewind(common)
            return self._cache, False
        if self._cache is not None and rewind(self._cache, common):
            return self._cache, False
        return _empty(self.model, self._graph), self._cache is not None


def peak_memory_bytes() -> int:
    """The most memory this process ever held resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
