"""What an app is started with: a configuration file, profiles, overrides, and the two checkpoints."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict

from serving.settings import Settings, load_settings
from waver_core.config import load_config
from waver_core.errors import ConfigError
from waver_core.storage import is_local


class Arguments(BaseModel):
    """What `serve run serving.app:build key=value` and the `args` of a Serve config file may say."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = None
    """Configuration file; pipelines.yaml by default."""
    profile: str = "embedded"
    """Profiles to merge in, in order, separated by commas."""
    set: list[str] = []
    """Overrides such as serving.queue.max_queued=8."""
    base: str | None = None
    """Short for serving.cascade.base."""
    refiner: str | None = None
    """Short for serving.cascade.refiner."""


def settings_of(args: Arguments) -> Settings:
    """`serving:` of the configuration, with absolute paths, for replicas start in other folders."""
    short = {"base": args.base, "refiner": args.refiner}
    overrides = [*args.set, *(f"serving.cascade.{key}={value}" for key, value in short.items() if value)]
    settings = load_settings(load_config(args.config, [p for p in args.profile.split(",") if p], overrides))
    cascade, storage, http = settings.cascade, settings.storage, settings.http
    if not is_local(storage.folder):
        raise ConfigError(f"serving.storage.folder: {storage.folder} is no folder: give a local or mounted one")
    return settings.model_copy(
        update={
            "cascade": cascade.model_copy(update={"base": _absolute(cascade.base), "refiner": _absolute(cascade.refiner)}),
            "storage": storage.model_copy(update={"folder": _absolute(storage.folder)}),
            "http": http.model_copy(update={"api_keys": _absolute(http.api_keys)}),
        }
    )


def _absolute(path: str | None) -> str | None:
    return os.path.abspath(path) if path is not None and is_local(path) else path
