"""A tuned model as a checkpoint, in either storage, through the writer every checkpoint goes through."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bytelane.checkpoint import QuantizedModule, QuantizedTensors, write_checkpoint
from bytelane.packing import pack_rows
from bytelane.quantize.pipeline import checkpoint_config
from bytelane.tune.modules import TunedEmbedding, TunedLinear
from bytelane.tune.student import KV_LEAVES, Student


def export_checkpoint(
    student: Student,
    output: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    copy_from: Path | str | None = None,
    storage: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Path:
    """Write the integer model of the current parameters, completely or not at all.

    Args:
        student: the tuned model.
        output: the folder to make.
        tokenizer: saved with it; not needed with `copy_from`.
        copy_from: a folder whose tokenizer and generation files go along as they are.
        storage: `"compressed-tensors"` or `"gemma"`; None for the recipe's.
        dtype: of what stays float, and of the model it will be.
        overwrite: replace a checkpoint that is there.

    Returns:
        The folder.

    Raises:
        CheckpointError: see `write_checkpoint`.
    """
    plan = student.plan
    with tempfile.TemporaryDirectory(prefix="bytelane-") as temporary:
        if copy_from is None:
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            if student.model.generation_config is not None:
                student.model.generation_config.save_pretrained(temporary)
        return write_checkpoint(
            output,
            config=checkpoint_config(student.model, plan, dtype),
            storage=storage or student.storage,
            modules=_modules(student, dtype),
            plain=_plain(student, dtype),
            kv_scales=student.kv_scales(),
            unquantized=plan.unquantized,
            tied=plan.tied,
            copy_from=copy_from or temporary,
            overwrite=overwrite,
        )


def _modules(student: Student, dtype: torch.dtype) -> Iterator[tuple[QuantizedModule, QuantizedTensors]]:
    for module in student.plan.modules:
        layer = student.model.get_submodule(module.name)
        assert isinstance(layer, TunedLinear | TunedEmbedding)
        codes, scale = layer.codes()
        linear = layer if isinstance(layer, TunedLinear) else None
        yield (
            module,
            QuantizedTensors(
                rows=pack_rows(codes, module.scheme.weight.num_bits),
                weight_scale=scale,
                input_scale=_detached(linear.input_scale) if linear else None,
                output_scale=_detached(linear.output_scale) if linear else None,
                bias=linear.bias.detach().to(dtype) if linear is not None and linear.bias is not None else None,
            ),
        )


def _detached(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.detach()


def _plain(student: Student, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that belongs to no trainable layer and is no KV scale, one that is tied to another only once."""
    tuned = {n for n, m in student.model.named_modules() if isinstance(m, TunedLinear | TunedEmbedding)}
    seen: set[int] = set()
    for name, tensor in student.model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        if owner in tuned or leaf in KV_LEAVES or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield name, tensor.detach().to(dtype) if tensor.dtype.is_floating_point else tensor.detach()
