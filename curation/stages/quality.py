"""Quality (Waver §3.2): the probability of each of thirteen issues, and that of high quality.

The first decode adds what only the full frame rate shows (`waver_core.tempo`), so the judge may look at six frames a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import stage
from curation.stage import BackendUse, ClipMedia, FrameRequest, Row, SourceFacts, StreamFrame
from waver_core.backends.contracts import ISSUES, ClipView, Quality, QualityJudge
from waver_core.config import Strict
from waver_core.manifest import Column
from waver_core.registry import backend_class
from waver_core.tempo import COLUMNS, PREFIX, SIGNALS_VERSION, SignalTracker, describe_signals, luma_rows

_DOCS = {
    "low_visual_quality": "noise",
    "black_border": "black bars",
    "text_overlay": "titles, subtitles, slides",
    "watermark": "a watermark or logo",
    "slow_motion": "slowed down by repeated or blended frames",
    "fast_motion": "too fast, or sped up",
    "perspective_change": "a jump of the viewpoint",
    "unstable_motion": "shake or stutter",
    "subject_cutoff": "a subject cut by the edge of the picture",
    "overexposed": "light lost",
    "dark_or_blurry": "too dark, or blurred",
    "image_animation": "a still that only the camera moves over",
    "color_imbalance": "a colour cast",
}
_EIGHT_BIT_LUMA = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray")


class Options(Strict):
    """Which judge, on which frames: by default those that motion uses as well."""

    backend: str = "issue_detectors"
    backend_options: dict[str, Any] = {}
    short_side_px: int = Field(192, ge=64)
    fps: float = Field(6.0, gt=0)


class Stage(stage.Stage):
    """Asks the judge about every clip."""

    name = "quality"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("stream", "clip")
    columns = (
        *(Column(f"{PREFIX}{name}", pa.float64(), doc, unit) for name, (doc, unit) in COLUMNS.items()),
        *(Column(f"quality_{name}", pa.float64(), f"probability of {_DOCS[name]}", score=True) for name in ISSUES),
        Column("quality_high", pa.float64(), "probability of high quality", score=True),
    )

    def backends(self) -> list[BackendUse]:
        """The judge."""
        return [BackendUse("quality_judge", self.options.backend, self.options.backend_options)]

    @cached_property
    def _judge(self) -> QualityJudge:
        judge: QualityJudge = self.backends()[0].create()
        return judge

    @property
    def uses(self) -> tuple[str, ...]:
        """Columns of earlier stages that the judge looks at."""
        return tuple(getattr(backend_class("quality_judge", self.options.backend), "uses", ()))

    def stream_fingerprint(self) -> dict[str, Any]:
        """The signals of the first decode are the same whatever judge is asked."""
        return {"signals": SIGNALS_VERSION, "columns": list(COLUMNS)}

    def requests(self) -> tuple[FrameRequest, ...]:
        """Frames at the judge's rate and size."""
        return (FrameRequest(self.options.short_side_px, fps=self.options.fps),)

    def watch(self, source: SourceFacts) -> TempoWatcher:
        """A watcher that compares every frame with those before it."""
        return TempoWatcher(source)

    def score_many(self, media: Sequence[ClipMedia]) -> list[Row | Exception]:
        """The judge's probabilities, or what it gives in their place, for every clip."""
        request = self.requests()[0]
        views = [ClipView(m.frames[request].rgb, m.frames[request].times_s, m.row) for m in media]
        return [found if isinstance(found, Exception) else _columns(found) for found in self._judge.judge(views)]


def _columns(found: Quality) -> Row:
    return {**{f"quality_{name}": found.issues[name] for name in ISSUES}, "quality_high": found.high_quality}


class TempoWatcher:
    """Signals of every frame of a source; a clip's columns come from its own frames."""

    def __init__(self, source: SourceFacts) -> None:
        self._video = source.kind == "video"
        self._declared_fps = source.info.fps or 25.0
        self._times_s: list[float] = []
        self._tracker = SignalTracker()

    def add(self, frame: StreamFrame) -> None:
        """Note time and signals."""
        if self._video:
            self._times_s.append(frame.time_s)
            self._tracker.add(frame.small, _luma_rows(frame))

    def describe(self, clips: Sequence[Row]) -> list[Row]:
        """Every clip's columns; nulls for a still image."""
        return [self._describe(clip["start_frame"], clip["end_frame"]) if self._video else {} for clip in clips]

    def _describe(self, start: int, end: int) -> Row:
        steps_s = np.diff(self._times_s[start:end])
        fps = 1 / float(np.median(steps_s)) if len(steps_s) and np.median(steps_s) > 0 else self._declared_fps
        return {f"{PREFIX}{k}": v for k, v in describe_signals(self._tracker.signals(start, end), fps).items()}


def _luma_rows(frame: StreamFrame) -> np.ndarray | None:
    """Rows of the full-size luma straight from libav's plane; None where the pixel format keeps no 8-bit luma."""
    picture = frame.picture
    if picture is None or picture.format.name not in _EIGHT_BIT_LUMA:
        return None
    plane = picture.planes[0]
    return luma_rows(np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width])
