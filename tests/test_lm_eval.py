"""The harness on a tiny checkpoint, with a task of its own that needs no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from bytelane.generation import Sampling, encode, generate, load_tokenizer
from bytelane.models import load_model
from bytelane.scheme import LinearScheme, WeightScheme
from test_cli import byte_tokenizer, call, call_json

pytest.importorskip("lm_eval", reason="needs the harness (the lm-eval extra)")
from lm_eval.tasks import TaskManager

QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " made of stone"], "answer": 0},
    {"question": "Two and two are", "choices": [" five", " four"], "answer": 1},
    {"question": "Bread is made of", "choices": [" flour", " iron"], "answer": 0},
]
TASK = """
task: offline_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

GENERATION = """
task: offline_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["!"], do_sample: false, max_gen_toks: {tokens}}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint under `model`, its float model under `float`, and a task under `tasks`."""
    root = tmp_path_factory.mktemp("lm_eval")
    config = tiny.config("llama", vocab_size=300)
    plan = {n: LinearScheme(WeightScheme(8)) for n in tiny.linear_names(config) if n != "lm_head"}
    tiny.write_random(root / "model", config, plan)
    tiny.float_model(config).save_pretrained(root / "float")
    for name in ("model", "float"):
        byte_tokenizer().save_pretrained(root / name)
    (root / "tasks").mkdir()
    (root / "questions.jsonl").write_text("\n".join(json.dumps(q) for q in QUESTIONS))
    (root / "tasks" / "offline_choices.yaml").write_text(TASK.format(file=root / "questions.jsonl"))
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@torch.inference_mode()
def likeliest(path: Path) -> list[int]:
    """The choice whose tokens have the largest summed log-probability, as the task defines it."""
    model, tokenizer = load_model(path), load_tokenizer(path)
    chosen = []
    for asked in QUESTIONS:
        scores = []
        for choice in asked["choices"]:
            before = tokenizer(asked["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(asked["question"] + choice, add_special_tokens=False)["input_ids"]
            logits = torch.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)
            scores.append(sum(float(logits[t - 1, whole[t]]) for t in range(len(before), len(whole))))
        chosen.append(scores.index(max(scores)))
    return chosen


def test_tasks_are_scored_and_put_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--tasks", "offline_choices", "--include", folder / "tasks", "--reference", folder / "float")
    found = call_json(capsys, "eval", folder / "model", *options)
    ours, theirs = found["results"]
    (score,) = ours["scores"]
    right = [a == q["answer"] for a, q in zip(likeliest(folder / "model"), QUESTIONS, strict=True)]
    assert (score["task"], score["metric"], score["higher_is_better"]) == ("offline_choices", "acc", True)
    assert score["value"] == pytest.approx(sum(right) / 3)
    assert (ours["numerics"], theirs["numerics"]) == ("integer", "float")
    assert theirs["scores"][0]["metric"] == "acc"


def greedy(path: Path, question: str) -> str:
    """What the model says after a question, up to the first `!`."""
    model, tokenizer = load_model(path), load_tokenizer(path)
    ids = encode(tokenizer, question, raw=True)
    options = {"max_new_tokens": TOKENS, "sampling": Sampling(greedy=True), "on_text": lambda _: None}
    return generate(model, tokenizer, ids, **options)[0].split("!")[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_tasks_get_the_models_own_words(
    batch_size: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two answers are what `generate` says, the third is not: the score is two thirds, in any batch."""
    answers = [greedy(folder / "model", q["question"]) for q in QUESTIONS]
    assert len(set(answers)) > 1
    answers[2] += "?"
    rows = [{"question": q["question"], "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "offline_generation.yaml").write_text(GENERATION.format(file=tmp_path / "rows.jsonl", tokens=TOKENS))
    options = ("--tasks", "offline_generation", "--include", tmp_path, "--batch-size", str(batch_size))
    (ours,) = call_json(capsys, "eval", folder / "model", *options)["results"]
    (score,) = ours["scores"]
    assert score["metric"] == "exact_match"
    assert score["value"] == pytest.approx(2 / 3)


def test_what_cannot_be_scored_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness reads 14 thousand files to say which tasks it has: here it has those of the folder.
    monkeypatch.setattr(
        "bytelane.integrations.lm_eval.TaskManager",
        lambda include_path=None, **_: TaskManager(
            include_path=include_path or str(folder / "tasks"), include_defaults=False
        ),
    )
    code, _, err = call(capsys, "eval", folder / "model", "--tasks", "no_such_task_anywhere")
    assert code == 2
    assert "no_such_task_anywhere" in err
    code, _, err = call(capsys, "eval", folder / "model")
    assert code == 2
    assert "--tasks" in err
    code, _, _ = call(capsys, "eval", tmp_path, "--tasks", "offline_choices", "--include", folder / "tasks")
    assert code == 2
