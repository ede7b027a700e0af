"""Broken checkpoints by the thousand: mutate good ones, and hold the loader to its promise.

Every mutated checkpoint is refused by a `CheckpointError` that names its folder, or it loads and computes right: codes
and scales are read from the file a second time by other code, and every layer's output is the oracle's. Anything else
is a failure: another exception, a crash, more than `SECONDS` or `MEMORY`, a layer that computes something else.

    python tests/fuzz.py --count 10000 --seed 0        prints a summary; exit code 1 and the findings
    make fuzz                                          the same cases, picked by what they reach (`fuzz_coverage.py`)

The cases are a Hypothesis strategy (`broken`): it chooses a good checkpoint, the mutators and the choices they make, so
it repeats no case and shrinks what it finds to few and small changes. The script runs batches in child processes, so
that a crash is a finding and not the end; the tests run a hundred and fifty in their own process.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, strategies

sys.path.insert(0, str(Path(__file__).parent))

import oracle
from bytelane import errors
from bytelane.checkpoint import Checkpoint, open_checkpoint
from bytelane.layers import QuantEmbedding, QuantLinear
from bytelane.models import build_linear, load_model, open_model
from bytelane.report.verify_checkpoint import codes_name, stored_codes
from bytelane.scheme import Kind
from checkpoints import COMPRESSED, GEMMA, hand_made, skeleton_of
from mutators import MUTATORS, Files, Mutator

SECONDS = 60
MEMORY = 8 * 1024**3

BASES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((COMPRESSED, 4), {}),
    ((COMPRESSED, 4), {"group": 32, "embeddings": True}),
    ((COMPRESSED, 8), {"fmt": "int-quantized", "kv": True}),
    ((COMPRESSED, 3), {"padded": True}),
    ((COMPRESSED, 2), {"head": True, "embeddings": True, "scale_dtype": torch.bfloat16}),
    ((COMPRESSED, 8), {"sides": (True, False), "attention_bias": True}),
    ((GEMMA, 2), {"embeddings": True}),
    ((GEMMA, 4), {"kv": True, "attention_bias": True}),
    ((GEMMA, 8), {"sides": (False, True), "head": True}),
]


@functools.cache
def base(which: int, *, sharded: bool) -> Files:
    """The files of a good checkpoint, in one shard or two; copied before anything changes them."""
    arguments, options = BASES[which]
    made = hand_made(*arguments, **options)
    names = sorted(made.tensors)
    half = len(names) // 2
    with tempfile.TemporaryDirectory(prefix="bytelane-fuzz-") as folder:
        made.write(Path(folder), shards=[names[:half], names[half:]] if sharded else None)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def skeleton(which: int) -> torch.nn.Module:
    """The weightless model of a good checkpoint."""
    arguments, options = BASES[which]
    return skeleton_of(hand_made(*arguments, **options).model)


def place(random_: random.Random, files: Files, folder: Path) -> None:
    """Write the files; now and then one of them is a link, a folder or a pipe."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    outside = folder.parent / f"{folder.name}-outside"
    outside.write_bytes(next(data for name, data in files.items() if name.endswith(".safetensors")))
    (folder / "link.safetensors").unlink(missing_ok=True)
    if "model.safetensors.index.json" in files:
        (folder / "link.safetensors").symlink_to(outside)
    if random_.random() > 0.04:
        return
    victim = folder / random_.choice(sorted(files))
    victim.unlink()
    how = random_.choice(["link", "folder", "pipe", "loop", "gone"])
    if how == "link":
        victim.symlink_to(outside)
    elif how == "folder":
        victim.mkdir()
    elif how == "pipe":
        os.mkfifo(victim)
    elif how == "loop":
        victim.symlink_to(victim)


# --- the promise -----------------------------------------------------------------------------------------------------


def _check_layer(
    layer: QuantLinear | QuantEmbedding, name: str, checkpoint: Checkpoint, random_: random.Random
) -> None:
    """Codes and scales are the file's, and the output is the oracle's."""
    module = checkpoint.modules[name]
    stored = codes_name(module)
    codes = stored_codes(checkpoint.file_of(stored), stored, module)
    bits, columns = module.scheme.weight.num_bits, module.shape[1]
    assert np.array_equal(oracle.unpack_bits(layer.packed.numpy(), bits, columns), codes), f"{name}: codes"
    scales = layer.weight_scale.numpy()
    assert np.isfinite(scales).all(), f"{name}: scales"
    assert (scales >= 0).all(), f"{name}: scales"
    if isinstance(layer, QuantEmbedding):
        groups = scales.shape[1]
        rows = codes[:3].astype(np.float32).reshape(3, groups, -1) * scales[:3, :, None]
        assert np.array_equal(layer(torch.arange(3)).numpy(), rows.reshape(3, -1)), f"{name}: rows"
        return
    if layer.input_scale is None:
        return
    s_in, s_out, bias = (None if t is None else t.numpy() for t in (layer.input_scale, layer.output_scale, layer.bias))
    seeded = np.random.default_rng(random_.randrange(2**32))
    x = (seeded.normal(size=(3, columns)) * s_in * 40).astype(np.float32)
    expected = oracle.linear(x, codes, scales, s_in, s_out, bias, layer.group_size or 0)
    found = layer(torch.from_numpy(x)).numpy()
    same = found.view(np.int32) == np.ascontiguousarray(expected).view(np.int32)
    same |= np.isnan(found) & np.isnan(expected)
    assert same.all(), f"{name}: {(~same).sum()} outputs"


def _built(checkpoint: Checkpoint, name: str) -> QuantLinear | QuantEmbedding:
    """A layer as `load_model` builds it."""
    module, tensors = checkpoint.modules[name], checkpoint.read(name, copy=True)
    weight = module.scheme.weight
    if module.kind is Kind.EMBEDDING:
        return QuantEmbedding(
            tensors.rows,
            tensors.weight_scale,
            embedding_dim=module.shape[1],
            num_bits=weight.num_bits,
            group_size=weight.group_size,
        )
    return build_linear(module, tensors)


def _load(folder: Path, model: torch.nn.Module | None) -> tuple[Checkpoint, torch.nn.Module | None]:
    """Everything a loader reads: of the whole model, or, given the weightless one, of the files alone."""
    if model is None:
        loaded = load_model(folder)
        return open_model(folder)[0], loaded
    checkpoint = open_checkpoint(folder, model)
    for name in checkpoint.plain:
        checkpoint.read_plain(name, copy=True)
    return checkpoint, None


def hold(folder: Path, random_: random.Random, model: torch.nn.Module | None = None) -> str:
    """The outcome of one checkpoint: a refusal's class, or `loaded`.

    Args:
        folder: the checkpoint.
        random_: of the activations.
        model: the weightless model, where config.json is known to be good; else it is built from the files.

    Raises:
        Exception: the promise is broken.
    """
    refusal: errors.CheckpointError | None = None
    try:
        checkpoint, loaded = _load(folder, model)
        with checkpoint, torch.inference_mode():
            layers = {
                n: _built(checkpoint, n) if loaded is None else loaded.get_submodule(n) for n in checkpoint.modules
            }
            for name, layer in layers.items():
                _check_layer(layer, name, checkpoint, random_)
            if loaded is not None:
                loaded(torch.tensor([[1, 2, 3]]))
    except errors.CheckpointError as error:
        refusal = error
    if refusal is None:
        return "loaded"
    assert model is not None or str(folder) in str(refusal), f"a refusal that does not name its folder: {refusal}"
    return type(refusal).__name__


@dataclass(frozen=True)
class Case:
    """A checkpoint to be broken.

    Attributes:
        which: of the good ones.
        sharded: in two files with an index.
        mutators: applied in this order.
        random: makes their choices.
    """

    which: int
    sharded: bool
    mutators: list[Mutator]
    random: random.Random

    def __repr__(self) -> str:
        names = ", ".join(mutator.__name__ for mutator in self.mutators)
        return f"{BASES[self.which]}{' in two files' * self.sharded}: {names}; {self.random!r}"


def broken() -> strategies.SearchStrategy[Case]:
    """All the broken checkpoints.

    Half of them let Hypothesis make the choices inside the mutators as well: it can shrink those, but likes plain
    values and so breaks much at once. The others draw evenly from a seed, and reach further in.
    """
    return strategies.builds(
        Case,
        which=strategies.integers(0, len(BASES) - 1),
        sharded=strategies.booleans(),
        mutators=strategies.lists(strategies.sampled_from(MUTATORS), min_size=1, max_size=3),
        random=strategies.randoms(use_true_random=False) | strategies.randoms(use_true_random=True),
    )


def run_case(case: Case) -> str:
    """Make, mutate and hold one checkpoint; the outcome as `hold` says it.

    Raises:
        Exception: the promise is broken.
    """
    folder = Path(tempfile.mkdtemp(prefix="bytelane-fuzz-"))
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        good = base(case.which, sharded=case.sharded)
        files = dict(good)
        for mutate in case.mutators:
            try:
                mutate(case.random, files)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error):
                continue  # a second mutation meets what the first one broke
        place(case.random, files, folder)
        # A good configuration builds a known model: most of the time is spent on what the mutations can reach.
        known = files["config.json"] == good["config.json"] and case.random.random() < 0.75
        return hold(folder, case.random, skeleton(case.which) if known else None)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}-outside").unlink(missing_ok=True)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def holder(count: int, seed: int, outcomes: collections.Counter[str]) -> Callable[[], None]:
    """A function that holds `count` broken checkpoints to the promise, and raises at the first (shrunk) finding."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @hypothesis.given(case=broken())
    def keeps_its_promise(case: Case) -> None:
        outcomes[run_case(case)] += 1

    return keeps_its_promise


def _child(first: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    outcomes: collections.Counter[str] = collections.Counter()
    failure = None
    try:
        holder(count, first, outcomes)()
    except Exception:  # noqa: BLE001 - whatever it is, it is a finding
        failure = traceback.format_exc()
    print(json.dumps([outcomes, failure]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _child(given.seed, given.count)
        return
    outcomes: collections.Counter[str] = collections.Counter()
    bad = False
    for first in range(given.seed, given.seed + given.count, given.batch):
        count = min(given.batch, given.seed + given.count - first)
        command = [sys.executable, __file__, "--child", "--seed", str(first), "--count", str(count)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3 * SECONDS + 3 * count)
        except subprocess.TimeoutExpired:  # hung where not even the alarm reaches
            bad = True
            print(f"seeds {first}..{first + count - 1}: the process hangs", flush=True)
            continue
        if done.returncode != 0:
            bad = True
            print(
                f"seeds {first}..{first + count - 1}: the process ended with {done.returncode}\n{done.stderr[-3000:]}"
            )
            continue
        found, failure = json.loads(done.stdout.splitlines()[-1])
        outcomes.update(found)
        if failure is not None:
            bad = True
            print(f"--seed {first} --count {count}:\n{done.stdout}\n{failure}")
        print(f"{first + count - given.seed} of {given.count}: {dict(outcomes)}", flush=True)
    print(json.dumps({"count": given.count, "seed": given.seed, "outcomes": dict(outcomes)}))
    sys.exit(bad)


if __name__ == "__main__":
    main()
