"""Write the trained small model as a checkpoint.

    python examples/small/export.py DATA TRAINED OUT

TRAINED is what `train.py` wrote. Codes and scales are the ones the training's forward used; nothing is calibrated or
rounded anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma4ForCausalLM

from bytelane.checkpoint import KVScales, QuantizedModule, QuantizedTensors, write_checkpoint
from bytelane.packing import pack_rows
from bytelane.scheme import EmbeddingScheme, Kind, LinearScheme, Storage, WeightScheme
from model import Embedding, Linear, Quantized, build, config, scales
from train import load_model


@torch.no_grad()
def quantized(name: str, module: Linear | Embedding) -> tuple[QuantizedModule, QuantizedTensors]:
    """A module as `write_checkpoint` takes it."""
    scale = module.log_scale.exp()
    found = torch.clamp(torch.round(module.weight * torch.reciprocal(scale)), *module.limits).to(torch.int8)
    rows, weight, shape = pack_rows(found, module.bits), WeightScheme(module.bits), tuple(module.weight.shape)
    if isinstance(module, Embedding):
        about = QuantizedModule(name, Kind.EMBEDDING, shape, EmbeddingScheme(weight), Storage.GEMMA)
        return about, QuantizedTensors(rows, scale)
    scheme = LinearScheme(weight, quantize_input=module.sides, quantize_output=module.sides)
    sides = (module.log_in.exp(), module.log_out.exp()) if module.sides else (None, None)
    about = QuantizedModule(name, Kind.LINEAR, shape, scheme, Storage.GEMMA)
    return about, QuantizedTensors(rows, scale, *sides)


def plain(model: Gemma4ForCausalLM, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Everything else, in the checkpoint's dtype."""
    learned = {id(p) for p in scales(model)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] not in names and id(tensor) not in learned:
            yield name, tensor.detach().to(torch.bfloat16)


def export(data: Path, trained: Path, out: Path, *, toy: bool = False, overwrite: bool = False) -> Path:
    """Write the checkpoint; the folder."""
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    shape = config(len(tokenizer), toy=toy)
    model = build(shape, 0)
    load_model(model, trained, "quantized")
    parts = {n: m for n, m in model.named_modules() if isinstance(m, Quantized)}
    kv = {
        f"model.layers.{i}.self_attn": KVScales(*(p.exp().item() for p in (s.log_k, s.log_v)))
        for i, layer in enumerate(model.model.layers)
        if not layer.self_attn.is_kv_shared_layer and (s := layer.self_attn.kv_scales)
    }
    left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Linear)]
    raw = {k: v for k, v in json.loads(shape.to_json_string()).items() if not k.startswith("_")}
    raw["architectures"] = ["Gemma4ForCausalLM"]
    with tempfile.TemporaryDirectory() as beside:
        tokenizer.save_pretrained(beside)
        generation = {"bos_token_id": 2, "eos_token_id": [1, 4], "pad_token_id": 0, "do_sample": True}
        (Path(beside) / "generation_config.json").write_text(
            json.dumps({**generation, "temperature": 0.7, "top_k": 20})
        )
        return write_checkpoint(
            out,
            config=raw,
            storage="gemma",
            modules=(quantized(name, module) for name, module in parts.items()),
            plain=plain(model, set(parts)),
            kv_scales=kv,
            unquantized=left,
            copy_from=beside,
            overwrite=overwrite,
        )


def main() -> None:
    """Export as the command line says."""
    parser = argparse.ArgumentParser(description="Write the small model's checkpoint.")
    parser.add_argument("data", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    folder = export(arguments.data, arguments.trained, arguments.out, toy=arguments.toy, overwrite=arguments.overwrite)
    print(json.dumps({path.name: path.stat().st_size for path in sorted(folder.iterdir())}))


if __name__ == "__main__":
    main()
