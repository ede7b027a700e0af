"""One self-contained HTML page about a checkpoint: styles, script, drawings and figures in one file, no network.

The figures go into the page as JSON; its script draws them (`page/page.js`) and treats every name as text. A content
security policy forbids the page to load or send anything, so a report is safe to open and to pass on whatever the
checkpoint called its layers.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

import bytelane
from bytelane.checkpoint import Checkpoint
from bytelane.errors import ConfigError
from bytelane.generation import generate, load_tokenizer, peak_memory_bytes
from bytelane.models import load_model, open_model
from bytelane.overrides import Overrides, OverridesSource
from bytelane.report.describe import describe_checkpoint, describe_kernels
from bytelane.report.findings import FORMAT
from bytelane.report.subject import sample_text
from bytelane.sampling import Sampling

KERNEL_ROWS = (1, 512)
"""The numbers of rows that kernels are named for: decoding, and a prompt."""

_MEASURED = ("input", "output", "alone", "sensitivity")


@dataclass(frozen=True)
class Speed:
    """What a model did on this machine.

    Attributes:
        prompt_tokens: read at once.
        new_tokens: written one by one.
        prefill_rate: prompt tokens a second.
        decode_rate: new tokens a second.
        peak_memory: of the process, in bytes.
        threads: CPU threads.
        dtype: of activations.
        machine: the processor's name.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_rate: float
    decode_rate: float
    peak_memory: int
    threads: int
    dtype: str
    machine: str


def processor_name() -> str:
    """The processor as the system calls it."""
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_speed(directory: Path, *, prompt_tokens: int = 128, new_tokens: int = 32) -> Speed:
    """Read the sample text and go on writing, greedily; one short run first, so that nothing is timed cold.

    Args:
        directory: a checkpoint with a tokenizer.
        prompt_tokens: read at most this many tokens of the sample text.
        new_tokens: write at most this many.
    """
    model, tokenizer = load_model(directory, text_only=True), load_tokenizer(directory)
    ids = tokenizer(sample_text(), return_tensors="pt")["input_ids"][:, :prompt_tokens]
    greedy = Sampling(greedy=True)
    generate(model, tokenizer, ids[:, :16], max_new_tokens=2, sampling=greedy, on_text=lambda _: None)
    _, stats = generate(model, tokenizer, ids, max_new_tokens=new_tokens, sampling=greedy, on_text=lambda _: None)
    return Speed(
        prompt_tokens=stats.prompt_tokens,
        new_tokens=stats.new_tokens,
        prefill_rate=stats.prefill_rate,
        decode_rate=stats.decode_rate,
        peak_memory=peak_memory_bytes(),
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        machine=processor_name(),
    )


def read_comparison(file: Path) -> dict[str, Any]:
    """The JSON that `bytelane compare` wrote.

    Raises:
        ConfigError: the file is something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not readable as JSON: {error}", file=file) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"not a comparison: its `format` must be {FORMAT}", file=file, tensor="format")
    return found


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def report_data(
    model: str | Path,
    *,
    comparison: Mapping[str, Any] | None = None,
    speed: Speed | None = None,
    overrides: OverridesSource | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Everything a page shows, as JSON values.

    Args:
        model: a checkpoint folder or hub id.
        comparison: what `comparison_json` gives, with this checkpoint as B.
        speed: measured figures.
        overrides: scales the checkpoint lacks.
        trust_remote_code: allow the checkpoint's own code to run.

    Raises:
        CheckpointError: the checkpoint is refused, or the comparison is of another one.
    """
    given = Overrides(overrides)
    checkpoint, skeleton = open_model(model, trust_remote_code=trust_remote_code)
    with checkpoint:
        described = describe_checkpoint(checkpoint, given.resolve(checkpoint))
        kernels = describe_kernels(checkpoint.modules.values(), skeleton.dtype, "cpu", KERNEL_ROWS)
        total = checkpoint.total_bytes
        weights = described["totals"]["quantized_weights"]
        dense = 2 * weights + described["totals"]["plain_bytes"]
    by_layer: dict[str, list[dict[str, Any]]] = {}
    for choice in kernels:
        for name in choice["layers"]:
            by_layer.setdefault(name, []).append({"rows": choice["rows"], "kernel": choice["kernel"]})
    layers = _layers(described["layers"], by_layer, comparison)
    return {
        "title": checkpoint.directory.resolve().name,
        "subtitle": f"{described['architecture']}, stored as {described['storage']}",
        "tiles": _tiles(described, total, dense, weights, comparison, speed),
        "findings": [*(comparison["findings"] if comparison else ()), *described["notes"]],
        "layers": layers,
        "comparison": None if comparison is None else {"a": comparison["a"], "b": comparison["b"]},
        "speed": _speed_facts(speed),
        "rest": _rest(checkpoint, described, comparison),
        "made": f"made by bytelane {bytelane.__version__} on {platform.system()} with torch {torch.__version__}",
    }


def _layers(
    described: list[dict[str, Any]], kernels: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Layers in the order of execution where that is known, with what was measured of them."""
    compared: dict[str, Any] = {entry["name"]: entry for entry in (comparison or {}).get("layers", ())}
    known = {layer["name"] for layer in described}
    if comparison is not None and not known & compared.keys():
        raise ConfigError("the comparison is of another model: they share no layer", tensor="comparison")
    order = {name: i for i, name in enumerate(compared)}
    described = sorted(described, key=lambda layer: order.get(layer["name"], -1))
    rows = []
    for i, layer in enumerate(described):
        found = compared.get(layer["name"])
        row = {**layer, "order": i, "kernels": kernels.get(layer["name"], []), "measured": found is not None}
        row.update({key: None if found is None else found[key] for key in _MEASURED})
        rows.append(row)
    return rows


def _tiles(
    described: dict[str, Any],
    total: int,
    dense: int,
    weights: int,
    comparison: Mapping[str, Any] | None,
    speed: Speed | None,
) -> list[tuple[str, str, str]]:
    totals = described["totals"]
    schemes = sorted(totals["by_scheme"].items(), key=lambda item: -item[1])
    tiles = [
        ("stored", _bytes(total), f"{total / max(dense, 1):.0%} of bfloat16"),
        (
            "bits a weight",
            f"{8 * totals['quantized_bytes'] / max(weights, 1):.2f}",
            f"scales included, {weights / 1e6:.1f} M weights",
        ),
        (
            "quantized modules",
            str(totals["quantized_modules"]),
            ", ".join(f"{n} x {label}" for label, n in schemes[:3]) + (", …" if len(schemes) > 3 else ""),
        ),
    ]
    if comparison is not None:
        both, tokens = comparison["perplexity"], comparison["tokens"]
        error = both["standard_error"]
        spread = "" if error is None else f" ± {error:.3f}"
        tiles += [
            (
                "perplexity",
                f"{both['quantized']['perplexity']:.2f}",
                f"reference {both['reference']['perplexity']:.2f}: {both['nll_increase']:+.3f}{spread} nats",
            ),
            ("KL divergence", f"{comparison['kl']:.3g}", f"nats a token, over {tokens} tokens"),
            ("same likeliest token", f"{comparison['top1_agreement']:.1%}", f"against {comparison['a']['label']}"),
        ]
    if speed is not None:
        tiles += [
            ("decoding", f"{speed.decode_rate:.1f} /s", f"tokens, {speed.threads} threads"),
            ("reading", f"{speed.prefill_rate:.0f} /s", f"tokens of a prompt of {speed.prompt_tokens}"),
        ]
    return tiles


def _speed_facts(speed: Speed | None) -> list[tuple[str, str]]:
    if speed is None:
        return []
    return [
        ("prompt", f"{speed.prompt_tokens} tokens at {speed.prefill_rate:.1f} a second"),
        ("decoding", f"{speed.new_tokens} tokens at {speed.decode_rate:.1f} a second"),
        ("peak memory", _bytes(speed.peak_memory)),
        ("activations", speed.dtype),
        ("machine", f"{speed.machine}, {speed.threads} threads"),
    ]


def _rest(
    checkpoint: Checkpoint, described: dict[str, Any], comparison: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    totals, kv = described["totals"], described["kv_cache_scales"]
    bare = [f"{name} ({' and '.join(sides)})" for name, sides in described["no_scales"].items()]
    pairs = [
        ("folder", str(checkpoint.directory)),
        ("unquantized", f"{totals['plain_tensors']} tensors in {_bytes(totals['plain_bytes'])}"),
        ("left in float", ", ".join(described["unquantized"]) or "no linear or embedding layer"),
        ("sides in float", ", ".join(bare) or "none"),
        ("tied", ", ".join(f"{head} shares {source}" for head, source in described["tied"].items()) or "nothing"),
        ("KV cache", f"int8 scales for {len(kv)} attention modules" if kv else "no scales"),
    ]
    if comparison is not None:
        first = comparison["first_difference"]
        pairs += [
            ("A, the reference", f"{comparison['a']['model']} ({comparison['a']['runtime']})"),
            ("B", f"{comparison['b']['model']} ({comparison['b']['runtime']})"),
            ("text", f"{comparison['tokens']} predicted tokens in windows of {comparison['window']}"),
            ("first difference", "none" if first is None else f"the {first[1]} of {first[0]}"),
            ("first under 20 dB", comparison["first_below"] or "none"),
        ]
    return pairs


def render(data: Mapping[str, Any]) -> str:
    """The page of `report_data`'s values."""
    files = resources.files("bytelane.report") / "page"
    page, css, js = ((files / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # In a script element, `<` may end it or open a comment; in JSON it may stand only in strings, where \u003c is it.
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return page.replace("/*CSS*/", css).replace("/*JS*/", js).replace("/*DATA*/", embedded)
