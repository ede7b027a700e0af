"""Write a checkpoint with the shapes of SmolLM2-135M, or of Llama 3.2 1B, and random codes.

    python benchmarks/build_llama.py OUT [--shape smollm2|llama1b] [--bits 4] [--layers N]

For speed and memory only, as `build_gemma.py`, which has the reasons and the distributions: every linear layer has
both activation scales, the embedding is 8 bits and so is the head.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from build_gemma import CODE_RMS, LOGIT_SPREAD, STEP, linear_rows, random_rows, tokenizer, weight_scale
from bytelane.checkpoint import KVScales, QuantizedModule, QuantizedTensors, write_checkpoint
from bytelane.scheme import EmbeddingScheme, Kind, LinearScheme, Storage, WeightScheme

SHAPES = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "llama1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}


def quantized(name: str, module: nn.Module, bits: int, seed: int) -> tuple[QuantizedModule, QuantizedTensors]:
    """One module with random codes, as `write_checkpoint` takes it."""
    rows, columns = module.weight.shape
    generator = np.random.default_rng(seed)
    if isinstance(module, nn.Embedding):
        table = QuantizedTensors(random_rows(rows, columns, generator), weight_scale(rows, 1, 1 / 73.9, generator))
        scheme = EmbeddingScheme(WeightScheme(8))
        return QuantizedModule(name, Kind.EMBEDDING, (rows, columns), scheme, Storage.PACK_QUANTIZED), table
    head = name == "lm_head"
    width = 8 if head else bits
    s_in, s_out = (None if head else torch.tensor(STEP, dtype=torch.float32) for _ in range(2))
    middle = (LOGIT_SPREAD if head else 1.0) / (math.sqrt(columns) * CODE_RMS[width])
    tensors = QuantizedTensors(
        linear_rows(rows, columns, width, generator), weight_scale(rows, 1, middle, generator), s_in, s_out
    )
    linear = LinearScheme(WeightScheme(width), quantize_input=not head, quantize_output=not head)
    return QuantizedModule(name, Kind.LINEAR, (rows, columns), linear, Storage.PACK_QUANTIZED), tensors


def build(
    out: Path, *, shape: str = "smollm2", bits: int = 4, layers: int | None = None, vocab: int | None = None
) -> Path:
    """Write the checkpoint; the folder. Layers and vocabulary are the shape's where nothing else is asked for."""
    changed = {"vocab_size": vocab, "num_hidden_layers": layers}
    sizes = SHAPES[shape] | {key: value for key, value in changed.items() if value is not None}
    config = LlamaConfig(tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=2, **sizes)
    config.dtype = "bfloat16"
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    chosen = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    plain = (
        (name, torch.ones(tensor.shape, dtype=tensor.dtype))
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in chosen
    )
    with tempfile.TemporaryDirectory() as beside:
        tokenizer(sizes["vocab_size"]).save_pretrained(beside)
        return write_checkpoint(
            out,
            config={**config.to_dict(), "architectures": ["LlamaForCausalLM"]},
            storage="compressed-tensors",
            modules=(quantized(name, module, bits, seed) for seed, (name, module) in enumerate(chosen.items())),
            plain=plain,
            kv_scales={f"model.layers.{i}.self_attn": KVScales(STEP, STEP) for i in range(sizes["num_hidden_layers"])},
            unquantized=[],
            copy_from=beside,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int)
    arguments = parser.parse_args()
    print(build(**vars(arguments)))


if __name__ == "__main__":
    main()
