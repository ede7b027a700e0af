"""Where the time of one decoded token goes, on the CPU.

    python benchmarks/decode.py MODEL [--context 64] [--tokens 24] [--rounds 5]

    floor        bytes of all weights over the read bandwidth measured in this run
    weights      every projection, dense layer and head once, by the kernels the model calls, nothing between them
    token        one token, greedily, by the loop of `bytelane run`
    calls        the same token with every kernel of the layers and the head left out: Python, masks, angles, tables
    between      what is left: norms, rotary embedding, attention, gates, the cache

`beside weights` is the share of a token that is not weights: 1 - weights / token. Rounds alternate, medians are
reported. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

import bytelane
import limits
from bytelane.cache import cache_keyword, make_cache
from bytelane.decoder import DecodeStack, merge, refusals
from bytelane.dispatch import machine, select
from bytelane.kernels import float_ops
from bytelane.layers import QuantLinear
from bytelane.sampling import Chooser


class Nothing:
    """Layers that do nothing."""

    def step(self, *_: int) -> None:
        """Leave the stream as it is."""


def weight_calls(model: Any) -> tuple[list[Callable[[], Any]], int]:
    """A call for every matrix a token reads, merged as the model merges them, and their bytes."""
    calls: list[Callable[[], Any]] = []
    total = 0
    groups: list[list[QuantLinear]] = []
    inside: set[int] = set()
    for layer in model.get_decoder().layers:
        parts = layer.bytelane_forward.parts
        named = [parts.q, parts.k, parts.v]
        groups.append([p.module for p in named if p is not None])
        groups.append([parts.gate.module, parts.up.module])
        groups += [[p.module] for p in parts.linears() if p not in (*named, parts.gate, parts.up)]
        inside |= {id(m) for m in layer.modules()}
    for merged in (m for group in groups for m in merge(group)):
        one, s_in = merged.parts[0], merged.input_scale
        x = torch.randn(1, one.in_features, dtype=model.dtype)
        size = one.group_size or 0
        total += merged.packed.nbytes
        if s_in is None:
            calls.append(lambda one=one, x=x: one(x))
            continue
        kernel = select("linear", "cpu", model.dtype, one.num_bits, size, 1)
        given = (merged.packed, merged.weight_scale, s_in, merged.output_scale, merged.bias, one.num_bits, size)
        calls.append(lambda run=kernel.run, x=x, given=given: run(x, *given))
    for module in [*model.get_decoder().modules(), model.get_output_embeddings()]:
        if id(module) in inside or not isinstance(module, QuantLinear | nn.Linear):
            continue
        x = torch.randn(1, module.in_features, dtype=model.dtype)
        total += (module.packed if isinstance(module, QuantLinear) else module.weight).nbytes
        if isinstance(module, QuantLinear):
            calls.append(lambda module=module, x=x: module(x))
        else:
            isa = machine().isas[0]
            calls.append(lambda w=module.weight, x=x, isa=isa: float_ops.dense(x, w, None, isa=isa))
    return calls, total


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The time of one call, over several."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache before the measurement")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    bandwidth = [limits.read_bandwidth(arguments.threads)]
    model: Any = bytelane.load_model(arguments.model, text_only=True)
    if model.bytelane_float_ops != "native" or refusals(model):
        raise SystemExit(f"not every decoder layer is native: {refusals(model)}")
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(10, vocabulary - 10, (1, arguments.context), generator=torch.Generator().manual_seed(0))
    cache, chooser = make_cache(model), Chooser()
    given = {cache_keyword(model): cache, "use_cache": True, "logits_to_keep": 1}

    times: dict[str, list[float]] = {"weights": [], "token": [], "calls": []}
    with torch.inference_mode():
        model(prompt, **given)
        stack: Any = DecodeStack.of(model)
        # one token over and over: its rows of the mapped tables are in memory
        again = int(prompt[0, -1])

        def token() -> int:
            return chooser.choose(stack.step(again, cache), [])

        calls, weight_bytes = weight_calls(model)
        real = stack._stack
        head = model.get_output_embeddings()
        dense = [m for m in model.get_decoder().modules() if type(m) is nn.Linear]
        logits = head(torch.randn(1, 1, head.in_features, dtype=model.dtype))

        def weights() -> None:
            for call in calls:
                call()

        token()
        for _ in range(arguments.rounds):
            times["weights"].append(seconds(weights, 3))
            times["token"].append(seconds(token, arguments.tokens))
            stack._stack = Nothing()
            outputs = {m: torch.zeros(1, 1, m.out_features, dtype=model.dtype) for m in dense} | {head: logits}
            kept = {m: m.forward for m in outputs}
            for module, value in outputs.items():
                module.forward = lambda *_, value=value: value
            times["calls"].append(seconds(token, arguments.tokens))
            for module, forward in kept.items():
                module.forward = forward
            stack._stack = real
    bandwidth.append(limits.read_bandwidth(arguments.threads))
    found = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    found["floor"] = weight_bytes / statistics.mean(bandwidth) * 1e3
    found["between"] = found["token"] - found["weights"] - found["calls"]
    table = Table(title=f"one token after {arguments.context}, {arguments.threads} threads, milliseconds")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("of the token", justify="right")
    for name in ("token", "weights", "between", "calls", "floor"):
        table.add_row(name, f"{found[name]:.2f}", f"{found[name] / found['token']:.0%}")
    Console().print(table)
    print(
        json.dumps(
            {
                "milliseconds": {name: round(value, 3) for name, value in found.items()},
                "beside weights": round(1 - found["weights"] / found["token"], 4),
                "weight bytes": weight_bytes,
                "read bandwidth": round(statistics.mean(bandwidth)),
                "weights' share of bandwidth": round(found["floor"] / found["weights"], 4),
                "tokens a second": round(1e3 / found["token"], 2),
                "threads": arguments.threads,
            }
        )
    )


if __name__ == "__main__":
    main()
