"""The options that choose a recipe, for the entry scripts of training; what all planes share is in `waver_core.command_line`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from training.recipe import Recipe, load_recipe
from waver_core.config import Config, load_config

DEFAULT_PROFILES = ("embedded",)
"""What stands beside the file's own settings where no profile is named: no weights, no GPU."""

Stage = Annotated[str, typer.Option("--stage", help="Training stage, a name under training.stages in pipelines.yaml.")]
Profiles = Annotated[
    list[str] | None, typer.Option("--profile", help="Profile to merge in (default: embedded); repeat for several, in order.")
]


def settings_of(config: str | None, profiles: Sequence[str] | None, sets: Sequence[str] | None) -> Config:
    """The configuration that the shared options choose; raises `ConfigError` as `load_config` does."""
    return load_config(config, list(profiles or DEFAULT_PROFILES), list(sets or ()))


def recipe_of(stage: str, config: str | None, profiles: Sequence[str] | None, sets: Sequence[str] | None) -> Recipe:
    """The recipe of a stage under the shared options; raises `ConfigError` as `load_recipe` does."""
    return load_recipe(settings_of(config, profiles, sets), stage)
