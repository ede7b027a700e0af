"""Running for long: memory and threads stay flat, results stay equal, and what runs out is said by name."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from bytelane.checkpoint import convert_checkpoint
from bytelane.cli import main
from bytelane.generation import ChatSession, Sampling, generate, load_tokenizer
from bytelane.models import load_model, open_model
from bytelane.scheme import LinearScheme, WeightScheme
from test_cli import byte_tokenizer

GREEDY = Sampling(greedy=True)
GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steady") / "model"
    config = tiny.config("llama", vocab_size=300)
    tiny.write_random(
        path, config, {n: LinearScheme(WeightScheme(4)) for n in tiny.linear_names(config) if n != "lm_head"}
    )
    byte_tokenizer().save_pretrained(path)
    return path


def prompt(seed: int, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(seed))


def resident_kilobytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def operating_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def answer(model: Any, tokenizer: Any, ids: torch.Tensor, count: int = 12, **options: Any) -> str:
    text, _ = generate(model, tokenizer, ids, max_new_tokens=count, sampling=GREEDY, on_text=lambda _: None, **options)
    return text


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("which", ["llama", "gemma4"])
def test_a_soak_of_generate_is_flat(which: str, folder: Path) -> None:
    """A leak of one KV cache (some 200 kB a round here), or of one thread, shows in as many rounds as these.

    `BYTELANE_SOAK` counts them: some ten thousand take an hour.
    """
    rounds = int(os.environ.get("BYTELANE_SOAK", "60"))
    model, tokenizer = load_model(folder if which == "llama" else GEMMA), load_tokenizer(folder)
    first = [answer(model, tokenizer, prompt(seed)) for seed in range(3)]
    for _ in range(15):
        answer(model, tokenizer, prompt(0))
    gc.collect()
    memory, threads = resident_kilobytes(), operating_threads()
    for round_ in range(rounds):
        assert answer(model, tokenizer, prompt(round_ % 3)) == first[round_ % 3]
    gc.collect()
    assert operating_threads() <= threads
    # The allocator may keep some pages more; sixty leaked caches would be 12 MB.
    assert resident_kilobytes() - memory < 6 * 1024


def test_threads_may_share_a_model(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    expected = [answer(model, tokenizer, prompt(seed)) for seed in range(8)]
    with torch.inference_mode():
        logits = [model(prompt(seed)).logits for seed in range(8)]
    gate = threading.Barrier(4)

    def work(seed: int) -> tuple[str, torch.Tensor]:
        if seed < 4:
            gate.wait()
        with torch.inference_mode():
            found = model(prompt(seed)).logits
        return answer(model, tokenizer, prompt(seed)), found

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(work, range(8)))
    assert [text for text, _ in done] == expected
    assert all(torch.equal(a, b) for (_, a), b in zip(done, logits, strict=True))


def test_a_cancelled_answer_leaves_nothing_behind(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    expected = answer(model, tokenizer, prompt(1), 20)
    calls = iter(range(1000))
    short = answer(model, tokenizer, prompt(1), 20, stopped=lambda: next(calls) >= 3)
    assert expected.startswith(short)
    assert len(short) < len(expected)
    assert answer(model, tokenizer, prompt(1), 20) == expected

    class Cancelled(Exception):
        pass

    def fail(text: str) -> None:
        raise Cancelled

    plain, broken = ChatSession(model, tokenizer), ChatSession(model, tokenizer)
    long = "Hello there, this is long enough to be written in pieces."
    with pytest.raises(Cancelled):
        broken.ask(long, max_new_tokens=20, sampling=GREEDY, on_text=fail)
    assert broken.messages == []
    answers = [session.ask("Hi", max_new_tokens=8, sampling=GREEDY)[0] for session in (broken, plain)]
    assert answers[0] == answers[1]


# --- what runs out -----------------------------------------------------------------------------------------------

_LIMITED = """
import resource, sys
from bytelane.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main(sys.argv[2:])
"""


def test_a_full_disk_is_said_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: the system call fails in the same place."""
    arguments = ["convert", str(folder), str(tmp_path / "out"), "--to", "gemma", "--json"]
    command = [sys.executable, "-c", _LIMITED, "20000", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "OSError"
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_is_the_systems_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("bytelane.checkpoint.writer.save_file", full)
    checkpoint, _ = open_model(folder)
    with checkpoint, pytest.raises(OSError, match="No space left on device") as failed:
        convert_checkpoint(checkpoint, tmp_path / "out", "compressed-tensors")
    assert failed.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def _of_torch() -> None:
    torch.empty(1 << 60, dtype=torch.int8)


def _of_numpy() -> None:
    np.zeros(1 << 60, np.int8)


def _of_a_kernel() -> None:
    raise MemoryError("std::bad_alloc")


def _of_a_device() -> None:
    """What torch raises where a GPU has no more: no GPU is needed to raise it."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("json_output", [True, False])
@pytest.mark.parametrize("run_out", [_of_torch, _of_numpy, _of_a_kernel, _of_a_device])
@pytest.mark.parametrize("where", ["bytelane.cli.common.load_model", "bytelane.generation.generate"])
def test_memory_that_runs_out_is_said(
    where: str,
    run_out: Callable[[], None],
    json_output: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_much(*_: object, **__: object) -> None:
        run_out()

    monkeypatch.setattr(where, too_much)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(folder), "Hello", *(["--json"] if json_output else [])])
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "out of memory" in (json.loads(out)["error"]["message"] if json_output else err)


def test_other_failures_are_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("bytelane.cli.common.load_model", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["run", str(folder), "Hello"])
