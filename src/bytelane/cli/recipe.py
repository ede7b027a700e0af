"""What the commands that make a checkpoint share: their source, the recipe's options, and the recipe they give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bytelane.quantize import Recipe

SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A float model: a folder, a GGUF file, or a hub id.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="A recipe file (JSON), or the name of one that ships; the options below override it."
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="A plan file: bits, granularity and sides of every layer, and the recipe, where no --recipe is given.",
    ),
]
DefaultBitsOption = Annotated[int | None, typer.Option(help="Weight bits where no --bits pattern matches.")]
BitsOption = Annotated[
    list[str] | None, typer.Option(help="PATTERN=N: weight bits by name, first match wins; repeatable.")
]
EmbeddingsOption = Annotated[int | None, typer.Option(help="Bits of embedding tables; float when absent.")]
HeadOption = Annotated[str | None, typer.Option(help="**weights** (weight-only, as Gemma's), **full** or **float**.")]
RotateOption = Annotated[
    bool | None, typer.Option("--rotate/--no-rotate", help="Rotate the residual stream (Llama-like models).")
]
EqualizeOption = Annotated[
    bool | None, typer.Option("--equalize/--no-equalize", help="Even out the channels of activations and weights.")
]
StorageOption = Annotated[str | None, typer.Option(help="**compressed-tensors** or **gemma**.")]
SplitOption = Annotated[
    str, typer.Option(help="For files of `<doc>` elements: **calibration**, **evaluation** or **all**.")
]
WindowOption = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
GgufOption = Annotated[str | None, typer.Option("--gguf", help="The GGUF file in SOURCE that holds the weights.")]
StoredDtypeOption = Annotated[str, typer.Option(help="Of what stays float: float32, bfloat16 or float16.")]


PLANNED = ("default_bits", "bits", "granularity", "ignore", "no_input", "no_output", "embeddings", "head")
"""What a plan says of every layer, so that no option may."""


def chosen_recipe(
    name: str | None,
    given: Mapping[str, Any],
    plan: Path | None = None,
    source: tuple[str, str | None] = ("", None),
) -> Recipe:
    """The named recipe with the options that were given in place of its values.

    Args:
        name: a recipe file or the name of one that ships; None for the plan's own recipe, or the default one.
        given: values by field; those that are None were not given.
        plan: a plan file, which decides the layers.
        source: the float model and the GGUF file in it, that the plan must be of.

    Raises:
        RecipeError: a value that the recipe refuses, named by the file or as the options'.
        PlanError: the plan is none, breaks a rule, or is of another model.
    """
    from bytelane.cli.common import source_folder
    from bytelane.quantize import BitPlan, Recipe

    options = {key: value for key, value in given.items() if value is not None}
    layers = None if plan is None else BitPlan.load(plan)
    clash = [key for key in PLANNED if key in options] if layers is not None else []
    if clash:
        raise typer.BadParameter(
            f"{plan} decides every layer; edit it, or leave it out", param_hint=f"--{clash[0].replace('_', '-')}"
        )
    base = Recipe() if name is None else Recipe.load(name)
    if layers is not None and name is None:
        base = Recipe.of(layers.recipe, str(plan))
    made = Recipe.of({**base.model_dump(mode="json"), **options}, "the recipe" if name is None else name)
    if layers is None:
        return made
    layers.check_source(source_folder(source[0]), source[1], str(plan))
    return layers.to_recipe(made)
