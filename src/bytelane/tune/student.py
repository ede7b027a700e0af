"""The model in training: `prepare` turns a float model into a `Student`, `Student.freeze` into the integer model.

A `Student` is the same transformers model with trainable layers in place of those the recipe quantizes. Its forward
pass in training mode is the fake-quantized one, with gradients; `freeze` gives an ordinary model of integer layers,
whose values are those of the checkpoint `bytelane.tune.export` writes, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bytelane.cache import cache_keyword, install_kv_cache, make_cache
from bytelane.checkpoint import KVScales
from bytelane.errors import CheckpointError, UnsupportedFormatError
from bytelane.layers import QuantEmbedding, QuantLinear
from bytelane.quantize.fold import equalize, rotate
from bytelane.quantize.kv import observe_kv
from bytelane.quantize.plan import Plan, make_plan
from bytelane.quantize.recipe import Recipe
from bytelane.quantize.settle import Settled, observe_ranges, settle
from bytelane.scheme import EmbeddingScheme, LinearScheme
from bytelane.tune.fake import fake_quantize_int8
from bytelane.tune.modules import TunedEmbedding, TunedLinear, log_scale
from bytelane.tune.ranges import start_weight_scale

KV_LEAVES = ("log_k_cache_scale", "log_v_cache_scale")
"""Parameters of an attention module whose keys and values are quantized."""

Progress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all."""


class _FakeQuantizingCache(DynamicCache):
    """Attention reads the keys and values it would read back from an int8 cache; nothing is stored."""

    def __init__(self, model: PreTrainedModel, scales: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__(config=model.config)
        self.scales = scales

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, quantized to int8 and back."""
        if layer_idx not in self.scales:
            return key_states, value_states
        k, v = self.scales[layer_idx]
        return fake_quantize_int8(key_states, k), fake_quantize_int8(value_states, v)


def passing_cache(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments with which a model computes what it does without a cache, its masks made without reading the GPU.

    Without a cache transformers looks for several texts in one window, which needs a value from the GPU, and where it
    cannot have one, as in the recording of a CUDA graph, it makes a mask that keeps attention from its fast kernels.
    """
    return {"use_cache": True, cache_keyword(model): _FakeQuantizingCache(model, {})}


class Student(nn.Module):
    """A model with trainable quantized layers.

    Attributes:
        model: the transformers model; its quantized modules are `TunedLinear` and `TunedEmbedding`.
        plan: what is quantized, and how.
        storage: the recipe's storage, the default of an export.
        shared_inputs: groups of layers that share an input scale.
        kv_names: attention modules whose keys and values are quantized.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        *,
        storage: str,
        shared_inputs: Sequence[tuple[str, ...]] = (),
        kv_names: Sequence[str] = (),
    ) -> None:
        """Wrap a model that `prepare` has changed."""
        super().__init__()
        self.model = model
        self.plan = plan
        self.storage = storage
        self.shared_inputs = tuple(shared_inputs)
        self.kv_names = tuple(kv_names)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """What the model returns for ids `[batch, tokens]`, without a cache; `kwargs` go to the model.

        In training mode this is the fake-quantized pass. In evaluation mode the layers are the integer ones, in the
        dtype of the model's plain parameters. In both, attention reads int8 keys and values where they are quantized.
        """
        recording = input_ids.is_cuda and torch.cuda.is_current_stream_capturing()
        if recording and not self.kv_names:
            return self.model(input_ids=input_ids, **passing_cache(self.model), **kwargs)
        if self.kv_names:
            scales = {self.model.get_submodule(n).layer_idx: self._kv(n) for n in self.kv_names}
            kwargs[cache_keyword(self.model)] = _FakeQuantizingCache(self.model, cast(Any, scales))
        return self.model(input_ids=input_ids, use_cache=bool(self.kv_names), **kwargs)

    def _kv(self, name: str) -> tuple[Tensor, Tensor]:
        module = self.model.get_submodule(name)
        k, v = (module.get_parameter(leaf).exp() for leaf in KV_LEAVES)
        return k, v

    @torch.no_grad()
    def kv_scales(self) -> dict[str, KVScales]:
        """The KV-cache scales as they are now, by attention module; empty where none are quantized."""
        pairs = {name: self._kv(name) for name in self.kv_names}
        return {name: KVScales(float(k), float(v)) for name, (k, v) in pairs.items()}

    @torch.no_grad()
    def freeze(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The integer model of the current parameters: what `load_model` gives for an export in this dtype.

        Its values are equal to the bit those of `load_model(..., float_ops="torch")` on the same device.

        Args:
            dtype: of activations and of what stays float; None for the student's own.

        Raises:
            CheckpointError: a scale or bias the integer form has no value for; it names the module.
        """
        chosen = dtype or self.model.dtype
        layers: dict[int, Any] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, TunedLinear | TunedEmbedding):
                layers[id(module)] = _quantized(module, name, chosen)
        # The copy takes what stands in its memo for a module instead of copying the module.
        frozen: PreTrainedModel = copy.deepcopy(self.model, layers)
        for module in frozen.modules():
            if isinstance(module, QuantEmbedding | QuantLinear):
                continue  # scales stay float32
            for leaf in KV_LEAVES:
                module._parameters.pop(leaf, None)
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.detach().to(chosen), requires_grad=False)
            for leaf, buffer in module._buffers.items():
                stored = leaf not in module._non_persistent_buffers_set
                if buffer is not None and buffer.dtype.is_floating_point and stored:
                    module._buffers[leaf] = buffer.to(chosen)
        frozen.config.dtype = chosen
        install_kv_cache(frozen, self.kv_scales())
        return frozen.eval()


def _quantized(module: TunedLinear | TunedEmbedding, name: str, dtype: torch.dtype) -> nn.Module:
    """A trainable layer's integer layer; a refusal names the module."""
    try:
        return module.quantized(dtype)
    except CheckpointError as error:
        raise error.within(None, name) from error


class WithCache(nn.Module):
    """A frozen model that reads and writes its int8 cache in every call, as `generate` does."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """What the model returns for ids `[batch, tokens]`, from an empty cache."""
        return self.model(input_ids=input_ids, use_cache=True, **{cache_keyword(self.model): make_cache(self.model)})


def prepare(
    model: PreTrainedModel,
    recipe: Recipe,
    windows: Sequence[Tensor],
    *,
    kv_cache: bool = False,
    progress: Progress | None = None,
) -> Student:
    """Put trainable layers into a float model, where a recipe would leave it.

    A recipe that rounds to nearest and takes its ranges from what is observed is only where training starts: weights
    are the float model's, their scales of least squared error. One with `rounding: gptq`, a search of ranges or learned
    scales is carried out first, and training starts from the values and scales that its checkpoint would have.

    Args:
        model: the float model, with float32 parameters. It is changed: rotated and equalized where the recipe says
            so, and what was its `nn.Linear` is a `TunedLinear`. A teacher is therefore a copy made before. (A recipe
            that is carried out first may work on a copy of its own: use the student's model, not this one.)
        recipe: what to quantize, and how, as for `bytelane quantize`.
        windows: calibration windows, int64 `[length]` each.
        kv_cache: learn static int8 scales of keys and values too.
        progress: called while observing and preparing.

    Raises:
        RecipeError: the recipe does not fit the model.
        FoldError: the architecture cannot be rotated.
        SequentialError: gptq or a search cannot run the model's layers one at a time.
        CalibrationError: the text gives a layer no range.
        LearningError: the scales cannot be learned.
        ValueError: the model is not float32.
    """
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError("a model to tune needs float32 parameters; load it with dtype=torch.float32")
    plan = make_plan(model, recipe)
    if recipe.rounding == "gptq" or recipe.search or recipe.learn_scales:
        settled = settle(model, windows, recipe, progress=progress)
        model, plan = settled.source, settled.plan
    else:
        settled = _observed(model, plan, recipe, windows, progress)
        plan = settled.plan
    kv = observe_kv(model, windows) if kv_cache else {}
    device = next(model.parameters()).device
    shared = [tuple(n for n in names if n in plan.input_ranges) for names in settled.seen.shared]
    shared = [names for names in shared if len(names) > 1]
    leader = {name: names[0] for names in shared for name in names}
    inputs: dict[str, nn.Parameter] = {}
    for done, module in enumerate(plan.modules, start=1):
        original: Any = model.get_submodule(module.name)
        weight = _own(original.weight, module.name in plan.untied)
        if module.name in settled.rounded:  # and the weight is what its codes stand for
            _, scale = settled.rounded[module.name]
        else:
            scale = start_weight_scale(weight, module.scheme.weight, module.name)
        if isinstance(module.scheme, EmbeddingScheme):
            layer: nn.Module = TunedEmbedding(
                weight, scale, module.scheme, embed_scale=_embed_scale(original, module.name)
            )
        else:
            name = module.name
            first = leader.get(name, name)
            if name in plan.input_ranges and first not in inputs:
                inputs[first] = log_scale(settled.inputs[name].scale.to(device))
            layer = TunedLinear(
                weight,
                scale,
                module.scheme,
                log_input_scale=inputs[first] if name in plan.input_ranges else None,
                log_output_scale=log_scale(settled.outputs[name].scale.to(device))
                if name in plan.output_ranges
                else None,
                bias=original.bias,
            )
        model.set_submodule(module.name, layer.train(model.training))
        if progress is not None:
            progress("prepare", done, len(plan.modules))
    for head, source in plan.tied.items():
        table = model.get_submodule(source)
        assert isinstance(table, TunedEmbedding)
        scheme = LinearScheme(table.scheme.weight, quantize_input=False, quantize_output=False)
        model.set_submodule(head, TunedLinear(table.weight, table.log_weight_scale, scheme))
    for name, scales in kv.items():
        attention = model.get_submodule(name)
        for leaf, value in zip(KV_LEAVES, (scales.k, scales.v), strict=True):
            attention.register_parameter(leaf, log_scale(torch.tensor(value, device=device)))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dtype.is_floating_point)
    return Student(model, plan, storage=recipe.storage, shared_inputs=shared, kv_names=tuple(kv))


def _observed(
    model: PreTrainedModel, plan: Plan, recipe: Recipe, windows: Sequence[Tensor], progress: Progress | None
) -> Settled:
    """Rotate and equalize a model in place, and observe its ranges."""
    found = Settled(model, plan)
    if recipe.rotate:
        rotate(model, windows[:1])
        found.plan = make_plan(model, recipe)  # a tied head is no longer
    if recipe.equalize:
        equalize(model, windows, progress=None if progress is None else lambda n: progress("equalize", n, len(windows)))
    note = None if progress is None else lambda done: progress("observe", done, len(windows))
    observe_ranges(found, windows, progress=note)
    return found


def _own(weight: nn.Parameter, apart: bool) -> nn.Parameter:
    """A weight to train: a copy where the float model shared it and the quantized one does not."""
    return nn.Parameter(weight.detach().clone()) if apart else weight


def _embed_scale(original: nn.Module, name: str) -> float:
    if type(original) is not nn.Embedding and not hasattr(original, "scalar_embed_scale"):
        raise UnsupportedFormatError(
            f"{type(original).__name__} does more than look up rows, and bytelane does not know what", tensor=name
        )
    return float(getattr(original, "scalar_embed_scale", 1.0))
