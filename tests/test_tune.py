"""Quantization-aware training of a model: its runs, one that stops and goes on, and what it exports."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import tiny
from bytelane.cli import main
from bytelane.errors import ConfigError, FileFormatError, OutputExistsError
from bytelane.models import load_model, open_model
from bytelane.quantize import Recipe
from bytelane.quantize.settle import settle
from bytelane.tune import (
    UNLIMITED_STEPS,
    TunedLinear,
    TuneSettings,
    TuningError,
    WithCache,
    evaluate,
    export_checkpoint,
    prepare,
    tune,
    written_windows,
)
from bytelane.tune import state as state_module
from bytelane.tune.loop import batch_indices

RECIPE = {
    "default_bits": 4,
    "bits": {r"(gate|up)_proj$": 2, r"down_proj$": 8},
    "embeddings": 4,
    "head": "weights",
    "range": "99.9",
}


def make_windows(count: int = 6, length: int = 24, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, 128, (count, length), generator=generator))


def tied_llama(**changes: Any) -> nn.Module:
    config = tiny.config("llama", **changes)
    config.tie_word_embeddings = True
    return tiny.float_model(config)


def make(architecture: str) -> nn.Module:
    return tied_llama() if architecture == "tied llama" else tiny.float_model(tiny.config(architecture))


def student_of(model: nn.Module, **values: Any) -> Any:
    kv_cache = values.pop("kv_cache", False)
    return prepare(model, Recipe.of({**RECIPE, **values}), make_windows(), kv_cache=kv_cache)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# --- a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["compressed-tensors", "gemma"])
@pytest.mark.parametrize("architecture", ["llama", "tied llama", "gemma3", "gemma4", "qwen3"])
def test_an_export_loads_as_the_frozen_model(tmp_path, architecture, storage, dtype) -> None:
    student = student_of(make(architecture), kv_cache=architecture == "gemma4")
    teacher = make(architecture)
    tune(student, teacher, make_windows(), TuneSettings(steps=2, batch=2))
    export_checkpoint(student, tmp_path / "out", storage=storage, dtype=dtype)
    loaded = load_model(tmp_path / "out", float_ops="torch")
    frozen = student.freeze(dtype)
    ids = make_windows(1, 20, seed=3)[0][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, frozen(ids).logits)
        if dtype == torch.float32 and not student.kv_names:
            assert torch.equal(student(ids).logits, frozen(ids).logits)
    if architecture == "gemma4":
        assert loaded.bytelane_kv_scales == frozen.bytelane_kv_scales
        assert list(frozen.bytelane_kv_scales) == [0, 1]  # the third layer reuses the second one's
        with torch.no_grad():
            cached, again = (WithCache(m)(ids).logits for m in (loaded, frozen))
            assert torch.equal(cached, again)
            if dtype == torch.float32:
                assert torch.equal(student(ids).logits, cached)
    if architecture == "tied llama":
        checkpoint, _ = open_model(tmp_path / "out")
        with checkpoint:
            assert dict(checkpoint.tied) == {"lm_head": "model.embed_tokens"}


def test_a_rotated_student_starts_as_the_float_model_and_exports(tmp_path) -> None:
    """At 8 bits on both sides the folded student is close to the float model; its head is no longer tied."""
    teacher = tied_llama()
    recipe = {"rotate": True, "equalize": True, "range": "mse", "default_bits": 8, "bits": {}, "embeddings": 8}
    student = student_of(tied_llama(), **recipe)
    ids = make_windows(1, 20, seed=3)[0][None]
    export_checkpoint(student, tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected, found = teacher(ids).logits, student.freeze()(ids).logits
        assert torch.equal(load_model(tmp_path / "out", float_ops="torch")(ids).logits, found)
    # Each of the 30 or so roundings adds noise of about 1/127 of a range.
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert not student.plan.tied


@pytest.mark.parametrize("more", [{"rounding": "gptq"}, {"search": 2}, {"rounding": "gptq", "learn_scales": 8}])
def test_a_student_starts_where_a_recipe_leaves_the_model(tmp_path, more) -> None:
    """GPTQ, searched ranges and learned scales: the first integer model is the checkpoint that they make."""
    model = tied_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe.of({**RECIPE, "rotate": True, "equalize": True, "range": "mse", "granularity": {"mlp": 16}, **more})
    settled = settle(model, make_windows(), recipe)
    student = prepare(model, recipe, make_windows())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for module in settled.plan.modules:
        layer = student.model.get_submodule(module.name)
        codes, scale = layer.codes()
        if module.name in settled.rounded:
            assert torch.equal(codes, settled.rounded[module.name][0])
            torch.testing.assert_close(scale, settled.rounded[module.name][1], rtol=1e-6, atol=0)
        for side, sides in (("input", settled.inputs), ("output", settled.outputs)):
            if module.name in sides:
                found = getattr(layer, f"{side}_scale")
                torch.testing.assert_close(found, sides[module.name].scale, rtol=1e-6, atol=0)
    assert bool(settled.rounded) == ("rounding" in more)
    report = tune(student, tied_llama(), make_windows(), TuneSettings(steps=2, batch=2))
    assert report.steps == 2


def test_layers_that_share_an_input_share_its_scale() -> None:
    student = student_of(make("llama"))
    attention = student.model.get_submodule("model.layers.0.self_attn")
    assert attention.q_proj.log_input_scale is attention.v_proj.log_input_scale
    assert attention.q_proj.log_output_scale is not attention.v_proj.log_output_scale
    names = [name for name, _ in student.named_parameters()]
    assert sum(name.endswith("log_input_scale") for name in names) == 2 * 4  # qkv, o, gate-up, down
    assert ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj") in student.shared_inputs


def test_distillation_brings_the_student_closer() -> None:
    """A tiny random model with 2-bit layers: the loss falls, and so does the integer model's distance."""
    teacher, model = tied_llama(), tied_llama()
    with torch.no_grad():
        for parameter in (*teacher.parameters(), *model.parameters()):
            if parameter.dim() > 1:
                parameter *= 4  # random weights of the usual size give hardly any logits
    student = student_of(model)
    ids = torch.stack(make_windows(4))

    def distance() -> float:
        with torch.no_grad():
            q, p = (m(ids).logits.log_softmax(-1) for m in (student.freeze(), teacher))
        return float((p.exp() * (p - q)).sum(-1).mean())

    before = distance()
    settings = TuneSettings(steps=40, batch=4, learning_rate=2e-3, scale_rate=5e-3, hidden_weight=0.01)
    report = tune(student, teacher, make_windows(4), settings, evaluation=make_windows(2, seed=1))
    assert sum(report.losses[-5:]) < 0.5 * sum(report.losses[:5])
    assert distance() < 0.5 * before
    assert report.steps == 40
    assert report.evaluations[-1].step == 40
    assert report.evaluations[-1].perplexity == evaluate(student, make_windows(2, seed=1))[0]


def test_text_alone_needs_no_teacher() -> None:
    student = student_of(tied_llama())
    settings = TuneSettings(steps=10, batch=2, accumulate=2, kl_weight=0, text_weight=1, learning_rate=3e-3)
    report = tune(student, None, make_windows(2), settings)
    assert report.losses[-1] < report.losses[0]
    with pytest.raises(TuningError, match="needs the float model"):
        tune(student, None, make_windows(2), TuneSettings(steps=1))


def test_a_kept_teacher_teaches_the_same() -> None:
    torch.set_num_threads(1)
    losses = []
    for keep in (False, True):
        settings = TuneSettings(steps=4, batch=4, accumulate=2, keep_teacher=keep, text_weight=0.1)
        losses.append(tune(student_of(tied_llama()), tied_llama(), make_windows(), settings).losses)
    assert losses[0] == losses[1]
    capped = tiny.float_model(tiny.config("gemma3", final_logit_softcapping=5.0))
    with pytest.raises(TuningError, match="leave `keep_teacher` out"):
        tune(student_of(make("gemma3")), capped, make_windows(), TuneSettings(steps=1, batch=2, keep_teacher=True))


@pytest.fixture
def accelerator():
    """Accelerators of any precision; Accelerate keeps one precision for a process."""

    def make_one(mixed_precision: str) -> Accelerator:
        AcceleratorState._reset_state(True)
        return Accelerator(mixed_precision=mixed_precision)

    yield make_one
    AcceleratorState._reset_state(True)


def on_gpu_run(run: Accelerator, *, eager: bool, keep: bool) -> tuple[Any, Any]:
    """Twelve steps on the GPU: the student and the report."""
    settings = TuneSettings(steps=12, batch=4, learning_rate=1e-3, evaluate_every=4, keep_teacher=keep)
    student, held = student_of(tied_llama().cuda()), make_windows(2, seed=1)
    more = {"accelerator": run, "eager": eager, "evaluation": held}
    report = tune(student, tied_llama(), make_windows(), settings, **more)
    assert report.recorded is not eager
    assert report.evaluations[-1].perplexity == evaluate(student, held)[0]
    return student, report


@on_gpu
@pytest.mark.parametrize("keep", [False, True])
def test_a_recorded_step_is_the_eager_one(keep, accelerator) -> None:
    """The same kernels in the same order."""
    (eager, expected), (recorded, found) = (
        on_gpu_run(accelerator("no"), eager=one_by_one, keep=keep) for one_by_one in (True, False)
    )
    # Attention's gradients may be summed in no fixed order, and a code that flips moves a loss by some 1e-4.
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    for (name, parameter), got in zip(eager.named_parameters(), recorded.parameters(), strict=True):
        assert (got - parameter).norm() <= 0.02 * parameter.norm() + 1e-3, name


@on_gpu
@pytest.mark.parametrize("keep", [False, True])
def test_a_compiled_step_is_as_good_as_the_eager_one(keep, accelerator) -> None:
    """What lies between layers is rounded to bfloat16 at other places, which flips codes.

    Eager steps in bfloat16 are some percent of a loss away from those in float32 too: on a CPU 5 % at most in these
    twelve. The compiled ones may be twice as far.
    """
    exact, eager, recorded = (
        torch.tensor(on_gpu_run(accelerator(precision), eager=one_by_one, keep=keep)[1].losses)
        for precision, one_by_one in (("no", True), ("bf16", True), ("bf16", False))
    )
    assert (recorded - exact).norm() <= 2 * (eager - exact).norm()


@on_gpu
def test_a_recorded_run_resumes(tmp_path) -> None:
    def interrupt(_: str, done: int, __: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    settings = TuneSettings(steps=8, batch=4, learning_rate=1e-3, save_every=3)
    whole, stopped = student_of(tied_llama().cuda()), student_of(tied_llama().cuda())
    losses = tune(whole, tied_llama(), make_windows(), settings).losses
    with pytest.raises(KeyboardInterrupt):
        tune(stopped, tied_llama(), make_windows(), settings, state=tmp_path / "s", progress=interrupt)
    again = student_of(tied_llama().cuda())
    report = tune(again, tied_llama(), make_windows(), settings, state=tmp_path / "s", resume=True)
    assert report.recorded
    assert report.losses == pytest.approx(losses, rel=1e-3)


def test_the_float_model_writes_windows_of_its_own() -> None:
    model, begun = tied_llama().eval(), make_windows(3, 40)
    written = written_windows(model, begun, 5, batch=2, seed=1)
    assert [w.shape for w in written] == [(40,)] * 5
    assert all(torch.equal(w[:32], begun[i % 3][:32]) for i, w in enumerate(written))
    assert not torch.equal(written[0], written[3])  # begun alike, sampled anew
    assert all(map(torch.equal, written, written_windows(model, begun, 5, batch=2, seed=1)))
    with pytest.raises(TuningError, match="begins with 32 tokens"):
        written_windows(model, make_windows(3, 32), 1)


# --- interruptions -----------------------------------------------------------------------------------------------


def parameters_after(tmp_path, *, stop_at: int | None) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    settings = TuneSettings(steps=8, batch=4, learning_rate=1e-3, save_every=3)
    folder = tmp_path / f"state-{stop_at}"

    def interrupt(_: str, done: int, __: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    student = student_of(tied_llama(), kv_cache=True)
    if stop_at is not None:
        with pytest.raises(KeyboardInterrupt):
            tune(student, tied_llama(), make_windows(), settings, state=folder, progress=interrupt)
        student = student_of(tied_llama(), kv_cache=True)
    report = tune(student, tied_llama(), make_windows(), settings, state=folder, resume=stop_at is not None)
    assert len(report.losses) == 8
    return dict(student.named_parameters())


def test_a_resumed_run_ends_in_the_same_parameters(tmp_path) -> None:
    threads = torch.get_num_threads()
    try:
        whole = parameters_after(tmp_path, stop_at=None)
        resumed = parameters_after(tmp_path, stop_at=5)  # two steps after the last saved state
    finally:
        torch.set_num_threads(threads)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_state_is_whole_or_not_there(tmp_path, monkeypatch) -> None:
    student, teacher, settings = student_of(tied_llama()), tied_llama(), TuneSettings(steps=2, batch=2, save_every=1)
    folder = tmp_path / "state"
    tune(student, teacher, make_windows(), settings, state=folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(state_module, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        state_module.save_state(folder, student, torch.optim.AdamW(student.parameters()), {})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_only_the_same_run_resumes(tmp_path) -> None:
    student, teacher = student_of(tied_llama()), tied_llama()
    folder = tmp_path / "state"
    settings = TuneSettings(steps=1, batch=2)
    with pytest.raises(FileFormatError, match="nothing to resume"):
        tune(student, teacher, make_windows(), settings, state=folder, resume=True)
    tune(student, teacher, make_windows(), settings, state=folder)
    with pytest.raises(OutputExistsError, match="another run"):
        tune(student, teacher, make_windows(), settings, state=folder)
    with pytest.raises(ConfigError, match="settings"):
        tune(student, teacher, make_windows(), TuneSettings(steps=2, batch=2), state=folder, resume=True)
    with pytest.raises(ConfigError, match="text"):
        tune(student, teacher, make_windows(seed=1), settings, state=folder, resume=True)
    other = student_of(tied_llama(), default_bits=8)
    with pytest.raises(ConfigError, match="plan"):
        tune(other, teacher, make_windows(), settings, state=folder, resume=True)
    record = json.loads((folder / "state.json").read_text())
    assert record["steps"] == 1


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch) -> None:
    student = student_of(tied_llama())
    calls = []

    def dies(self: TunedLinear) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return codes(self)

    codes = TunedLinear.codes
    monkeypatch.setattr(TunedLinear, "codes", dies)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_window_once_an_epoch() -> None:
    epoch = [i for step in range(5) for i in batch_indices(step, 2, 5, seed=0)]
    assert sorted(epoch[:5]) == sorted(epoch[5:]) == list(range(5))
    assert epoch[:5] != epoch[5:]


def test_a_run_that_time_ends_guesses_its_steps() -> None:
    guesses: list[tuple[int, int]] = []
    settings = TuneSettings(steps=UNLIMITED_STEPS, batch=2, max_seconds=0.5)
    report = tune(
        student_of(tied_llama()),
        tied_llama(),
        make_windows(),
        settings,
        progress=lambda _, done, total: guesses.append((done, total)),
    )
    assert report.seconds >= 0.5
    assert [done for done, _ in guesses] == list(range(1, report.steps + 1))
    assert all(done <= total < 10**6 for done, total in guesses)
    assert guesses[-1][1] == report.steps


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"batch": 3, "accumulate": 2}, "accumulate must divide"),
        ({"kl_weight": 0}, "one of them positive"),
        ({"warmup": 1.0}, "share of the steps"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
    ],
)
def test_wrong_settings_are_refused(values, message) -> None:
    with pytest.raises(TuningError, match=message):
        TuneSettings(**values)


# --- the command -------------------------------------------------------------------------------------------------


def tune_command(tmp_path, capsys, *more: str) -> dict[str, Any]:
    """`bytelane tune --json` on a tiny model; two steps, and a text of nine documents."""
    source, text = tmp_path / "float", tmp_path / "text.jsonl"
    if not source.exists():
        tied_llama().save_pretrained(source)
        words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
        made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>").save_pretrained(source)
        documents = (" ".join(f"w{3 + (i * j) % 125}" for j in range(60)) for i in range(1, 10))
        text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    options = ["--window", "24", "--batch", "2", "--evaluate", "2", "--embeddings", "8", "--cpu", "--json", *more]
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(source), str(tmp_path / "out"), "--text", str(text), *options])
    printed = json.loads(capsys.readouterr().out)
    return {"code": ended.value.code or 0, **printed}


def test_the_command_tunes_stops_and_resumes(tmp_path, capsys) -> None:
    state = ["--state", str(tmp_path / "state")]
    done = tune_command(tmp_path, capsys, "--steps", "3", *state)
    assert (done["code"], done["report"]["steps"], done["storage"]) == (0, 3, "compressed-tensors")
    assert done["report"]["evaluations"][0]["tokens"] == 2 * 23
    loaded = load_model(tmp_path / "out", float_ops="torch")
    assert loaded.config.tie_word_embeddings is True
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (
        done["windows"]
        < tune_command(tmp_path, capsys, "--window", "40", "--steps", "1", "--write", "40", "--overwrite")["windows"]
    )
    again = tune_command(tmp_path, capsys, "--steps", "3", *state, "--resume", "--overwrite")
    assert again["report"]["losses"] == done["report"]["losses"]  # there was nothing left to do
    refused = tune_command(tmp_path, capsys, "--steps", "3")
    assert (refused["code"], refused["error"]["type"]) == (2, "OutputExistsError")
