"""The command as a user runs it: every subcommand, its JSON, and how it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from bytelane.checkpoint import KVScales
from bytelane.cli import main
from bytelane.cli.output import write_bytes
from bytelane.cli.run import _Interrupts
from bytelane.generation import encode, generate, load_tokenizer
from bytelane.models import load_model
from bytelane.sampling import Sampling
from bytelane.scheme import LinearScheme, WeightScheme

GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


def float_folder(folder: Path) -> Path:
    """The folder, with a float model in `float` and some text in `text.txt`."""
    tiny.float_model(tiny.config("llama", vocab_size=300)).save_pretrained(folder / "float")
    byte_tokenizer().save_pretrained(folder / "float")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    config = tiny.config("llama", vocab_size=300)
    plan = {
        n: LinearScheme(WeightScheme(4 if "mlp" in n else 8), quantize_output=n != "lm_head")
        for n in tiny.linear_names(config)
    }
    tiny.write_random(folder, config, plan)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text with documents to deal to both splits."""
    file = tmp_path_factory.mktemp("text") / "text.utf8"
    bodies = [f"Document {i}. " + "The quick brown fox jumps over the lazy dog. " * 12 for i in range(8)]
    file.write_text("".join(f'<doc id="{i}">\n{body}\n</doc>\n' for i, body in enumerate(bodies)))
    return file


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def call_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_help_describes_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for command in ("inspect", "explain", "run", "chat", "eval", "trace", "compare", "quantize", "convert"):
        assert command in out
        code, page, _ = call(capsys, command, "--help")
        assert code == 0
        assert "--json" in page


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--version")
    assert (code, out.split()[0]) == (0, "bytelane")


def test_inspect(capsys: pytest.CaptureFixture[str], quantized: Path) -> None:
    found = call_json(capsys, "inspect", quantized)
    assert found["totals"]["by_scheme"] == {"w8a8o8": 8, "w4a8o8": 6, "w8a8o16": 1}
    assert found["storage"] == "compressed-tensors"
    assert len(found["layers"]) == found["totals"]["quantized_modules"] == 15
    gate = next(r for r in found["layers"] if r["name"] == "model.layers.0.mlp.gate_proj")
    assert (gate["bits"], gate["shape"], gate["input_scale"]) == (4, [96, 64], pytest.approx(0.031))
    code, out, _ = call(capsys, "inspect", quantized)
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in out


def test_inspect_shows_kv_scales_and_uncalibrated_heads(capsys: pytest.CaptureFixture[str]) -> None:
    found = call_json(capsys, "inspect", GEMMA)
    assert len(found["kv_cache_scales"]) == 4
    head = next(r for r in found["layers"] if r["name"] == "lm_head")
    assert (head["scheme"], head["input_scale"], head["output_scale"]) == ("w2a16o16", None, None)
    assert found["unquantized"] == ["model.per_layer_model_projection"]


def test_explain_names_a_kernel_and_reasons(capsys: pytest.CaptureFixture[str], quantized: Path) -> None:
    found = call_json(capsys, "explain", quantized, "--rows", "1")
    assert {c["scheme"] for c in found["choices"]} == {"w8a8o8", "w4a8o8", "w8a8o16"}
    for choice in found["choices"]:
        assert choice["kernel"].startswith("cpu.")
        assert all(r["reason"] for r in choice["refused"])
    cuda = call_json(capsys, "explain", quantized, "--rows", "1", "--device", "cuda")
    for choice in cuda["choices"]:
        assert choice["kernel"] == "reference.linear"
        assert any("needs a cpu tensor" in r["reason"] for r in choice["refused"])
    assert "decoder_layers" not in cuda
    assert {r["blocking"] for r in cuda["layers"]} == {None}


def test_explain_says_what_a_token_costs_and_which_decoder_layers_are_native(
    capsys: pytest.CaptureFixture[str], quantized: Path
) -> None:
    found = call_json(capsys, "explain", quantized, "--rows", "1", "--threads", "2")
    totals = found["totals"]
    assert totals["bytes_per_token"] == totals["quantized_bytes_per_token"] + totals["float_bytes_per_token"]
    assert sum(r["bytes_per_token"] for r in found["layers"]) == totals["quantized_bytes_per_token"]
    for r in found["layers"]:
        assert r["share"] == pytest.approx(r["bytes_per_token"] / totals["bytes_per_token"])
        assert r["op"] != "linear" or (r["blocking"] and 1 <= r["threads"] <= 2)
    assert found["decoder_layers"] >= 1
    assert found["not_native"] == {}
    code, out, _ = call(capsys, "explain", quantized, "--rows", "1", "--headers-only")
    assert code == 0
    assert "a token reads" in out
    assert "native calls" not in out


def test_run_answers(capsys: pytest.CaptureFixture[str], quantized: Path) -> None:
    found = call_json(capsys, "run", quantized, "Hello", "--greedy", "-n", "5")
    assert 1 <= found["new_tokens"] <= 5
    assert found["peak_memory"] > 0
    again = call_json(capsys, "run", quantized, "Hello", "--greedy", "-n", "5", "--threads", "1")
    assert again["text"] == found["text"]
    code, out, err = call(capsys, "run", quantized, "Hello", "--greedy", "-n", "5")
    assert code == 0
    assert out.strip() == found["text"].strip()
    assert "peak memory" in err


def test_run_samples_with_a_seed(capsys: pytest.CaptureFixture[str], quantized: Path) -> None:
    options = ("run", quantized, "Hello", "-n", "8", "--temperature", "1.5", "--top-k", "50", "--seed", "7")
    assert call_json(capsys, *options)["text"] == call_json(capsys, *options)["text"]


def test_run_chooses_the_cache_and_the_float_operations(capsys: pytest.CaptureFixture[str], quantized: Path) -> None:
    _, page, _ = call(capsys, "run", "--help")
    assert "--kv-cache" in page
    assert "--float-ops" in page
    assert "--numerics" in page
    options = ("run", quantized, "Hello", "--greedy", "-n", "3")
    found = call_json(capsys, *options)
    assert (found["numerics"], found["kv_cache"], found["float_ops"]) == ("integer", "float", "native")
    assert call_json(capsys, *options, "--float-ops", "torch")["float_ops"] == "torch"
    for option, said in (("--float-ops", "auto, native or torch"), ("--kv-cache", "auto, int8 or float")):
        code, _, err = call(capsys, *options, option, "fast")
        assert code == 2
        assert said in " ".join(err.replace("│", " ").split())
    code, _, err = call(capsys, *options, "--kv-cache", "int8")
    assert code == 2
    assert "MissingTensorError" in err


def test_the_int8_cache_is_a_choice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tiny.config("llama", vocab_size=300)
    scales = {"model.layers.0.self_attn": KVScales(0.03, 0.04)}
    tiny.write_random(tmp_path, config, tiny.default_schemes(config), kv_scales=scales)
    byte_tokenizer().save_pretrained(tmp_path)
    options = ("run", tmp_path, "Hello", "--greedy", "-n", "3")
    assert call_json(capsys, *options)["kv_cache"] == "int8"
    assert call_json(capsys, *options, "--kv-cache", "float")["kv_cache"] == "float"
    assert call_json(capsys, *options, "--numerics", "emulated")["kv_cache"] == "float"


def test_chat_reads_lines_and_remembers(
    capsys: pytest.CaptureFixture[str], quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAgain\n/reset\nHello\n/exit\nnever\n"))
    code, out, err = call(capsys, "chat", quantized, "--greedy", "-n", "4", "--json")
    assert code == 0, err
    first, second, third = (json.loads(line) for line in out.splitlines())
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert third["prompt_tokens"] == first["prompt_tokens"]
    assert third["text"] == first["text"]


def test_eval_puts_models_side_by_side(capsys: pytest.CaptureFixture[str], quantized: Path, text: Path) -> None:
    options = ("--window", "64", "--max-tokens", "256", "--emulated", "--split", "evaluation")
    found = call_json(capsys, "eval", quantized, text, *options)
    integer, emulated = found["results"]
    assert (integer["numerics"], emulated["numerics"]) == ("integer", "emulated")
    assert integer["tokens"] == emulated["tokens"] == 4 * 63
    assert emulated["ratio"] == 1
    assert integer["ratio"] == pytest.approx(1, abs=0.2)
    gaps = [a - b for a, b in zip(integer["window_nll"], emulated["window_nll"], strict=True)]
    assert integer["nll_increase"] == pytest.approx(statistics.mean(gaps))
    assert integer["standard_error"] == pytest.approx(statistics.stdev(gaps) / 2)
    assert (emulated["nll_increase"], emulated["standard_error"]) == (0, 0)


def test_trace_shows_where_the_numbers_part(capsys: pytest.CaptureFixture[str], quantized: Path) -> None:
    found = call_json(capsys, "trace", f"{quantized}@integer", f"{quantized}@integer,threads=1")
    assert found["first_difference"] is None
    found = call_json(capsys, "trace", quantized, f"{quantized}@emulated", "--dtype", "bfloat16")
    assert found["first_difference"] == ["model.layers.0.self_attn.q_proj", "output"]
    code, out, _ = call(capsys, "trace", quantized, f"{quantized}@emulated", "--dtype", "bfloat16")
    assert code == 0
    assert "first difference: the output of model.layers.0.self_attn.q_proj" in out


def test_convert_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = call_json(capsys, "convert", GEMMA, tmp_path / "ct", "--to", "compressed-tensors")
    assert done["lost"] == []
    call_json(capsys, "convert", tmp_path / "ct", tmp_path / "back", "--to", "gemma")
    first, last = (call_json(capsys, "inspect", folder) for folder in (GEMMA, tmp_path / "back"))
    for key in ("layers", "kv_cache_scales", "unquantized", "totals"):
        assert first[key] == last[key]


def test_refusals_exit_2_and_say_what_and_where(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = call(capsys, "inspect", tmp_path)
    assert (code, out) == (2, "")
    assert "ModelConfigError" in err
    assert str(tmp_path) in err
    code, out, _ = call(capsys, "inspect", tmp_path, "--json")
    assert code == 2
    assert json.loads(out)["error"]["type"] == "ModelConfigError"
    code, _, err = call(capsys, "run", tmp_path, "Hello", "--numerics", "exact")
    assert code == 2
    assert "integer or emulated" in err


@pytest.mark.parametrize(
    ("device", "rule"), [("gpu9", "torch knows no device called gpu9"), ("cuda:64", "sees [0-9]+ CUDA devices here")]
)
@pytest.mark.parametrize("command", ["run", "eval"])
def test_devices_that_are_not_here_are_refused(
    command: str, device: str, rule: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "words").write_text("some words")
    code, _, err = call(capsys, command, tmp_path, tmp_path / "words", "--device", device)
    assert code == 2
    assert re.search(rule, " ".join(err.replace("\u2502", " ").split()))


def test_files_are_written_whole_into_folders_that_are_made(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "deep" / "file", b"all")
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["file"]


def test_group_scales_cannot_become_gemma(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tiny.config("llama")
    plan = {"model.layers.0.mlp.up_proj": LinearScheme(WeightScheme(4, 32))}
    tiny.write_random(tmp_path / "model", config, plan, kv_scales={"model.layers.0.self_attn": KVScales(0.1, 0.2)})
    code, _, err = call(capsys, "convert", tmp_path / "model", tmp_path / "out", "--to", "gemma")
    assert code == 2
    assert "NotRepresentableError" in err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """As at a terminal. A shell starts what it runs in the background, tests too, with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_stops_an_answer_and_not_the_chat(quantized: Path) -> None:
    calls = iter(range(1000))
    model, tokenizer = load_model(quantized), load_tokenizer(quantized)
    with _Interrupts() as interrupts:

        def stopped() -> bool:
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return interrupts.seen()

        _, stats = generate(
            model,
            tokenizer,
            encode(tokenizer, "Hello"),
            max_new_tokens=100,
            sampling=Sampling(greedy=True),
            on_text=lambda _: None,
            stopped=stopped,
        )
    assert stats.new_tokens == 3
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
