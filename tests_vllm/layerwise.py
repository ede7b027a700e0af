"""What engines recorded of every layer, held against `bytelane.load_model` row by row, to the bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bytelane

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROW_PARALLEL = ("o_proj", "down_proj")


def logprobs_and_noise(native: nn.Module, other: nn.Module, ids: list[int]) -> tuple[Tensor, float]:
    """Of every token after the first, `[tokens, vocabulary]`, and how far float operations alone move one.

    `native` and `other` are one checkpoint under `load_model`, with bytelane's float operations and with transformers'.
    """
    with torch.inference_mode():
        ours, theirs = (torch.log_softmax(m(torch.tensor([ids])).logits[0, :-1].double(), -1) for m in (native, other))
    return ours, float((ours - theirs).abs().max())


def by_row(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """A recorded layer's outputs by `bytelane.load_model`, one row at a time: no batch but the smallest."""
    parent, _, leaf = name.rpartition(".")
    modules = [model.get_submodule(f"{parent}.{part}") for part in PARTS[leaf]] if leaf in PARTS else None
    modules = modules or [model.get_submodule(name)]
    if isinstance(modules[0], bytelane.QuantEmbedding):
        modules = [modules[0].rows]  # vLLM's Gemma scales its embeddings outside the table
    return torch.cat([torch.cat([m(x[i : i + 1]) for m in modules], -1) for i in range(len(x))])


def _shares(model: nn.Module, name: str, outputs: Tensor, ranks: int) -> list[Tensor]:
    """Of a column-parallel layer's outputs, what each rank has: its share of every part.

    Where there are fewer heads of keys and values than ranks, neighbouring ranks have the same one.
    """
    parent, _, leaf = name.rpartition(".")
    modules = {part: model.get_submodule(f"{parent}.{part}") for part in PARTS.get(leaf, (leaf,))}
    heads = model.config.num_key_value_heads
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    for part, y in zip(modules, outputs.split([m.out_features for m in modules.values()], -1), strict=True):
        pieces = min(ranks, heads) if part in ("k_proj", "v_proj") else ranks
        for rank, share in enumerate(found):
            share.append(y.chunk(pieces, -1)[rank // (ranks // pieces)])
    return [torch.cat(share, -1) for share in found]


def check_records(model: nn.Module, ranks: list[dict[str, Any]]) -> int:
    """Hold the records of all ranks against the model; returns the rows compared."""
    compared = 0
    for name, calls in ranks[0].items():
        leaf = name.rpartition(".")[2]
        for call, (x, _) in enumerate(calls):
            others = [records[name][call] for records in ranks]
            if leaf in ROW_PARALLEL:
                x = torch.cat([other[0] for other in others], -1)
                expected = by_row(model, name, x)
                assert all(torch.equal(other[1], expected) for other in others), name
            else:
                expected = by_row(model, name, x)
                assert all(torch.equal(x, other[0]) for other in others), name
                if leaf == "embed_tokens":
                    assert all(torch.equal(other[1], expected) for other in others), name
                elif leaf == "lm_head":
                    actual = torch.cat([other[1] for other in others], -1)
                    assert torch.equal(actual[:, : expected.shape[1]], expected), name
                elif leaf.startswith("per_layer") or leaf == "embed_tokens_per_layer":
                    assert all(torch.equal(other[1], expected) for other in others), name  # on every rank whole
                else:
                    shares = _shares(model, name, expected, len(ranks))
                    assert all(torch.equal(o[1], s) for o, s in zip(others, shares, strict=True)), name
            compared += len(x)
    return compared
