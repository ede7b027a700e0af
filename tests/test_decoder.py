"""Native decoder layers: the same bits as step by step, in any batch; near transformers' own; and who gets them."""

from __future__ import annotations

import copy
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import bytelane
import tiny
from bytelane import QuantLinear, _native, errors
from bytelane.cache import cache_keyword, make_cache
from bytelane.checkpoint import KVScales
from bytelane.decoder import DecodeStack, merge, refusals
from bytelane.decoder.forward import LayerForward
from bytelane.scheme import LinearScheme, WeightScheme

GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"
ARCHITECTURES = ["llama", "gemma3", "gemma4", "qwen3"]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in ARCHITECTURES:
        made[name] = tmp_path_factory.mktemp(name) / "model"
        config = tiny.config(name)
        scales = {"model.layers.0.self_attn": KVScales(0.03, 0.04), "model.layers.1.self_attn": KVScales(0.02, 0.05)}
        tiny.write_random(made[name], config, tiny.default_schemes(config), kv_scales=scales)
    return made


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def feed(model: Any, ids: torch.Tensor, sizes: list[int], cache: Any = None, **given: Any) -> torch.Tensor:
    """Logits of all positions, the ids fed piece by piece."""
    found = []
    cache = make_cache(model) if cache is None else cache
    for piece in torch.split(ids, sizes, dim=1):
        found.append(model(piece, **{cache_keyword(model): cache}, use_cache=True, **given).logits)
    return torch.cat(found, dim=1)


def watch(model: Any) -> list[Any]:
    """Hooks on every projection: the layers run step by step then."""
    parts = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return [m.register_forward_hook(lambda *_: None) for m in parts]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_native_equals_step_by_step(folders: dict[str, Path], architecture: str, dtype: torch.dtype) -> None:
    model = bytelane.load_model(folders[architecture], dtype=dtype)
    assert model.bytelane_float_ops == "native"
    assert refusals(model) == {}
    ids = tokens(2, 30)
    native = feed(model, ids, [17, 1, 12])
    hooks = watch(model)
    assert torch.equal(feed(model, ids, [17, 1, 12]), native)
    for hook in hooks:
        hook.remove()
    assert torch.equal(feed(model, ids, [17, 1, 12]), native)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("int8", [True, False], ids=["int8 cache", "float cache"])
def test_pieces_batches_threads_and_padding_change_no_bit(
    folders: dict[str, Path], architecture: str, dtype: torch.dtype, int8: bool
) -> None:
    """Beyond the sliding window (16) too. In float32 the head is torch's matmul, whose sums depend on its rows."""
    model = bytelane.load_model(folders[architecture], dtype=dtype)
    caches = (lambda: make_cache(model)) if int8 else (lambda: DynamicCache(config=model.config))
    ids = tokens(3, 40)
    whole = feed(model, ids, [40], caches())
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for sizes in ([40], [1] * 40, [7, 16, 1, 1, 15]):
                assert torch.equal(feed(model, ids, sizes, caches()), whole)
    finally:
        torch.set_num_threads(before)
    for row in range(3):
        assert torch.equal(feed(model, ids[row : row + 1], [25, 15], caches()), whole[row : row + 1])
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = feed(model, padded, [45], caches(), attention_mask=mask, position_ids=positions)
    assert torch.equal(found[:, 5:], whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_near_transformers_own_layers(folders: dict[str, Path], architecture: str) -> None:
    """In float32 the float operations differ from torch's in last bits only, which an integer layer mostly swallows.

    Where one falls between, a code flips and its token moves by whole steps. A million codes were made on the way to
    60 tokens, one in some hundred thousand flips: so nearly all tokens' logits differ by the head's rounding alone.
    """
    ours = bytelane.load_model(folders[architecture], dtype=torch.float32)
    theirs = bytelane.load_model(folders[architecture], dtype=torch.float32, float_ops="torch")
    assert theirs.bytelane_float_ops == "torch"
    ids = tokens(2, 30)
    left, right = (feed(m, ids, [30], DynamicCache(config=m.config)) for m in (ours, theirs))
    gaps = (left - right).abs().amax(dim=-1)
    assert (gaps > 1e-5).float().mean() <= 0.1, gaps


def test_the_wrapper_with_images_is_native(tmp_path: Path) -> None:
    """Image tokens see each other both ways: the mask is no longer a triangle."""
    import wrapper

    folder = wrapper.write_wrapper(tmp_path / "model", kv_scales=True)
    model = bytelane.load_model(folder, dtype=torch.bfloat16)
    assert model.bytelane_float_ops == "native"
    native = wrapper.logits(model, wrapper.image_inputs())
    watch(model)
    assert torch.equal(wrapper.logits(model, wrapper.image_inputs()), native)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_width_side_and_group(group_size: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    """Projections that cannot be merged, weight-only ones among them, are run apart and give the same bits."""
    config = tiny.config("llama")
    plan = {
        name: LinearScheme(WeightScheme(2 + i % 7, group_size), quantize_input=i % 4 != 1, quantize_output=i % 3 != 0)
        for i, name in enumerate(tiny.linear_names(config))
    }
    tiny.write_random(tmp_path / "model", config, plan)
    model = bytelane.load_model(tmp_path / "model", dtype=dtype)
    assert refusals(model) == {}
    native = feed(model, tokens(2, 9), [5, 4])
    watch(model)
    assert torch.equal(feed(model, tokens(2, 9), [5, 4]), native)


# --- merging -----------------------------------------------------------------------------------------------------


def layer(out: int, bits: int = 4, seed: int = 0, **given: Any) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low, high + 1, (out, 64), dtype=torch.int8, generator=generator)
    scale = torch.rand(out, 1, generator=generator) * 0.01
    given = {"input_scale": 0.02, "output_scale": 0.01 * (seed + 1), **given}
    return QuantLinear.from_codes(codes, scale, num_bits=bits, **given)


def test_merged_projections_share_memory_and_keep_their_scales() -> None:
    parts = [layer(32, seed=0), layer(8, seed=1), layer(8, seed=2)]
    x = torch.randn(5, 64)
    apart = [part(x) for part in parts]
    (one,) = merge(parts)
    assert one.first == (0, 32, 40)
    assert one.out_features == 48
    y = torch.ops.bytelane.linear(x, one.packed, one.weight_scale, one.input_scale, one.output_scale, None, 4, 0)
    assert torch.equal(y, torch.cat(apart, dim=1))
    for part, expected in zip(parts, apart, strict=True):
        assert part.packed.untyped_storage().data_ptr() == one.packed.untyped_storage().data_ptr()
        assert torch.equal(part(x), expected)
    (again,) = merge(parts)
    assert again.packed.data_ptr() == one.packed.data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 2},
        {"input_scale": 0.03},
        {"output_scale": None},
        {"group_size": 32, "weight_scale": True},
        {"bias": torch.zeros(8)},
    ],
)
def test_what_cannot_be_merged_is_left_apart(other: dict[str, Any]) -> None:
    if other.pop("weight_scale", None):
        codes = torch.zeros(8, 64, dtype=torch.int8)
        second = QuantLinear.from_codes(
            codes, torch.ones(8, 2), num_bits=4, input_scale=0.02, output_scale=0.1, **other
        )
    else:
        second = layer(8, **other)
    assert len(merge([layer(32), second])) == 2


def test_without_an_input_scale_nothing_is_shared() -> None:
    assert len(merge([layer(8, input_scale=None), layer(8, input_scale=None)])) == 2


# --- when it runs ------------------------------------------------------------------------------------------------


def test_replaced_projections_count(folders: dict[str, Path]) -> None:
    model = bytelane.load_model(folders["llama"], dtype=torch.bfloat16)
    ids = tokens(1, 6)
    before = feed(model, ids, [6])
    attention = model.model.layers[0].self_attn
    attention.q_proj = layer(64, seed=5)
    replaced = feed(model, ids, [6])
    assert not torch.equal(replaced, before)
    watch(model)
    assert torch.equal(feed(model, ids, [6]), replaced)


def test_scales_of_groups_may_change_in_place(tmp_path: Path) -> None:
    config = tiny.config("llama")
    scheme = LinearScheme(WeightScheme(4, 32), quantize_input=True, quantize_output=True)
    tiny.write_random(tmp_path / "model", config, dict.fromkeys(tiny.linear_names(config), scheme))
    model, ids = bytelane.load_model(tmp_path / "model", dtype=torch.bfloat16), tokens(1, 6)
    before = feed(model, ids, [5, 1])
    for name in ("mlp.up_proj", "self_attn.o_proj"):  # merged with another one, and alone
        model.model.layers[0].get_submodule(name).weight_scale.mul_(1.5)
    changed = feed(model, ids, [5, 1])
    assert not torch.equal(changed, before)
    watch(model)
    assert torch.equal(feed(model, ids, [5, 1]), changed)


def test_numerics_may_change_at_any_time(folders: dict[str, Path]) -> None:
    model = bytelane.load_model(folders["llama"], dtype=torch.bfloat16)
    emulated = bytelane.load_model(folders["llama"], dtype=torch.bfloat16, numerics="emulated", float_ops="native")
    ids = tokens(1, 6)
    integer = feed(model, ids, [6])
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.numerics = bytelane.Numerics.EMULATED
    assert torch.equal(feed(model, ids, [6], DynamicCache(config=model.config)), feed(emulated, ids, [6]))
    assert not torch.equal(feed(model, ids, [6]), integer)
    assert refusals(model)["model.layers.0"] == "q_proj runs in emulated numerics"


def test_copies_and_casts_are_their_own(folders: dict[str, Path]) -> None:
    model = bytelane.load_model(folders["gemma4"], dtype=torch.bfloat16)
    ids = tokens(1, 6)
    expected = feed(model, ids, [6])
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.gate_proj.packed.zero_()
    assert torch.equal(feed(model, ids, [6]), expected)
    assert not torch.equal(feed(other, ids, [6]), expected)
    model.to(torch.float32)
    wide = bytelane.load_model(folders["gemma4"], dtype=torch.float32)
    # norms were rounded to bfloat16 when the model was loaded, and the layers' scales never are
    for layer, other in zip(model.model.layers, wide.model.layers, strict=True):
        other.load_state_dict({k: v for k, v in layer.state_dict().items() if "norm" in k}, strict=False)
    stream = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    angles = wide.model.rotary_emb(stream, torch.arange(6)[None], "sliding_attention")
    given = {"position_embeddings": angles, "shared_kv_states": {}}
    gate = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        pair = [m.model.layers[0](stream, gate, **given) for m in (model, wide)]
    assert torch.equal(*pair)


def last_streams(*models: Any) -> list[torch.Tensor]:
    """What reaches each model's last norm, filled in as they run."""
    seen: list[torch.Tensor] = []
    for model in models:
        model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("case", ["eager", "hook"])
def test_other_calls_take_transformers_own_layers(folders: dict[str, Path], case: str, monkeypatch: Any) -> None:
    ours = bytelane.load_model(folders["llama"], dtype=torch.float32)
    theirs = bytelane.load_model(folders["llama"], dtype=torch.float32, float_ops="torch")
    hooked: list[int] = []
    for model in (ours, theirs):
        if case == "eager":
            model.set_attn_implementation("eager")
        else:
            for layer in model.model.layers:
                layer.mlp.register_forward_hook(lambda *_: hooked.append(1))
    monkeypatch.setattr(LayerForward, "native", lambda *_: pytest.fail("took the native layer"))
    streams = last_streams(ours, theirs)
    given = {"output_attentions": True} if case == "eager" else {}
    with torch.inference_mode():
        found, expected = (model(tokens(1, 8), use_cache=False, **given) for model in (ours, theirs))
    assert torch.equal(*streams)
    assert len(hooked) == (4 if case == "hook" else 0)
    if case == "eager":
        assert all(torch.equal(a, b) for a, b in zip(found.attentions, expected.attentions, strict=True))


def test_what_the_kernels_do_not_take_is_refused_to_them(folders: dict[str, Path]) -> None:
    own: LayerForward = bytelane.load_model(folders["llama"]).model.layers[0].bytelane_forward
    x, angles = torch.zeros(1, 3, 64), (torch.zeros(1, 3, 16), torch.zeros(1, 3, 16))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert own.takes(x, mask, angles, {})
    assert own.takes(x, None, angles, {})
    assert not own.takes(x.requires_grad_(), mask, angles, {})
    assert not own.takes(x.detach(), mask.float(), angles, {})
    assert not own.takes(x.detach().double(), mask, angles, {})
    assert not own.takes(x.detach(), mask, tuple(a[..., :8] for a in angles), {})
    assert not own.takes(x.detach(), mask, None, {})
    assert not own.takes(x.detach(), mask, angles, {"output_attentions": True})
    assert not own.takes(torch.zeros(1, 3, 64, device="meta"), None, angles, {})


def test_hidden_states_are_recorded(folders: dict[str, Path]) -> None:
    model = bytelane.load_model(folders["gemma4"], dtype=torch.bfloat16)
    streams = last_streams(model)
    with torch.inference_mode():
        found = model(tokens(1, 5), output_hidden_states=True)
        (stream,) = streams
        assert len(found.hidden_states) == 4
        assert torch.equal(found.hidden_states[-1], model.model.norm(stream))


def test_choices_are_checked(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float_ops must be one of"):
        bytelane.load_model(folders["llama"], float_ops="fast")  # type: ignore[arg-type]
    assert bytelane.load_model(folders["llama"], numerics="emulated").bytelane_float_ops == "torch"
    from transformers import MistralConfig

    config = MistralConfig(**tiny.SIZES, tie_word_embeddings=False)
    tiny.write_random(tmp_path / "other", config, {"model.layers.0.mlp.up_proj": LinearScheme(WeightScheme(4))})
    other = bytelane.load_model(tmp_path / "other")
    assert other.bytelane_float_ops == "torch"
    with pytest.raises(errors.ConfigError, match="MistralDecoderLayer is not an architecture"):
        bytelane.load_model(tmp_path / "other", float_ops="native")


def test_a_layer_of_another_kind_runs_step_by_step(tmp_path: Path) -> None:
    """A model of which only some projections are quantized has no native layer, and the same invariance."""
    config = tiny.config("llama")
    tiny.write_random(tmp_path / "model", config, {"model.layers.0.mlp.up_proj": LinearScheme(WeightScheme(4))})
    model = bytelane.load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert refusals(model)["model.layers.1"] == "q_proj is a Linear, not one of bytelane's layers"
    assert torch.isfinite(feed(model, tokens(2, 8), [5, 3])).all()


# --- all layers at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("int8", [True, False], ids=["int8 cache", "float cache"])
def test_a_stack_of_layers_gives_the_models_logits(
    folders: dict[str, Path], architecture: str, dtype: torch.dtype, int8: bool
) -> None:
    """Token by token to beyond the window and out of the cache's first room, in two caches."""
    model = bytelane.load_model(folders[architecture], dtype=dtype, kv_cache="int8" if int8 else "float")
    ids = tokens(1, 100)
    one, other = make_cache(model), make_cache(model)
    feed(model, ids[:, :7], [7], one)
    stack = DecodeStack.of(model)
    assert stack is not None
    assert not stack.takes(other)
    feed(model, ids[:, :7], [7], other)
    assert stack.takes(other)
    for i in range(7, 100):
        expected = feed(model, ids[:, i : i + 1], [1], one)[0, -1]
        assert torch.equal(stack.step(int(ids[0, i]), other), expected)
    assert one.get_seq_length() == other.get_seq_length() == 100
    for a, b in zip(one.layers, other.layers, strict=True):
        if getattr(a, "keys", None) is not None:
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


def test_a_stack_is_for_native_layers_and_growing_caches(folders: dict[str, Path]) -> None:
    model = bytelane.load_model(folders["gemma4"], dtype=torch.bfloat16)
    stack = DecodeStack.of(model)
    assert stack is not None
    foreign = DynamicCache(config=model.config)
    feed(model, tokens(1, 5), [5], foreign)
    assert not stack.takes(foreign)
    two = make_cache(model)
    feed(model, tokens(2, 5), [5], two)
    assert not stack.takes(two)
    recorded = make_cache(model)
    recorded.activate_past_recording()
    feed(model, tokens(1, 5), [5], recorded)
    assert not stack.takes(recorded)
    hooks = watch(model)
    assert DecodeStack.of(model) is None
    for hook in hooks:
        hook.remove()
    assert DecodeStack.of(model) is not None
    assert DecodeStack.of(bytelane.load_model(folders["gemma4"], float_ops="torch")) is None
    handle = model.register_forward_hook(lambda *_: None)
    assert DecodeStack.of(model) is None
    handle.remove()


def test_the_native_stack_checks_its_slots(folders: dict[str, Path]) -> None:
    model = bytelane.load_model(folders["llama"], dtype=torch.bfloat16)
    stack = _native.LayerStack()
    native = model.model.layers[0].bytelane_forward.native(torch.bfloat16)
    stack.add(native.run)
    with pytest.raises(ValueError, match="a slot for each of the 1 layers, found 2"):
        stack.step(0, 0, 2, 0, 1, 0, 0, 0, 1)
    for slot, message in (([0] * 8, "sees at least the token"), ([0] * 6 + [1, 1], "no such angles")):
        table, angles = array("q", slot), array("q", [0, 0])
        with pytest.raises(ValueError, match=message):
            stack.step(0, table.buffer_info()[0], 1, angles.buffer_info()[0], 1, 0, 0, 0, 1)
