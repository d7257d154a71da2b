"""The prompts that models are asked with: one text file each, named `<name>.v<version>.txt`, and part of fingerprints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from string import Template
from typing import NamedTuple

from waver_core.config import digest_of
from waver_core.errors import ConfigError, did_you_mean

_FOLDER = Path(__file__).parent


class Prompt(NamedTuple):
    """A prompt's file name without suffix, its text, and a digest that changes with every letter of it."""

    name: str
    text: str
    digest: str

    def fill(self, **values: str) -> str:
        """The text with `$name` placeholders filled in; a missing value is an error (KeyError)."""
        return Template(self.text).substitute(**values)


@cache
def load_prompt(name: str) -> Prompt:
    """The prompt `name`, for example `quality_judge.v1`, or a path of a text file of one's own.

    Raises `ConfigError` with the nearest names where there is none.
    """
    path = _FOLDER / f"{name}.txt"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise ConfigError(f"no prompt '{name}': {did_you_mean(name, [p.stem for p in _FOLDER.glob('*.txt')])}")
    text = path.read_text(encoding="utf-8")
    return Prompt(path.stem, text, digest_of(text))
