"""Make a wNa8o8 checkpoint from a float model and text.

`Recipe` says what to do, `quantize_checkpoint` (folder to folder) and `quantize_model` (a model in memory) do it, the
`QuantizationReport` says what was done. `plan_bits` chooses widths under a budget; a `BitPlan` says which.
"""

from bytelane.quantize.bit_plan import BitPlan, PlanError, PlannedLayer, is_plan
from bytelane.quantize.choose import Budget, parse_size, plan_bits, plan_checkpoint
from bytelane.quantize.fold import FoldError, equalize, rotate
from bytelane.quantize.gptq import Hessian, gptq
from bytelane.quantize.knapsack import BudgetError
from bytelane.quantize.kv import observe_kv
from bytelane.quantize.layerwise import SequentialError
from bytelane.quantize.learn import LearningError, learn_scales
from bytelane.quantize.observe import CalibrationError, observe
from bytelane.quantize.pipeline import load_float_model, quantize_checkpoint, quantize_model
from bytelane.quantize.plan import Plan, make_plan
from bytelane.quantize.recipe import Head, Range, Recipe, RecipeError, builtin_recipes, parse_range
from bytelane.quantize.report import LayerReport, QuantizationReport
from bytelane.quantize.resume import ResumeError
from bytelane.quantize.rounding import round_to_nearest
from bytelane.quantize.search import search_ranges
from bytelane.quantize.sensitivity import SensitivityError
from bytelane.quantize.sequential import quantize_sequentially
from bytelane.quantize.text import TextError, read_documents, read_files, windows

__all__ = [
    "BitPlan",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "FoldError",
    "Head",
    "Hessian",
    "LayerReport",
    "LearningError",
    "Plan",
    "PlanError",
    "PlannedLayer",
    "QuantizationReport",
    "Range",
    "Recipe",
    "RecipeError",
    "ResumeError",
    "SensitivityError",
    "SequentialError",
    "TextError",
    "builtin_recipes",
    "equalize",
    "gptq",
    "is_plan",
    "learn_scales",
    "load_float_model",
    "make_plan",
    "observe",
    "observe_kv",
    "parse_range",
    "parse_size",
    "plan_bits",
    "plan_checkpoint",
    "quantize_checkpoint",
    "quantize_model",
    "quantize_sequentially",
    "read_documents",
    "read_files",
    "rotate",
    "round_to_nearest",
    "search_ranges",
    "windows",
]
