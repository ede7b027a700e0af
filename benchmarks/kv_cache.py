"""Bytes of the KV cache, and memory that stays resident after generating, on Linux.

    python benchmarks/kv_cache.py MODEL [--context 128,1024,8192] [--prompt 64] [--tokens 16]
    python benchmarks/kv_cache.py e2b [--layers 6 --vocab 2048]     # builds a random one of Gemma's shapes first

The cache's bytes follow from the model's configuration: an empty cache is given keys and values of the model's shapes,
int8 codes beside bfloat16, with nothing computed. Then the text model answers a prompt, and the kernel is asked what is
in memory: anonymous pages (what the process holds), file pages (code, and whatever is mapped), and of the latter the
pages of the checkpoint's own files, which are the rows of the mapped embedding tables that were read and what the disk
cache read around them. `beyond the tables` is everything resident but those: what was there before the model was loaded
(the interpreter, torch, transformers), and what loading and generating added. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache
from transformers.utils import logging

import bytelane
from bytelane.cache import Int8Cache, cache_bytes, cache_keyword, kv_scales, make_cache
from bytelane.cli.output import size
from bytelane.sampling import Chooser


def resident() -> dict[str, int]:
    """Bytes of this process in memory: `anonymous`, and `file` for pages of files."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE))
    return {"anonymous": int(found["RssAnon"]) * 1024, "file": int(found["RssFile"]) * 1024}


def resident_of(folder: Path) -> dict[str, int]:
    """Resident and mapped bytes of the files of a folder: `resident`, `mapped`."""
    total = {"resident": 0, "mapped": 0}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        header = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)$", line)
        if header:
            ours = bool(header[1]) and Path(header[1]).parent == folder
        elif ours and (value := re.match(r"(Rss|Size):\s+(\d+) kB$", line)):
            total["resident" if value[1] == "Rss" else "mapped"] += int(value[2]) * 1024
    return total


def filled(cache: Any, model: Any, length: int) -> int:
    """Bytes of a cache after one write of `length` tokens of the model's shapes."""
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        if getattr(attention, "is_kv_shared_layer", False):
            continue
        heads = attention.q_proj.out_features // attention.head_dim // attention.num_key_value_groups
        # in two writes: the first of a window's layer may be longer than the window
        for tokens in (length - 1, 1):
            states = torch.zeros(1, heads, tokens, attention.head_dim, dtype=torch.bfloat16)
            cache.update(states, states, attention.layer_idx)
    return cache_bytes(cache)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint with KV-cache scales, or e2b or e4b")
    parser.add_argument("--layers", type=int, help="of a built model")
    parser.add_argument("--vocab", type=int, help="of a built model")
    parser.add_argument("--context", default="128,1024,8192,32768", help="lengths, separated by commas")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to write")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(arguments.model)
        if arguments.model in ("e2b", "e4b") and not folder.exists():
            folder = Path(made) / "model"
            sizes = [f"--{name}={getattr(arguments, name)}" for name in ("layers", "vocab") if getattr(arguments, name)]
            builder = Path(__file__).with_name("build_gemma.py")
            # in a process of its own: what it held would be counted here
            subprocess.run([sys.executable, builder, arguments.model, folder, *sizes], check=True, stdout=sys.stderr)
        measure(folder.resolve(), [int(c) for c in arguments.context.split(",")], arguments.prompt, arguments.tokens)


def measure(folder: Path, contexts: list[int], prompt: int, tokens: int) -> None:
    """Measure a checkpoint and print what was found."""
    before = resident()
    model: Any = bytelane.load_model(folder, text_only=True)
    if not kv_scales(model):
        raise SystemExit("the checkpoint has no KV-cache scales")
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(10, vocabulary - 10, (1, prompt), generator=torch.Generator().manual_seed(0))
    cache, chooser = make_cache(model), Chooser()
    given = {cache_keyword(model): cache, "use_cache": True, "logits_to_keep": 1}
    with torch.inference_mode():
        for _ in range(tokens):
            ids = torch.tensor([[chooser.choose(model(ids, **given).logits[0, -1], [])]])
    held, tables = resident(), resident_of(folder)
    beyond = held["anonymous"] + held["file"] - tables["resident"]
    added = beyond - before["anonymous"] - before["file"]
    rows = []
    for length in contexts:
        codes = filled(Int8Cache(model.config, kv_scales(model)), model, length)
        floats = filled(DynamicCache(config=model.config), model, length)
        rows.append({"context": length, "int8": codes, "bfloat16": floats, "ratio": round(codes / floats, 4)})
    table = Table(title="bytes of keys and values", title_justify="left")
    for column in ("context", "int8", "bfloat16", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["context"]), size(row["int8"]), size(row["bfloat16"]), f"{row['ratio']:.3f}")
    memory = Table(title=f"resident after {prompt} tokens read and {tokens} written", title_justify="left")
    memory.add_column("what")
    memory.add_column("bytes", justify="right")
    for name, value in {
        "anonymous": held["anonymous"],
        "file": held["file"],
        f"of which the checkpoint's, of {size(tables['mapped'])} mapped": tables["resident"],
        "beyond the tables": beyond,
        "of which before loading (Python, torch, transformers)": before["anonymous"] + before["file"],
        "of which added by loading and generating": added,
    }.items():
        memory.add_row(name, size(value))
    Console().print(table)
    Console().print(memory)
    print(
        json.dumps(
            {
                "cache": rows,
                "resident": held,
                "before loading": before,
                "tables": tables,
                "beyond the tables": beyond,
                "added by loading and generating": added,
            }
        )
    )


if __name__ == "__main__":
    main()
