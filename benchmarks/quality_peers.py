"""Perplexity of what other quantizers write, on the windows that bytelane's own recipes are scored on.

    python benchmarks/quality_peers.py MODEL --text wiki.utf8 --llmcompressor PYTHON --gptqmodel PYTHON
    python benchmarks/quality_peers.py --table-only              # only write the guide's tables

Each peer runs in an environment of its own (`pip install llmcompressor`, `pip install gptqmodel`), on the same
calibration windows: token ids, so that no tokenizer or template stands between. What it writes is loaded into
transformers here, and one loss (`bytelane.evaluate`) judges all. Weights are what the file's codes and scales stand
for; int8 activations, where the file has them, are quantized and dequantized in float32 by compressed-tensors. A file
of static int8 inputs and outputs (wNa8o8) is also loaded into bytelane's integer layers.

A row is written when it is done; rows that have figures are not run again. A peer that fails leaves its last line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality_peers.json"
GUIDE = ROOT / "docs" / "quantizing.md"
TABLES = {
    RESULTS: ("other quantizers", "quality.json"),
    RESULTS.with_name("quality_peers_gemma.json"): ("other quantizers, Gemma 3", "quality_gemma.json"),
}
"""By result file: which of the guide's tables it makes, and bytelane's own rows beside it."""

ROWS = {
    "llm-compressor W4A16": ("llmcompressor", "w4a16"),
    "llm-compressor W8A8": ("llmcompressor", "w8a8"),
    "llm-compressor W8A8O8": ("llmcompressor", "w8a8o8"),
    "llm-compressor W4A8O8": ("llmcompressor", "w4a8o8"),
    "GPTQModel W4A16": ("gptqmodel", "w4a16"),
    "GPTQModel W8A16": ("gptqmodel", "w8a16"),
}
NAMES = {"llmcompressor": "llm-compressor", "gptqmodel": "GPTQModel"}
GROUP = 128
"""Weights that share a scale where a row is not one group: what both peers begin with."""


def group_size(model: Any) -> int:
    """The largest group, `GROUP` at most, that divides every linear layer's inputs: 64 with SmolLM2's 576."""
    return math.gcd(GROUP, *(m.in_features for m in model.modules() if type(m).__name__ == "Linear"))


def smoothed(model: Any) -> list[list[Any]]:
    """What smoothing multiplies, and the norm that it divides: llm-compressor's own pairs.

    In Gemma 3 another norm stands before the MLP than in Llama; 0.14 takes Llama's there, whose output is added to the
    residual stream, and so changes what the float model computes.
    """
    own = any(name.endswith("pre_feedforward_layernorm") for name, _ in model.named_modules())
    norm = "pre_feedforward_layernorm" if own else "post_attention_layernorm"
    attention = [[f"re:.*{name}_proj" for name in "qkv"], "re:.*input_layernorm"]
    return [attention, [["re:.*gate_proj", "re:.*up_proj"], f"re:.*{norm}"]]


def observe_output(module: Any, _: Any, output: Any) -> None:
    """What llm-compressor 0.14's hook for outputs is for.

    Its own quantizes the outputs that it observes too, by scales that are computed when the layer is done: till then
    they are whatever memory held. `v_proj` then writes zeros, and `o_proj`'s input has a range of 1e-43.
    """
    module.output_observer(output)


def llmcompressor(scheme: str, model_folder: str, ids: Any, out: str) -> int | None:
    """Runs in llm-compressor's environment: SmoothQuant and GPTQ as its own W8A8 example has them, or GPTQ alone."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization.quantization import mixin
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    rows = [[int(i) for i in row] for row in ids]
    text = {
        "tokenizer": AutoTokenizer.from_pretrained(model_folder),
        "dataset": Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]}),
        "max_seq_length": len(rows[0]),
        "num_calibration_samples": len(rows),
    }
    static = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    weights = {"num_bits": int(scheme[1]), "type": "int", "symmetric": True, "strategy": "channel"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if scheme.endswith("o8"):
        mixin.calibrate_output_hook = observe_output
    if scheme == "w4a16":
        weights |= {"strategy": "group", "group_size": group_size(model)}
    else:  # smoothing reads what the float model computes: one pass over the text, not two for each layer
        smoothing = SmoothQuantModifier(smoothing_strength=0.8, mappings=smoothed(model))
        oneshot(model=model, **text, recipe=[smoothing], pipeline="basic")
        group["input_activations"] = {**static, "strategy": "token", "dynamic": True} if scheme == "w8a8" else static
        if scheme.endswith("o8"):
            group["output_activations"] = static
    rounding = GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"])
    oneshot(model=model, **text, recipe=[rounding], output_dir=out)
    return weights.get("group_size")


def gptqmodel(scheme: str, model_folder: str, ids: Any, out: str) -> int:
    """Runs in GPTQModel's environment."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader needs two, and two cores give it one
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoModelForCausalLM

    size = group_size(AutoModelForCausalLM.from_pretrained(model_folder))
    config = QuantizeConfig(bits=int(scheme[1]), group_size=size, sym=True, desc_act=False, device="cpu")
    model = GPTQModel.load(model_folder, config, dtype=torch.float32)
    model.quantize([{"input_ids": [int(i) for i in r], "attention_mask": [1] * len(r)} for r in ids], batch_size=1)
    model.save(out)
    return size


def worker(peer: str, scheme: str, model: str, ids: str, out: str) -> None:
    """What the peer's own Python runs; what it found is its last line."""
    from safetensors.torch import load_file

    started = time.perf_counter()
    size = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel}[peer](scheme, model, load_file(ids)["ids"], out)
    seconds = round(time.perf_counter() - started, 1)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"group": size, "seconds": seconds, "peak_bytes": peak}), flush=True)


def dense_gptq(folder: Path, model: Any) -> None:
    """A GPTQ checkpoint's weights into a float model: `w[i, o] = (q - z) s`, codes packed along the inputs."""
    import torch
    from safetensors.torch import load_file

    held: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    bits = json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))["bits"]
    shifts = torch.arange(0, 32, bits)
    mask = (1 << bits) - 1
    for name in [n.removesuffix(".qweight") for n in held if n.endswith(".qweight")]:
        packed, scales, index = (held[f"{name}.{leaf}"] for leaf in ("qweight", "scales", "g_idx"))
        codes = ((packed[:, None, :] >> shifts[None, :, None]) & mask).reshape(-1, packed.shape[1])
        zeros = ((held[f"{name}.qzeros"][:, :, None] >> shifts) & mask).reshape(scales.shape)
        # The format stores the zero point less one: what it holds of a symmetric code tells which of the two it is.
        zeros = zeros + 1 if int(zeros[0, 0]) == (1 << (bits - 1)) - 1 else zeros
        weight = (codes - zeros[index.long()]) * scales[index.long()].float()
        model.get_submodule(name).weight.data.copy_(weight.T)


def stored(folder: Path) -> int:
    """The bytes of a checkpoint's tensors, where what is in float takes 16 bits, as the float row's does."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                total += tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())
    return total


def evaluate(peer: str, scheme: str, folder: Path, source: Path, held: list[Any]) -> dict[str, Any]:
    """Score a peer's checkpoint, densely in float32 and, where it is wNa8o8, in integers."""
    import torch
    from transformers import AutoModelForCausalLM

    from bytelane.errors import CheckpointError
    from bytelane.evaluate import perplexity
    from bytelane.models import load_model

    found: dict[str, Any] = {"bytes": stored(folder)}
    if peer == "gptqmodel":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        dense_gptq(folder, model)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # decompressed at its first pass
    scored = perplexity(model, held)
    found |= {"perplexity": scored.perplexity, "window_nll": scored.window_nll}
    del model
    if scheme.endswith("o8"):
        try:
            exact = perplexity(load_model(folder), held)
        except CheckpointError as error:  # the file breaks a rule; which one is the figure
            return {**found, "integer_refused": f"{error.tensor}: {error.rule}"}
        found |= {"integer_perplexity": exact.perplexity, "integer_window_nll": exact.window_nll}
    return found


def run(key: str, python: Path, given: argparse.Namespace, held: list[Any], ids: Path) -> dict[str, Any]:
    """One row: the peer's own process, then its score."""
    peer, scheme = ROWS[key]
    with tempfile.TemporaryDirectory(prefix="bytelane-peers-") as temporary:
        folder = (given.out or Path(temporary)) / f"{peer}-{scheme}"
        words = [python, __file__, "--worker", peer, scheme, given.model, ids, folder]
        threads = {} if given.threads is None else {"OMP_NUM_THREADS": str(given.threads)}
        log = (given.out or Path(temporary)) / f"{peer}-{scheme}.log"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [*map(str, words)], stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **threads}
            )
        said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        if done.returncode:
            print("\n".join(said[-40:]), file=sys.stderr)
            return {"failed": said[-1].replace(str(folder), "OUT")}
        spent: dict[str, Any] = json.loads(next(line for line in reversed(said) if line.startswith('{"group"')))
        return {**evaluate(peer, scheme, folder, given.model, held), "calibrate": given.calibrate, **spent}


ACTIVATIONS = {
    "a16": "float",
    "a8": "int8 in, dynamic",
    "a8o8": "int8 in and out, static",
}
"""By the end of a scheme: what a layer's input and output are."""


def cells(label: str, activations: str, row: dict[str, Any], reference: Sequence[float], windows: int) -> str:
    """A row of the guide's table."""
    from bytelane.cli.output import size
    from quality import scored

    found = scored(row["window_nll"], reference)
    held = [size(row[key]) if key in row else "" for key in ("bytes", "peak_bytes")]
    spent = f"{row['seconds'] / 60:.1f} min" if "seconds" in row else ""
    figures = [f"{found['perplexity']:.2f}", f"{found['ratio']:.3f} ± {found['ratio_error']:.3f}", held[0]]
    return "| " + " | ".join([label, activations, *figures, str(windows), spent, held[1]]) + " |"


def peers_table(found: dict[str, Any], ours: dict[str, Any]) -> str:
    """The peers' rows, and bytelane's on the same scored windows of the same text, as Markdown."""
    from quality import ROWS as RECIPES

    choice, reference = found["choice"], found["rows"]["float"]["window_nll"]
    releases = ", ".join(f"{NAMES[peer]} {release}" for peer, release in found["versions"].items())
    lines = [
        f"{choice['model']}, {choice['score']} windows of {choice['window']} tokens of the evaluation documents of "
        f"`{choice['text']}`; {releases}. {found['machine']}, {found['date']}.",
        "",
        "| what | activations | perplexity | over float | file | calibrated on | quantizing | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| float | float | {found['rows']['float']['perplexity']:.2f} | 1 | | | | |",
    ]
    refused: list[str] = []
    for key, (_, scheme) in ROWS.items():
        if (row := found["rows"].get(key)) is None:
            continue
        if "failed" in row:
            refused.append(f"{key} failed: `{row['failed']}`.")
            continue
        label = key if row.get("group") is None else f"{key}, groups of {row['group']}"
        lines.append(cells(label, ACTIVATIONS[scheme[2:]], row, reference, row["calibrate"]))
        if "integer_perplexity" in row:
            integer = {**row, "window_nll": row["integer_window_nll"]}
            lines.append(cells(f"{label}, in bytelane", ACTIVATIONS["a8o8"], integer, reference, row["calibrate"]))
        if "integer_refused" in row:
            refused.append(f"bytelane does not load {key}: {row['integer_refused']}.")
    scored, read = {"windows": choice["score"], "window": choice["window"]}, ours["calibration_windows"]
    for key, (label, _) in RECIPES.items():
        if (ours["text"], ours["score"]) == (choice["text"], scored) and key in ours["rows"]:
            row, reference = dict(ours["rows"][key]), ours["float"]["window_nll"]
            row["bytes"] = row["checkpoint_bytes"]
            if ours["machine"] != found["machine"]:  # neither time nor memory stands beside the peers'
                del row["seconds"], row["peak_bytes"]
            lines.append(cells(f"bytelane, {label}", ACTIVATIONS["a8o8"], row, reference, read))
    return "\n".join([*lines, *(["", *refused] if refused else [])])


def write_tables() -> None:
    """The guide's tables of the result files that there are."""
    from bytelane.cli.output import write_text
    from readme import replace

    for path, (marker, beside) in TABLES.items():
        if path.exists():
            body = peers_table(json.loads(path.read_text()), json.loads(path.with_name(beside).read_text()))
            text = GUIDE.read_text(encoding="utf-8")
            write_text(GUIDE, replace(text, marker, body, script="benchmarks/quality_peers.py"))


def version(python: Path, peer: str) -> str:
    """What is installed there."""
    code = f"import importlib.metadata as m; print(m.version({peer!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Every row that has no figures yet."""
    import torch
    from safetensors.torch import save_file

    from bytelane.cli.output import write_json
    from bytelane.evaluate import perplexity
    from bytelane.quantize import load_float_model, read_documents, windows
    from quality import cpu_name

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a float checkpoint folder with safetensors")
    parser.add_argument("--text", type=Path, help="documents, every fourth held out")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    parser.add_argument("--llmcompressor", type=Path, help="the Python of an environment with llm-compressor")
    parser.add_argument("--gptqmodel", type=Path, help="the Python of an environment with GPTQModel")
    parser.add_argument("--only", action="append", choices=list(ROWS))
    parser.add_argument("--again", action="store_true", help="also what has figures, or failed")
    parser.add_argument("--calibrate", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--score", type=int, default=40, help="windows to score")
    parser.add_argument("--out", type=Path, help="keep the checkpoints here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.table_only:
        write_tables()
        return
    if given.model is None or given.text is None:
        parser.error("needs MODEL and --text, or --table-only")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    choice = {"model": given.model.name, "text": given.text.name, "window": 512, "score": given.score}
    results: dict[str, Any] = {"choice": choice, "versions": {}, "rows": {}}
    if given.results.exists():
        results = json.loads(given.results.read_text(encoding="utf-8"))
        if results["choice"] != choice:
            sys.exit(f"{given.results} is of {results['choice']}, not of {choice}")
    model, tokenizer = load_float_model(given.model)
    held = windows(tokenizer, read_documents(given.text, "evaluation"), length=512, limit=given.score)
    used = windows(tokenizer, read_documents(given.text, "calibration"), length=512, limit=given.calibrate)
    if "float" not in results["rows"]:
        scored = perplexity(model, held)
        results["rows"]["float"] = {"perplexity": scored.perplexity, "window_nll": scored.window_nll}
        write_json(given.results, results)
    del model
    with tempfile.TemporaryDirectory() as temporary:
        ids = Path(temporary) / "ids.safetensors"
        save_file({"ids": torch.stack(used)}, ids)
        for key, (peer, _) in ROWS.items():
            python = getattr(given, peer)
            if python is None or (given.only and key not in given.only):
                continue
            if key in results["rows"] and not given.again:
                continue
            results["versions"][peer] = version(python, peer)
            results |= {"machine": cpu_name(), "date": time.strftime("%Y-%m-%d")}
            results["rows"][key] = run(key, python, given, held, ids)
            write_json(given.results, results)
            print(key, {k: v for k, v in results["rows"][key].items() if not k.endswith("nll")}, flush=True)
    if given.results.resolve() in TABLES:
        write_tables()
    print(json.dumps({k: r.get("perplexity") for k, r in results["rows"].items()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
