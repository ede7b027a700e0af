"""mkdocs: the command reference, from the command itself, and FORMAT.md's own links."""

from __future__ import annotations

import re
from typing import Any

import typer

MARK = "<!-- commands -->"


def _command(name: str, command: Any) -> list[str]:
    lines = [f"## {name}", ""]
    text = re.sub(r"\n(?=\S)", "\n", (command.help or "").strip())
    lines += [text, "", "| argument or option | |", "| --- | --- |"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        option = parameter.param_type_name == "option"
        names = ", ".join(f"`{n}`" for n in (*parameter.opts, *parameter.secondary_opts)) if option else ""
        metavar = (parameter.metavar or (parameter.name or "").upper()).strip("[]")
        shown = names if option else f"`{metavar}`"
        about = re.sub(r"\s+", " ", getattr(parameter, "help", None) or "").replace("|", "\\|")
        default = parameter.default
        if option and isinstance(default, str | int | float) and not isinstance(default, bool) and default != "":
            about += f" Default: `{default}`."
        lines.append(f"| {shown} | {about} |")
    return [*lines, ""]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the commands into their page."""
    if MARK not in markdown:
        return markdown
    from bytelane.cli import app

    group: Any = typer.main.get_command(app)
    lines: list[str] = []
    for name, command in sorted(group.commands.items()):
        lines += _command(name, command)
    return markdown.replace(MARK, "\n".join(lines))
