"""The small model: Gemma 4's architecture at a few million parameters, with the phone's arithmetic in its training.

Every linear and table of transformers' own Gemma 4 is replaced by a module that has learned scales beside its weight.
In the float stage it computes as before. In the quantized stage its forward is the integer layer's (see
`bytelane.numerics`), on codes that bfloat16 holds exactly, and its backward passes rounding straight through:

    q = clamp(rne(x / s_in)),  c = clamp(rne(w / s_w)),  y = s_in s_w (q c^T),  out = s_out clamp(rne(y / s_out))

so the gradient of each scale is that of learned step size quantization (Esser et al., 2020, https://arxiv.org/abs/1902.08153):
the clamp is trained. Scales are learned as logarithms, which keeps them positive and their steps relative. Layers that
read one tensor (q, k and v; gate and up) share one input scale. Keys and values are quantized between rotation and
attention, where the int8 cache does it.

The bit map is Gemma's mobile one: 4-bit attention and lower MLPs, 2-bit MLPs in the layers that reuse keys and values,
8-bit per-layer gates, 2-bit embeddings and head (the head without activation scales), 4-bit per-layer embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "small_model_attention"
ROW = 512


def config(vocab: int = 4096, *, toy: bool = False) -> Gemma4TextConfig:
    """The shape; `toy` is a tenth of it, to try the scripts with."""
    hidden, inner = (64, 128) if toy else (256, 640)
    types = ["sliding_attention"] * 3 + ["full_attention"]
    return Gemma4TextConfig(
        vocab_size=vocab,
        vocab_size_per_layer_input=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=8,
        num_kv_shared_layers=4,
        use_double_wide_mlp=True,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=hidden // 4,
        global_head_dim=hidden // 2,
        hidden_size_per_layer_input=hidden // 8,
        layer_types=types * 2,
        sliding_window=128,
        max_position_embeddings=1024,
        final_logit_softcapping=30.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        dtype="bfloat16",
    )


def weight_bits(name: str, shared_from: int) -> int:
    """The width of a module: see above. `shared_from` is the first layer that reuses keys and values."""
    leaf = name.rpartition(".")[2]
    if leaf in ("lm_head", "embed_tokens"):
        return 2
    if leaf in ("per_layer_input_gate", "per_layer_projection"):
        return 8
    return 2 if ".mlp." in name and int(name.split("layers.")[1].split(".")[0]) >= shared_from else 4


def codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """`clamp(rne(x / s))` with rounding passed straight through and the clamp learned."""
    scaled = torch.clamp(x.float() * torch.reciprocal(scale), low, high)
    return scaled + (torch.round(scaled) - scaled).detach()


def fake_quantize(x: Tensor, log_scale: Tensor) -> Tensor:
    """An int8 side: quantize and dequantize, in the dtype of `x`."""
    scale = log_scale.exp()
    return (codes(x, scale, -128, 127) * scale).to(x.dtype)


def _scalar() -> nn.Parameter:
    return nn.Parameter(torch.zeros(()))


class Quantized:
    """What the two modules share: a weight with one learned scale for each row."""

    bits: int
    weight: nn.Parameter
    log_scale: nn.Parameter
    quantizing = False

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    @torch.no_grad()
    def fit_scales(self) -> None:
        """For each row, the scale with the least squared error, from a grid below the one that clips nothing."""
        low, high = self.limits
        weight = self.weight.float()
        top = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / high
        best, least = top.clone(), torch.full_like(top, math.inf)
        for step in range(1, 101):
            scale = top * (step / 100)
            error = (torch.clamp(torch.round(weight / scale), low, high) * scale - weight).square().sum(1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        self.log_scale.copy_(best.log())


class Linear(nn.Linear, Quantized):
    """A linear layer with N-bit weights, and int8 sides unless it is the head."""

    def __init__(self, source: nn.Linear, bits: int, *, sides: bool) -> None:
        super().__init__(source.in_features, source.out_features, bias=False)
        self.weight = source.weight
        self.bits, self.sides = bits, sides
        self.log_scale = nn.Parameter(torch.zeros(self.out_features, 1))
        if sides:
            self.log_in, self.log_out = _scalar(), _scalar()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if not self.quantizing:
            return super().forward(x)
        half = torch.bfloat16
        w_scale = self.log_scale.exp()
        w = codes(self.weight, w_scale, *self.limits)
        if not self.sides:
            return functional.linear(x.to(half), (w * w_scale).to(half))
        s_in = self.log_in.exp()
        y = functional.linear(codes(x, s_in, -128, 127).to(half), w.to(half))
        return fake_quantize(y.float() * (s_in * w_scale[:, 0]), self.log_out)


class Embedding(nn.Embedding, Quantized):
    """A table with N-bit rows; `factor` is the architecture's own."""

    def __init__(self, source: nn.Embedding, bits: int, factor: float) -> None:
        super().__init__(source.num_embeddings, source.embedding_dim)
        self.weight = source.weight
        self.bits, self.factor = bits, factor
        self.log_scale = nn.Parameter(torch.zeros(self.num_embeddings, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `[...]` to rows `[..., dim]`."""
        rows = super().forward(ids)
        if self.quantizing:
            scale = functional.embedding(ids, self.log_scale).exp()
            rows = codes(rows, scale, *self.limits) * scale
        return rows * self.factor


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention on keys and values as the int8 cache holds them; transformers' interface."""
    scales = module.kv_scales
    if scales.quantizing:
        key, value = fake_quantize(key, scales.log_k), fake_quantize(value, scales.log_v)
    heads = query.shape[1]
    key, value = (t.expand(-1, heads, -1, -1) for t in (key, value))
    out = functional.scaled_dot_product_attention(
        query, key.to(query.dtype), value.to(query.dtype), attn_mask=mask, is_causal=mask is None, scale=1.0
    )
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


class KVScales(nn.Module):
    """The learned scales of one layer's keys and values."""

    quantizing = False

    def __init__(self) -> None:
        super().__init__()
        self.log_k, self.log_v = _scalar(), _scalar()


def build(shape: Gemma4TextConfig, seed: int) -> Gemma4ForCausalLM:
    """The float model with trainable scales in it."""
    torch.manual_seed(seed)
    shape._attn_implementation = ATTENTION
    model = Gemma4ForCausalLM(shape).float()
    first_shared = shape.num_hidden_layers - shape.num_kv_shared_layers
    for name, module in list(model.named_modules()):
        if name.endswith("per_layer_model_projection"):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02 if name == "lm_head" else module.in_features**-0.5)
            _replace(model, name, Linear(module, weight_bits(name, first_shared), sides=name != "lm_head"))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / module.scalar_embed_scale)
            _replace(model, name, Embedding(module, weight_bits(name, first_shared), module.scalar_embed_scale))
        elif name.endswith("q_norm"):
            # Attention has no factor of its own (scaling is 1), so its logits would start out far too large.
            nn.init.constant_(module.weight, module.weight.numel() ** -0.5)
        elif "post_" in name.rpartition(".")[2]:
            nn.init.constant_(module.weight, 0.3)
    last: dict[str, KVScales] = {}
    for layer in model.model.layers:
        attention_module, mlp = layer.self_attn, layer.mlp
        mlp.up_proj.log_in = mlp.gate_proj.log_in
        if not attention_module.is_kv_shared_layer:
            attention_module.k_proj.log_in = attention_module.v_proj.log_in = attention_module.q_proj.log_in
            last[attention_module.layer_type] = KVScales()
            attention_module.kv_scales = last[attention_module.layer_type]
        else:
            # Not a submodule: the layer whose keys it reads owns the scales.
            object.__setattr__(attention_module, "kv_scales", last[attention_module.layer_type])
    return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def masks(length: int, window: int, device: torch.device | str) -> dict[str, Tensor | None]:
    """Attention masks by layer type, as transformers' model takes them: causal, and causal within the window."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return {"full_attention": None, "sliding_attention": ((distance >= 0) & (distance < window))[None, None]}


def set_quantizing(model: nn.Module, on: bool) -> None:
    """Switch between the two stages."""
    for module in model.modules():
        if isinstance(module, Quantized | KVScales):
            module.quantizing = on


@torch.no_grad()
def calibrate(model: Gemma4ForCausalLM, run: Callable[[], Any], share: float = 0.99999) -> None:
    """Start all scales: weights by least squares, sides at the value that `share` of a run's activations stay below."""
    seen: dict[int, tuple[nn.Parameter, float]] = {}

    def note(parameter: nn.Parameter, x: Tensor) -> None:
        flat = x.detach().float().abs().flatten()
        rank = max(1, int(flat.numel() * share))
        value = float(flat.kthvalue(rank).values) if flat.numel() < 2**24 else float(flat.cpu().kthvalue(rank).values)
        seen[id(parameter)] = parameter, max(value, seen.get(id(parameter), (parameter, 0.0))[1])

    hooks = []
    for module in model.modules():
        if isinstance(module, Quantized):
            module.fit_scales()
        if isinstance(module, Linear) and module.sides:
            hooks.append(module.register_forward_hook(
                lambda m, args, y: (note(m.log_in, args[0]), note(m.log_out, y), None)[-1]
            ))  # fmt: skip

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        note(module.kv_scales.log_k, key)
        note(module.kv_scales.log_v, value)
        return attention(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, watched)
    try:
        run()
    finally:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
        for hook in hooks:
            hook.remove()
    for parameter, value in seen.values():
        parameter.fill_(math.log(value / 127))


def scales(model: nn.Module) -> Iterator[nn.Parameter]:
    """The learned scales, each once."""
    yield from (p for name, p in model.named_parameters() if ".log_" in name)
