"""bytelane: wNa8o8 language models with true integer arithmetic, bit for bit what the phone computes."""

from bytelane.errors import CheckpointError
from bytelane.layers import QuantEmbedding, QuantLinear
from bytelane.models import load_model
from bytelane.packing import pack_int32, unpack_int32
from bytelane.scheme import EmbeddingScheme, LinearScheme, Numerics, Storage, WeightScheme
from bytelane.shipped import shipped_model

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "EmbeddingScheme",
    "LinearScheme",
    "Numerics",
    "QuantEmbedding",
    "QuantLinear",
    "Storage",
    "WeightScheme",
    "__version__",
    "load_model",
    "pack_int32",
    "shipped_model",
    "unpack_int32",
]
