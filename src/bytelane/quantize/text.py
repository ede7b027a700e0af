"""Text for calibration and evaluation: files to documents, documents to windows of token ids.

Three kinds of file are read, told apart by name and content:

- `.jsonl`: one JSON object a line, its `"text"` is a document;
- a text file whose first line starts with `<doc `: every `<doc ...>` to `</doc>` element is a document, as extractors
  of Wikipedia write them; elements of `MIN_DOCUMENT_CHARACTERS` or fewer are stubs and are dropped;
- any other `.txt` or `.utf8`: the whole file is one document.

So that the text a model is calibrated with is never the text it is judged by, documents are dealt to two splits by
their position in the file: every `EVALUATION_STRIDE`th one is for evaluation, the others for calibration. A file of one
document cannot be dealt; it is read with `split="all"` or not at all.

A *window* is `length` token ids: the tokenizer's BOS if it has one, then a run of the text. Documents are joined by a
blank line and cut without overlap; a last, shorter run is dropped, so every window costs and counts the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bytelane.errors import FileFormatError, QuantizeError

Split = Literal["calibration", "evaluation", "all"]

MIN_DOCUMENT_CHARACTERS = 400
EVALUATION_STRIDE = 4
JOINER = "\n\n"

_ELEMENT = re.compile(r"^<doc [^>\n]*>\n?(.*?)^</doc>", re.DOTALL | re.MULTILINE)


class TextError(QuantizeError):
    """The text cannot be used: nothing in it, or too little for one window."""


def read_documents(path: Path, split: Split = "all") -> list[str]:
    """The documents of one file that belong to a split, in file order.

    Args:
        path: a `.txt`, `.utf8` or `.jsonl` file, UTF-8.
        split: `"evaluation"` for every fourth document, `"calibration"` for the others, `"all"` for both.

    Raises:
        FileFormatError: the file is not UTF-8, not one of the three kinds, or a line of it is not what `.jsonl` needs.
        TextError: the split has no document.
    """
    documents = _parse(path)
    if split != "all":
        if len(documents) < EVALUATION_STRIDE:
            raise TextError(
                f"{path} has {len(documents)} document(s), too few to deal every {EVALUATION_STRIDE}th to the "
                f'evaluation split; read it with split="all" and use another file for the other purpose'
            )
        wanted = split == "evaluation"
        last = EVALUATION_STRIDE - 1
        documents = [d for i, d in enumerate(documents) if (i % EVALUATION_STRIDE == last) is wanted]
    if not documents:
        raise TextError(f"{path} holds no document; give a file with text in it")
    return documents


def _parse(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"not UTF-8 text: {error}", file=path) from error
    if path.suffix == ".jsonl":
        documents = list(_parse_lines(path, text))
    elif path.suffix not in (".txt", ".utf8"):
        raise FileFormatError(f"text is read from .txt, .utf8 and .jsonl files, found {path.suffix!r}", file=path)
    elif text.startswith("<doc "):
        bodies = (match.group(1).strip() for match in _ELEMENT.finditer(text))
        documents = [body for body in bodies if len(body) > MIN_DOCUMENT_CHARACTERS]
    else:
        documents = [text]
    return [document for document in documents if document.strip()]


def _parse_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FileFormatError(f"line {number} is not JSON: {error}", file=path) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise FileFormatError(f'line {number} must be an object with a string under "text"', file=path)
        yield record["text"]


def read_files(paths: Iterable[Path], split: Split = "all") -> list[str]:
    """The documents of several files, in order: see `read_documents`."""
    return [document for path in paths for document in read_documents(path, split)]


def windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], *, length: int = 512, limit: int | None = None
) -> list[Tensor]:
    """Cut documents into windows of token ids.

    Args:
        tokenizer: its special tokens are not added but for the BOS at the start of each window.
        documents: joined by a blank line, in order. Only as many as `limit` needs are tokenized.
        length: ids in a window, the BOS included; at least 2.
        limit: at most this many windows; None for all.

    Returns:
        int64 tensors `[length]`.

    Raises:
        TextError: the text is shorter than one window.
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens (one to read, one to predict), found {length}")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of windows must be at least 1, found {limit}; omit it for all of the text")
    head = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    step = length - len(head)
    found: list[Tensor] = []
    pending: list[int] = []
    for i, document in enumerate(documents):
        pending += tokenizer(JOINER + document if i else document, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(pending) // step
        found += [torch.tensor(head + pending[w * step : (w + 1) * step]) for w in range(whole)]
        del pending[: whole * step]
        if limit is not None and len(found) >= limit:
            return found[:limit]
    if not found:
        raise TextError(f"the text has {len(pending)} tokens, fewer than one window of {length}; give more text")
    return found
