"""Models from checkpoints: each architecture, both numerics, and nothing dense on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import bytelane
import oracle
import tiny
from bytelane import QuantEmbedding, QuantLinear, errors
from bytelane.packing import unpack_rows
from bytelane.scheme import EmbeddingScheme, LinearScheme, WeightScheme

DATA = Path(__file__).parent / "data"
GEMMA = DATA / "gemma4-tiny-mobile"
ARCHITECTURES = ["llama", "gemma3", "gemma4", "qwen3"]


class OracleLinear(nn.Module):
    """The integer layer, by the NumPy oracle."""

    def __init__(self, codes: torch.Tensor, layer: QuantLinear) -> None:
        super().__init__()
        self.codes = codes.numpy()
        self.scale = layer.weight_scale.numpy()
        self.s_in, self.s_out = (None if s is None else np.float32(s) for s in (layer.input_scale, layer.output_scale))
        self.bias = None if layer.bias is None else layer.bias.numpy()
        self.group_size = layer.group_size or 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).numpy()
        y = oracle.linear(flat, self.codes, self.scale, self.s_in, self.s_out, self.bias, self.group_size)
        return torch.from_numpy(y).reshape(*x.shape[:-1], -1)


def with_oracle(model: nn.Module, codes: dict[str, torch.Tensor]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear) and module.input_scale is not None:
            model.set_submodule(name, OracleLinear(codes[name], module))
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integer_logits_equal_a_model_made_of_oracles(architecture: str, tmp_path: Path) -> None:
    config = tiny.config(architecture)
    codes = tiny.write_random(tmp_path / "model", config, tiny.default_schemes(config))
    model = bytelane.load_model(tmp_path / "model")
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    found = logits(model, ids)
    assert torch.isfinite(found).all()
    assert torch.equal(found, logits(with_oracle(model, codes), ids))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generates_and_is_an_ordinary_model(architecture: str, tmp_path: Path) -> None:
    config = tiny.config(architecture)
    tiny.write_random(tmp_path / "model", config, tiny.default_schemes(config))
    model = bytelane.load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    ids = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    once = model.generate(ids, **options)
    assert once.shape == (2, 11) or (once == 2).any()
    assert torch.equal(once, model.generate(ids, **options))


@pytest.mark.parametrize("group_size", [None, 32])
def test_group_scales_and_every_width(group_size: int | None, tmp_path: Path) -> None:
    config = tiny.config("llama")
    plan = {
        name: LinearScheme(WeightScheme(2 + i % 7, group_size), quantize_output=i % 3 != 0)
        for i, name in enumerate(tiny.linear_names(config))
    }
    codes = tiny.write_random(tmp_path / "model", config, plan)
    model = bytelane.load_model(tmp_path / "model")
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(model, ids), logits(with_oracle(model, codes), ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_golden_emulated_logits_equal_transformers(dtype: str) -> None:
    expected = load_file(GEMMA / f"expected_emulated_{dtype}.safetensors")
    chosen = getattr(torch, dtype)
    model = bytelane.load_model(GEMMA, dtype=chosen, numerics="emulated")
    theirs = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=chosen).eval()
    found = logits(model, expected["input_ids"])
    assert torch.equal(found, logits(theirs, expected["input_ids"]))


class TheirLinear(nn.Module):
    """Transformers' quantized layer, computed by the NumPy oracle where it has an input scale."""

    def __init__(self, theirs: nn.Module, codes: torch.Tensor) -> None:
        super().__init__()
        self.theirs, self.codes = theirs, codes.numpy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s_in, s_out = (
            np.float32(s) if s else None
            for s in (self.theirs.input_activation_scale, self.theirs.output_activation_scale)
        )
        if s_in is None:
            return self.theirs(x)
        flat = x.reshape(-1, x.shape[-1]).numpy()
        y = oracle.linear(flat, self.codes, self.theirs.weight_scale.numpy(), s_in, s_out)
        return torch.from_numpy(y).reshape(*x.shape[:-1], -1)


def test_golden_integer_logits_equal_transformers_with_oracle_layers() -> None:
    ids = load_file(GEMMA / "expected_integer_float32.safetensors")["input_ids"]
    ours = bytelane.load_model(GEMMA, dtype=torch.float32, float_ops="torch")
    theirs = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32).eval()
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            codes = unpack_rows(module.packed, module.num_bits, module.in_features)
            theirs.set_submodule(name, TheirLinear(theirs.get_submodule(name), codes))
    assert torch.equal(logits(ours, ids), logits(theirs, ids))


@pytest.mark.parametrize("numerics", ["integer", "emulated"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_golden_logits_equal_the_recorded_ones(dtype: str, numerics: str) -> None:
    """The recording holds on processors whose float kernels sum as the recording machine's did.

    Attention, norms and the float head are torch's own operations, and their last bits differ between processors. That
    transformers' own emulation reproduces its recording here shows that this one's do not; then ours must too.
    """
    chosen = getattr(torch, dtype)
    recorded = load_file(GEMMA / f"expected_emulated_{dtype}.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=chosen).eval()
    if not torch.equal(logits(theirs, recorded["input_ids"]).float(), recorded["logits"].float()):
        pytest.skip("torch's float operations differ on this processor from those of the recording")
    expected = load_file(GEMMA / f"expected_{numerics}_{dtype}.safetensors")
    model = bytelane.load_model(GEMMA, dtype=chosen, numerics=numerics, float_ops="torch")
    assert torch.equal(logits(model, expected["input_ids"]).float(), expected["logits"].float())


def test_threads_and_batches_change_no_linear_output() -> None:
    model = bytelane.load_model(GEMMA, dtype=torch.float32)
    layer = model.model.layers[0].mlp.gate_proj
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(0))
    whole = layer(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(torch.cat([layer(row[None]) for row in x]), whole)
    finally:
        torch.set_num_threads(before)


class DenseWatch(TorchDispatchMode):
    """Notes every float tensor as large as one of the quantized weights."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if (
                isinstance(tensor, torch.Tensor)
                and not tensor.is_meta
                and tensor.dtype.is_floating_point
                and tensor.numel() in self.sizes
                # A tensor that only reserves address space is how modules are built before they move to meta.
                and func not in (torch.ops.aten.empty.memory_format,)
            ):
                self.seen.append((str(func), tuple(tensor.shape)))
        return out


def test_dense_weights_never_exist(tmp_path: Path) -> None:
    config = tiny.config("llama", intermediate_size=1216)
    plan = {n: LinearScheme(WeightScheme(4)) for n in tiny.linear_names(config) if "mlp" in n}
    tiny.write_random(tmp_path / "model", config, plan)
    with DenseWatch({64 * 1216}) as watch:
        model = bytelane.load_model(tmp_path / "model")
        logits(model, torch.tensor([[1, 2, 3]]))
    assert watch.seen == []


def test_a_tied_quantized_head_shares_the_table(tmp_path: Path) -> None:
    config = tiny.config("qwen3", tie_word_embeddings=True)
    tiny.write_random(tmp_path / "model", config, {"model.embed_tokens": EmbeddingScheme(WeightScheme(4))})
    model = bytelane.load_model(tmp_path / "model")
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(table, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert head.packed.data_ptr() == table.packed.data_ptr()
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(hidden), torch.nn.functional.linear(hidden, table(torch.arange(128))))


def test_casting_the_model_keeps_its_scales(tmp_path: Path) -> None:
    model = bytelane.load_model(GEMMA, dtype=torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.input_scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.input_scale, before)
    assert layer.input_scale.dtype == torch.float32


def copy_golden(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GEMMA / name, folder / name)
    return folder


def test_config_refusals(tmp_path: Path) -> None:
    with pytest.raises(errors.FileFormatError, match="no such folder"):
        bytelane.load_model(tmp_path / "absent")
    with pytest.raises(errors.ModelConfigError, match=r"config\.json"):
        bytelane.load_model(tmp_path)
    folder = copy_golden(tmp_path)
    with pytest.raises(errors.FileFormatError, match="is a folder"):
        bytelane.load_model(folder / "config.json")
    raw = json.loads((folder / "config.json").read_text())
    for change, error in (
        ({"model_type": "nobody-knows"}, errors.ModelConfigError),
        ({"model_type": "nobody-knows", "auto_map": {"AutoConfig": "code.Config"}}, errors.RemoteCodeError),
        ({"num_attention_heads": "four"}, errors.ModelConfigError),
    ):
        (folder / "config.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(error):
            bytelane.load_model(folder)
    for text in ("{", "[1]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(errors.ModelConfigError):
            bytelane.load_model(folder)


def test_a_written_checkpoint_is_as_readable_as_its_configuration(tmp_path: Path) -> None:
    tiny.write_random(tmp_path / "model", tiny.config("llama"), {"lm_head": LinearScheme(WeightScheme(8))})
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1
