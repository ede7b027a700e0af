"""Gemma 4's vision and audio towers as vLLM builds them: every quantized layer gives `bytelane.load_model`'s bits.

The model is vLLM's whole multimodal class, built and loaded as its engine does it; images and sounds are handed to its
encoders as tensors. That class cannot be imported without torchvision, of which the environment of these tests has none
that fits (docs/serving.md): then the test is skipped.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn
from transformers import Gemma4Config, Gemma4VisionConfig

import bytelane
import ranks
import record
import wrapper
from bytelane import errors
from bytelane.checkpoint import convert_checkpoint
from bytelane.models import open_model
from test_registration import made_config


def config(vision_size: int = 64) -> Gemma4Config:
    """vLLM's attention takes heads of 32 and more; it quantizes towers of whole multiples of 64."""
    made = wrapper.config()
    made.text_config.head_dim, made.text_config.global_head_dim = 32, 64
    heads = {"num_attention_heads": vision_size // 16, "num_key_value_heads": vision_size // 16}
    made.vision_config = Gemma4VisionConfig(**made.vision_config.to_dict() | heads | {"hidden_size": vision_size})
    made.dtype = "bfloat16"
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model in both storages."""
    root = tmp_path_factory.mktemp("towers")
    found = {"gemma": wrapper.write_wrapper(root / "gemma", model_config=config()), "compressed": root / "compressed"}
    checkpoint, _ = open_model(found["gemma"])
    with checkpoint:
        convert_checkpoint(checkpoint, found["compressed"], "compressed-tensors")
    return found


def vllm_model(directory: str, port: int) -> nn.Module:
    """The model as vLLM's loader leaves it, on one rank."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # What vLLM asks of an accelerator; its CPU workers answer for themselves, and this process is none.
    torch.accelerator.empty_cache = lambda: None
    torch.accelerator.get_memory_info = lambda: (1 << 30, 1 << 30)
    arguments = EngineArgs(model=directory, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16")
    made = arguments.create_engine_config()
    with set_current_vllm_config(made):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1)
        return get_model(vllm_config=made)


def check(_: int, directory: str, port: int) -> None:
    """Run in a process of its own: an image and a sound through vLLM's encoders, then every layer by row."""
    os.environ["VLLM_DIST_IDENT"] = f"bytelane{port}"
    model = vllm_model(directory, port)
    assert record.start(model) > 40
    image, audio = wrapper.image_inputs(), wrapper.audio_inputs()
    pixels = {"pixel_values": image["pixel_values"].bfloat16(), "pixel_position_ids": image["image_position_ids"]}
    sounds: dict[str, Any] = {
        "input_features_padded": audio["input_features"].bfloat16(),
        "input_features_mask": audio["input_features_mask"],
    }
    with torch.inference_mode():
        seen = model._process_image_input(pixels)
        heard = model._process_audio_input(sounds)
    assert [x.shape[-1] for x in (*seen, *heard)] == [64, 64]
    assert all(bool(x.isfinite().all()) for x in (*seen, *heard))
    reference = bytelane.load_model(directory, dtype=torch.bfloat16)
    for leaf in ("input_min", "input_max", "output_min", "output_max"):
        for name, buffer in model.vision_tower.named_buffers():
            if name.endswith(leaf):
                assert torch.equal(buffer, reference.get_buffer(f"model.vision_tower.{name}")), name
    records = record.collect(model)
    for tower in ("vision_tower", "audio_tower", "embed_vision", "embed_audio"):
        assert any(name.startswith(tower) for name in records), tower
    for name, calls in records.items():
        module = reference.get_submodule(f"model.{name}")
        for x, y in calls:
            rows = x.reshape(-1, x.shape[-1])
            expected = torch.cat([module(rows[i : i + 1]) for i in range(len(rows))])
            assert torch.equal(y.reshape(expected.shape), expected), name


@pytest.mark.skipif(find_spec("torchvision") is None, reason="needs a torchvision that fits this torch")
@pytest.mark.parametrize("storage", ["gemma", "compressed"])
def test_towers_give_load_models_bits(folders: dict[str, Path], storage: str) -> None:
    multiprocessing.spawn(check, (str(folders[storage]), ranks.free_port()), nprocs=1)


def test_towers_vllm_would_leave_unquantized_are_refused(tmp_path: Path) -> None:
    """In Gemma's storage vLLM decides by the tower's size; it would find no place for the codes, and not say why."""
    made = config(vision_size=48)
    directory = wrapper.write_wrapper(tmp_path / "model", model_config=made)
    quant_config = made_config(made.quantization_config.to_dict())
    with pytest.raises(errors.UnsupportedFormatError, match=r"48 and 64.*Gemma4ForCausalLM"):
        quant_config.maybe_update_config(str(directory), made)
