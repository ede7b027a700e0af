"""The HTML report: its data, what may stand in it, and the page itself in headless Chromium."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from browser import chromium
from bytelane import errors
from bytelane.checkpoint import open_checkpoint
from bytelane.report.compare import compare_models, sensitivity
from bytelane.report.findings import comparison_json
from bytelane.report.html import Speed, measure_speed, read_comparison, render, report_data
from bytelane.report.subject import Subject
from bytelane.scheme import LinearScheme, WeightScheme
from test_cli import byte_tokenizer, call, call_json

GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"
SPEED = Speed(128, 32, 512.25, 40.5, 10**9, 2, "bfloat16", "A processor")


@pytest.fixture(scope="module")
def comparison() -> dict[str, Any]:
    """The tiny Gemma 4 checkpoint, integer against emulated, with one scale spoiled so that a layer clips."""
    subjects = Subject(str(GEMMA), "emulated"), Subject(str(GEMMA), "integer")
    a, b = (subject.load(torch.float32) for subject in subjects)
    b.get_submodule("model.layers.2.mlp.up_proj").output_scale.mul_(0.02)
    ids = [torch.randint(3, 512, (24,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    result = compare_models(a, b, ids)
    found = sensitivity(a, b, ids[0], [layer.name for layer in result.layers])
    layers = tuple(dataclasses.replace(layer, sensitivity=found[layer.name]) for layer in result.layers)
    return comparison_json(*subjects, dataclasses.replace(result, layers=layers))


@pytest.fixture(scope="module")
def page(comparison: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render(report_data(GEMMA, comparison=comparison, speed=SPEED)))
    return file


def test_data_is_what_inspect_and_compare_say(comparison: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    data = report_data(GEMMA, comparison=comparison)
    inspected = call_json(capsys, "inspect", GEMMA)
    by_name = {layer["name"]: layer for layer in data["layers"]}
    assert {layer["name"]: layer["bytes"] for layer in inspected["layers"]} == {
        n: x["bytes"] for n, x in by_name.items()
    }
    compared = {layer["name"]: layer for layer in comparison["layers"]}
    for name, layer in by_name.items():
        assert layer["measured"] == (name in compared)
        if layer["measured"]:
            assert layer["output"] == compared[name]["output"]
            assert [kernel["rows"] for kernel in layer["kernels"]] == [1, 512]
    executed = [layer["name"] for layer in comparison["layers"] if layer["name"] in by_name]
    assert [layer["name"] for layer in data["layers"] if layer["measured"]] == executed
    assert any("up_proj" in finding and "clip" in finding for finding in data["findings"])
    assert data["findings"][-1] == inspected["notes"][-1]


def test_a_page_loads_nothing_and_holds_names_as_text(tmp_path: Path) -> None:
    data = report_data(GEMMA)
    data["title"] = "</script><script>alert(1)</script><!--"
    page = render(data)
    assert page.count("</script>") == 2
    assert "alert(1)</script>" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page
    embedded = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert embedded is not None
    assert json.loads(embedded[1]) == json.loads(json.dumps(data))


def test_comparisons_of_other_models_are_refused(comparison: dict[str, Any], tmp_path: Path) -> None:
    tiny.write_random(
        tmp_path / "other", tiny.config("llama"), {"model.layers.1.mlp.up_proj": LinearScheme(WeightScheme(4))}
    )
    stranger = {**comparison, "layers": [{**comparison["layers"][0], "name": "elsewhere"}]}
    with pytest.raises(errors.ConfigError, match="share no layer"):
        report_data(GEMMA, comparison=stranger)
    for text in ("{}", "[]", "{", '{"format": "other"}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(errors.ConfigError, match=r"c\.json"):
            read_comparison(tmp_path / "c.json")


def test_the_command_compares_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.config("llama", vocab_size=300)
    plan = {n: LinearScheme(WeightScheme(8)) for n in tiny.linear_names(config) if n != "lm_head"}
    tiny.write_random(tmp_path / "model", config, plan)
    tiny.float_model(config).save_pretrained(tmp_path / "float")
    for name in ("float", "model"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    output = tmp_path / "out.html"
    options = ("--text", tmp_path / "text.txt", "--dtype", "float32", "--measure", "-o", output)
    found = call_json(capsys, "report", tmp_path / "model", "--reference", tmp_path / "float", *options)
    assert "bytelane report" in output.read_text()
    assert [label for label, *_ in found["tiles"]][-2:] == ["decoding", "reading"]
    assert all(layer["sensitivity"] is not None for layer in found["layers"] if layer["measured"])
    code, _, _ = call(capsys, "report", tmp_path / "model", "--reference", "x", "--comparison", output)
    assert code == 2
    code, out, _ = call(capsys, "report", tmp_path / "model", "-o", tmp_path / "plain.html")
    assert (code, out.split()[0]) == (0, "wrote")


def test_speed_is_measured(tmp_path: Path) -> None:
    config = tiny.config("llama", vocab_size=300)
    tiny.write_random(tmp_path, config, {"model.layers.1.mlp.up_proj": LinearScheme(WeightScheme(4))})
    byte_tokenizer().save_pretrained(tmp_path)
    speed = measure_speed(tmp_path, prompt_tokens=20, new_tokens=3)
    assert speed.prompt_tokens == 20
    assert 1 <= speed.new_tokens <= 3
    assert speed.prefill_rate > 0
    assert speed.machine


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)], ids=["desk", "phone"])
def test_the_page_draws_sorts_and_filters(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    with chromium(tmp_path, width=width, height=1400, dark=dark) as chrome:
        chrome.get(page.as_uri())

        def texts(selector: str) -> list[str]:
            script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
            return chrome.execute_script(script, selector)  # type: ignore[no-any-return]

        def click(selector: str) -> None:
            chrome.execute_script("document.querySelector(arguments[0]).click()", selector)

        def names() -> list[str]:
            return texts("tr.layer td.name")

        def put(selector: str, value: str) -> None:
            script = """const e = document.querySelector(arguments[0]);
                e.value = arguments[1]; e.dispatchEvent(new Event('input'))"""
            chrome.execute_script(script, selector, value)

        def column(key: str) -> list[str]:
            script = (
                "return [...document.querySelector('#head').children].findIndex(h => h.dataset.key === arguments[0])"
            )
            return texts(f"tr.layer td:nth-child({chrome.execute_script(script, key) + 1})")

        everything = names()
        with open_checkpoint(GEMMA, _skeleton()) as checkpoint:
            assert set(everything) == set(checkpoint.modules)
        assert len(texts("#sizes svg g")) >= 6
        assert len(texts("#quality svg polyline")) == 2
        assert len(texts(".tile")) == 8
        # sorting: the column's own numbers are in order, twice the other way round
        click("th[data-key=bytes] button")
        units = {"B": 1, "kB": 1e3, "MB": 1e6}
        sizes = [float(count) * units[unit] for count, unit in (text.split() for text in column("bytes"))]
        assert sizes == sorted(sizes)
        click("th[data-key=bytes] button")
        assert names()[0] != everything[0]
        assert chrome.execute_script("return document.querySelector('th[data-key=bytes]').ariaSort") == "descending"
        click("th[data-key=out] button")
        shown = [float(text) for text in column("out") if text not in ("\u2013", "equal")]
        assert shown == sorted(shown)
        # filters
        put("#filter", "up_proj")
        assert names()
        assert all("up_proj" in name for name in names())
        assert f"{len(names())} of {len(everything)}" in texts("#count")[0]
        put("#filter", "")
        click("#suspect")
        assert "model.layers.2.mlp.up_proj" in names()
        assert len(names()) < len(everything)
        click("#suspect")
        put("#bits", "2")
        assert {t[:2] for t in texts("tr.layer .chip")} == {"w2"}
        put("#bits", "")
        # drill-down
        put("#filter", "layers.2.mlp.up_proj")
        click("tr.layer")
        assert len(texts("tr.detail h3")) == 3
        assert len(texts("tr.detail svg")) == 4
        assert "kernel, M = 512" in texts("tr.detail")[0]
        put("#filter", "")
        # the page is as wide as the window, light or dark as asked, and the button switches
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
        ground = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(21, 24, 27)") == dark
        click("#theme")
        assert chrome.execute_script("return getComputedStyle(document.body).backgroundColor") != ground
        printed = chrome.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
        assert base64.b64decode(printed).startswith(b"%PDF")
        assert chrome.get_log("browser") == []


def _skeleton() -> Any:
    from bytelane.models import open_model

    checkpoint, model = open_model(GEMMA)
    checkpoint.close()
    return model


def test_a_page_without_a_comparison_draws_too(tmp_path: Path) -> None:
    file = tmp_path / "plain.html"
    file.write_text(render(report_data(GEMMA)))
    with chromium(tmp_path / "profile") as chrome:
        chrome.get(file.as_uri())
        assert chrome.execute_script("return document.querySelectorAll('tr.layer').length") > 50
        assert chrome.execute_script("return document.querySelector('#quality-card').hidden")
        chrome.execute_script("document.querySelector('tr.layer').click()")
        assert chrome.execute_script("return document.querySelectorAll('tr.detail h3').length") == 1
        assert chrome.get_log("browser") == []
