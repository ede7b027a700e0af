"""Calibration text, recipes, and the plan they make with a model."""

from __future__ import annotations

import pytest
import torch

from bytelane.errors import FileFormatError, GroupSizeError
from bytelane.quantize import (
    Head,
    Range,
    Recipe,
    RecipeError,
    TextError,
    builtin_recipes,
    make_plan,
    read_documents,
    windows,
)
from bytelane.scheme import Storage
from calibration import linear_names, make_model


def test_doc_elements_are_dealt_to_splits_and_stubs_dropped(tmp_path) -> None:
    bodies = [f"Title {i}\n\n" + f"long{i} " * 100 for i in range(9)]
    stub = "x" * 400  # exactly the limit: dropped
    parts = [f'<doc id="{i}" title="t">\n{body}\n</doc>\n' for i, body in enumerate([stub, *bodies])]
    path = tmp_path / "wiki.utf8"
    path.write_text("".join(parts), encoding="utf-8")
    every = [body.strip() for body in bodies]
    assert read_documents(path) == every
    assert read_documents(path, "evaluation") == [every[3], every[7]]
    assert read_documents(path, "calibration") == [b for i, b in enumerate(every) if i not in (3, 7)]


def test_plain_and_json_lines(tmp_path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("all of it\n\none document", encoding="utf-8")
    assert read_documents(plain) == ["all of it\n\none document"]
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"text": "one"}\n\n{"text": "two\\u2028still two", "more": 1}\n', encoding="utf-8")
    assert read_documents(lines) == ["one", "two\u2028still two"]
    with pytest.raises(TextError, match='split="all"'):
        read_documents(plain, "calibration")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b'{"text": 1}', FileFormatError, "line 1 must be an object"),
        ("a.jsonl", b'{"text": "x"}\n{', FileFormatError, "line 2 is not JSON"),
        ("a.txt", b"\xff\xfe", FileFormatError, "not UTF-8"),
        ("a.pdf", b"text", FileFormatError, "read from .txt, .utf8 and .jsonl"),
        ("a.txt", b" \n", TextError, "no document"),
    ],
)
def test_bad_text_is_refused(tmp_path, name, content, error, message) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_documents(path)


def test_windows_start_with_bos_and_lose_no_token(tokenizer, documents) -> None:
    found = windows(tokenizer, documents, length=32)
    ids = [i for d in documents for i in tokenizer(d, add_special_tokens=False)["input_ids"]]
    assert all(w.shape == (32,) and w.dtype == torch.int64 and w[0] == tokenizer.bos_token_id for w in found)
    joined = [int(i) for w in found for i in w[1:]]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < 31
    assert len(windows(tokenizer, documents, length=32, limit=3)) == 3
    with pytest.raises(TextError, match="fewer than one window"):
        windows(tokenizer, ["w5 w6"], length=32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"default_bits": 9}, "default_bits: weights have 2 to 8 bits, found 9"),
        ({"bits": {"mlp": 1}}, "weights have 2 to 8 bits, found 1"),
        ({"bits": {"(": 4}}, "not a regular expression"),
        ({"granularity": {"mlp": "row"}}, '"channel" or a positive group size'),
        ({"granularity": {"mlp": 0}}, '"channel" or a positive group size'),
        ({"range": {"method": "percentile"}}, 'needs a "percentile" from 50 to below 100'),
        ({"range": {"method": "percentile", "percentile": 100}}, '{"method": "minmax"}'),
        ({"range": {"method": "minmax", "percentile": 99}}, "remove it or change the method"),
        ({"range": "most"}, 'a range is "minmax", "mse" or a percentile'),
        ({"head": "half"}, "head:"),
        ({"bitz": {}}, "bitz: no such setting; there are default_bits"),
        ({"storage": "gemma", "bits": {"mlp": 3}}, "the gemma storage holds 2, 4 and 8 bits"),
        ({"bits": ["mlp"]}, "must be PATTERN=VALUE"),
        ({"bits": ["mlp=4", "mlp=8"]}, "given twice"),
    ],
)
def test_a_wrong_recipe_says_what_to_do(values, message) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.of(values)
    assert message in str(caught.value)


def test_flags_and_file_make_the_same_recipe(tmp_path) -> None:
    flags = Recipe.of(
        {
            "bits": ["down_proj$=8", "mlp=4"],
            "granularity": ["mlp=32"],
            "range": "99.9",
            "output_ranges": ["v_proj=minmax"],
            "head": "full",
        }
    )
    path = tmp_path / "recipe.json"
    path.write_text(flags.model_dump_json(), encoding="utf-8")
    assert Recipe.load(path) == flags
    assert list(flags.bits.items()) == [("down_proj$", 8), ("mlp", 4)]
    assert flags.range == Range(method="percentile", percentile=99.9)
    assert flags.head is Head.FULL
    path.write_text('{"bits": {"a": 4, "a": 8}}', encoding="utf-8")
    with pytest.raises(RecipeError, match="'a' is given twice"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.load(tmp_path / "absent.json")


def test_built_in_recipes_load() -> None:
    assert "smollm2-w8a8o8" in builtin_recipes()
    for name in builtin_recipes():
        assert Recipe.load(name).storage == "compressed-tensors"


def test_the_first_matching_pattern_wins() -> None:
    recipe = Recipe.of(
        {"bits": {r"layers\.0\.mlp\.down": 8, r"\.mlp\.": 4}, "default_bits": 6, "granularity": ["mlp=32"]}
    )
    found = {m.name: m for m in make_plan(make_model(), recipe).modules}
    bits = {n.removeprefix("model.layers."): m.scheme.weight.num_bits for n, m in found.items()}
    assert (bits["0.mlp.down_proj"], bits["1.mlp.down_proj"], bits["0.mlp.up_proj"]) == (8, 4, 4)
    assert bits["0.self_attn.q_proj"] == 6
    assert found["model.layers.0.mlp.down_proj"].storage is Storage.INT_QUANTIZED
    assert found["model.layers.1.mlp.down_proj"].storage is Storage.PACK_QUANTIZED
    assert found["model.layers.1.mlp.down_proj"].groups == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": {"mpl": 4}}, "bits: the pattern 'mpl' matches none"),
        ({"bits": {"embed": 4}}, "matches none"),  # tables stay in float unless `embeddings` says otherwise
        ({"bits": {"mlp": 4, "down_proj": 8}}, "decides nothing, earlier patterns match"),
        ({"ignore": ["mlp"], "no_input": ["down_proj"]}, "no_input: the pattern 'down_proj' matches none"),
        ({"no_output": ["lm_head"]}, "no_output: the pattern 'lm_head' matches none"),  # it has no sides
        ({"no_output": ["v_proj"], "output_ranges": {"v_proj": {"method": "minmax"}}}, "output_ranges: the pattern"),
        ({"ignore": [""]}, "quantizes nothing"),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(values, message) -> None:
    with pytest.raises(RecipeError, match=message):
        make_plan(make_model(), Recipe.of(values))


def test_a_group_size_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(GroupSizeError, match=r"model\.layers\.0\.mlp\.down_proj: the group size 64"):
        make_plan(make_model(), Recipe.of({"granularity": {"mlp": 64}}))


@pytest.mark.parametrize(
    ("values", "tied", "untied", "float_tied"),
    [
        ({"head": "float"}, {}, (), True),
        ({"embeddings": 8}, {"lm_head": "model.embed_tokens"}, (), False),
        ({"embeddings": 4, "bits": {"lm_head|embed": 4}}, {"lm_head": "model.embed_tokens"}, (), False),
        ({"embeddings": 4}, {}, ("lm_head",), False),  # the head has 8 bits
        ({"embeddings": 8, "granularity": {"embed": 32}}, {}, ("lm_head",), False),
        ({"embeddings": 8, "head": "full"}, {}, ("lm_head",), False),
        ({"embeddings": 8, "head": "float"}, {}, ("lm_head",), False),
        ({}, {}, ("lm_head",), False),
    ],
)
def test_a_tied_head_is_stored_once_where_it_can_be(values, tied, untied, float_tied) -> None:
    plan = make_plan(make_model(), Recipe.of(values))
    assert (dict(plan.tied), plan.untied, plan.float_tied) == (tied, untied, float_tied)
    names = {m.name for m in plan.modules} | set(plan.unquantized) | set(plan.tied)
    assert names == {*linear_names(make_model()), "model.embed_tokens"}
    assert not {m.name for m in plan.modules} & {*plan.unquantized, *plan.tied}
