"""Read, validate, write and convert checkpoints of both storages.

`open_checkpoint` -> `Checkpoint`, `write_checkpoint`, `convert_checkpoint`; FORMAT.md specifies the formats.
"""

from bytelane.checkpoint.convert import convert_checkpoint
from bytelane.checkpoint.reader import Checkpoint, open_checkpoint
from bytelane.checkpoint.types import (
    ConversionReport,
    KVScales,
    ModuleScales,
    QuantizedModule,
    QuantizedTensors,
    TensorInfo,
)
from bytelane.checkpoint.writer import write_checkpoint

__all__ = [
    "Checkpoint",
    "ConversionReport",
    "KVScales",
    "ModuleScales",
    "QuantizedModule",
    "QuantizedTensors",
    "TensorInfo",
    "convert_checkpoint",
    "open_checkpoint",
    "write_checkpoint",
]
