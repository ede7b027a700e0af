"""The model that comes with bytelane, so that everything can be tried without a download.

A Gemma 4 of a few million parameters with the mobile scheme in all its parts: 2-, 4- and 8-bit weights, per-layer
embeddings, sliding and full attention, keys and values shared between layers and kept in int8. It tells short stories
in simple English and answers small questions. `MODEL_CARD.md` in its folder is its card, `examples/small` is how
it was made.

Wherever a checkpoint's folder or hub id is expected, `bytelane:small` names it.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED_NAME = "bytelane:small"


def shipped_model() -> Path:
    """The folder of the model that comes with bytelane: a checkpoint in Gemma mobile storage, with its tokenizer.

    Examples:
        >>> import bytelane
        >>> model = bytelane.load_model(bytelane.shipped_model())  # the same as load_model("bytelane:small")
    """
    return Path(__file__).parent / "data" / "small"
