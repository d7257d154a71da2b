"""Overlay (Waver §3.1): how much text lies in the picture, whether it is burned in, and whether there is a watermark."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import stage
from curation.stage import BackendUse, ClipMedia, FrameRequest, Row, SourceFacts, StreamFrame
from waver_core.backends.contracts import TextBox, TextDetector, WatermarkScorer
from waver_core.config import Strict
from waver_core.manifest import Column
from waver_core.video import resize


class Options(Strict):
    """Which detectors, on how many frames."""

    text_backend: str | None = "rapidocr"
    """None leaves text undetected (its columns null), which no tier's text gate passes."""
    text_backend_options: dict[str, Any] = {}
    watermark_backend: str = "static_overlay"
    watermark_backend_options: dict[str, Any] = {}
    frames: int = Field(3, ge=2)
    short_side_px: int = Field(360, ge=64)
    watermark_fps: float = Field(6.0, gt=0)
    watermark_frames: int = Field(32, ge=8)
    """Frames of a clip that are compared at most, where its source has too few shots to tell."""
    watermark_short_side_px: int = Field(192, ge=64)
    source_samples_per_s: float = Field(2.0, gt=0)
    max_source_samples: int = Field(96, ge=8)
    same_frame_levels: float = Field(1.5, ge=0)
    """Frames that differ less from the one before (mean luma levels) are not searched for text again."""


class Stage(stage.Stage):
    """Text boxes on a few frames; still edges over the clip and, from the first decode, over the whole source."""

    name = "overlay"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("stream", "clip")
    columns = (
        Column("overlay_source_watermark", pa.float64(), "probability that something stays still over all shots", score=True),
        Column("overlay_text_area_ratio", pa.float64(), "share of the picture inside text boxes, mean over frames", score=True),
        Column("overlay_text_boxes", pa.float64(), "number of text boxes, mean over frames", score=True),
        Column("overlay_burned_in_area_ratio", pa.float64(), "share inside boxes that keep their place over time", score=True),
        Column(
            "overlay_text_kind", pa.string(), "none, scene (moves with the picture) or burned_in (keeps its place)", score=True
        ),
        Column(
            "overlay_watermark",
            pa.float64(),
            "probability of a watermark, from the source where its shots tell",
            score=True,
        ),
        Column(
            "overlay_watermark_box",
            pa.list_(pa.float32(), 4),
            "left, top, right, bottom as shares, where the clip itself decided",
        ),
    )

    def backends(self) -> list[BackendUse]:
        """The watermark scorer and, unless text is left alone, the text detector."""
        o = self.options
        text = [BackendUse("text_detector", o.text_backend, o.text_backend_options)] if o.text_backend else []
        return [BackendUse("watermark_scorer", o.watermark_backend, o.watermark_backend_options), *text]

    @cached_property
    def _watermark(self) -> WatermarkScorer:
        scorer: WatermarkScorer = self.backends()[0].create()
        return scorer

    @cached_property
    def _text(self) -> TextDetector:
        detector: TextDetector = self.backends()[1].create()
        return detector

    def stream_fingerprint(self) -> dict[str, Any]:
        """The watermark scorer and how the source is sampled; how text is found matters to clips only."""
        o = self.options
        return {
            "samples": [o.source_samples_per_s, o.max_source_samples],
            "watermark": self.backend_fingerprints()["watermark_scorer"],
        }

    def requests(self) -> tuple[FrameRequest, ...]:
        """Large frames for text, and the denser small ones that motion uses as well."""
        o = self.options
        return (FrameRequest(o.short_side_px, count=o.frames), FrameRequest(o.watermark_short_side_px, fps=o.watermark_fps))

    def watch(self, source: SourceFacts) -> SourceOverlayWatcher:
        """A watcher that keeps small pictures from all over the source."""
        return SourceOverlayWatcher(self.options, source, self._watermark)

    def score(self, media: ClipMedia) -> Row:
        """Text and watermark columns of one clip."""
        large, dense = (media.frames[r] for r in self.requests())
        row: Row = {}
        if self.options.text_backend:
            row.update(self._text_columns(large.rgb))
        across_shots = media.row.get("overlay_source_watermark")
        if across_shots is not None:  # what lies over all shots of a source is surer than what stays still within one clip
            row["overlay_watermark"] = across_shots
            return row
        step = max(1, len(dense.rgb) // self.options.watermark_frames)
        mark = self._watermark.score(dense.rgb[::step])
        # Where nothing moves, a still edge is no evidence: such clips are the static gate's business.
        row["overlay_watermark"] = mark.probability or 0.0
        row["overlay_watermark_box"] = [float(v) for v in mark.box] if mark.box and (mark.probability or 0) >= 0.5 else None
        return row

    def _text_columns(self, frames: np.ndarray) -> Row:
        boxes: list[list[TextBox]] = []
        for t, frame in enumerate(frames):
            if t and float(cv2.absdiff(frame, frames[t - 1]).mean()) < self.options.same_frame_levels:
                boxes.append(boxes[-1])
            else:
                boxes.append(self._text.detect(frame))
        area = float(np.mean([min(1.0, sum(b.area for b in found)) for found in boxes]))
        burned = float(np.mean([sum(b.area for b in found if _keeps_place(b, t, boxes)) for t, found in enumerate(boxes)]))
        kind = "none" if area == 0 else "burned_in" if burned >= 0.3 * area else "scene"
        return {
            "overlay_text_area_ratio": area,
            "overlay_text_boxes": float(np.mean([len(found) for found in boxes])),
            "overlay_burned_in_area_ratio": min(1.0, burned),
            "overlay_text_kind": kind,
        }


def _keeps_place(box: TextBox, frame: int, boxes: list[list[TextBox]]) -> bool:
    """Whether half of the other frames (one at least) have text on the same line: titles, logos, and lines of subtitles."""
    others = [found for t, found in enumerate(boxes) if t != frame]
    hits = sum(any(_same_place(box, other) for other in found) for found in others)
    return bool(others) and hits >= max(1, len(others) / 2)


def _same_place(a: TextBox, b: TextBox) -> bool:
    """Boxes on one line: same top and bottom within a fifth of the height, and overlapping sideways."""
    height = max(a.bottom - a.top, b.bottom - b.top)
    level = abs(a.top - b.top) < 0.2 * height and abs(a.bottom - b.bottom) < 0.2 * height
    overlap = min(a.right, b.right) - max(a.left, b.left)
    # Subtitles change their length about a fixed centre; scene text that drifts keeps its length and loses its place.
    same_centre = abs(a.left + a.right - b.left - b.right) < 0.02
    same_edge = abs(a.left - b.left) < 0.01
    return level and overlap > 0 and (same_centre or same_edge)


class SourceOverlayWatcher:
    """Small pictures from all over a source, thinned evenly when they get too many."""

    def __init__(self, options: Options, source: SourceFacts, scorer: WatermarkScorer) -> None:
        self._options, self._turns, self._scorer = options, source.turns, scorer
        self._video = source.kind == "video"
        self._interval_s = 1 / options.source_samples_per_s
        self._next_s = 0.0
        self._kept: list[np.ndarray] = []

    def add(self, frame: StreamFrame) -> None:
        """Keep a frame at 180 px now and then."""
        if not self._video or frame.picture is None or frame.time_s < self._next_s:
            return
        self._next_s = frame.time_s + self._interval_s
        scale = 180 / min(frame.picture.width, frame.picture.height)
        size = (max(2, round(frame.picture.width * scale)), max(2, round(frame.picture.height * scale)))
        self._kept.append(resize(frame.picture, *size))
        if len(self._kept) > self._options.max_source_samples:
            self._kept, self._interval_s = self._kept[::2], self._interval_s * 2

    def describe(self, clips: Sequence[Row]) -> list[Row]:
        """The source's verdict on every clip; null where too little moves to tell."""
        same = [f for f in self._kept if f.shape == self._kept[0].shape]
        found = self._scorer.score(np.stack(same)).probability if same else None
        return [{"overlay_source_watermark": found} for _ in clips]
