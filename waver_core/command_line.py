"""What the entry scripts share: the options that choose a configuration, the console, and errors of one line."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from waver_core.errors import UserError

ConfigPath = Annotated[str | None, typer.Option("--config", help="Configuration file (default: pipelines.yaml).")]
Profiles = Annotated[list[str] | None, typer.Option("--profile", help="Profile to merge in; repeat for several, in order.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override one setting; repeat for several.")]


def new_console(width: int = 150) -> Console:
    """The terminal, or a log wide enough for the tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else width)


def run(app: typer.Typer) -> None:
    """Run a command line; a `UserError` becomes one line and its exit code."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
