"""pipelines.yaml -> one validated configuration: profiles merge in order, then `--set a.b=c`; unknown keys are errors.

`Config` knows the shape of the file. What a funnel stage's own options may be is declared by the stage's file and checked
when the stages are built (`curation.stage.load_stages`), so that a new stage touches one file and pipelines.yaml.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from waver_core.errors import ConfigError, did_you_mean

DEFAULT_PATH = Path(__file__).resolve().parent.parent / "pipelines.yaml"


class Strict(BaseModel):
    """Base of every configuration object: no unknown keys, no changes once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Llm(Strict):
    """A model served inside the run by `ray.data.llm` with vLLM."""

    model: str
    """Name or folder of the checkpoint, as vLLM takes it."""
    engine: dict[str, Any] = {}
    """Arguments of the vLLM engine: tensor_parallel_size, max_model_len, ..."""
    replicas: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    accelerator: str | None = None
    """Kind of GPU the replicas want, as Ray names it."""


class Pass(Strict):
    """Resources of one pass over the sources: what a Ray Data actor of it reserves, and how many there may be."""

    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)
    memory_gb: float | None = Field(None, gt=0)
    min_actors: int = Field(1, ge=1)
    max_actors: int = Field(8, ge=1)
    sources_per_task: int = Field(1, ge=1)
    """Sources in one unit of work; results become durable unit by unit."""
    clips_per_batch: int = Field(1, ge=1)
    """Clips whose frames are held at once, so that a model on a GPU sees them together; about 15 MB each."""
    llm: Llm | None = None
    """Answers come from `ray.data.llm` (vLLM), in a pool of its own; the actors of this pass only prepare and parse."""

    @model_validator(mode="after")
    def _range(self) -> Pass:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} is above max_actors {self.max_actors}")
        return self


class FailureBudget(Strict):
    """A run stops when a pass has failed on more than `max_share` of at least `min_items` items."""

    max_share: float = Field(0.5, ge=0, le=1)
    min_items: int = Field(20, ge=1)


class Gate(Strict):
    """One condition on one column. Null never passes. `kind` limits it to videos or images, `only` to rows in which other
    columns have certain values (of text)."""

    column: str
    min: float | None = None
    max: float | None = None
    equals: str | bool | tuple[str, ...] | None = None
    """The value, or a list of texts any of which will do."""
    present: Literal[True] | None = None
    """Any value will do, but there must be one."""
    kind: Literal["video", "image"] | None = None
    only: dict[str, str] | None = None

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def condition(self) -> dict[str, str]:
        """Column -> value of the rows that the gate is for."""
        return {**({"kind": self.kind} if self.kind else {}), **(self.only or {})}

    @model_validator(mode="after")
    def _one_condition(self) -> Gate:
        if self.min is None and self.max is None and self.equals is None and self.present is None:
            raise ValueError("a gate needs min, max, equals or present")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}: nothing can pass")
        return self

    @property
    def rule(self) -> str:
        """The condition in words, for reports."""
        low = f"{self.column} >= {self.min:g}" if self.min is not None else ""
        high = f"{self.column} <= {self.max:g}" if self.max is not None else ""
        same = ""
        if self.equals is not None:
            words = " or ".join(self.equals) if isinstance(self.equals, tuple) else str(self.equals).lower()
            same = f"{self.column} = {words}"
        there = f"{self.column} is there" if self.present else ""
        rule = " and ".join(part for part in (low, high, same, there) if part)
        return rule + "".join(f", where {k} = {v}" for k, v in (self.only or {}).items())


class Funnel(Strict):
    """The declared funnel: the order of the stages, their options, and how it is executed."""

    order: list[str]
    stages: dict[str, dict[str, Any]] = {}
    passes: dict[str, Pass] = {}
    """Resources of `shots` (the first decode) and `scores` (the second, for all stages that score clips), and of every stage
    that is to run in a pass of its own: named here, a stage gets its own actors, and its own decode of the clips left."""
    failure_budget: FailureBudget = FailureBudget()
    decode_threads: int = Field(1, ge=0)
    """Threads of one decoder; 0 lets libav choose. One per actor is the most work done per core."""
    score_reference_frames_only: bool = True
    """Second decode: leave out frames that no other frame refers to, where the rest still come every 0.2 s or closer."""
    max_attempts: int = Field(3, ge=1)
    """Times a worker may die on one source within a run before that source is quarantined."""

    @model_validator(mode="after")
    def _stages_are_ordered(self) -> Funnel:
        for name in self.stages:
            if name not in self.order:
                raise ValueError(f"stage '{name}' has options but is not in funnel.order: {did_you_mean(name, self.order)}")
        for name in self.passes:
            if name not in ("shots", "scores", *self.order):
                near = did_you_mean(name, ["shots", "scores", *self.order])
                raise ValueError(f"passes.{name}: neither shots nor scores nor a stage of funnel.order: {near}")
        if len(set(self.order)) < len(self.order):
            raise ValueError("a stage stands twice in funnel.order")
        return self

    def resources(self, name: str) -> Pass:
        """What the actors of a pass reserve."""
        return self.passes.get(name) or Pass()


class QualityTag(Gate):
    """Words that are put after the training caption of every clip that meets the condition (Waver §4.5)."""

    words: str
    negative: bool = False
    """Whether serving names these words in the negative prompt."""


class Tags(Strict):
    """Prompt tagging (Waver §4.5): style before the caption, quality after it."""

    style: dict[str, str] = {}
    """A clip's style -> the words put before its caption; a style that is not named here gets none."""
    quality: dict[str, QualityTag] = {}
    negative: list[str] = []
    """Further words for the negative prompt."""

    def negative_words(self) -> list[str]:
        """What serving puts into the negative prompt, in order and without repeats."""
        return list(dict.fromkeys([*(t.words for t in self.quality.values() if t.negative), *self.negative]))


class Config(Strict):
    """The whole of pipelines.yaml after profiles and overrides."""

    version: Literal[1]
    funnel: Funnel
    tiers: dict[str, dict[str, Gate]]
    """Tier -> gate name -> gate, inheritance resolved."""
    tier_parents: dict[str, str | None] = {}
    tags: Tags = Tags()
    training: dict[str, Any] = {}
    serving: dict[str, Any] = {}
    profiles: list[str] = []

    def resolved_yaml(self) -> str:
        """The configuration as it was used, with its digest as a comment at the head."""
        raw = self.model_dump(mode="json", exclude_none=True, exclude={"profiles", "tier_parents"})
        for name, parent in self.tier_parents.items():
            if parent is not None:  # written as declared, so that the file can be loaded and overridden again
                own = {k: v for k, v in raw["tiers"][name].items() if self.tiers[name][k] != self.tiers[parent].get(k)}
                raw["tiers"][name] = {"from": parent, **own}
        text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
        profiles = ", ".join(self.profiles) or "none"
        return f"# OpenWaver configuration as resolved for this output; digest {self.digest}; profiles: {profiles}\n{text}"

    @property
    def digest(self) -> str:
        """Twelve hex digits that change when any setting does."""
        return digest_of(self.model_dump(mode="json", exclude={"profiles"}))


def digest_of(value: Any) -> str:
    """Twelve hex digits of a JSON-able value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def load_config(path: str | Path | None = None, profiles: Sequence[str] = (), overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, merge the named profiles in order, apply `a.b=c` overrides and validate.

    Raises `ConfigError` with one line that names the key and the nearest valid one.
    """
    path = Path(path) if path else DEFAULT_PATH
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file at {path}; give one with --config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a configuration file: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys {', '.join(Config.model_fields)}")
    known = raw.pop("profiles", None) or {}
    for name in profiles:
        if name not in known:
            raise ConfigError(f"no profile '{name}' in {path.name}: {did_you_mean(name, known)}")
        raw = merge(raw, known[name] or {})
    for override in overrides:
        apply_override(raw, override)
    raw = copy.deepcopy(raw)
    tiers, parents = _inherit(raw.get("tiers") or {})
    return validate(Config, {**raw, "tiers": tiers, "tier_parents": parents, "profiles": list(profiles)})


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, mapping by mapping; lists and scalars are replaced."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` in place; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set takes a.b=value, not '{override}'")
    *parents, last = key.strip().split(".")
    here: Any = raw
    for depth, part in enumerate(parents):
        if not isinstance(here.get(part, {}), dict):
            raise ConfigError(f"--set {key}: '{'.'.join(parents[: depth + 1])}' is a value, not a mapping")
        if depth <= 1 and part not in here:
            raise ConfigError(f"--set {key}: no key '{'.'.join(parents[: depth + 1])}': {did_you_mean(part, here)}")
        if not isinstance(here.get(part), dict):
            here[part] = {}
        here = here[part]
    try:
        here[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: '{text}' is no valid YAML value") from error


def _inherit(tiers: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Resolve `from:`. A tier starts with its parent's gates and may add to them or tighten them by name.

    Of two thresholds the stricter holds, for tiers only ever get stricter (Waver §3.5): raising one of a parent raises
    the floor of every tier below it.
    """
    if not isinstance(tiers, dict):
        raise ConfigError(f"tiers must map tier names to gates (got {tiers!r})")
    done: dict[str, Any] = {}
    parents: dict[str, str | None] = {}
    for name, gates in tiers.items():
        if not isinstance(gates, dict | None):
            raise ConfigError(f"tiers.{name} must map gate names to gates")
        gates = dict(gates or {})
        parent = gates.pop("from", None)
        if parent is not None and str(parent) not in done:
            raise ConfigError(f"tiers.{name}.from: no earlier tier '{parent}': {did_you_mean(str(parent), done)}")
        for gate, value in gates.items():
            if not isinstance(value, dict):
                raise ConfigError(
                    f"tiers.{name}.{gate}: a gate is a mapping with a column and min, max or equals (got {value!r})"
                )
            inherited = done[parent] if parent is not None else {}
            if "column" not in value and gate not in inherited:
                near = did_you_mean(gate, {*inherited, *gates} - {gate})
                raise ConfigError(f"tiers.{name}.{gate}: a new gate needs a column; {near}")
        merged = merge(done[parent], gates) if parent is not None else gates
        for gate, base in (done[parent] if parent is not None else {}).items():
            over = merged[gate]
            if isinstance(over, dict) and over.get("column") == base.get("column"):
                merged[gate] = {**over, **_stricter(base, over)}
        done[name] = merged
        parents[name] = parent
    return done, parents


def _stricter(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The higher min and the lower max of two gates, for those that have numbers there."""
    out = {}
    for key, pick in (("min", max), ("max", min)):
        values = [g[key] for g in (base, over) if isinstance(g.get(key), int | float)]
        if values:
            out[key] = pick(values)
    return out


def validate(model: type[Any], raw: Any, where: str = "") -> Any:
    """Build a strict model; a validation error becomes a `ConfigError` of one line per mistake."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(model, e, where) for e in error.errors()]
        raise ConfigError("; ".join(dict.fromkeys(lines))) from error


def _explain(model: type[Any], error: Any, where: str) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join([where, *path] if where else path)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key, {did_you_mean(path[-1], _fields_at(model, path[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    shown = f" (got {error['input']!r})" if not isinstance(error["input"], dict | BaseModel) else ""
    return f"{key or 'configuration'}: {message[0].lower()}{message[1:]}{shown}"


def _fields_at(model: type[Any], path: list[str]) -> list[str]:
    """Names of the fields of the model that `path` leads to, for did-you-mean."""
    here: Any = model
    for part in path:
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[part].annotation if part in here.model_fields else None
        else:
            here = (getattr(here, "__args__", None) or [None])[-1]
    while here is not None and not (isinstance(here, type) and issubclass(here, BaseModel)):
        here = (getattr(here, "__args__", None) or [None])[-1]
    return list(here.model_fields) if here is not None else []
