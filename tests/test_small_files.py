"""What lies beside the weights: odd configurations, generation settings, tokenizers and templates are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from bytelane import errors
from bytelane.generation import encode, load_tokenizer
from bytelane.models import load_config, load_generation_config, load_model
from bytelane.sampling import Chooser, Sampling
from bytelane.scheme import LinearScheme, WeightScheme
from test_cli import byte_tokenizer, call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tiny.config("llama", vocab_size=300)
    tiny.write_random(tmp_path, config, {"model.layers.0.mlp.up_proj": LinearScheme(WeightScheme(4))})
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"eos_token_id": "a"}',
        '{"eos_token_id": [1, -2]}',
        '{"pad_token_id": [1]}',
        '{"bos_token_id": true}',
        '{"temperature": "hot"}',
        '{"temperature": NaN}',
        '{"temperature": -1}',
        '{"top_p": 7}',
        '{"top_k": 2.5}',
        '{"repetition_penalty": 0}',
        '{"do_sample": "yes"}',
    ],
)
def test_generation_settings_that_choose_no_token_are_refused(text: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(errors.ConfigError, match=r"generation_config\.json") as refused:
        load_model(folder)
    assert text in ("{", "[]") or next(iter(json.loads(text))) in str(refused.value)


def test_generation_settings_that_writers_make_are_read(folder: Path) -> None:
    assert load_generation_config(folder) is None
    good = {
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
        "temperature": 0.0,
        "top_k": None,
        "top_p": 1.0,
        "do_sample": True,
    }
    (folder / "generation_config.json").write_text(json.dumps(good))
    config = load_model(folder).generation_config
    assert config.eos_token_id == [1, 2]
    assert not Chooser.of(Sampling(), config).sample, "a temperature of 0 takes the likeliest token"


@pytest.mark.parametrize(
    "values",
    [
        {"return_dict": False},
        {"output_attentions": True},
        {"output_hidden_states": ["x"]},
        {"output_hidden_states": True},
    ],
)
def test_how_calls_answer_is_not_the_files_to_say(values: dict[str, Any], folder: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    expected = load_model(folder)(ids).logits
    edit(folder, **values)
    answer = load_model(folder)(ids)
    assert torch.equal(answer.logits, expected)
    assert answer.hidden_states is None


def test_encoder_decoders_are_refused(folder: Path) -> None:
    edit(folder, is_encoder_decoder=True)
    with pytest.raises(errors.ModelConfigError, match="is_encoder_decoder"):
        load_config(folder)


def test_a_broken_configuration_is_not_blamed_on_the_tokenizer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder, id2label=7)
    code, _, err = call(capsys, "run", folder, "Hello")
    assert code == 2
    assert "ModelConfigError" in err


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_tokenizers_that_are_none_are_refused(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    with pytest.raises(errors.FileFormatError, match="no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "template", ["{% for", "{{ raise_exception('system messages are not for me') }}", "{{ 1 / 0 }}"]
)
def test_chat_templates_that_fail_are_refused(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(errors.FileFormatError, match="chat template"):
        encode(tokenizer, "Hello")
