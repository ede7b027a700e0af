"""Real weights and real prompts: greedy text beside `bytelane run`'s, log-probabilities on one rank and on several.

The models are `bytelane:small` (Gemma 4's architecture, 4 heads: 1, 2 and 4 ranks) and, where they have been made,
SmolLM2-135M's (Llama's, 9 heads and 3 of keys and values: 1 and 3 ranks).

The linear layers of both are the same bits (`test_engine.py`); the operations between them are vLLM's in one and
bytelane's in the other, and differ in the last bits of float32. Now and then such a bit moves a value across a rounding
boundary, one int8 code changes, and a text may part from there. So a text is equal up to its first divergence, which is
shown, and at it the two candidates must be closer than float operations alone have been seen to move a probability:
`bytelane.load_model` with its own and with transformers' float operations, on the same tokens, is the measure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bytelane
import layerwise
from bytelane.generation import load_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEMO = ROOT / "demo-model"
FOUR_BITS = ROOT / "smollm2-w4"
PROMPTS = [
    "Once upon a time, in a small village by the sea,",
    "Tell me a story about a fox.",
    "The capital of France is",
    "She opened the letter and read the first line twice.",
    "Water boils at a temperature of",
    "The three primary colours are red,",
]
TOKENS = 24


@dataclass(frozen=True)
class Answers:
    """What an engine said to every prompt, and what each of its ranks recorded."""

    said: list[dict[str, Any]]
    records: list[dict[str, Any]]


def run_engine(model: Path, ranks: int, folder: Path, dtype: str, prompts: list[str] = PROMPTS) -> Answers:
    cores = sorted(os.sched_getaffinity(0))
    binds = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    environment = os.environ | {
        "PYTHONPATH": str(HERE),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CPU_OMP_THREADS_BIND": binds if ranks > 1 else ",".join(map(str, cores)),
    }
    out, records = folder / f"{ranks}{dtype}.json", folder / f"{ranks}{dtype}.pt"
    command = [sys.executable, HERE / "engine_text.py", model, str(ranks), dtype, str(TOKENS), out, records]
    done = subprocess.run(
        command, env=environment, input=json.dumps(prompts), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return Answers(json.loads(out.read_text()), torch.load(records, weights_only=False))


def run_command(model: Path, prompt: str) -> str:
    """What `bytelane run` says."""
    command = [Path(sys.executable).with_name("bytelane"), "run", model, prompt, "--raw", "--greedy", "--json"]
    command += ["--dtype", "float32", "--kv-cache", "float", "-n", str(TOKENS)]  # as vLLM's
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    text: str = json.loads(done.stdout)["text"]
    return text


@dataclass(frozen=True)
class Judge:
    """A checkpoint under `bytelane.load_model`, with its own float operations and with transformers'."""

    native: Any
    torch: Any

    @classmethod
    def of(cls, model: Path) -> Judge:
        options: dict[str, Any] = {"dtype": torch.float32, "kv_cache": "float"}
        return cls(*(bytelane.load_model(model, float_ops=f, **options) for f in ("native", "torch")))

    def logprobs(self, answer: dict[str, Any]) -> tuple[Tensor, float]:
        """See `layerwise.logprobs_and_noise`."""
        return layerwise.logprobs_and_noise(self.native, self.torch, answer["prompt_ids"] + answer["ids"])


@dataclass(frozen=True)
class Divergence:
    """Where two texts part: the token's place, both choices, and how far apart bytelane sees them."""

    place: int
    vllm: int
    run: int
    gap: float


def parted(tokenizer: Any, answer: dict[str, Any], expected: Tensor, text: str) -> Divergence:
    """The first divergence of `run`'s text from an engine's tokens."""
    ids = answer["ids"]

    def begins(tokens: list[int]) -> bool:
        return text.startswith(tokenizer.decode(tokens, skip_special_tokens=True))

    place = next((i for i in range(len(ids)) if not begins(ids[: i + 1])), len(ids) - 1)
    row = expected[len(answer["prompt_ids"]) - 1 + place]
    likely = [t for t in row.topk(100).indices.tolist() if t != ids[place] and begins([*ids[:place], t])]
    assert likely, f"at token {place} `run` says what is not among the hundred likeliest: {text!r}"
    return Divergence(place, ids[place], likely[0], abs(float(row[ids[place]] - row[likely[0]])))


def check_text(model: Path, answers: list[dict[str, Any]]) -> list[str]:
    """Hold the engine's texts and probabilities against bytelane's; returns what was seen, described."""
    judge, tokenizer = Judge.of(model), load_tokenizer(model)
    judged = [judge.logprobs(answer) for answer in answers]
    # The same precision twice, other last bits: what vLLM's may differ by, with a factor for being a third opinion.
    near = 2 * max(noise for _, noise in judged) + 1e-5
    shown = [f"two ways of float operations differ by up to {(near - 1e-5) / 2:.1e}"]
    for prompt, answer, (expected, _) in zip(PROMPTS, answers, judged, strict=False):
        start = len(answer["prompt_ids"]) - 1
        for place, (token, value) in enumerate(zip(answer["ids"], answer["logprobs"], strict=True)):
            row = expected[start + place]
            assert abs(value - float(row[token])) <= near, (prompt, place, value, float(row[token]), near)
            best = int(row.argmax())
            if best != token:
                gap = float(row[best] - row[token])
                shown.append(f"{prompt!r}, token {place}: vLLM {token}, bytelane {best}, {gap:.2e} apart")
                assert gap <= near, (shown[-1], near)
        for place, known in enumerate(answer["prompt_logprobs"][1:]):
            for token, value in known.items():
                assert abs(value - float(expected[place, int(token)])) <= near, (prompt, place)
        # decoded whole: vLLM decodes piece by piece, which shows bytes that are no UTF-8 otherwise
        said, text = tokenizer.decode(answer["ids"], skip_special_tokens=True), run_command(model, prompt)
        if text != said:
            divergence = parted(tokenizer, answer, expected, text)
            shown.append(f"{prompt!r}: {said!r} by vLLM, {text!r} by `run`, {divergence}")
            assert divergence.gap <= near, (shown[-1], near)
    return shown


def check_ranks(one: Answers, several: Answers, native: Any) -> None:
    """Every token, every log-probability and with it every argmax, and every linear output, to the bit."""
    for prompt, a, b in zip(PROMPTS, one.said, several.said, strict=False):
        assert a == b, prompt
    for answers in (one, several):
        assert layerwise.check_records(native, answers.records) > 10_000


@pytest.fixture(scope="module")
def small() -> Path:
    return bytelane.shipped_model()


@pytest.fixture(scope="module")
def one(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return run_engine(small, 1, tmp_path_factory.mktemp("one"), "bfloat16")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_agree_to_the_bit(small: Path, one: Answers, ranks: int, tmp_path: Path) -> None:
    """In bfloat16: in float32 the head, which has no input scale, is torch's matmul, and its bits hang on its shape."""
    several = run_engine(small, ranks, tmp_path, "bfloat16")
    assert len(several.records) == ranks
    check_ranks(one, several, bytelane.load_model(small, dtype=torch.bfloat16, kv_cache="float"))


def test_greedy_text_is_bytelane_runs(small: Path, tmp_path: Path) -> None:
    answers = run_engine(small, 1, tmp_path, "float32").said
    assert all(len(answer["ids"]) == TOKENS or answer["finish"] == "stop" for answer in answers)
    for line in check_text(small, answers):
        print(line)


@pytest.mark.slow
@pytest.mark.skipif(not DEMO.is_dir(), reason="needs demo-model, which `make demo-smollm2` makes")
def test_smollm2_says_what_bytelane_run_says(tmp_path: Path) -> None:
    for line in check_text(DEMO, run_engine(DEMO, 1, tmp_path, "float32", PROMPTS[:3]).said):
        print(line)


@pytest.mark.slow
@pytest.mark.skipif(not FOUR_BITS.is_dir(), reason="needs smollm2-w4, which docs/benchmarks.md says how to make")
def test_smollm2_on_one_rank_and_three(tmp_path: Path) -> None:
    """Two ranks cannot share its 9 heads. Every layer here has both scales; in the demo's model some have not."""
    one, three = (run_engine(FOUR_BITS, ranks, tmp_path, "bfloat16", PROMPTS[:3]) for ranks in (1, 3))
    check_ranks(one, three, bytelane.load_model(FOUR_BITS, dtype=torch.bfloat16))
