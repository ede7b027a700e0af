"""bytelane as a transformers quantizer, for code that loads its models with `from_pretrained`.

    from transformers import AutoModelForCausalLM
    from bytelane.integrations.transformers import BytelaneConfig

    config = BytelaneConfig(numerics="integer").model_config("my-model")
    model = AutoModelForCausalLM.from_pretrained("my-model", config=config)

The folder (or hub id) is a checkpoint of either storage, unchanged. `AutoModelForImageTextToText` and the model classes
themselves work the same way, and so do `dtype`, `device_map="cuda"` and `attn_implementation`. The result is bit for
bit `bytelane.load_model`'s, and every refusal is the same.

Why `config=` and not only `quantization_config=`: a checkpoint's `config.json` names its own quantizer (`gemma`,
`compressed-tensors`), and `AutoHfQuantizer.merge_quantization_configs` refuses a `quantization_config` argument of
any other class. No public hook comes before it. The one place a caller can name another quantizer is the configuration
object, whose `quantization_config` is read from there and not from the file; `model_config` makes such an object.
Beside it, `quantization_config=BytelaneConfig(...)` is accepted and ignored with transformers' own warning.

How it works: importing this module registers the method `bytelane` (both `register_quantization_config` and
`register_quantizer`; a module is imported once, so this happens once). Before transformers reads a weight, the
checkpoint is opened and checked as a whole, and the quantized modules give way to modules without parameters: no dense
weight is made, and transformers loads only what is not quantized. Afterwards bytelane's layers take their places, with
rows from the memory map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bytelane.cache import KVCacheChoice, install_kv_cache
from bytelane.checkpoint import Checkpoint, open_checkpoint
from bytelane.decoder import FloatOps, install_decoder
from bytelane.errors import ConfigError, FileFormatError, UnknownMethodError
from bytelane.models import build_skeleton, has_towers, load_config, place_quantized, resolve_checkpoint, without_towers
from bytelane.overrides import Overrides, ScaleOverride
from bytelane.scheme import Numerics

METHOD = "bytelane"
"""The `quant_method` of this quantizer. No checkpoint is stored under it."""


@register_quantization_config(METHOD)
class BytelaneConfig(QuantizationConfigMixin):
    """How bytelane shall run a checkpoint. See the module's documentation for what to type.

    Attributes:
        quant_method: `"bytelane"`.
        numerics: `"integer"` or `"emulated"`.
        kv_cache: `"auto"`, `"int8"` or `"float"`, as for `load_model`.
        float_ops: `"auto"`, `"native"` or `"torch"`, as for `load_model`.
        overrides: scales the checkpoint lacks, as a file's path or a mapping: see `bytelane.overrides`.
    """

    def __init__(
        self,
        numerics: Numerics | str = "integer",
        kv_cache: KVCacheChoice = "auto",
        overrides: str | Path | Mapping[str, Mapping[str, Any]] | None = None,
        float_ops: FloatOps = "auto",
        quant_method: str = METHOD,
    ) -> None:
        """Take the arguments of `load_model` that are not `from_pretrained`'s own.

        Raises:
            ConfigError: another `quant_method`.
            ValueError: unknown numerics.
        """
        if quant_method != METHOD:
            raise ConfigError(f"must be {METHOD}, found {quant_method}", tensor="quant_method")
        self.quant_method = METHOD
        # Plain values only: transformers copies this object and writes it as JSON.
        self.numerics = Numerics(numerics).value
        self.kv_cache = kv_cache
        self.float_ops = float_ops
        self.overrides = str(overrides) if isinstance(overrides, Path) else overrides

    def model_config(
        self,
        path: str | Path,
        *,
        text_only: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> PretrainedConfig:
        """The configuration of a checkpoint's model, for `from_pretrained(path, config=...)`.

        Args:
            path: a checkpoint's folder, or a hub id.
            text_only: leave the towers of a multimodal model out, as `load_model` does.
            revision: of the hub repository; give `from_pretrained` the same.
            trust_remote_code: allow the checkpoint's own code.

        Raises:
            CheckpointError: no such checkpoint, or one that is not quantized.
        """
        directory = resolve_checkpoint(path, revision=revision)
        config = load_config(directory, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is None:
            raise UnknownMethodError(
                "the model is not quantized: there is no such object",
                file=directory / "config.json",
                tensor="quantization_config",
            )
        if text_only:
            config = without_towers(config)
        config.quantization_config = self.to_dict()
        return config


class _Awaiting(nn.Module):
    """Holds the place of a quantized module while transformers loads the others. It has no parameters to load."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Never run: `from_pretrained` replaces it or fails.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("the model is still being loaded")


@register_quantizer(METHOD)
class BytelaneQuantizer(HfQuantizer):
    """Puts bytelane's layers into a model that transformers is loading."""

    quantization_config: BytelaneConfig
    requires_calibration = True

    def __init__(self, quantization_config: BytelaneConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checkpoint: Checkpoint | None = None
        self._originals: dict[str, nn.Module] = {}
        self._overrides: dict[str, ScaleOverride] = {}
        self._device = torch.device("cpu")
        self._dtype = torch.float32

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device map of several devices.

        Raises:
            ConfigError: as said.
        """
        self._device = _one_device(kwargs.get("device_map"))

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check the checkpoint against the model, then take the quantized modules out of it."""
        files = kwargs.get("checkpoint_files")
        if not files or not str(files[0]).endswith(".safetensors"):
            raise FileFormatError("bytelane reads safetensors files of a folder, found none", file=files and files[0])
        directory = Path(files[0]).parent
        self._dtype = model.dtype
        # transformers builds the model with the meta device as the default, which is no place to read scales to.
        with torch.device("cpu"):
            checkpoint = open_checkpoint(directory, model, whole=_whole(directory, model))
            self._overrides = Overrides(self.quantization_config.overrides).resolve(checkpoint)
        self._checkpoint = checkpoint
        self._originals = {name: model.get_submodule(name) for name in checkpoint.modules}
        gone = {*checkpoint.modules, *checkpoint.tied, *(n for n, o in self._overrides.items() if o.num_bits)}
        for name in gone:
            model.set_submodule(name, _Awaiting())
        # Ties between modules that share codes are bytelane's to make; transformers would look for their parameters.
        ties: dict[str, str] = model.all_tied_weights_keys
        for name in [name for name in ties if name.rpartition(".")[0] in gone]:
            del ties[name]
        elsewhere = [*(rf"{re.escape(name)}\.[^.]+" for name in gone), *map(re.escape, checkpoint.skipped)]
        elsewhere += [rf"{re.escape(name)}\.[kv]_(cache_)?scale" for name in checkpoint.kv_scales]
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^(?:{'|'.join(elsewhere)})$"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Put bytelane's layers in."""
        checkpoint = self._checkpoint
        if checkpoint is None:
            raise RuntimeError("the model was not prepared by this quantizer")
        numerics = Numerics(self.quantization_config.numerics)
        with checkpoint:
            place_quantized(checkpoint, model, self._originals, self._overrides, self._dtype, self._device, numerics)
            install_kv_cache(
                model,
                checkpoint.kv_scales,
                choice=self.quantization_config.kv_cache,
                numerics=numerics,
                file=checkpoint.directory,
            )
        install_decoder(model, self.quantization_config.float_ops, numerics=numerics)
        # The model keeps its quantizer; neither the files nor the architecture's own modules need to stay with it.
        self._checkpoint, self._originals = None, {}
        return model

    def is_serializable(self) -> bool:
        """No: the checkpoint is the serialized form; `bytelane convert` rewrites it."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: the codes are constants."""
        return False


def _one_device(device_map: Any) -> torch.device:
    """The device of a device map that names one only; the CPU without one."""
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) != 1 or devices & {"auto", "balanced", "balanced_low_0", "sequential", "disk"}:
        raise ConfigError(f"bytelane loads a model onto one device, found {device_map}", tensor="device_map")
    (found,) = devices
    return torch.device("cpu" if found is None else found)


def _whole(directory: Path, model: PreTrainedModel) -> PreTrainedModel | None:
    """The model with its towers, where the one being loaded was asked for without them."""
    config = load_config(directory)
    if not has_towers(config) or has_towers(model.config):
        return None
    return build_skeleton(config, dtype=model.dtype, file=directory / "config.json")
