"""What the commands that make a checkpoint share: their source, the recipe's options, and the recipe they give."""

from __future__ import annotations

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


def chosen_recipe(name: str | None, given: Mapping[str, Any]) -> Recipe:
    """The named recipe with the options that were given in place of its values.

    Raises:
        RecipeError: a value that the recipe refuses, named by the file or as the options'.
    """
    from bytelane.quantize import Recipe

    values: dict[str, Any] = {} if name is None else Recipe.load(name).model_dump(mode="json")
    values.update({key: value for key, value in given.items() if value is not None})
    return Recipe.of(values, "the recipe" if name is None else name)
