"""`verify`: right kernels pass and wrong ones do not, files are read to the last code, and the vendor agrees."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import oracle as independent
import tiny
from bytelane import dispatch, errors
from bytelane.checkpoint import Checkpoint
from bytelane.kernels import cpu
from bytelane.models import open_model
from bytelane.report import oracle, verify
from bytelane.report.verify import verify_kernel
from bytelane.report.verify_checkpoint import (
    check_layer,
    codes_name,
    sample,
    stored_codes,
    tflite_of,
    verify_checkpoint,
)
from bytelane.scheme import LinearScheme, WeightScheme
from test_cli import call, call_json

GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"
HAS_LITERT = find_spec("ai_edge_litert") is not None


# --- the package's oracle against the tests' -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_two_oracles_agree(seed: int) -> None:
    """Written apart, from the formulas: `bytelane verify` relies on one, the test suite on the other."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 3]))
    m, n, k = int(rng.integers(1, 9)), int(rng.integers(1, 20)), groups * int(rng.integers(1, 40))
    x = (rng.normal(size=(m, k)) * rng.choice([0.1, 1, 100])).astype(np.float32)
    x[0, 0] = rng.choice(np.array([np.nan, np.inf, -np.inf, 0.5], np.float32))
    w = rng.integers(-128, 128, (n, k)).astype(np.int8)
    s_w = rng.uniform(1e-3, 2e-2, (n, groups)).astype(np.float32)
    s_in, s_out = np.float32(rng.uniform(0.01, 0.1)), np.float32(rng.uniform(0.05, 2))
    bias = rng.normal(size=n).astype(np.float32)
    size = k // groups if groups > 1 else 0
    for out, b in ((None, None), (s_out, None), (s_out, bias), (None, bias)):
        wide = None if out is None else np.full(1, out)
        ours, theirs = oracle.linear(x, w, s_w, s_in, wide, b, size), independent.linear(x, w, s_w, s_in, out, b, size)
        assert ours.dtype == theirs.dtype == np.float32
        assert np.array_equal(ours.view(np.int32), theirs.view(np.int32))


def test_roundings_are_torchs() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32),
            np.array([3.4e38, -3.39e38, 1e-45, 6e-8], "f4"),
        ]
    )
    values = values[np.isfinite(values)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = torch.from_numpy(values).to(dtype).float().numpy()
        assert np.array_equal(oracle.rounded(values, str(dtype).removeprefix("torch.")), expected)


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", dispatch.TABLE, ids=lambda k: f"{k.op}-{k.name}")
def test_every_kernel_is_right_or_says_why_it_did_not_run(kernel: dispatch.Kernel) -> None:
    check = verify_kernel(kernel, seed=1)
    assert (check.differing, check.first) == (0, None)
    if check.skipped is None:
        assert check.problems >= 24
        assert check.values > 5000
    else:
        assert not check.problems


def _off_by_one(kernel: dispatch.Kernel) -> dispatch.Kernel:
    """The same kernel with one output wrong by the smallest step, in large problems only."""

    def run(*arguments: object) -> torch.Tensor:
        found = kernel.run(*arguments).contiguous().clone()
        if found.numel() > 300:
            flat = found.view(-1)
            step = 1 if not found.dtype.is_floating_point else float(flat[3].abs()) * 0.05 + 0.01
            flat[3] += step
        return found

    return dataclasses.replace(kernel, run=run)


@pytest.mark.parametrize("op", list(verify.CASES))
def test_a_wrong_kernel_is_found(op: str) -> None:
    kernel = next(k for k in dispatch.TABLE if k.op == op and k.name.startswith("reference."))
    check = verify_kernel(_off_by_one(kernel))
    assert check.differing > 0
    assert check.first is not None


def test_kernels_that_cannot_run_say_why() -> None:
    kernel = next(k for k in dispatch.TABLE if k.isa in cpu.supported_isas())
    assert "no neon9" in (verify_kernel(dataclasses.replace(kernel, isa="neon9")).skipped or "")
    assert "no such operation" in (verify_kernel(dataclasses.replace(kernel, op="tangle")).skipped or "")
    none = dataclasses.replace(kernel, min_rows=10**6)
    assert "rows" in (verify_kernel(none).skipped or "")
    if not torch.cuda.is_available():
        assert "CUDA" in (verify_kernel(dataclasses.replace(kernel, device="cuda")).skipped or "")


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gemma() -> Iterator[Checkpoint]:
    checkpoint, _ = open_model(GEMMA)
    with checkpoint:
        yield checkpoint


def test_a_good_checkpoint(gemma: Checkpoint) -> None:
    steps: list[tuple[int, int]] = []
    found = verify_checkpoint(gemma, samples=15, progress=lambda *s: steps.append(s))
    assert found.right
    assert found.codes == sum(m.shape[0] * m.shape[1] for m in gemma.modules.values())
    assert len(found.layers) == 15
    assert all(layer.values > 0 for layer in found.layers)
    assert {layer.scheme for layer in found.layers} >= {"w2a8o8", "w4a8o8", "w8a8o8"}
    assert steps[-1][0] == steps[-1][1]
    if HAS_LITERT:
        assert any(layer.vendor_differing == 0 for layer in found.layers)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_read_a_second_time(bits: int, tmp_path: Path) -> None:
    config = tiny.config("llama", intermediate_size=100)
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    codes = tiny.write_random(tmp_path, config, {n: LinearScheme(WeightScheme(bits)) for n in names})
    checkpoint, _ = open_model(tmp_path)
    with checkpoint:
        for name in names:
            module = checkpoint.modules[name]
            stored = codes_name(module)
            assert np.array_equal(stored_codes(checkpoint.file_of(stored), stored, module), codes[name].numpy())
            assert check_layer(checkpoint, name, vendor=False).right


def test_a_wrong_layer_and_wrong_codes_are_found(gemma: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = sample(gemma, 1)
    read = gemma.read

    def one_code_off(name: str, *, copy: bool = False) -> object:
        tensors = read(name, copy=True)
        tensors.rows[0, 0] ^= 1
        return tensors

    monkeypatch.setattr(gemma, "read", one_code_off)
    assert check_layer(gemma, name, vendor=False).codes_differ == 1
    monkeypatch.undo()
    monkeypatch.setattr("bytelane.layers.QuantLinear.forward", lambda self, x: torch.zeros(len(x), self.out_features))
    check = check_layer(gemma, name, vendor=HAS_LITERT)
    assert check.differing > 0
    assert not check.right
    if HAS_LITERT:
        assert check.vendor_differing == check.differing


def test_samples_cover_every_scheme(gemma: Checkpoint) -> None:
    assert len(sample(gemma, 100)) == len(set(sample(gemma, 100)))
    schemes = {(gemma.modules[n].scheme, gemma.modules[n].shape) for n in sample(gemma, 100)}
    few = sample(gemma, len(schemes))
    assert {(gemma.modules[n].scheme, gemma.modules[n].shape) for n in few} == schemes
    assert sample(gemma, 0) == []


def test_notes_say_what_is_allowed_and_odd(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    tiny.write_random(tmp_path, tiny.config("llama"), {name: LinearScheme(WeightScheme(4))})
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.weight_scale"][3] = 0
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint, _ = open_model(tmp_path)
    with checkpoint:
        notes = verify_checkpoint(checkpoint, samples=1).notes
    assert notes == (f"{name}: 1 channels have a scale of 0", "model.norm.weight: holds NaN or infinity")


# --- the vendor ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_LITERT, reason="needs ai-edge-litert (the litert extra)")
def test_an_exported_layer_runs_in_the_vendors_interpreter(gemma: Checkpoint, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    name = next(n for n in sample(gemma, 100) if check_layer(gemma, n, vendor=True).vendor_differing == 0)
    file = tmp_path / "layer.tflite"
    file.write_bytes(tflite_of(gemma, name, rows=2))
    interpreter = Interpreter(model_path=str(file), num_threads=1)
    interpreter.allocate_tensors()
    k = gemma.modules[name].shape[1]
    x = np.linspace(-1, 1, 2 * k, dtype=np.float32).reshape(2, k)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    tensors = gemma.read(name)
    s_in, s_out = tensors.input_scale.numpy(), tensors.output_scale.numpy()
    stored = codes_name(gemma.modules[name])
    codes = stored_codes(gemma.file_of(stored), stored, gemma.modules[name])
    assert np.array_equal(y, independent.linear(x, codes, tensors.weight_scale.numpy(), s_in, s_out))


@pytest.mark.parametrize(
    ("name", "rule"),
    [("nowhere", "no such quantized layer"), ("lm_head", "input and an output scale")],
)
def test_layers_that_no_tflite_holds_are_refused(gemma: Checkpoint, name: str, rule: str) -> None:
    with pytest.raises(errors.NotRepresentableError, match=rule if HAS_LITERT or name == "nowhere" else "litert extra"):
        tflite_of(gemma, name)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.up_proj"
    exporting = ("--export-tflite", name, "-o", tmp_path / "x.tflite") if HAS_LITERT else ()
    found = call_json(capsys, "verify", GEMMA, "--no-kernels", "--samples", "3", *exporting)
    assert found["right"]
    assert len(found["checkpoint"]["layers"]) == 3
    assert (tmp_path / "x.tflite").exists() == HAS_LITERT
    kernels = tuple(k for k in dispatch.TABLE if k.op == "quantize")
    monkeypatch.setattr(verify, "TABLE", kernels)
    code, out, _ = call(capsys, "verify")
    assert code == 0
    assert "all is right" in out
    monkeypatch.setattr(verify, "TABLE", (*kernels, _off_by_one(kernels[-1])))
    code, out, _ = call(capsys, "verify", GEMMA, "--samples", "1")
    assert code == 3
    assert "DIFFERS" in out
    assert "NOT RIGHT" in out
    code, out, _ = call(capsys, "verify", "--json")
    assert (code, json.loads(out)["right"]) == (3, False)
    code, _, _ = call(capsys, "verify", tmp_path, "--no-kernels")
    assert code == 2
    code, _, _ = call(capsys, "verify", "--export-tflite", name)
    assert code == 2
