"""Recipes, calibration text, ranges, rounding, and a tiny model all the way to a checkpoint and back."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bytelane.errors import CheckpointError, FileFormatError, GroupSizeError, OutputExistsError, ScaleError
from bytelane.models import load_model, open_model
from bytelane.quantize import (
    CalibrationError,
    Head,
    Range,
    Recipe,
    RecipeError,
    TextError,
    builtin_recipes,
    make_plan,
    observe,
    quantize_checkpoint,
    quantize_model,
    read_documents,
    round_to_nearest,
    windows,
)
from bytelane.quantize.observe import Statistics, range_scale
from bytelane.scheme import Kind, Storage, WeightScheme, code_range

VOCABULARY = 128
BFLOAT16_HALF_STEP = 2.0**-8
"""Rounding to 8 significant bits moves a value by at most half a step: a relative 2^-8."""


def make_model(*, tied: bool = True, seed: int = 0, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bias,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(3, VOCABULARY, 200)) for _ in range(4)]


def linear_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]


# --- text --------------------------------------------------------------------------------------------------------


def test_doc_elements_are_dealt_to_splits_and_stubs_dropped(tmp_path) -> None:
    bodies = [f"Title {i}\n\n" + f"long{i} " * 100 for i in range(9)]
    stub = "x" * 400  # exactly the limit: dropped
    parts = [f'<doc id="{i}" title="t">\n{body}\n</doc>\n' for i, body in enumerate([stub, *bodies])]
    path = tmp_path / "wiki.utf8"
    path.write_text("".join(parts), encoding="utf-8")
    every = [body.strip() for body in bodies]
    assert read_documents(path) == every
    assert read_documents(path, "evaluation") == [every[3], every[7]]
    assert read_documents(path, "calibration") == [b for i, b in enumerate(every) if i not in (3, 7)]


def test_plain_and_json_lines(tmp_path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("all of it\n\none document", encoding="utf-8")
    assert read_documents(plain) == ["all of it\n\none document"]
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"text": "one"}\n\n{"text": "two\\u2028still two", "more": 1}\n', encoding="utf-8")
    assert read_documents(lines) == ["one", "two\u2028still two"]
    with pytest.raises(TextError, match='split="all"'):
        read_documents(plain, "calibration")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b'{"text": 1}', FileFormatError, "line 1 must be an object"),
        ("a.jsonl", b'{"text": "x"}\n{', FileFormatError, "line 2 is not JSON"),
        ("a.txt", b"\xff\xfe", FileFormatError, "not UTF-8"),
        ("a.pdf", b"text", FileFormatError, "read from .txt, .utf8 and .jsonl"),
        ("a.txt", b" \n", TextError, "no document"),
    ],
)
def test_bad_text_is_refused(tmp_path, name, content, error, message) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_documents(path)


def test_windows_start_with_bos_and_lose_no_token(tokenizer, documents) -> None:
    found = windows(tokenizer, documents, length=32)
    ids = [i for d in documents for i in tokenizer(d, add_special_tokens=False)["input_ids"]]
    assert all(w.shape == (32,) and w.dtype == torch.int64 and w[0] == tokenizer.bos_token_id for w in found)
    joined = [int(i) for w in found for i in w[1:]]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < 31
    assert len(windows(tokenizer, documents, length=32, limit=3)) == 3
    with pytest.raises(TextError, match="fewer than one window"):
        windows(tokenizer, ["w5 w6"], length=32)


# --- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"default_bits": 9}, "default_bits: weights have 2 to 8 bits, found 9"),
        ({"bits": {"mlp": 1}}, "weights have 2 to 8 bits, found 1"),
        ({"bits": {"(": 4}}, "not a regular expression"),
        ({"granularity": {"mlp": "row"}}, '"channel" or a positive group size'),
        ({"granularity": {"mlp": 0}}, '"channel" or a positive group size'),
        ({"range": {"method": "percentile"}}, 'needs a "percentile" from 50 to below 100'),
        ({"range": {"method": "percentile", "percentile": 100}}, '{"method": "minmax"}'),
        ({"range": {"method": "minmax", "percentile": 99}}, "remove it or change the method"),
        ({"range": "most"}, 'a range is "minmax" or a percentile'),
        ({"head": "half"}, "head:"),
        ({"bitz": {}}, "bitz: no such setting; there are default_bits"),
        ({"storage": "gemma", "bits": {"mlp": 3}}, "the gemma storage holds 2, 4 and 8 bits"),
        ({"bits": ["mlp"]}, "must be PATTERN=VALUE"),
        ({"bits": ["mlp=4", "mlp=8"]}, "given twice"),
    ],
)
def test_a_wrong_recipe_says_what_to_do(values, message) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.of(values)
    assert message in str(caught.value)


def test_flags_and_file_make_the_same_recipe(tmp_path) -> None:
    flags = Recipe.of(
        {
            "bits": ["down_proj$=8", "mlp=4"],
            "granularity": ["mlp=32"],
            "range": "99.9",
            "output_ranges": ["v_proj=minmax"],
            "head": "full",
        }
    )
    path = tmp_path / "recipe.json"
    path.write_text(flags.model_dump_json(), encoding="utf-8")
    assert Recipe.load(path) == flags
    assert list(flags.bits.items()) == [("down_proj$", 8), ("mlp", 4)]
    assert flags.range == Range(method="percentile", percentile=99.9)
    assert flags.head is Head.FULL
    path.write_text('{"bits": {"a": 4, "a": 8}}', encoding="utf-8")
    with pytest.raises(RecipeError, match="'a' is given twice"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.load(tmp_path / "absent.json")


def test_built_in_recipes_load() -> None:
    assert "smollm2-w8a8o8" in builtin_recipes()
    for name in builtin_recipes():
        assert Recipe.load(name).storage == "compressed-tensors"


# --- the plan ----------------------------------------------------------------------------------------------------


def test_the_first_matching_pattern_wins() -> None:
    recipe = Recipe.of(
        {"bits": {r"layers\.0\.mlp\.down": 8, r"\.mlp\.": 4}, "default_bits": 6, "granularity": ["mlp=32"]}
    )
    found = {m.name: m for m in make_plan(make_model(), recipe).modules}
    bits = {n.removeprefix("model.layers."): m.scheme.weight.num_bits for n, m in found.items()}
    assert (bits["0.mlp.down_proj"], bits["1.mlp.down_proj"], bits["0.mlp.up_proj"]) == (8, 4, 4)
    assert bits["0.self_attn.q_proj"] == 6
    assert found["model.layers.0.mlp.down_proj"].storage is Storage.INT_QUANTIZED
    assert found["model.layers.1.mlp.down_proj"].storage is Storage.PACK_QUANTIZED
    assert found["model.layers.1.mlp.down_proj"].groups == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": {"mpl": 4}}, "bits: the pattern 'mpl' matches none"),
        ({"bits": {"embed": 4}}, "matches none"),  # tables stay in float unless `embeddings` says otherwise
        ({"bits": {"mlp": 4, "down_proj": 8}}, "decides nothing, earlier patterns match"),
        ({"ignore": ["mlp"], "no_input": ["down_proj"]}, "no_input: the pattern 'down_proj' matches none"),
        ({"no_output": ["lm_head"]}, "no_output: the pattern 'lm_head' matches none"),  # it has no sides
        ({"no_output": ["v_proj"], "output_ranges": {"v_proj": {"method": "minmax"}}}, "output_ranges: the pattern"),
        ({"ignore": [""]}, "quantizes nothing"),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(values, message) -> None:
    with pytest.raises(RecipeError, match=message):
        make_plan(make_model(), Recipe.of(values))


def test_a_group_size_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(GroupSizeError, match=r"model\.layers\.0\.mlp\.down_proj: the group size 64"):
        make_plan(make_model(), Recipe.of({"granularity": {"mlp": 64}}))


@pytest.mark.parametrize(
    ("values", "tied", "untied", "float_tied"),
    [
        ({"head": "float"}, {}, (), True),
        ({"embeddings": 8}, {"lm_head": "model.embed_tokens"}, (), False),
        ({"embeddings": 4, "bits": {"lm_head|embed": 4}}, {"lm_head": "model.embed_tokens"}, (), False),
        ({"embeddings": 4}, {}, ("lm_head",), False),  # the head has 8 bits
        ({"embeddings": 8, "granularity": {"embed": 32}}, {}, ("lm_head",), False),
        ({"embeddings": 8, "head": "full"}, {}, ("lm_head",), False),
        ({"embeddings": 8, "head": "float"}, {}, ("lm_head",), False),
        ({}, {}, ("lm_head",), False),
    ],
)
def test_a_tied_head_is_stored_once_where_it_can_be(values, tied, untied, float_tied) -> None:
    plan = make_plan(make_model(), Recipe.of(values))
    assert (dict(plan.tied), plan.untied, plan.float_tied) == (tied, untied, float_tied)
    names = {m.name for m in plan.modules} | set(plan.unquantized) | set(plan.tied)
    assert names == {*linear_names(make_model()), "model.embed_tokens"}
    assert not {m.name for m in plan.modules} & {*plan.unquantized, *plan.tied}


# --- ranges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 99.99])
def test_percentiles_agree_with_quantile_within_a_bin(dtype, percent) -> None:
    torch.manual_seed(1)
    x = (torch.randn(40000) * torch.exp(2 * torch.randn(40000))).to(dtype)
    parts = Statistics()
    for part in x.split(7000):
        parts.add(Statistics.of(part, histogram=True))
    # The order statistic of rank ceil(n * p): with `higher` interpolation quantile takes rank ceil((n-1) * p) + 1,
    # which is the same or one more, so both neighbours bound it.
    ordered = x.abs().float().sort().values
    exact = float(ordered[math.ceil(len(x) * percent / 100) - 1])
    around = [float(torch.quantile(ordered, percent / 100, interpolation=i)) for i in ("lower", "higher")]
    assert around[0] <= exact <= around[1] or exact in around
    tolerance = 0.0 if dtype is torch.bfloat16 else exact * BFLOAT16_HALF_STEP
    assert abs(parts.percentile(percent) - exact) <= tolerance
    clipped = float((x.abs().float() > exact).float().mean())
    if dtype is torch.bfloat16:
        assert parts.clipped(exact) == pytest.approx(clipped, abs=1e-7)
    assert parts.clipped(parts.amax()) == 0
    assert parts.amax() == float(ordered[-1])


def test_a_range_becomes_a_scale() -> None:
    assert range_scale(254.0, "m", "input").item() == 2.0
    assert range_scale(254.0, "m", "input").dtype == torch.float32
    with pytest.raises(CalibrationError, match=r"m: the range of its output is 0.0.*no_output"):
        range_scale(0.0, "m", "output")


def test_layers_that_read_one_tensor_share_its_range(tokenizer, documents) -> None:
    model = make_model()
    used = windows(tokenizer, documents, length=24, limit=5)
    names = linear_names(model)[:-1]
    seen = observe(model, used, names, input_histograms=names, output_histograms=names)
    expected = []
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        expected.append(tuple(attention + n for n in ("q_proj", "k_proj", "v_proj")))
        expected.append(tuple(mlp + n for n in ("gate_proj", "up_proj")))
    assert set(seen.shared) == set(expected)
    assert seen.tokens == 5 * 24
    q, k = (seen.inputs[expected[0][j]] for j in (0, 1))
    assert q is k
    assert q.count == 5 * 24 * 64  # once for the tensor, not once for each reader
    assert int(q.histogram.sum()) == q.count

    direct: dict[str, list[torch.Tensor]] = {}
    target = model.get_submodule(expected[1][0])

    def keep(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        direct.setdefault("in", []).append(args[0].flatten())
        direct.setdefault("out", []).append(output.flatten())

    handle = target.register_forward_hook(keep)
    with torch.no_grad():
        for window in used:
            model(window[None])
    handle.remove()
    for side, found in (("in", seen.inputs), ("out", seen.outputs)):
        x = torch.cat(direct[side])
        assert (found[expected[1][0]].low, found[expected[1][0]].high) == (float(x.min()), float(x.max()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Branches(nn.Module):
    """Two layers that read one tensor, a third that reads it after a write in place, one that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = input_ids[0].float().expand(4).clone()
        y = self.a(x) + self.b(input=x)
        x += 1
        return y + self.c(x)


def test_sharing_is_by_identity_and_version() -> None:
    model = Branches()
    used = [torch.tensor([i]) for i in range(3)]
    seen = observe(model, used, ["a", "b", "c"])
    assert seen.shared == (("a", "b"),)
    assert (seen.inputs["a"].high, seen.inputs["c"].high) == (2.0, 3.0)  # before and after the write in place
    assert seen.inputs["a"].histogram is None
    mixed = observe(model, used, ["a", "b", "c"], input_histograms=["b"])
    assert int(mixed.inputs["a"].histogram.sum()) == mixed.inputs["a"].count == 12
    with pytest.raises(CalibrationError, match=r"never reached 1 layer\(s\), first d"):
        observe(model, used, ["a", "d"])


def test_non_finite_activations_name_the_layer() -> None:
    model = Branches()
    nn.init.constant_(model.b.bias, math.inf)
    with pytest.raises(CalibrationError, match="b: its output holds NaN or infinity"):
        observe(model, [torch.tensor([1])], ["a", "b"])
    assert not model.a._forward_hooks


# --- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 16])
def test_rounding_is_nearest_and_clips_nothing(num_bits, group_size) -> None:
    torch.manual_seed(num_bits)
    weight = torch.randn(40, 48) * torch.logspace(-4, 3, 40)[:, None]
    weight[3] = weight[3].abs()
    weight[4] = -weight[4].abs()
    scheme = WeightScheme(num_bits, group_size)
    codes, scale = round_to_nearest(weight, scheme)
    low, high = code_range(num_bits)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert tuple(scale.shape) == (40, scheme.groups(48))
    w, c, s = (t.to(torch.float64) for t in (weight.reshape(40, -1, group_size or 48), codes, scale[..., None]))
    c = c.reshape(w.shape)
    # Half a step, and the float32 rounding of the scale and of the division: two roundings of at most 2^-24 of |w / s|.
    assert ((c * s - w).abs() <= s * (0.5 + 2 * 2**-24 * 2**num_bits)).all()
    smaller = s * (1 - 2.0**-20)
    clips = ((w / smaller).amax(-1) > high) | ((w / smaller).amin(-1) < low)
    assert clips.all()  # no smaller scale covers the row


def test_rows_of_zeros_and_bad_weights() -> None:
    weight = torch.zeros(3, 8)
    codes, scale = round_to_nearest(weight, WeightScheme(4))
    assert not codes.any()
    assert (scale == 1).all()
    weight[1] = 7.0
    weight[2] = 1e-40  # its scale would be subnormal
    codes, scale = round_to_nearest(weight, WeightScheme(4))
    assert scale.flatten().tolist() == [1.0, 1.0, 1.0]
    assert codes[1].tolist() == [7] * 8
    assert not codes[[0, 2]].any()
    with pytest.raises(ScaleError, match="q_proj: a weight is NaN or infinite"):
        round_to_nearest(torch.tensor([[1.0, math.nan]]), WeightScheme(8), "q_proj")


# --- all the way -------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_the_report_says(tmp_path, tokenizer, documents) -> None:
    model = make_model(bias=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe.of(
        {
            "bits": {r"\.mlp\.": 4},
            "granularity": {r"gate_proj$": 16},
            "ignore": [r"layers\.1\.self_attn\.o_proj$"],
            "no_output": [r"layers\.1\.mlp\.down_proj$"],
            "no_input": [r"layers\.0\.mlp\.down_proj$"],
            "embeddings": 8,
            "range": "99.9",
            "output_ranges": ["=minmax"],
        }
    )
    stages: list[tuple[str, int, int]] = []
    report = quantize_model(
        model,
        tokenizer,
        documents,
        recipe,
        tmp_path / "out",
        window=24,
        max_windows=6,
        dtype=torch.bfloat16,
        progress=lambda *step: stages.append(step),
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert report.tokens == 6 * 24
    assert report.windows == 6
    assert report.tied == {"lm_head": "model.embed_tokens"}
    assert report.unquantized == ("model.layers.1.self_attn.o_proj",)
    assert report.labels == {"w8a8o8": 7, "w4a8o8": 4, "w4a16o8": 1, "w4a8o16": 1, "w8": 1}
    assert stages[:6] == [("observe", i, 6) for i in range(1, 7)]
    assert stages[-1] == ("write", 14, 14)
    assert json.loads(report.to_json())["labels"] == report.labels
    by_name = {layer.name: layer for layer in report.layers}
    q, k = (by_name[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert q.input_scale == k.input_scale
    assert q.output_scale != k.output_scale
    assert (q.input_range, q.output_range, q.output_clipped) == ("percentile 99.9", "minmax", 0.0)
    assert 0 < q.input_clipped <= 1e-3
    assert report.shared_inputs[0] == tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    files = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert report.checkpoint_bytes == files
    assert report.float_bytes == 2 * sum(p.numel() for p in model.parameters())

    checkpoint, _ = open_model(tmp_path / "out")
    with checkpoint:
        assert set(checkpoint.modules) == set(by_name)
        assert dict(checkpoint.tied) == report.tied
        for name, module in checkpoint.modules.items():
            assert module.scheme.label == by_name[name].label
            tensors = checkpoint.read(name)
            for side in ("input_scale", "output_scale"):
                found = getattr(tensors, side)
                assert (None if found is None else float(found)) == getattr(by_name[name], side)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "generation_config.json").is_file()
    with pytest.raises(OutputExistsError):
        quantize_model(model, tokenizer, documents, recipe, tmp_path / "out", window=24)


@pytest.mark.parametrize(
    "values",
    [
        {"embeddings": 8, "head": "full"},
        {"embeddings": 4, "storage": "gemma", "head": "weights"},
        {"head": "float"},
        {"head": "weights"},
    ],
    ids=["full", "gemma", "float", "untied"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_head_comes_back(tmp_path, tokenizer, documents, values, tied) -> None:
    """An 8-bit checkpoint loads and is close to the float model, whatever becomes of the head."""
    model = make_model(tied=tied)
    used = windows(tokenizer, documents, length=24, limit=4)
    quantize_model(model, tokenizer, documents, Recipe.of(values), tmp_path / "out", window=24, max_windows=4)
    loaded = load_model(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is (tied and values["head"] == "float")
    with torch.no_grad():
        float_logits = model(used[0][None]).logits
        difference = (loaded(used[0][None]).logits - float_logits).norm() / float_logits.norm()
    # Each of the 30 or so roundings adds noise of about 1/127 of a range; 4-bit tables 1/14 of a row's maximum.
    assert difference < (0.25 if values.get("embeddings") == 4 else 0.1)


def test_weight_only_needs_no_text(tmp_path, tokenizer) -> None:
    report = quantize_model(
        make_model(), tokenizer, [], Recipe.of({"no_input": [""], "no_output": [""]}), tmp_path / "out"
    )
    assert report.tokens == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.tokens = 1
    assert set(report.labels) == {"w8a16o16"}


def test_layers_that_share_an_input_must_agree(tmp_path, tokenizer, documents) -> None:
    recipe = Recipe.of({"input_ranges": ["q_proj=99.9"]})
    with pytest.raises(RecipeError, match=r"must agree on its range.*percentile 99.9 for .*q_proj"):
        quantize_model(make_model(), tokenizer, documents, recipe, tmp_path / "out", window=24)
    assert not (tmp_path / "out").exists()


def test_from_folder_to_folder(tmp_path, tokenizer, documents) -> None:
    source = tmp_path / "float"
    make_model().save_pretrained(source)
    tokenizer.save_pretrained(source)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    report = quantize_checkpoint(
        source, tmp_path / "out", Recipe(), [text], window=24, max_windows=3, dtype=torch.float32
    )
    assert report.tokens == 72
    assert report.float_bytes == 4 * sum(p.numel() for p in make_model().parameters())
    assert report.untied == ("lm_head",)
    kinds = {m.name: m.kind for m in make_plan(make_model(), Recipe()).modules}
    assert all(kind is Kind.LINEAR for kind in kinds.values())
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", Recipe(), [text])
    with pytest.raises(FileFormatError, match="no such folder"):
        quantize_checkpoint(tmp_path / "absent", tmp_path / "again", Recipe(), [text])
    with pytest.raises(FileFormatError, match="no such GGUF file"):
        quantize_checkpoint(source / "absent.gguf", tmp_path / "again", Recipe(), [text])
