"""What the entry scripts of training share: the options that choose a recipe, the console, and errors of one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from training.recipe import Recipe, load_recipe
from waver_core.config import Config, load_config
from waver_core.errors import UserError

DEFAULT_PROFILES = ("embedded",)
"""What stands beside the file's own settings where no profile is named: no weights, no GPU."""

Stage = Annotated[str, typer.Option("--stage", help="Training stage, a name under training.stages in pipelines.yaml.")]
ConfigPath = Annotated[str | None, typer.Option("--config", help="Configuration file (default: pipelines.yaml).")]
Profiles = Annotated[
    list[str] | None, typer.Option("--profile", help="Profile to merge in (default: embedded); repeat for several, in order.")
]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override one setting; repeat for several.")]


def settings_of(config: str | None, profiles: Sequence[str] | None, sets: Sequence[str] | None) -> Config:
    """The configuration that the shared options choose; raises `ConfigError` as `load_config` does."""
    return load_config(config, list(profiles or DEFAULT_PROFILES), list(sets or ()))


def recipe_of(stage: str, config: str | None, profiles: Sequence[str] | None, sets: Sequence[str] | None) -> Recipe:
    """The recipe of a stage under the shared options; raises `ConfigError` as `load_recipe` does."""
    return load_recipe(settings_of(config, profiles, sets), stage)


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
