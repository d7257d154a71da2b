"""The taxonomy of actions (Waver §3.4): 12 first-level, 100 second-level and more than 6,000 third-level labels.

The report names these counts and uses the labels to balance the training data; the labels themselves are our own. They
stand in `actions.yaml` beside this file, whose header says how to add one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from waver_core.backends.contracts import ActionLabel
from waver_core.config import digest_of
from waver_core.errors import ConfigError, did_you_mean

DEFAULT_PATH = Path(__file__).resolve().parent / "actions.yaml"
_ARTICLE = re.compile(r"\b(?:a|an|the) ")


@dataclass(frozen=True)
class Taxonomy:
    """Labels by first and second level, in the order of the file; `digest` changes when any label or its place does."""

    tree: dict[str, dict[str, tuple[str, ...]]]
    digest: str
    _paths: dict[str, ActionLabel] = field(repr=False, compare=False)

    def path_of(self, level3: str) -> ActionLabel:
        """The whole path of a third-level label; `ConfigError` names the nearest when there is none."""
        if level3 not in self._paths:
            raise ConfigError(f"no action label '{level3}': {did_you_mean(level3, self._paths)}")
        return self._paths[level3]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of labels at each of the three levels."""
        return len(self.tree), sum(map(len, self.tree.values())), len(self._paths)

    def __iter__(self) -> Iterator[ActionLabel]:
        return iter(self._paths.values())


def load_taxonomy(path: str | Path | None = None) -> Taxonomy:
    """Read and check a taxonomy, the project's own by default; the second call for a file costs nothing."""
    return _load(Path(path or DEFAULT_PATH).resolve())


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # ten times as fast where libyaml is
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' stands twice", node.value[number][0].start_mark)
        return super().construct_mapping(node, deep)


@cache
def _load(path: Path) -> Taxonomy:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the taxonomy {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    tree = {
        level1: {level2: tuple(labels) for level2, labels in classes.items()} for level1, classes in _checked(raw, path).items()
    }
    paths = {
        label: ActionLabel(one, two, label)
        for one, classes in tree.items()
        for two, labels in classes.items()
        for label in labels
    }
    return Taxonomy(tree, digest_of([[one, list(classes.items())] for one, classes in tree.items()]), paths)


def _checked(raw: Any, path: Path) -> Mapping[str, Mapping[str, list[str]]]:
    """The file's content, or a `ConfigError` of one line that names the place."""
    places: dict[str, str] = {}
    classes: dict[str, str] = {}
    for level1, level2, labels in _classes(raw, path):
        if level2 in classes:
            raise ConfigError(
                f"{path.name}: class '{level2}' stands under '{classes[level2]}' and '{level1}'; give it another name"
            )
        classes[level2] = level1
        if not isinstance(labels, list) or not labels:
            raise ConfigError(f"{path.name}: '{level1} / {level2}' must be a list of one label or more")
        for label in labels:
            if not isinstance(label, str) or not label.strip():
                raise ConfigError(
                    f"{path.name}: '{level1} / {level2}' holds {label!r}, which is not a label: only text nests so deep"
                )
            # Articles, hyphens and spaces make no other action: a model's answer is matched without them too.
            plain = re.sub(r"[^a-z0-9]", "", _ARTICLE.sub("", label.strip().lower()))
            if plain in places:
                raise ConfigError(f"{path.name}: '{label}' stands twice, in {places[plain]} and in '{level2}'; remove one")
            places[plain] = f"'{level2}'"
    return raw


def _classes(raw: Any, path: Path) -> Iterator[tuple[str, str, Any]]:
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path.name}: first-level names must stand at the top, each with its second-level classes below")
    for level1, classes in raw.items():
        if not isinstance(level1, str) or not isinstance(classes, dict) or not classes:
            raise ConfigError(f"{path.name}: '{level1}' must hold second-level classes, each with a list of labels")
        for level2, labels in classes.items():
            if not isinstance(level2, str):
                raise ConfigError(f"{path.name}: '{level2}' in '{level1}' is not a name; put it in quotes")
            yield level1, level2, labels
