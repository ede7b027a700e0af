"""Chats over the int8 KV cache: a turn reads what is new, and answers as the same turn from scratch.

Exactly, which `row_by_row` makes possible: see tests/test_cache.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import bytelane
from bytelane.generation import ChatSession, encode
from bytelane.sampling import Sampling
from rowwise import row_by_row

WINDOW = 16

TEMPLATE = (
    "{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<a>' }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These models are far too small to share out; on a busy machine the waiting takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, so that an answer read back gives the tokens that were written."""
    vocab = {"<pad>": 0, "</s>": 1, "<s>": 2, "<u>": 3, "<a>": 4} | {f"w{i}": i for i in range(5, 512)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


class Prefills:
    """The number of tokens of every call of a model."""

    def __init__(self, model: Any) -> None:
        self.sizes: list[int] = []
        embedding = model.get_input_embeddings()
        self.handle = embedding.register_forward_hook(lambda _, args, out: self.sizes.append(args[0].shape[-1]))

    def take(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sizes


@pytest.fixture
def prefills(rowwise: Any) -> Iterator[Prefills]:
    found = Prefills(rowwise)
    yield found
    found.handle.remove()


ASK = {"max_new_tokens": 5, "sampling": Sampling(greedy=True)}


def from_scratch(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    fresh = ChatSession(model, tokenizer)
    fresh.messages = messages[:-1]
    return fresh.ask(messages[-1]["content"], **ASK)[0]


def test_turns_read_only_what_is_new(rowwise: Any, prefills: Prefills) -> None:
    """Three turns, to beyond the window: each equals the same turn from scratch and reads only its new tokens."""
    tokenizer, session = word_tokenizer(), ChatSession(rowwise, word_tokenizer())
    for turn, text in enumerate(["w10 w11 w12", "w20 w21", "w30 w31 w32 w33"]):
        asked = [*session.messages, {"role": "user", "content": text}]
        length = encode(tokenizer, asked).shape[1]
        answer, stats = session.ask(text, **ASK)
        # A turn's prompt is its message and two role tokens; the previous answer's last token was never run, either.
        new = len(text.split()) + 2 + (1 if turn else 0)
        assert prefills.take() == [new] + [1] * (stats.new_tokens - 1)
        assert (stats.prompt_tokens, stats.read_tokens, stats.restarted) == (length, new, False)
        assert answer == from_scratch(rowwise, tokenizer, asked)
        prefills.take()
        assert session.messages[-1] == {"role": "assistant", "content": answer}
    assert length > WINDOW
    session.messages[-1]["content"] = "w7"
    answer, stats = session.ask("w40", **ASK)
    assert (stats.restarted, stats.reused_tokens) == (True, 0)
    assert prefills.take()[0] == stats.prompt_tokens
    assert answer == from_scratch(rowwise, tokenizer, session.messages[:-1])
    session.reset()
    prefills.take()
    _, stats = session.ask("w10", **ASK)
    assert (prefills.take()[0], stats.reused_tokens, stats.restarted) == (3, 0, False)


def test_a_changed_history_is_cut_back_to_what_it_shares(llama_folder: Path) -> None:
    model = row_by_row(bytelane.load_model(llama_folder))
    tokenizer, session = word_tokenizer(), ChatSession(model, word_tokenizer(), system="w9")
    counted = Prefills(model)
    session.ask("w10 w11 w12", **ASK)
    session.ask("w20 w21", **ASK)
    session.messages[2]["content"] = "w5 w6"
    counted.take()
    answer, stats = session.ask("w50", **ASK)
    kept = encode(tokenizer, session.messages[:2]).shape[1]
    assert (stats.reused_tokens, stats.restarted) == (kept, False)
    assert counted.take()[0] == stats.prompt_tokens - kept
    counted.handle.remove()
    assert answer == from_scratch(model, tokenizer, session.messages[:-1])


def test_the_same_prompt_again_runs_its_last_token(llama_folder: Path) -> None:
    session = ChatSession(bytelane.load_model(llama_folder), word_tokenizer())
    first, _ = session.ask("w10 w11 w12", **ASK)
    session.messages = []
    again, stats = session.ask("w10 w11 w12", **ASK)
    assert (again, stats.read_tokens) == (first, 1)


def test_a_failed_turn_leaves_the_conversation_and_no_cache(llama_folder: Path) -> None:
    session = ChatSession(bytelane.load_model(llama_folder), word_tokenizer())
    session.ask("w10 w11", **ASK)
    before = list(session.messages)

    def fail(_: str) -> None:
        raise RuntimeError("the terminal went away")

    with pytest.raises(RuntimeError, match="terminal"):
        session.ask("w12", on_text=fail, **ASK)
    assert session.messages == before
    _, stats = session.ask("w12", **ASK)
    assert (stats.reused_tokens, stats.restarted) == (0, False)
