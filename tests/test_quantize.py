"""A tiny model all the way to a checkpoint and back."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from bytelane.errors import CheckpointError, ConfigError, FileFormatError, OutputExistsError
from bytelane.models import load_model, open_model
from bytelane.quantize import (
    Hessian,
    Recipe,
    RecipeError,
    ResumeError,
    SequentialError,
    equalize,
    gptq,
    make_plan,
    quantize_checkpoint,
    quantize_model,
    quantize_sequentially,
    resume,
    windows,
)
from bytelane.quantize.pipeline import check_words
from bytelane.quantize.simulate import Simulation, fake_quantize
from bytelane.scheme import Kind
from calibration import make_model


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


@pytest.mark.parametrize("merged", [True, False])
def test_a_tokenizer_that_cuts_up_its_own_words_is_refused(merged: bool) -> None:
    """As transformers 5.17 makes one of Gemma 3's GGUF files: without a merge, a whole word is never reached."""
    letters = dict.fromkeys("onetwuhrf")
    pairs = [("t", "w"), ("tw", "o"), ("▁", "two")] if merged else [("t", "w")]
    words = ["▁", *letters, "tw", "two", "▁two"]
    model = models.BPE({word: i for i, word in enumerate(words)}, pairs)
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    if merged:
        check_words(tokenizer, Path("model.gguf"))
        return
    with pytest.raises(ConfigError, match="cuts up 'two'") as caught:
        check_words(tokenizer, Path("model.gguf"))
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_the_best_recipe_all_the_way(tmp_path, tokenizer, documents, tied) -> None:
    """Rotation, equalization, searched ranges and GPTQ: nearer to the float model than the plain recipe at 4 bits."""
    model = make_model(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    used = windows(tokenizer, documents, length=24, limit=8)
    plain = Recipe.of({"default_bits": 4, "head": "float"})
    best = plain.model_copy(update={"rotate": True, "equalize": True, "search": 2, "rounding": "gptq"})
    differences = []
    for name, recipe in (("plain", plain), ("best", best)):
        stages: list[str] = []
        report = quantize_model(
            model,
            tokenizer,
            documents,
            recipe,
            tmp_path / name,
            window=24,
            max_windows=8,
            progress=lambda stage, _, __, stages=stages: stages.append(stage),
        )
        loaded = load_model(tmp_path / name)
        with torch.no_grad():
            wanted = model(used[0][None]).logits
            differences.append(float((loaded(used[0][None]).logits - wanted).norm() / wanted.norm()))
    assert differences[1] < 0.8 * differences[0]
    assert list(dict.fromkeys(stages)) == ["equalize", "observe", "search", "gptq", "write"]
    assert report.ranges["loss"] == 2
    assert report.peak_bytes > 0
    assert loaded.config.tie_word_embeddings is False
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gptq_hears_the_layers_before_it(tokenizer, documents) -> None:
    """The second layer's Hessian is of what the rounded first layer puts out, on the int8 grid of its input."""
    model = make_model()
    used = windows(tokenizer, documents, length=24, limit=4)
    recipe = Recipe.of({"default_bits": 3, "ignore": [r"layers\.1\.(?!mlp\.down)"], "head": "float"})
    plan = make_plan(model, recipe)
    scale = dict.fromkeys(plan.input_ranges, 0.02)
    codes = quantize_sequentially(model, used, plan.modules, scale, {})
    assert set(codes) == {m.name for m in plan.modules}
    name = "model.layers.1.mlp.down_proj"
    hessian, original = Hessian(96), make_model()
    exact: list[torch.Tensor] = []
    lengths: list[torch.Tensor] = []
    original.model.layers[1].register_forward_hook(
        lambda _, __, out: lengths.append((out[0] if isinstance(out, tuple) else out).norm(dim=-1))
    )
    original.get_submodule(name).register_forward_pre_hook(lambda _, args: exact.append(args[0]))
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: hessian.add(fake_quantize(args[0], scale[name]), exact.pop(), 1.0 / lengths.pop())
    )
    with torch.no_grad(), Simulation(model, {n: s for n, s in scale.items() if n != name}, {}):
        for window in used:
            original(window[None])
            model(window[None])
    handle.remove()
    found, _ = gptq(original.get_submodule(name).weight, plan.modules[-1].scheme.weight, hessian.sum)
    assert torch.equal(found, codes[name][0])


def test_gptq_of_a_model_without_layers_says_so() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(SequentialError, match='"rounding": "nearest"'):
        quantize_sequentially(model, [torch.arange(4)], (), {}, {})


@pytest.mark.parametrize("storage", ["compressed-tensors", "gemma"])
def test_kv_scales_cover_what_attention_writes(tmp_path, tokenizer, documents, storage) -> None:
    model = make_model()
    recipe = Recipe.of({"kv_cache": True, "equalize": True, "storage": storage})
    stages: list[str] = []
    report = quantize_model(
        model,
        tokenizer,
        documents,
        recipe,
        tmp_path / "out",
        window=24,
        max_windows=4,
        progress=lambda stage, *_: stages.append(stage),
    )
    assert report.kv_layers == 2
    assert stages.count("kv cache") == 4
    used = windows(tokenizer, documents, length=24, limit=4)
    folded = copy.deepcopy(model)
    equalize(folded, used)
    checkpoint, _ = open_model(tmp_path / "out")
    with checkpoint:
        scales = dict(checkpoint.kv_scales)
    assert sorted(scales) == [f"model.layers.{i}.self_attn" for i in range(2)]
    with torch.no_grad():
        caches = [folded(window[None], use_cache=True).past_key_values for window in used]
    for i, found in enumerate(scales[f"model.layers.{i}.self_attn"] for i in range(2)):
        keys = max(float(c.layers[i].keys.abs().max()) for c in caches)
        values = max(float(c.layers[i].values.abs().max()) for c in caches)
        assert (found.k, found.v) == pytest.approx((keys / 127, values / 127), rel=1e-6)
    loaded = load_model(tmp_path / "out")
    out = loaded.generate(used[0][None, :8], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.layers[0].keys.dtype is torch.int8


def test_a_killed_calibration_goes_on(tmp_path, tokenizer, documents) -> None:
    """Killed in its fifth window, a run started again reads the rest only and makes the same checkpoint."""
    model = make_model()
    recipe = Recipe.of({"range": "mse"})

    def make(name: str, **more: Any) -> list[bytes]:
        quantize_model(model, tokenizer, documents, recipe, tmp_path / name, window=24, max_windows=6, **more)
        return [p.read_bytes() for p in sorted((tmp_path / name).glob("*.safetensors"))]

    def kill(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("observe", 5):
            raise KeyboardInterrupt

    state = tmp_path / "observed.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.time, "monotonic", itertools.count(0.0, 100.0).__next__)
        with pytest.raises(KeyboardInterrupt):
            make("killed", resume=state, progress=kill)
    assert not (tmp_path / "killed").exists()
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    resumed = make("resumed", resume=state)
    handle.remove()
    assert len(passes) == 1
    assert resumed == make("whole")
    with pytest.raises(ResumeError, match="another model, text or recipe"):
        quantize_model(
            model, tokenizer, documents, Recipe(), tmp_path / "other", window=24, max_windows=6, resume=state
        )
