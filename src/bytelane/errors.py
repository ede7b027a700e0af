"""Every refusal bytelane can make, one class for each rule.

A refusal names the file, the tensor (or module, or config key) and the rule that was broken, and it is
raised before anything is built or written: see FORMAT.md, "Refusals". All of them derive from
`CheckpointError`, which is also a `ValueError` because the same rules guard `QuantLinear.from_codes`.
"""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """Base of every refusal.

    Args:
        rule: what must hold and what was found instead.
        file: the file at fault, when there is one.
        tensor: the tensor, module or configuration key at fault, when there is one.
    """

    def __init__(self, rule: str, *, file: Path | str | None = None, tensor: str | None = None) -> None:
        self.rule = rule
        self.file = None if file is None else str(file)
        self.tensor = tensor
        super().__init__(": ".join(part for part in (self.file, tensor, rule) if part))

    def within(self, file: Path | str | None, tensor: str | None = None) -> CheckpointError:
        """The same refusal with the file, and a prefix of the tensor's name, filled in where they were unknown."""
        name = self.tensor if tensor is None else ".".join(p for p in (tensor, self.tensor) if p)
        return type(self)(self.rule, file=self.file or file, tensor=name)


# --- the container -----------------------------------------------------------------------------------------------


class FileFormatError(CheckpointError):
    """A file is not what its name says: unreadable, not JSON, not safetensors."""


class TruncatedFileError(FileFormatError):
    """A safetensors file ends before the data its header promises."""


class OverlappingTensorsError(FileFormatError):
    """The byte ranges in a safetensors header overlap, leave a hole, or do not match dtype and shape."""


class ShardIndexError(FileFormatError):
    """`model.safetensors.index.json` and the shards it names disagree, or it points outside the folder."""


# --- the configuration -------------------------------------------------------------------------------------------


class ConfigError(CheckpointError):
    """`config.json` lacks a key, has one of the wrong type, or contradicts itself."""


class UnknownMethodError(ConfigError):
    """`quant_method` is absent or is not one of the storages bytelane reads."""


class UnsupportedFormatError(ConfigError):
    """A compressed-tensors `format` other than pack-quantized and int-quantized."""


class UnsupportedWidthError(ConfigError):
    """A bit width the scheme or the storage does not have."""


class UnsupportedStrategyError(ConfigError):
    """A scale granularity other than channel or group (weights) or tensor (activations)."""


class UnsupportedTypeError(ConfigError):
    """Weights or activations quantized to something other than integers."""


class AsymmetricError(ConfigError):
    """Quantization with a zero point. The scheme is symmetric throughout."""


class DynamicActivationError(ConfigError):
    """Activation ranges computed at run time. The scheme's are static."""


class ModelConfigError(ConfigError):
    """The model's own configuration is unknown to transformers or cannot be built."""


class RemoteCodeError(ConfigError):
    """The checkpoint wants its own Python code run, and the user did not allow it."""


# --- the tensors -------------------------------------------------------------------------------------------------


class MissingTensorError(CheckpointError):
    """A tensor the model and its quantization need is not in the checkpoint."""


class UnexpectedTensorError(CheckpointError):
    """The checkpoint has a tensor that the model and its quantization have no place for."""


class TensorDtypeError(CheckpointError):
    """A tensor's dtype is not the one its role requires."""


class TensorShapeError(CheckpointError):
    """A tensor's shape is not the one its role requires."""


class PackedShapeError(TensorShapeError):
    """A packed weight's shape matches neither the dense nor the padded packing rule."""


class WeightShapeError(TensorShapeError):
    """`weight_shape` disagrees with the packed tensor or with the model."""


class GroupSizeError(CheckpointError):
    """The group size does not divide the input features, or the scale has another number of groups."""


class ScaleError(CheckpointError):
    """A scale is negative, NaN, infinite, or so small or large that the integer arithmetic has no value for it."""


class CodeRangeError(CheckpointError):
    """A weight code lies outside `-2^(N-1) .. 2^(N-1)-1`."""


class AccumulatorError(CheckpointError):
    """The accumulator could overflow: too many input features, or too large a bias."""


class ShardingError(CheckpointError):
    """A layer cannot be split over tensor-parallel ranks as asked and stay what it is."""


# --- writing -----------------------------------------------------------------------------------------------------


class NotRepresentableError(CheckpointError):
    """The target storage has no place for what is to be written."""


class OutputExistsError(CheckpointError):
    """The output folder exists and is not empty."""


# --- making ------------------------------------------------------------------------------------------------------


class QuantizeError(ValueError):
    """Base of what can be wrong with a recipe or with the text a model is observed or judged on."""
