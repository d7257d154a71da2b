"""What a funnel stage is: options, declared columns, and one or more of these hooks that the passes call.

- `stream`, `Stage.watch`: sees every frame of a source in the first decode, then describes the clips found (cheap, per frame);
- `table`, `Stage.resolve`: looks over all clips at once, pixels no longer at hand (duplicates);
- `clip`, `Stage.score` or `score_many`: scores clips from frames that the second decode sampled for every stage together;
- `text`, `Stage.annotate`: adds columns to rows by their text (the caption), after everything that needs pixels.
A new stage is one file in `curation/stages/` with a class named `Stage`, and its place in pipelines.yaml.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import av
import numpy as np
import pyarrow as pa

import curation.stages
from waver_core.config import Config, Strict, validate
from waver_core.errors import ConfigError, did_you_mean
from waver_core.isolation import one_by_one
from waver_core.manifest import Column, build_schema
from waver_core.registry import create
from waver_core.video import VideoInfo

Row = dict[str, Any]


@dataclass(frozen=True)
class FrameRequest:
    """Frames that a stage wants of every clip: at a rate, or a number of them evenly spread; sampled once for all stages."""

    short_side_px: int
    fps: float | None = None
    count: int | None = None

    def times_s(self, start_s: float, end_s: float) -> list[float]:
        """The times, from the clip's start, whose nearest frames are taken."""
        duration_s = max(0.0, end_s - start_s)
        if self.count is not None:
            return [start_s + (k + 0.5) * duration_s / self.count for k in range(self.count)]
        assert self.fps is not None
        return [start_s + k / self.fps for k in range(max(1, int(np.ceil(duration_s * self.fps - 1e-6))))]


class Frames(NamedTuple):
    """Sampled frames: uint8 [T, H, W, 3] RGB, upright, and their times in seconds [T]."""

    rgb: np.ndarray
    times_s: np.ndarray


@dataclass
class ClipMedia:
    """One clip while its pixels are at hand: the row so far and the frames of every request."""

    row: Row
    frames: dict[FrameRequest, Frames]


@dataclass(frozen=True, slots=True)
class StreamFrame:
    """One frame of the first decode: index, time, a small RGB picture [h, w, 3], and libav's own for a closer look."""

    index: int
    time_s: float
    small: np.ndarray
    picture: av.VideoFrame | None
    full: np.ndarray | None
    damaged: bool


class Watcher(Protocol):
    """Sees the frames of one source in order, then says what it knows of each clip."""

    def add(self, frame: StreamFrame) -> None:
        """Take in one frame; pictures must not be kept."""

    def describe(self, clips: Sequence[Row]) -> list[Row]:
        """Columns for every clip, in the order given."""


class SourceFacts(NamedTuple):
    """What is known of a source when its first decode begins."""

    info: VideoInfo
    kind: str
    turns: int


class BackendUse(NamedTuple):
    """A backend as a stage's options name it."""

    capability: str
    name: str
    options: dict[str, Any]

    def create(self) -> Any:
        """Build it; cheap, for weights are loaded at the first use."""
        return create(self.capability, self.name, **self.options)


class Stage:
    """Base of all stages. Cheap to build; heavy set-up belongs in the first use, inside the worker."""

    name: ClassVar[str]
    Options: ClassVar[type[Strict]] = Strict
    columns: ClassVar[tuple[Column, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    """Columns of earlier stages that it cannot do without."""
    hooks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def uses(self) -> tuple[str, ...]:
        """Columns of earlier stages that it looks at where they are there; it does without them."""
        return ()

    def fingerprint(self) -> dict[str, Any]:
        """What this stage's columns depend on, other than the columns' inputs: options and versions of backends."""
        return {
            "options": self.options.model_dump(mode="json"),
            "columns": [c.name for c in self.columns],
            "backends": self.backend_fingerprints(),
        }

    def stream_fingerprint(self) -> dict[str, Any]:
        """What the columns of hook `stream` depend on; less than all where a stage also scores clips."""
        return self.fingerprint()

    def backend_fingerprints(self) -> dict[str, str]:
        """Capability -> name, version and whatever else changes its numbers; written beside the scores."""
        return {use.capability: str(use.create().fingerprint) for use in self.backends()}

    def watch(self, source: SourceFacts) -> Watcher:
        """Hook `stream`: a watcher for one source."""
        raise TypeError(f"stage {self.name} watches no streams")

    def requests(self) -> tuple[FrameRequest, ...]:
        """Hook `clip`: the frames it wants."""
        return ()

    def score(self, media: ClipMedia) -> Row:
        """Hook `clip`: its columns for one clip. What it raises becomes the row's `<stage>_error`."""
        if type(self).score_many is Stage.score_many:
            raise TypeError(f"stage {self.name} scores no clips")
        found = self.score_many([media])[0]
        if isinstance(found, Exception):
            raise found
        return found

    def score_many(self, media: Sequence[ClipMedia]) -> list[Row | Exception]:
        """Hook `clip` for models that want a batch: columns, or what went wrong, for every clip in the order given.

        A stage has this or `score`; each is made of the other where it is missing.
        """
        return one_by_one(self.score, media)

    def annotate(self, rows: Sequence[Row]) -> list[Row | Exception]:
        """Hook `text`: columns, or what went wrong, for every row (clip_id and what the stage `reads`) in the order given."""
        raise TypeError(f"stage {self.name} annotates no texts")

    @property
    def language_model(self) -> Any:
        """The backend whose questions a pass with `llm` answers, if its option `engine` is vllm; None where none is asked."""
        return None

    def check_tiers(self, tiers: Sequence[str]) -> None:
        """Raises `ConfigError` when its options name a tier that there is not."""

    def backends(self) -> list[BackendUse]:
        """The backends that its options ask for."""
        return []

    def resolve(self, clips: pa.Table, eligible: np.ndarray) -> dict[str, pa.Array]:
        """Hook `table`: its columns over all clips; `eligible` [N] marks rows that no gate has rejected so far."""
        raise TypeError(f"stage {self.name} resolves no tables")


@dataclass(frozen=True)
class StageSet:
    """The configured stages in order, and the clip table they make."""

    stages: tuple[Stage, ...]
    schema: pa.Schema

    def with_hook(self, hook: str) -> list[Stage]:
        """Stages that have a hook, in order."""
        return [s for s in self.stages if hook in s.hooks]

    def named(self, name: str) -> Any:
        """The stage of that name; raises `ConfigError` if the funnel lacks it."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"funnel.order lacks the stage '{name}', which every run needs")

    def order_of(self, column: str) -> int:
        """Position of the stage that writes a column; -1 for unknown columns."""
        index = self.schema.get_field_index(column)
        if index < 0:
            return -1
        owner = (self.schema.field(index).metadata or {}).get(b"owner", b"ingest").decode()
        return next((i for i, s in enumerate(self.stages) if s.name == owner), 0)


def error_column(stage: str) -> Column:
    """The text column that says why a stage has no scores for a clip."""
    return Column(f"{stage}_error", pa.string(), f"why {stage} failed on this clip; null when it did not")


def load_stages(config: Config) -> StageSet:
    """Find the stages of `funnel.order` in `curation/stages/`, check their options and join their columns to a schema."""
    found = {m.name: m.name for m in pkgutil.iter_modules(curation.stages.__path__)}
    stages: list[Stage] = []
    for name in config.funnel.order:
        if name not in found:
            raise ConfigError(f"funnel.order: no stage '{name}' in curation/stages: {did_you_mean(name, found)}")
        cls = importlib.import_module(f"curation.stages.{name}").Stage
        options = validate(cls.Options, config.funnel.stages.get(name) or {}, where=f"funnel.stages.{name}")
        stages.append(cls(options))
    owned = {s.name: [*s.columns, *([error_column(s.name)] if {"clip", "text"} & set(s.hooks) else [])] for s in stages}
    schema = build_schema(owned)
    written: set[str] = set(build_schema({}).names)
    for stage in stages:
        for column in stage.reads:
            if column not in written and column not in {c.name for c in stage.columns}:
                raise ConfigError(f"stage '{stage.name}' reads '{column}', which no earlier stage of funnel.order writes")
        written |= {c.name for c in stage.columns}
    return StageSet(tuple(stages), schema)
