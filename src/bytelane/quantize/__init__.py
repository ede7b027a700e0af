"""Make a wNa8o8 checkpoint from a float model and text.

`Recipe` says what to do, `quantize_checkpoint` (folder to folder) and `quantize_model` (a model in memory) do it, the
`QuantizationReport` says what was done.
"""

from bytelane.quantize.observe import CalibrationError, observe
from bytelane.quantize.pipeline import load_float_model, quantize_checkpoint, quantize_model
from bytelane.quantize.plan import Plan, make_plan
from bytelane.quantize.recipe import Head, Range, Recipe, RecipeError, builtin_recipes, parse_range
from bytelane.quantize.report import LayerReport, QuantizationReport
from bytelane.quantize.rounding import round_to_nearest
from bytelane.quantize.text import TextError, read_documents, read_files, windows

__all__ = [
    "CalibrationError",
    "Head",
    "LayerReport",
    "Plan",
    "QuantizationReport",
    "Range",
    "Recipe",
    "RecipeError",
    "TextError",
    "builtin_recipes",
    "load_float_model",
    "make_plan",
    "observe",
    "parse_range",
    "quantize_checkpoint",
    "quantize_model",
    "read_documents",
    "read_files",
    "round_to_nearest",
    "windows",
]
