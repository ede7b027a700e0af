"""Write a checkpoint with the shapes of Gemma 4 E2B or E4B (mobile) and random codes.

    python benchmarks/build_gemma.py e2b OUT [--storage gemma|compressed-tensors] [--layers N] [--vocab N] [--wrapper]

The released checkpoints cannot be had everywhere; speed, memory and loading time depend on shapes and widths only, so a
random model of the same shapes measures the same. Modules stream one at a time into `write_checkpoint`: nothing dense
exists, and memory stays near twice the largest table or shard (one as a tensor, one as bytes on their way to the disk).

Random codes make a random model, but not a meaningless one: scales are chosen so that the activations of every layer
have a standard deviation near 1 and an int8 step of 1/32 of it, as calibration would give.

- Codes of linears are drawn without the lowest one (-2, -8, -128), so that their mean is 0. With it, every channel
  would add the same multiple of the inputs' mean, and soon that one direction would fill the int8 range.
- The residual stream gains one unit of variance at each of a layer's three additions; the scales of the layers that
  read it without a norm before (`per_layer_input_gate`) follow that growth.
- `lm_head` is uncalibrated (scales 0), `per_layer_model_projection` is float, layers that reuse keys and values have no
  projections for them and no KV-cache scales, as released.

E2B's widths are the released ones. E4B's are assumed to follow the same rule: 4-bit MLPs in the layers that have keys
and values of their own, 2-bit ones in the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4TextConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bytelane.checkpoint import KVScales, QuantizedModule, QuantizedTensors, write_checkpoint
from bytelane.scheme import EmbeddingScheme, Kind, LinearScheme, Storage, WeightScheme, row_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "e2b": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "full_every": 5,
    },
    "e4b": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 42,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "use_double_wide_mlp": False,
        "full_every": 6,
    },
}

SHARD_BYTES = 512 * 1024**2

STEP = 4 / 127
"""An int8 step for a tensor of standard deviation 1: four of them are in range."""

CODE_RMS = {2: 0.5**0.5, 4: 17.5**0.5, 8: 73.9}
"""Root mean square of the codes `linear_rows` draws."""

TABLE_RMS = {2: 1.5**0.5, 4: 21.5**0.5}
"""Root mean square of uniform codes, the lowest included."""

LOGIT_SPREAD = 4.0
"""Standard deviation of the logits, so that sampling has something to choose from."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def text_config(shape: str, layers: int | None, vocab: int) -> Gemma4TextConfig:
    """The configuration of a shape, with fewer layers or a smaller vocabulary if asked.

    Raises:
        ValueError: fewer than four layers, too few for both kinds of attention on both sides of KV sharing.
    """
    values = dict(SHAPES[shape])
    every, whole = values.pop("full_every"), values["num_hidden_layers"]
    count = whole if layers is None else layers
    if count < 4 or count > whole:
        raise ValueError(f"--layers must be 4..{whole}, found {count}")
    if count < whole:
        # The same proportion of shared layers, with a full-attention layer on each side.
        every = min(every, count // 2)
        shared = min(round(count * values["num_kv_shared_layers"] / whole), count - every)
        values["num_kv_shared_layers"] = shared
    values["num_hidden_layers"] = count
    types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    types[-1] = "full_attention"
    return Gemma4TextConfig(
        vocab_size=vocab,
        vocab_size_per_layer_input=vocab,
        hidden_size_per_layer_input=256,
        num_attention_heads=8,
        head_dim=256,
        global_head_dim=512,
        layer_types=types,
        sliding_window=512,
        final_logit_softcapping=30.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        dtype="bfloat16",
        **values,
    )


def weight_bits(name: str, config: Gemma4TextConfig) -> int:
    """The width of a module: E2B's map."""
    leaf = name.rpartition(".")[2]
    if leaf in ("lm_head", "embed_tokens"):
        return 2
    if leaf in ("per_layer_input_gate", "per_layer_projection"):
        return 8
    if ".mlp." in name and layer_index(name) >= config.num_hidden_layers - config.num_kv_shared_layers:
        return 2
    return 4


def layer_index(name: str) -> int:
    """The decoder layer a module belongs to."""
    return int(name.partition("layers.")[2].partition(".")[0])


def random_rows(rows: int, width: int, generator: np.random.Generator) -> Tensor:
    """Uniform random bytes: at 2, 4 and 8 bits, uniform random codes."""
    return torch.from_numpy(generator.integers(0, 256, (rows, width), dtype=np.uint8))


def linear_rows(rows: int, columns: int, bits: int, generator: np.random.Generator) -> Tensor:
    """Canonical rows of random codes with mean 0: the lowest code becomes 0, whose field is its top bit alone."""
    found = random_rows(rows, row_bytes(columns, bits), generator)
    if bits == 8:
        return torch.where(found == 0, 128, found).to(torch.uint8)
    # In each field, a bit that is set where any bit of the field is.
    any_set = found | found >> 1
    if bits == 2:
        return found | (~any_set & 0x55) << 1
    any_set |= any_set >> 2
    return found | (~any_set & 0x11) << 3


def weight_scale(rows: int, groups: int, middle: float, generator: np.random.Generator) -> Tensor:
    """Scales around a value, 20 % to either side."""
    spread = generator.random((rows, groups), dtype=np.float32) * 0.4 + 0.8
    return torch.from_numpy(spread * np.float32(middle))


def linear_sides(leaf: str, layer: int) -> tuple[float, float]:
    """The standard deviations of a linear's input and output."""
    stream = math.sqrt(1 + 3 * layer)
    return {
        "down_proj": (0.6, 0.6),
        "per_layer_input_gate": (stream, stream),
        "per_layer_projection": (stream, stream),
    }.get(leaf, (1.0, 1.0))


def quantized(
    name: str, module: nn.Module, config: Gemma4TextConfig, storage: str, seed: int, row_scales: bool = False
) -> Any:
    """One module with random codes, as `write_checkpoint` takes it; with `row_scales`, tables have one scale a row."""
    rows, columns = module.weight.shape
    bits, generator = weight_bits(name, config), np.random.default_rng(seed)
    leaf = name.rpartition(".")[2]
    lies = Storage.GEMMA if storage == "gemma" else Storage.PACK_QUANTIZED
    if isinstance(module, nn.Embedding):
        grouped = leaf == "embed_tokens_per_layer" and not row_scales
        group = config.hidden_size_per_layer_input if grouped else None
        scheme = EmbeddingScheme(WeightScheme(bits, group))
        middle = 1 / (module.scalar_embed_scale * TABLE_RMS[bits])
        tensors = QuantizedTensors(
            random_rows(rows, row_bytes(columns, bits), generator),
            weight_scale(rows, scheme.weight.groups(columns), middle, generator),
        )
        return QuantizedModule(name, Kind.EMBEDDING, (rows, columns), scheme, lies), tensors
    head = leaf == "lm_head"
    middle = (LOGIT_SPREAD if head else 1.0) / (math.sqrt(columns) * CODE_RMS[bits])
    sides = (None, None) if head else linear_sides(leaf, layer_index(name))
    s_in, s_out = (None if s is None else torch.tensor(s * STEP, dtype=torch.float32) for s in sides)
    tensors = QuantizedTensors(
        linear_rows(rows, columns, bits, generator),
        weight_scale(rows, 1, middle, generator),
        input_scale=s_in,
        output_scale=s_out,
    )
    linear = LinearScheme(WeightScheme(bits), quantize_input=not head, quantize_output=not head)
    return QuantizedModule(name, Kind.LINEAR, (rows, columns), linear, lies), tensors


def plain_tensors(model: PreTrainedModel, skipped: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Everything that is not quantized: norms and layer scalars of 1, a random per-layer projection."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] in skipped:
            continue
        if name.endswith("per_layer_model_projection.weight"):
            value = torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor.shape[1])
            yield name, value.to(tensor.dtype)
        else:
            yield name, torch.ones(tensor.shape, dtype=tensor.dtype)


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer that reads and writes bytes, and shows every other token as its number."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    entries = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += [f"<{i}>" for i in range(len(entries), vocab)]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(entries[:vocab])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=special[3:],
        chat_template=TEMPLATE,
    )


def build(
    shape: str,
    out: Path,
    *,
    storage: str = "gemma",
    layers: int | None = None,
    vocab: int = 262144,
    wrapper: bool = False,
    row_scales: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the checkpoint; the folder.

    Args:
        shape: `"e2b"` or `"e4b"`.
        out: the folder to make.
        storage: `"gemma"` or `"compressed-tensors"`.
        layers: decoder layers, for a smaller model.
        vocab: rows of the tables.
        wrapper: with the names of the multimodal wrapper, without its towers.
        row_scales: one scale for each row of the per-layer table instead of one for each layer's part, because
            transformers' own quantizer loads no other.
        overwrite: replace a checkpoint that is there.
    """
    text = text_config(shape, layers, vocab)
    config: PretrainedConfig = text
    if wrapper:
        config = Gemma4Config(text_config=text, tie_word_embeddings=False, dtype="bfloat16")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parts = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    left = [n for n in parts if n.endswith("per_layer_model_projection")]
    chosen = {n: m for n, m in parts.items() if n not in left}
    own = text.num_hidden_layers - text.num_kv_shared_layers
    attention = [n for n, _ in model.named_modules() if n.endswith(".self_attn") and layer_index(n) < own]
    raw = config.to_dict()
    raw["architectures"] = [type(model).__name__]
    with tempfile.TemporaryDirectory() as beside:
        tokenizer(vocab).save_pretrained(beside)
        generation = {"bos_token_id": 2, "eos_token_id": [1, 4], "pad_token_id": 0, "do_sample": True}
        sampling = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
        (Path(beside) / "generation_config.json").write_text(json.dumps({**generation, **sampling}))
        return write_checkpoint(
            out,
            config=raw,
            storage=storage,
            modules=(
                quantized(name, module, text, storage, seed, row_scales)
                for seed, (name, module) in enumerate(chosen.items())
            ),
            plain=plain_tensors(model, set(chosen)),
            kv_scales=dict.fromkeys(attention, KVScales(STEP, STEP)),
            unquantized=left,
            copy_from=beside,
            overwrite=overwrite,
            max_shard_bytes=SHARD_BYTES,
        )


def main() -> None:
    """Build as the command line says; the last line printed is JSON."""
    parser = argparse.ArgumentParser(description="Write an E2B- or E4B-shaped checkpoint with random codes.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--storage", choices=("gemma", "compressed-tensors"), default="gemma")
    parser.add_argument("--layers", type=int, help="fewer decoder layers")
    parser.add_argument("--vocab", type=int, default=262144, help="rows of the embedding tables and the head")
    parser.add_argument("--wrapper", action="store_true", help="names of the multimodal wrapper, without towers")
    parser.add_argument("--row-scales", action="store_true", help="tables that transformers' own quantizer loads")
    parser.add_argument("--overwrite", action="store_true")
    arguments = vars(parser.parse_args())
    start = time.perf_counter()
    folder = build(arguments.pop("shape"), arguments.pop("out"), **arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    written = sum(file.stat().st_size for file in folder.iterdir())
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"folder": str(folder), "seconds": seconds, "bytes": written, "peak_rss": peak}))


if __name__ == "__main__":
    main()
