"""Broken checkpoints by the thousand: mutate good ones, and hold the loader to its promise.

Every mutated checkpoint is refused by a `CheckpointError` that names its folder, or it loads and computes right: codes
and scales are read from the file a second time by other code, and every layer's output is the oracle's. Anything else
is a failure: another exception, a crash, more than `SECONDS` or `MEMORY`, a layer that computes something else.

    python tests/fuzz.py --count 10000 --seed 0        prints a summary; exit code 1 and the seeds where it failed

Cases are seeded one by one, so `--seed N --count 1` repeats one. The script runs them in child processes, so that a
crash is a finding and not the end; the tests run a few hundred in their own process.
"""

from __future__ import annotations

import argparse
import collections
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import oracle
from bytelane import errors
from bytelane.checkpoint import Checkpoint
from bytelane.layers import QuantEmbedding, QuantLinear
from bytelane.models import load_model, open_model
from bytelane.report.verify_checkpoint import codes_name, stored_codes
from checkpoints import COMPRESSED, GEMMA, hand_made

SECONDS = 60
MEMORY = 8 * 1024**3
Files = dict[str, bytes]

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
JUNK: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 7, 2.5, 2**31, 2**63, 10**30, -(10**9), 1e308, 1e-320]
JUNK += ["", "x", "int", "re:(", "auto", "float64", "eager", "\u0000", "\ud800"]
JUNK += [[], [1], [[]], {}, {"a": 1}, ["Linear"]]
EVIL = [r"^(\w+)+$", r"(a|a)*b", r"^(.*)*$", r"(.+)+x", r"(?:\w*\.?)*!", r"((\w+)\.?)+#", r"^(?=(\w+))\1*!"]
HUGE = r"a{99999999999}"
EVIL += [HUGE, r"(?x)( \w+ ) +!", "[", r"(?P<n", r"\w*\w*\w*\w*\w*\w*\w*!", "(a?){30}a{30}"]
EVIL += ["a" * 70000, "(" * 5000]
FLOATS = [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, -0.0, 1e-45, 1e-39, 3e38, 1e-30, 65504.0]
DTYPES = ("F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "U32", "C64", "X", "")


def base(random_: random.Random, folder: Path) -> Files:
    """The files of a good checkpoint, in one shard or two."""
    arguments, options = random_.choice(BASES)
    made = hand_made(*arguments, **options)
    names = sorted(made.tensors)
    half = len(names) // 2
    made.write(folder, shards=[names[:half], names[half:]] if random_.random() < 0.3 else None)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- mutators: each changes some file's bytes ------------------------------------------------------------------------


def _weights(random_: random.Random, files: Files) -> str:
    return random_.choice(sorted(name for name in files if name.endswith(".safetensors")))


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(header: Any, data: bytes) -> bytes:
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def _places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix] * bool(prefix) + [p for key, child in inner for p in _places(child, (*prefix, key))]


def _mutate_json(random_: random.Random, value: Any) -> Any:
    """Junk, a deletion, a renaming or a nudge at a random place."""
    place = random_.choice(_places(value))
    owner = value
    for key in place[:-1]:
        owner = owner[key]
    last, how = place[-1], random_.random()
    if how < 0.5:
        owner[last] = random_.choice(JUNK)
    elif how < 0.65:
        del owner[last]
    elif how < 0.75 and isinstance(owner, dict):
        owner[f"{last}{random_.choice(['x', '', '.weight', '_scale'])}"] = owner.pop(last)
    elif isinstance(owner[last], int):
        owner[last] += random_.choice([-1, 1, 2, -(10**6), 2**40])
    elif isinstance(owner[last], list):
        random_.shuffle(owner[last])
    else:
        owner[last] = [owner[last]]
    return value


def header_json(random_: random.Random, files: Files) -> None:
    name = _weights(random_, files)
    header, data = _split(files[name])
    files[name] = _join(_mutate_json(random_, header), data)


def header_entry(random_: random.Random, files: Files) -> None:
    """Another dtype, shape or place for one tensor, or a name twice."""
    name = _weights(random_, files)
    header, data = _split(files[name])
    tensor = random_.choice([n for n in header if n != "__metadata__"])
    how = random_.random()
    if how < 0.3:
        header[tensor]["dtype"] = random_.choice(DTYPES)
    elif how < 0.55:
        shape = header[tensor]["shape"]
        header[tensor]["shape"] = random_.choice(
            [shape[::-1], [1, *shape], [*shape, 1], [], [0], [2**62, 4], shape[:1]]
        )
    elif how < 0.8:
        other = random_.choice([n for n in header if n != "__metadata__"])
        header[tensor]["data_offsets"] = header[other]["data_offsets"]
    else:
        raw = json.dumps(header)[:-1] + f", {json.dumps(tensor)}: {json.dumps(header[tensor])}}}"
        files[name] = struct.pack("<Q", len(raw)) + raw.encode() + data
        return
    files[name] = _join(header, data)


def header_length(random_: random.Random, files: Files) -> None:
    name = _weights(random_, files)
    (length,) = struct.unpack("<Q", files[name][:8])
    wrong = random_.choice([length + random_.randint(-9, 9), 0, 2**63, 2**64 - 1, 10**8 + 1, len(files[name])])
    order = ">Q" if random_.random() < 0.2 else "<Q"
    files[name] = struct.pack(order, max(wrong, 0) if order == "<Q" else length) + files[name][8:]


def any_bytes(random_: random.Random, files: Files) -> None:
    name = random_.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(random_.choice([1, 1, 2, 8])):
        place = random_.randrange(min(len(data), random_.choice([16, 9000, 10**9])) or 1)
        data[place : place + 1] = bytes([random_.randrange(256)])
    files[name] = bytes(data)


def length_of_file(random_: random.Random, files: Files) -> None:
    name = random_.choice(sorted(files))
    data = files[name]
    keep = random_.choice([0, 7, 8, random_.randrange(len(data) + 1), len(data) - 1])
    files[name] = data[:keep] if random_.random() < 0.7 else data + bytes(random_.choice([1, 8, 4096]))


def scale_value(random_: random.Random, files: Files) -> None:
    """A special value in a float tensor, most likely a scale; or two bytes swapped, as of the other endianness."""
    name = _weights(random_, files)
    header, data = _split(files[name])
    floats = [
        n for n in header if n != "__metadata__" and header[n]["dtype"] in ("F32", "BF16") and header[n]["shape"] != [0]
    ]
    scales = [n for n in floats if n.endswith("scale")]
    if not floats:
        return
    tensor = random_.choice(scales if scales and random_.random() < 0.9 else floats)
    begin, end = header[tensor]["data_offsets"]
    size = 4 if header[tensor]["dtype"] == "F32" else 2
    at = begin + size * random_.randrange(max((end - begin) // size, 1))
    value = struct.pack("<f", random_.choice(FLOATS))[4 - size :]
    if random_.random() < 0.15:
        value = data[at : at + size][::-1]
    files[name] = _join(header, data[:at] + value + data[at + size :])


def code_bytes(random_: random.Random, files: Files) -> None:
    """Other codes: always allowed but where int8 holds fewer bits."""
    name = _weights(random_, files)
    header, data = _split(files[name])
    codes = [n for n in header if n != "__metadata__" and header[n]["dtype"] in ("I8", "U8", "I32", "I64")]
    if codes:
        begin, end = header[random_.choice(codes)]["data_offsets"]
        count = min(end - begin, random_.choice([1, 64]))
        at = begin + random_.randrange(max(end - begin - count, 0) + 1)
        files[name] = _join(header, data[:at] + random_.randbytes(count) + data[at + count :])


def config_json(random_: random.Random, files: Files) -> None:
    config = json.loads(files["config.json"])
    part = config["quantization_config"] if random_.random() < 0.5 else config
    _mutate_json(random_, part)
    files["config.json"] = json.dumps(config).encode("utf-8", "surrogatepass")


def config_text(random_: random.Random, files: Files) -> None:
    text = files["config.json"].decode()
    files["config.json"] = random_.choice(
        [
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + text.encode(),
            b"[" * 100_000,
            b'{"a":' * 50_000,
            text.replace("64", "1" * 5000, 1).encode(),
            text.replace(": 64", ": NaN", 1).encode(),
            text.replace(": 64", ": 1e999", 1).encode(),
            text[:-1].encode() + b', "quantization_config": {}}',
            b"null",
            b'"text"',
            b"",
        ]
    )


def patterns(random_: random.Random, files: Files) -> None:
    config = json.loads(files["config.json"])
    quantization, evil = config["quantization_config"], random_.choice(EVIL)
    if quantization["quant_method"] == GEMMA:
        if random_.random() < 0.5:
            quantization["module_quant_configs"] = {evil: {"num_bits": quantization["num_bits"]}}
        else:
            quantization["modules_to_not_convert"].append(evil)
    elif random_.random() < 0.5:
        quantization["ignore"].append(f"re:{evil}")
    else:
        quantization["config_groups"]["group_0"]["targets"].append(f"re:{evil}")
    files["config.json"] = json.dumps(config).encode()


def index_json(random_: random.Random, files: Files) -> None:
    """A wrong index, made up where there is none."""
    key = "model.safetensors.index.json"
    if key in files:
        index = json.loads(files[key])
    else:
        header, _ = _split(files["model.safetensors"])
        index = {"weight_map": {n: "model.safetensors" for n in header if n != "__metadata__"}}
    tensor = random_.choice(sorted(index["weight_map"]))
    how = random_.random()
    if how < 0.5:
        places = [
            "../x.safetensors",
            "/etc/passwd",
            "a\\b.safetensors",
            "link.safetensors",
            "no.safetensors",
            "",
            "x" * 5000,
        ]
        index["weight_map"][tensor] = random_.choice(["sub/../../x.safetensors", "\u0000.safetensors", *places])
    elif how < 0.6:
        index["weight_map"]["stranger"] = index["weight_map"][tensor]
    else:
        _mutate_json(random_, index)
    files[key] = json.dumps(index).encode("utf-8", "surrogatepass")


MUTATORS = [header_json, header_length, length_of_file, code_bytes, config_text, patterns, index_json]
MUTATORS += [header_entry, any_bytes] * 2 + [scale_value, config_json] * 3


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


def hold(folder: Path, random_: random.Random) -> str:
    """The outcome of one checkpoint: a refusal's class, or `loaded`.

    Raises:
        Exception: the promise is broken.
    """
    refusal: errors.CheckpointError | None = None
    try:
        model = load_model(folder)
    except errors.CheckpointError as error:
        refusal = error
    if refusal is not None:
        assert str(folder) in str(refusal), f"a refusal that does not name its folder: {refusal}"
        return type(refusal).__name__
    checkpoint, _ = open_model(folder)
    with checkpoint, torch.inference_mode():
        for name in checkpoint.modules:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantLinear | QuantEmbedding)
            _check_layer(layer, name, checkpoint, random_)
        model(torch.tensor([[1, 2, 3]]))
    return "loaded"


def run_case(seed: int) -> str:
    """Make, mutate and hold one checkpoint."""
    random_ = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="bytelane-fuzz-"))
    try:
        files = base(random_, folder)
        for _ in range(random_.choice([1, 1, 1, 2, 3])):
            try:
                random_.choice(MUTATORS)(random_, files)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error):
                continue  # a second mutation meets what the first one broke
        place(random_, files, folder)
        return hold(folder, random_)
    finally:
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}-outside").unlink(missing_ok=True)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def run_cases(seeds: range) -> tuple[dict[str, int], dict[int, str]]:
    """Outcomes by kind, and what went wrong by seed."""
    outcomes: collections.Counter[str] = collections.Counter()
    failures: dict[int, str] = {}
    signal.signal(signal.SIGALRM, _too_long)
    for seed in seeds:
        signal.alarm(SECONDS)
        try:
            outcomes[run_case(seed)] += 1
        except Exception:  # noqa: BLE001 - whatever it is, it is a finding
            outcomes["FAILED"] += 1
            failures[seed] = traceback.format_exc()
        finally:
            signal.alarm(0)
    return dict(outcomes), failures


def _child(first: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    outcomes, failures = run_cases(range(first, first + count))
    print(json.dumps([outcomes, failures]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--child", action="store_true")
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
        found, failures = json.loads(done.stdout.splitlines()[-1])
        outcomes.update(found)
        for seed, text in failures.items():
            bad = True
            print(f"seed {seed}:\n{text}")
        print(f"{first + count - given.seed} of {given.count}: {dict(outcomes)}", flush=True)
    print(json.dumps({"count": given.count, "seed": given.seed, "outcomes": dict(outcomes)}))
    sys.exit(bad)


if __name__ == "__main__":
    main()
