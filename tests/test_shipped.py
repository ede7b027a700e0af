"""The model that comes with the package: it is small, whole, right, and it writes English."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bytelane
from bytelane.checkpoint import convert_checkpoint
from bytelane.cli import main
from bytelane.generation import encode, generate, load_tokenizer
from bytelane.models import load_model, open_model, resolve_checkpoint
from bytelane.numerics import linear_integer
from bytelane.sampling import Sampling
from bytelane.scheme import LinearScheme
from check_wheel import problems, source_files

EXAMPLES = Path(__file__).parent.parent / "examples" / "small"
FOLDER = bytelane.shipped_model()


@pytest.fixture(scope="module")
def other_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(FOLDER, tmp_path_factory.mktemp("shipped") / "ct", "compressed-tensors")


def convert(source: Path, target: Path, storage: str) -> Path:
    checkpoint, _ = open_model(source)
    with checkpoint:
        convert_checkpoint(checkpoint, target, storage)
    return target


def test_it_has_its_name_its_card_and_its_size() -> None:
    assert resolve_checkpoint("bytelane:small") == FOLDER
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5_000_000


def test_it_has_the_mobile_bit_map() -> None:
    checkpoint, _ = open_model(FOLDER)
    with checkpoint:
        bits = {m.name: m.scheme.weight.num_bits for m in checkpoint.modules.values()}
        sides = {
            m.name: m.scheme.quantize_input for m in checkpoint.modules.values() if isinstance(m.scheme, LinearScheme)
        }
        assert sorted(checkpoint.kv_scales) == [f"model.layers.{i}.self_attn" for i in range(4)]
    assert bits["model.embed_tokens"] == bits["lm_head"] == 2
    assert bits["model.embed_tokens_per_layer"] == 4
    for name, found in bits.items():
        if "mlp" in name:
            assert found == (4 if int(name.split(".")[2]) < 4 else 2)
        elif "self_attn" in name:
            assert found == 4
        elif "per_layer_" in name and "embed" not in name:
            assert found == 8
    assert [name for name, quantized in sides.items() if not quantized] == ["lm_head"]


def test_it_obeys_the_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "bytelane:small", "--no-kernels", "--samples", "3", "--json"])
    assert not ended.value.code, capsys.readouterr()


def test_both_storages_are_one_model(other_storage: Path, tmp_path: Path) -> None:
    back = convert(other_storage, tmp_path / "gemma", "gemma")
    first, again = load_file(FOLDER / "model.safetensors"), load_file(back / "model.safetensors")
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        here, there = (load_model(folder)(input_ids=ids).logits for folder in (FOLDER, other_storage))
    assert torch.equal(here, there)


def test_a_batch_gives_the_same_bits() -> None:
    model = load_model(FOLDER)
    ids = torch.arange(5, 165).reshape(1, -1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        together = model(input_ids=torch.cat([ids, ids.flip(1)])).logits[:1]
    assert torch.equal(alone, together)


def test_it_writes_english() -> None:
    model, tokenizer = load_model(FOLDER), load_tokenizer(FOLDER)
    ids = encode(tokenizer, [{"role": "user", "content": "Who are you?"}])
    answer, _ = generate(
        model,
        tokenizer,
        ids,
        max_new_tokens=40,
        on_text=lambda _: None,
        sampling=Sampling(True, None, None, None, None, None),
    )
    assert answer.strip() == "I am a small language model. I can tell stories and answer small questions."


def test_what_it_reads_is_made_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from corpus import HELD_OUT_SEED, made

    texts = list(made(30, HELD_OUT_SEED))
    assert texts == list(made(30, HELD_OUT_SEED))
    assert all("{" not in text and "[" not in text and "|" not in text for text in texts)
    sys.modules.pop("corpus")


def test_training_computes_the_integer_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import model as small

    torch.manual_seed(0)
    layer = small.Linear(torch.nn.Linear(64, 48, bias=False), 4, sides=True)
    layer.fit_scales()
    with torch.no_grad():
        layer.log_in.fill_(-3.5)
        layer.log_out.fill_(-4.0)
    layer.quantizing = True
    x = torch.randn(32, 64)
    scale, s_in, s_out = layer.log_scale.exp(), layer.log_in.exp(), layer.log_out.exp()
    codes = torch.clamp(torch.round(layer.weight * torch.reciprocal(scale)), *layer.limits).to(torch.int8)
    wanted = linear_integer(x, codes, scale, s_in, s_out)
    # The accumulator leaves the bfloat16 product rounded to 8 bits: an output may fall on the other side of a half.
    steps = ((layer(x) - wanted) / s_out).abs().detach()
    assert float(steps.max()) < 1.5
    assert float((steps > 0.5).float().mean()) < 0.2
    assert not json.loads((FOLDER / "config.json").read_text())["tie_word_embeddings"]
    sys.modules.pop("model")


def test_what_is_wrong_with_a_wheel_is_said() -> None:
    """`make wheel` builds one and checks it so; here, that the check can fail."""
    sources = source_files()
    assert "bytelane/data/small/model.safetensors" in sources
    good = dict.fromkeys([*sources, "bytelane/_native.x.so", "bytelane-1.dist-info/licenses/LICENSE"], 1)
    assert problems(good, 10, sources) == []
    model = "bytelane/data/small/model.safetensors"
    for change, rule in (
        ({model: 5_000_001}, "the small model takes"),
        ({"bytelane/_native.y.so": 1}, "one native module belongs there"),
        ({"tests/test_shipped.py": 1}, "tests/test_shipped.py does not belong there"),
    ):
        (found,) = problems(good | change, 10, sources)
        assert rule in found
    for name, rule in ((model, f"{model} is missing"), ("bytelane-1.dist-info/licenses/LICENSE", "the licence")):
        (found,) = problems({n: taken for n, taken in good.items() if n != name}, 10, sources)
        assert rule in found
    (found,) = problems(good, 20_000_001, sources)
    assert "the wheel has" in found
