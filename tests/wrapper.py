"""A tiny Gemma 4 with its vision and audio towers, quantized and saved by transformers' own classes.

`write_wrapper` replaces the linears and tables of a random `Gemma4ForConditionalGeneration` by transformers' quantized
modules, fills those with random codes and plausible scales, and saves the model as its authors would. Nothing of the
package takes part, so what bytelane reads back is the format as transformers means it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    PreTrainedModel,
)
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear, replace_with_quant_layers
from transformers.utils.quantization_config import GemmaQuantizationConfig

IMAGE, VIDEO, AUDIO = 120, 121, 122
WIDTHS = {
    r"^lm_head$": {"num_bits": 2},
    r"language_model\.embed_tokens$": {"num_bits": 2},
    r"language_model\.embed_tokens_per_layer$": {"num_bits": 4},
    r"language_model\.layers\.[01]\.mlp\.": {"num_bits": 4},
    r"language_model\.layers\.\d+\.mlp\.": {"num_bits": 2},
    r"language_model\.layers\.\d+\.per_layer_": {"num_bits": 8},
    r"self_attn\..*_proj\.linear": {"num_bits": 8},
    r"self_attn\.": {"num_bits": 4},
    r"vision|audio": {"num_bits": 8},
}


def config(*, tied: bool = False) -> Gemma4Config:
    """All parts of the real model at a thousandth of its size."""
    text = Gemma4TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=1,
        final_logit_softcapping=30.0,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
    )
    vision = Gemma4VisionConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        patch_size=4,
        pooling_kernel_size=2,
        position_embedding_size=64,
        use_clipped_linears=True,
        standardize=True,
    )
    audio = Gemma4AudioConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        output_proj_dims=40,
        subsampling_conv_channels=[8, 4],
    )
    return Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        tie_word_embeddings=tied,
        dtype="float32",
    )


def write_wrapper(
    directory: Path,
    *,
    kv_scales: bool = False,
    groups: int = 1,
    seed: int = 0,
    model_config: Gemma4Config | None = None,
) -> Path:
    """Save a random quantized model; the folder. `groups` are scales in a row of the per-layer table."""
    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(model_config or config()).eval()
    # As in the released checkpoints, the per-layer projection and the audio front end stay in float.
    left = ["model.language_model.per_layer_model_projection", "model.audio_tower.subsample_conv_projection"]
    quantization = GemmaQuantizationConfig(
        num_bits=8, quantize_embeddings=True, module_quant_configs=WIDTHS, modules_to_not_convert=left
    )
    replace_with_quant_layers(model, quantization, left)
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            _fill_linear(module, generator, calibrated=name != "lm_head")
        elif isinstance(module, QuantizedEmbedding):
            _fill_table(module, generator, groups=groups if "per_layer" in name else 1)
        elif hasattr(module, "input_min"):
            for leaf, value in (("input_min", -3.5), ("input_max", 3.25), ("output_min", -4.5), ("output_max", 5.0)):
                getattr(module, leaf).fill_(value)
        elif name.endswith("self_attn") and "language_model" in name and kv_scales and "layers.2" not in name:
            module.register_buffer("k_cache_scale", torch.tensor(0.025))
            module.register_buffer("v_cache_scale", torch.tensor(0.03))
    model.config.quantization_config = quantization
    model.save_pretrained(directory)
    return directory


def _random_bytes(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    low, high = (0, 256) if like.dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, like.shape, dtype=like.dtype, generator=generator)


def _fill_linear(module: QuantizedLinear, generator: torch.Generator, *, calibrated: bool) -> None:
    module.weight.data = _random_bytes(module.weight, generator)
    spread = 1.5 / (module.in_features**0.5 * (1 << (module.num_bits - 1)))
    module.weight_scale.data = (0.5 + torch.rand(module.out_features, 1, generator=generator)) * spread
    if calibrated:
        for scale in (module.input_activation_scale, module.output_activation_scale):
            scale.data = 0.02 + 0.02 * torch.rand((), generator=generator)


def _fill_table(module: QuantizedEmbedding, generator: torch.Generator, *, groups: int) -> None:
    module.embedding_quantized.data = _random_bytes(module.embedding_quantized, generator)
    spread = 1.5 / (module.scalar_embed_scale * (1 << (module.num_bits - 1)))
    scale = (0.5 + torch.rand(module.num_embeddings, groups, generator=generator)) * spread
    module.embedding_scale = torch.nn.Parameter(scale, requires_grad=False)


def text_inputs(tokens: int = 12) -> dict[str, Any]:
    """Two sequences of text."""
    return {"input_ids": torch.randint(3, 100, (2, tokens), generator=torch.Generator().manual_seed(1))}


def image_inputs() -> dict[str, Any]:
    """One sequence with an image of 4 x 4 patches, which the pooler turns into four soft tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 100, (1, 12), generator=generator)
    ids[0, 3:7] = IMAGE
    across, down = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy")
    return {
        "input_ids": ids,
        "pixel_values": torch.rand(1, 16, 48, generator=generator),
        "image_position_ids": torch.stack([across.flatten(), down.flatten()], dim=-1)[None],
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def audio_inputs() -> dict[str, Any]:
    """One sequence with 32 frames of audio, which the front end turns into eight soft tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (1, 14), generator=generator)
    ids[0, 3:11] = AUDIO
    return {
        "input_ids": ids,
        "input_features": torch.randn(1, 32, 8, generator=generator),
        "input_features_mask": torch.ones(1, 32, dtype=torch.bool),
        "mm_token_type_ids": (ids == AUDIO).long() * 3,
    }


def logits(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's logits."""
    with torch.inference_mode():
        return model(**inputs).logits
