"""The documentation's own examples, run: Python blocks as programs, `bytelane` lines as commands, links as files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import tiny
from bytelane.cli import main
from bytelane.scheme import LinearScheme, WeightScheme
from test_cli import byte_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


README = ROOT / "README.md"
PROGRAMS = [pytest.param(b, id=f"{p.stem}-{i}") for p in [README, *PAGES] for i, b in enumerate(blocks(p, "python"))]
# serving.md's commands start servers, some on several machines, in vLLM's own environment: tests_vllm starts one.
ELSEWHERE = "serving"
COMMANDS = [
    pytest.param(b, id=f"{p.stem}-{i}") for p in PAGES if p.stem != ELSEWHERE for i, b in enumerate(blocks(p, "sh"))
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the examples name."""
    config = tiny.config("llama", vocab_size=300)
    plan = {n: LinearScheme(WeightScheme(8)) for n in tiny.linear_names(config) if n != "lm_head"}
    tiny.write_random(tmp_path / "demo-model", config, plan)
    tiny.float_model(config).save_pretrained(tmp_path / "float-model")
    for name in ("demo-model", "float-model"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program: str, folder: Path) -> None:
    exec(compile(program, "documentation", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", COMMANDS)
def test_commands_run(block: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert lines
    if any("comparison.json" in line and "report" in line for line in lines):  # an earlier block of the page makes it
        lines.insert(0, "bytelane compare float-model demo-model --window 64 --max-tokens 64 -o comparison.json")
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "bytelane"
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code, f"{line}\n{capsys.readouterr()}"


def test_there_are_examples() -> None:
    assert len(PROGRAMS) >= 3
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere_and_pages_are_in_the_navigation(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in link or (page.parent / link).is_file(), link
    assert page.name in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_pages_name_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:src|csrc|tests|benchmarks)/[\w/.*-]+)`|python ((?:benchmarks|tests)/\w+\.py)", page.read_text()
    )
    for path in (a or b for a, b in named):
        assert list(ROOT.glob(path.rstrip("/"))), path
