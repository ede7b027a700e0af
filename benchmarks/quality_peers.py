"""Perplexity of what other quantizers write, on the windows that bytelane's own recipes are scored on.

    python benchmarks/quality_peers.py MODEL --text wiki.utf8 --llmcompressor PYTHON --gptqmodel PYTHON

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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quality_peers.json"

ROWS = {
    "llm-compressor W4A16": ("llmcompressor", "w4a16"),
    "llm-compressor W8A8": ("llmcompressor", "w8a8"),
    "llm-compressor W8A8O8": ("llmcompressor", "w8a8o8"),
    "llm-compressor W4A8O8": ("llmcompressor", "w4a8o8"),
    "GPTQModel W4A16": ("gptqmodel", "w4a16"),
    "GPTQModel W8A16": ("gptqmodel", "w8a16"),
}
GROUP = 64
"""Weights that share a scale in W4A16: the presets' 128 does not divide SmolLM2's rows of 576."""


def llmcompressor(scheme: str, model_folder: str, ids: Any, out: str) -> None:
    """Runs in llm-compressor's environment: SmoothQuant and GPTQ as its own W8A8 example has them, or GPTQ alone."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    static = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    bits = int(scheme[1])
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    steps: list[Any] = []
    if scheme == "w4a16":
        weights |= {"strategy": "group", "group_size": GROUP}
    else:
        steps.append(SmoothQuantModifier(smoothing_strength=0.8))
        group["input_activations"] = {**static, "strategy": "token", "dynamic": True} if scheme == "w8a8" else static
        if scheme.endswith("o8"):
            group["output_activations"] = static
    steps.append(GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"]))
    rows = [[int(i) for i in row] for row in ids]
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model_folder),
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]}),
        recipe=steps,
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        output_dir=out,
    )


def gptqmodel(scheme: str, model_folder: str, ids: Any, out: str) -> None:
    """Runs in GPTQModel's environment."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=int(scheme[1]), group_size=GROUP, sym=True, desc_act=False, device="cpu")
    model = GPTQModel.load(model_folder, config)
    model.quantize([{"input_ids": [int(i) for i in r], "attention_mask": [1] * len(r)} for r in ids], batch_size=1)
    model.save(out)


def worker(peer: str, scheme: str, model: str, ids: str, out: str) -> None:
    """What the peer's own Python runs."""
    from safetensors.torch import load_file

    {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel}[peer](scheme, model, load_file(ids)["ids"], out)


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


def evaluate(peer: str, scheme: str, folder: Path, source: Path, held: list[Any]) -> dict[str, Any]:
    """Score a peer's checkpoint, densely in float32 and, where it is wNa8o8, in integers."""
    import torch
    from transformers import AutoModelForCausalLM

    from bytelane.errors import CheckpointError
    from bytelane.evaluate import perplexity
    from bytelane.models import load_model

    found: dict[str, Any] = {"bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors"))}
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
        started = time.perf_counter()
        words = [python, __file__, "--worker", peer, scheme, given.model, ids, folder]
        done = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds = round(time.perf_counter() - started, 1)
        if done.returncode:
            last = [line for line in done.stdout.splitlines() if line.strip()][-1]
            print(done.stdout, file=sys.stderr)
            return {"failed": last.replace(str(folder), "OUT"), "seconds": seconds}
        return {**evaluate(peer, scheme, folder, given.model, held), "seconds": seconds}


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

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a float checkpoint folder with safetensors")
    parser.add_argument("--text", type=Path, required=True, help="documents, every fourth held out")
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
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    choice = {"model": given.model.name, "text": given.text.name, "window": 512}
    choice |= {"calibrate": given.calibrate, "score": given.score}
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
            results["rows"][key] = run(key, python, given, held, ids)
            write_json(given.results, results)
            print(key, {k: v for k, v in results["rows"][key].items() if not k.endswith("nll")}, flush=True)
    print(json.dumps({k: r.get("perplexity") for k, r in results["rows"].items()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
