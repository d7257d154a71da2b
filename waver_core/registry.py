"""Capability -> implementation. Backends register themselves; the folders are scanned at the first look-up.

A new backend is one new file in `backends/embedded/` or `backends/pretrained/` with `@register(capability, name)` on its
class, and a line in pipelines.yaml. Heavy packages are imported inside the class, so scanning costs nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from waver_core.errors import ConfigError, did_you_mean

_BACKENDS: dict[tuple[str, str], type] = {}
_FOLDERS = ("waver_core.backends.embedded", "waver_core.backends.pretrained")
T = TypeVar("T", bound=type)


def register(capability: str, name: str) -> Callable[[T], T]:
    """Class decorator: make a backend known under `capability` and `name`."""

    def add(cls: T) -> T:
        known = _BACKENDS.setdefault((capability, name), cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"two backends are called {capability}/{name}: {known.__module__} and {cls.__module__}")
        return cls

    return add


def backend_class(capability: str, name: str) -> type:
    """The class registered for a capability; raises `ConfigError` with the nearest name when there is none."""
    _scan()
    if (capability, name) not in _BACKENDS:
        names = [n for c, n in _BACKENDS if c == capability]
        raise ConfigError(f"no backend '{name}' for {capability}: {did_you_mean(name, names)}")
    return _BACKENDS[capability, name]


def create(capability: str, name: str, **options: Any) -> Any:
    """Build a backend; what its constructor refuses becomes a `ConfigError` that names it."""
    try:
        return backend_class(capability, name)(**options)
    except TypeError as error:
        raise ConfigError(f"backend {capability}/{name}: {error}") from error


def backends(capability: str) -> list[str]:
    """Names registered for a capability, sorted."""
    _scan()
    return sorted(n for c, n in _BACKENDS if c == capability)


@cache
def _scan() -> None:
    for folder in _FOLDERS:
        try:
            package = importlib.import_module(folder)
        except ModuleNotFoundError as error:
            if error.name != folder:
                raise
            continue
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{folder}.{module.name}")
