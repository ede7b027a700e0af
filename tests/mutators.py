"""The ways `tests/fuzz.py` breaks a checkpoint: each changes the bytes of some file by the choices of `random_`."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from checkpoints import GEMMA

Files = dict[str, bytes]
Mutator = Callable[[random.Random, Files], None]

JUNK: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 7, 2.5, 2**31, 2**63, 10**30, -(10**9), 1e308, 1e-320]
JUNK += ["", "x", "int", "re:(", "auto", "float64", "eager", "\u0000", "\ud800"]
JUNK += [[], [1], [[]], {}, {"a": 1}, ["Linear"]]
EVIL = [r"^(\w+)+$", r"(a|a)*b", r"^(.*)*$", r"(.+)+x", r"(?:\w*\.?)*!", r"((\w+)\.?)+#", r"^(?=(\w+))\1*!"]
HUGE = r"a{99999999999}"
EVIL += [HUGE, r"(?x)( \w+ ) +!", "[", r"(?P<n", r"\w*\w*\w*\w*\w*\w*\w*!", "(a?){30}a{30}"]
EVIL += ["a" * 70000, "(" * 5000]
FLOATS = [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, -0.0, 1e-45, 1e-39, 3e38, 1e-30, 65504.0]
DTYPES = ("F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "U32", "C64", "X", "")


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


MUTATORS: list[Mutator] = [header_json, header_length, length_of_file, code_bytes, config_text, patterns, index_json]
MUTATORS += [header_entry, any_bytes] * 2 + [scale_value, config_json] * 3
