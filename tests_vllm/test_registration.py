"""What vLLM has after the plugin ran: its own class for every checkpoint that is not wNa8o8."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

import pytest

from bytelane import errors
from checkpoints import hand_made


def made_config(raw: dict[str, Any]) -> Any:
    from vllm.model_executor.layers.quantization import get_quantization_config

    from bytelane.integrations.vllm import register

    register()
    return get_quantization_config(raw["quant_method"]).from_config(raw)


def test_another_scheme_gets_vllms_own_class() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    made = hand_made(bits=4)
    made.group["output_activations"] = made.group["input_activations"] = None
    assert type(made_config(made.quantization)) is CompressedTensorsConfig


def test_this_scheme_gets_bytelanes_which_workers_can_be_sent(tmp_path: Any) -> None:
    made = hand_made(bits=4)
    config = made_config(made.quantization)
    config.maybe_update_config(str(made.write(tmp_path / "model")))
    sent = pickle.loads(pickle.dumps(config))
    assert type(sent).__name__ == "BytelaneCompressedConfig"
    assert sent.table.is_quantized("model.layers.0.mlp.up_proj")


def test_a_broken_configuration_ends_the_start(tmp_path: Any) -> None:
    made = hand_made(bits=4)
    made.group["weights"]["symmetric"] = False
    config = made_config(made.quantization)
    with pytest.raises(errors.AsymmetricError, match="symmetric"):
        config.maybe_update_config(str(made.write(tmp_path / "model")))


@pytest.mark.parametrize(("switch", "expected"), [("1", True), ("0", False)])
def test_the_switch(switch: str, expected: bool) -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS\n"
        "print('FOUND', 'gemma' in QUANTIZATION_METHODS)"
    )
    environment = os.environ | {"BYTELANE_VLLM": switch}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"FOUND {expected}" in done.stdout
