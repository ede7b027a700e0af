"""The `bytelane` command."""

from bytelane.cli.app import app, main

__all__ = ["app", "main"]
