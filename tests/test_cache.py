"""The int8 KV cache: its codes against the oracle, its logits against a reference made without it, and its uses.

Comparisons are exact. Where one run cuts the tokens differently from another (chunks, batches with padding, chats),
the float operations in between would differ in their last bits: attention sums over another number of keys, and the
linears without an input scale (`per_layer_model_projection`, `lm_head`) are float matmuls of other shapes. `row_by_row`
replaces exactly those by ones that treat every row alone; norms, rotations and activations are elementwise or per row
already. What is left is the cache, and it must then make no difference at all.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.gemma4.modeling_gemma4 import apply_rotary_pos_emb

import bytelane
import oracle
import tiny
from bytelane import errors
from bytelane.cache import (
    Int8Cache,
    Int8Layer,
    Int8SlidingWindowLayer,
    cache_bytes,
    cache_keyword,
    kv_scales,
    make_cache,
    rewind,
)
from bytelane.checkpoint import KVScales
from bytelane.kernels.float_ops import dequantize
from bytelane.scheme import LinearScheme, WeightScheme
from rowwise import gemma

WINDOW = 16
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 120, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These models are far too small to share out; on a busy machine the waiting takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- a second cache, by the oracle --------------------------------------------------------------------------------


def fake_quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """The oracle's codes as floats in the dtype of x."""
    y = oracle.quantize(x.float().numpy(), np.float32(scale)).astype(np.float32) * np.float32(scale)
    return torch.from_numpy(oracle.to_bfloat16(y) if x.dtype == torch.bfloat16 else y).to(x.dtype)


class OracleCache(DynamicCache):
    """Transformers' float cache, shown keys and values that went through the oracle's codes."""

    def __init__(self, model: Any) -> None:
        super().__init__(config=model.config)
        self.scales = model.bytelane_kv_scales

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> Any:
        if layer_idx in self.scales:
            s = self.scales[layer_idx]
            key_states, value_states = fake_quantize(key_states, s.k), fake_quantize(value_states, s.v)
        return super().update(key_states, value_states, layer_idx, *args, **kw)


def forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=True, **{cache_keyword(model): cache}).logits


def held_by(model: Any, output: Any) -> Any:
    """The cache that a model's output or `generate`'s holds."""
    return getattr(output, cache_keyword(model))


def codes(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers if layer.keys is not None]


def same_codes(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for p, q in zip(codes(a), codes(b), strict=True) for x, y in zip(p, q, strict=True))


# --- codes and logits ---------------------------------------------------------------------------------------------


class Captured:
    """Keys and values as the attention modules make them, from hooks on their norms and the rotary tables."""

    def __init__(self, model: Any) -> None:
        self.k: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}
        self.rotary: dict[str, Any] = {}
        self.handles = [
            model.model.rotary_emb.register_forward_hook(
                lambda _, args, out: self.rotary.__setitem__(args[2], out),
            )
        ]
        for layer in model.model.layers:
            attention = layer.self_attn
            if not attention.is_kv_shared_layer:
                self.handles += [
                    attention.k_norm.register_forward_hook(self._keys(attention)),
                    attention.v_norm.register_forward_hook(self._values(attention)),
                ]

    def _keys(self, attention: Any) -> Callable[..., None]:
        def hook(_: Any, args: Any, out: torch.Tensor) -> None:
            cos, sin = self.rotary[attention.layer_type]
            self.k[attention.layer_idx] = apply_rotary_pos_emb(out, cos, sin, unsqueeze_dim=2).transpose(1, 2)

        return hook

    def _values(self, attention: Any) -> Callable[..., None]:
        return lambda _, args, out: self.v.__setitem__(attention.layer_idx, out.transpose(1, 2))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_oracles_of_rotated_keys_and_normed_values(dtype: torch.dtype) -> None:
    model = gemma(dtype=dtype)
    cache, captured = make_cache(model), Captured(model)
    forward(model, tokens(2, 12), cache)
    captured.close()
    assert sorted(captured.k) == sorted(kv_scales(model)) == [0, 1, 2, 3]
    for index, scales in kv_scales(model).items():
        layer = cache.layers[index]
        for held, made, scale in ((layer.keys, captured.k, scales.k), (layer.values, captured.v, scales.v)):
            assert held.dtype == torch.int8
            assert np.array_equal(held.numpy(), oracle.quantize(made[index].float().numpy(), np.float32(scale)))
            assert held.unique().numel() > 50, "the scale leaves the codes something to say"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_a_float_cache_fed_through_the_oracle(dtype: torch.dtype) -> None:
    """Prefill, then token by token to more than twice the window: the same tensors, so the same bits."""
    model = gemma(dtype=dtype)
    ids = tokens(2, 40)
    ours, theirs, plain = make_cache(model), OracleCache(model), DynamicCache(config=model.config)
    differs = False
    for piece in torch.split(ids, [10] + [1] * 30, dim=1):
        found = forward(model, piece, ours)
        assert torch.equal(found, forward(model, piece, theirs))
        differs |= not torch.equal(found, forward(model, piece, plain))
    assert differs, "a float cache gives other logits, so the comparison sees the codes"
    sliding = [layer for layer in ours.layers if isinstance(layer, Int8SlidingWindowLayer)]
    assert [layer.keys.shape[-2] for layer in sliding] == [WINDOW - 1] * 3
    assert ours.get_seq_length() == 40


def test_prefill_beyond_the_window_equals_the_oracle() -> None:
    model = gemma()
    ours, theirs = make_cache(model), OracleCache(model)
    for piece in torch.split(tokens(1, 70), [45, 1, 1, 20, 3], dim=1):
        assert torch.equal(forward(model, piece, ours), forward(model, piece, theirs))


def test_layers_without_scales_stay_float(llama_folder: Path) -> None:
    model = bytelane.load_model(llama_folder)
    ours, theirs = make_cache(model), OracleCache(model)
    for piece in torch.split(tokens(2, 12), [9, 1, 2], dim=1):
        assert torch.equal(forward(model, piece, ours), forward(model, piece, theirs))
    assert [layer.keys.dtype for layer in ours.layers] == [torch.int8, torch.float32]


CHUNKS = {"whole": [40], "halves": [20, 20], "ragged": [7, 16, 1, 1, 15], "tokens": [1] * 40}


def test_chunks_change_no_code_when_float_operations_are_per_row(rowwise: Any) -> None:
    caches = {}
    last = {}
    for name, sizes in CHUNKS.items():
        caches[name] = make_cache(rowwise)
        for piece in torch.split(tokens(1, 40), sizes, dim=1):
            last[name] = forward(rowwise, piece, caches[name])[:, -1]
    for name in CHUNKS:
        assert same_codes(caches[name], caches["whole"]), name
        assert torch.equal(last[name], last["whole"]), name


def test_chunks_change_no_code_of_the_first_layer() -> None:
    """With torch's own attention: nothing comes before the first layer's codes but row-wise operations."""
    model = gemma()
    caches = {name: make_cache(model) for name in CHUNKS}
    for name, sizes in CHUNKS.items():
        for piece in torch.split(tokens(1, 40), sizes, dim=1):
            forward(model, piece, caches[name])
        first, whole = caches[name].layers[0], caches["whole"].layers[0]
        assert torch.equal(first.keys, whole.keys), name
        assert torch.equal(first.values, whole.values), name


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(r) for r in rows)
    ids = torch.stack([nn.functional.pad(r, (width - len(r), 0)) for r in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(r)).long() for r in rows])
    return ids, mask


@pytest.mark.parametrize("kind", ["rowwise", "torch"])
def test_left_padded_batch_equals_each_row_alone(kind: str, rowwise: Any) -> None:
    """To the bit with row-wise float operations; the same tokens with torch's. Beyond the window in both."""
    model = rowwise if kind == "rowwise" else gemma()
    rows = [tokens(n, seed=n) for n in (5, 19, 11)]
    ids, mask = padded(rows)
    new = 4 if kind == "rowwise" else 20
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=new, output_logits=True, **GREEDY)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=new, output_logits=True, **GREEDY)
        assert torch.equal(batch.sequences[i, ids.shape[1] :], alone.sequences[0, len(row) :])
        if kind == "rowwise":
            for a, b in zip(batch.logits, alone.logits, strict=True):
                assert torch.equal(a[i], b[0])


def test_bytes_are_half_of_bfloat16s() -> None:
    model = gemma(dtype=torch.bfloat16)
    ours, theirs = make_cache(model), DynamicCache(config=model.config)
    assert isinstance(ours, Int8Cache)
    assert ours.nbytes == 0
    for piece in torch.split(tokens(2, 40), [30, 9, 1], dim=1):
        forward(model, piece, ours)
        forward(model, piece, theirs)
        assert 2 * ours.nbytes == cache_bytes(theirs) > 0
    # three windows of 15 tokens with heads of 32, one full layer of 40 with heads of 64, keys and values, two rows
    assert ours.nbytes == 2 * 2 * (3 * (WINDOW - 1) * 32 + 40 * 64)


# --- the cache's own operations -----------------------------------------------------------------------------------

SCALES = {0: KVScales(0.03, 0.05), 1: KVScales(0.02, 0.04)}


def filled(length: int, batch: int = 3) -> tuple[Int8Cache, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A cache of one sliding and one full layer, and the floats that went in."""
    cache = Int8Cache(tiny.config("gemma3"), SCALES)
    generator = torch.Generator().manual_seed(length)
    states = [
        (torch.randn(batch, 2, length, 16, generator=generator), torch.randn(batch, 2, length, 16, generator=generator))
        for _ in SCALES
    ]
    for index, (k, v) in enumerate(states):
        cache.update(k, v, index)
    return cache, states


def holds(cache: Int8Cache, states: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    found = []
    for index, (k, v) in enumerate(states):
        layer, s = cache.layers[index], SCALES[index]
        found += [np.array_equal(layer.keys.numpy(), oracle.quantize(k.numpy(), np.float32(s.k)))]
        found += [np.array_equal(layer.values.numpy(), oracle.quantize(v.numpy(), np.float32(s.v)))]
    return all(found)


def test_operations_move_codes_as_they_would_move_floats() -> None:
    order = torch.tensor([2, 0, 0])
    changes: dict[str, tuple[Callable[[Int8Cache], object], Callable[[torch.Tensor], torch.Tensor]]] = {
        "nothing": (lambda c: None, lambda x: x),
        "crop": (lambda c: c.crop(-4), lambda x: x[:, :, :-4]),
        "reorder": (lambda c: c.reorder_cache(order), lambda x: x[order]),
        "repeat": (lambda c: c.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
        "select": (lambda c: c.batch_select_indices(order[:2]), lambda x: x[order[:2]]),
        "copy": (lambda c: None, lambda x: x),
    }
    for name, (change, expected) in changes.items():
        cache, states = filled(WINDOW - 3)
        if name == "copy":
            original, cache = cache, copy.deepcopy(cache)
            original.reset()
        change(cache)
        assert holds(cache, [(expected(k), expected(v)) for k, v in states]), name


def test_reset_forgets_and_the_cache_is_as_new() -> None:
    cache, _ = filled(20)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert cache.get_mask_sizes(5, 0) == cache.get_mask_sizes(5, 1) == (5, 0)
    states = filled(9, batch=2)[1]
    for index, (k, v) in enumerate(states):
        cache.update(k, v, index)
    assert holds(cache, states)


def test_rewind_cuts_or_refuses_and_leaves_alone() -> None:
    cache, states = filled(WINDOW - 1)
    assert rewind(cache, WINDOW - 1)
    assert rewind(cache, 6)
    assert holds(cache, [(k[:, :, :6], v[:, :, :6]) for k, v in states])
    assert rewind(cache, 0)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="cannot be cut to 1"):
        rewind(cache, 1)
    cache, states = filled(WINDOW)
    assert not rewind(cache, WINDOW - 1)
    assert holds(cache, [tuple(x[:, :, 1:] for x in states[0]), states[1]])


def test_update_returns_what_it_stored_and_saturates() -> None:
    layer = Int8Layer(KVScales(0.5, 0.25))
    k = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.25, 0.75, -0.25, -1e-30]).reshape(1, 1, 1, 7)
    keys, values = layer.update(k, k)
    assert layer.keys.flatten().tolist() == [127, 127, -128, 0, 2, 0, 0]
    assert keys.flatten().tolist() == [63.5, 63.5, -64, 0, 1, 0, 0]
    assert values.flatten().tolist() == [31.75, 31.75, -32, 0.25, 0.75, -0.25, 0]
    assert not torch.signbit(keys[keys == 0]).any()


def test_dequantize_equals_the_oracle_for_every_code() -> None:
    every = torch.arange(-128, 128, dtype=torch.int8)
    for scale in (0.03, 0.0472, 1e-3, 7.0):
        y = every.numpy().astype(np.float32) * np.float32(scale)
        assert np.array_equal(dequantize(every, torch.tensor(scale), torch.float32).numpy(), y)
        assert np.array_equal(dequantize(every, torch.tensor(scale), torch.bfloat16).float(), oracle.to_bfloat16(y))
        assert np.array_equal(dequantize(every, torch.tensor(scale), torch.float16).float(), oracle.to_float16(y))


def test_beams_equal_a_float_cache_fed_through_the_oracle() -> None:
    model = gemma()
    options = {**GREEDY, "max_new_tokens": 14, "num_beams": 3, "num_return_sequences": 2}
    ids = tokens(2, 9)
    ours = model.generate(ids, **options)
    assert isinstance(held_by(model, ours), Int8Cache)
    options[cache_keyword(model)] = OracleCache(model)
    assert torch.equal(ours.sequences, model.generate(ids, **options).sequences)


def test_candidates_of_an_assistant_are_taken_back() -> None:
    """Assisted generation crops both caches, beyond the window too; greedy, it must change nothing."""
    model, assistant = gemma(), gemma()
    ids = tokens(1, 9)
    options = {**GREEDY, "max_new_tokens": 30}
    plain = model.generate(ids, **options).sequences
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options).sequences, plain)


def test_configurations_without_an_int8_form_are_refused() -> None:
    config = tiny.config("gemma4")
    assert [type(layer) for layer in Int8Cache(config, SCALES).layers][:2] == [Int8SlidingWindowLayer, Int8Layer]
    # The third layer reuses the second one's states: it writes nothing, and its scales say nothing.
    assert not any(isinstance(x, Int8Layer) for x in Int8Cache(config, {2: SCALES[0]}).layers)
    with pytest.raises(errors.ModelConfigError, match="layer 3 of 3"):
        Int8Cache(config, {3: SCALES[0]})


# --- who gets it --------------------------------------------------------------------------------------------------


def cache_of(model: Any, **options: Any) -> type:
    return type(held_by(model, model.generate(tokens(1, 4), max_new_tokens=2, **{**GREEDY, **options})))


def test_generate_uses_it_unless_told_otherwise() -> None:
    model = gemma()
    assert model.bytelane_kv_cache == "int8"
    assert cache_of(model) is Int8Cache
    keyword = cache_keyword(model)
    assert keyword in inspect.signature(model.forward).parameters
    for name in {keyword, "past_key_values"}:
        assert cache_of(model, **{name: None}) is Int8Cache
    assert cache_of(model, **{keyword: DynamicCache(config=model.config)}) is DynamicCache
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        assert cache_of(model, past_key_values=DynamicCache(config=model.config)) is DynamicCache
    assert cache_of(model, use_cache=False) is type(None)
    assert cache_of(model, cache_implementation="dynamic") is DynamicCache
    config = copy.deepcopy(model.generation_config)
    config.cache_implementation, config.max_new_tokens, config.return_dict_in_generate = "dynamic", 2, True
    assert type(held_by(model, model.generate(tokens(1, 4), config))) is DynamicCache
    model.generation_config.cache_implementation = "dynamic"
    assert cache_of(model) is DynamicCache
    model.generation_config.cache_implementation = None
    with torch.inference_mode():
        assert type(held_by(model, model(tokens(1, 4)))) is DynamicCache


def test_kv_cache_choices(llama_folder: Path, tmp_path: Path) -> None:
    assert cache_of(gemma(kv_cache="float")) is DynamicCache
    assert cache_of(gemma(numerics="emulated")) is DynamicCache
    assert cache_of(gemma(numerics="emulated", kv_cache="int8")) is Int8Cache
    assert kv_scales(gemma(kv_cache="float"))[0] == kv_scales(gemma())[0]
    assert bytelane.load_model(llama_folder).bytelane_kv_cache == "int8"
    config = tiny.config("llama")
    tiny.write_random(tmp_path / "bare", config, {"model.layers.0.mlp.up_proj": LinearScheme(WeightScheme(4))})
    bare = bytelane.load_model(tmp_path / "bare")
    assert (kv_scales(bare), bare.bytelane_kv_cache, cache_of(bare)) == ({}, "float", DynamicCache)
    with pytest.raises(errors.MissingTensorError, match=r"bare: k_cache_scale: kv_cache='int8' needs"):
        bytelane.load_model(tmp_path / "bare", kv_cache="int8")
    with pytest.raises(ValueError, match="kv_cache must be one of auto, int8, float"):
        gemma(kv_cache="int4")


def test_a_copied_model_generates_with_itself() -> None:
    model = gemma()
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    del twin.bytelane_kv_scales[0]
    layers = held_by(twin, twin.generate(tokens(1, 4), max_new_tokens=2, **GREEDY)).layers
    assert [type(x) for x in layers[:2]] != [Int8SlidingWindowLayer] * 2
    assert cache_of(model) is Int8Cache


def test_a_copied_cache_goes_on_by_itself() -> None:
    model = gemma()
    cache = make_cache(model)
    forward(model, tokens(1, 20), cache)
    twin = copy.deepcopy(cache)
    found = forward(model, tokens(1, 3, seed=1), cache)
    assert twin.get_seq_length() == 20
    assert torch.equal(forward(model, tokens(1, 3, seed=1), twin), found)
    assert same_codes(cache, twin)
