"""Technical (Waver §3.1, basic attributes): frame rate, size, bitrate, codec, black borders, measured while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import stage
from curation.stage import Row, SourceFacts, StreamFrame
from waver_core.config import Strict
from waver_core.manifest import Column
from waver_core.video import display_size_px, resize


class Options(Strict):
    """How black borders are measured."""

    border_samples_per_s: float = Field(2.0, gt=0)
    black_level: int = Field(24, ge=0, le=64)
    """A row or column whose mean luma never exceeds this, with no lit pixels to speak of, is black (video black is 16)."""
    max_border_ratio: float = Field(0.4, gt=0, lt=0.5)
    """Black from farther in than this share of the picture is a dark scene, not a border."""


class Stage(stage.Stage):
    """Facts of the file and of the clip's pictures."""

    name = "technical"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("stream",)
    columns = (
        Column("width_px", pa.int32(), "width as shown: upright, square pixels", "px"),
        Column("height_px", pa.int32(), "height as shown: upright, square pixels", "px"),
        Column("short_side_px", pa.int32(), "the smaller of width and height", "px", score=True),
        Column("fps", pa.float64(), "mean frame rate over the source, from the frames' own times", "1/s", score=True),
        Column("technical_variable_fps", pa.bool_(), "whether frames are unevenly spaced"),
        Column("technical_codec", pa.string(), "video codec"),
        Column("technical_pixel_format", pa.string(), "pixel format of the stream"),
        Column("technical_rotation_deg", pa.int32(), "counter-clockwise turn applied to show it upright", "deg"),
        Column("technical_pixel_aspect", pa.float64(), "width of a pixel over its height"),
        Column("technical_bitrate_kbps", pa.float64(), "video bitrate of the source", "kbit/s", score=True),
        Column("technical_bits_per_pixel", pa.float64(), "bitrate over pixels per second", "bit", score=True),
        Column("technical_has_audio", pa.bool_(), "whether the file has sound"),
        Column("technical_black_border_ratio", pa.float64(), "share of the picture taken by black bars", score=True),
        Column("technical_active_box", pa.list_(pa.int32(), 4), "left, top, right, bottom of the picture inside bars", "px"),
    )

    def watch(self, source: SourceFacts) -> TechnicalWatcher:
        """A watcher that measures times and borders."""
        return TechnicalWatcher(self.options, source)


class TechnicalWatcher:
    """Frame times of the source, and mean luma of rows and columns a few times a second."""

    def __init__(self, options: Options, source: SourceFacts) -> None:
        self._options, self._source = options, source
        self._times_s: list[float] = []
        self._sampled_at: list[int] = []
        self._rows: list[np.ndarray] = []
        self._columns: list[np.ndarray] = []
        self._size_px = (source.info.width_px, source.info.height_px)
        self._next_sample_s = 0.0
        self.bytes_read = 0

    def add(self, frame: StreamFrame) -> None:
        """Note the time; now and then the luma profile of the full picture."""
        self._times_s.append(frame.time_s)
        if frame.time_s < self._next_sample_s:
            return
        self._next_sample_s = frame.time_s + 1 / self._options.border_samples_per_s
        if frame.picture is not None:
            grey = resize(frame.picture, frame.picture.width, frame.picture.height, "gray")
            self._size_px = (frame.picture.width, frame.picture.height)
        else:
            assert frame.full is not None
            grey = cv2.cvtColor(frame.full, cv2.COLOR_RGB2GRAY)
            self._size_px = (grey.shape[1], grey.shape[0])
        turned = np.rot90(grey, self._source.turns) if self._source.turns else grey
        self._sampled_at.append(frame.index)
        self._rows.append(self._profile(turned, 1))
        self._columns.append(self._profile(turned, 0))

    def _profile(self, grey: np.ndarray, axis: int) -> np.ndarray:
        """Luma of each row (axis 1) or column (0), uint8: its mean, or white where more than a few pixels are lit."""
        mean = cv2.reduce(grey, axis, cv2.REDUCE_AVG, dtype=cv2.CV_32F).ravel()
        bright = cv2.threshold(grey, self._options.black_level + 16, 1, cv2.THRESH_BINARY)[1]
        lit = cv2.reduce(bright, axis, cv2.REDUCE_AVG, dtype=cv2.CV_32F).ravel()
        return np.where(lit > 0.02, 255, mean).astype(np.uint8)

    def describe(self, clips: Sequence[Row]) -> list[Row]:
        """The source's facts on every clip, and each clip's own borders."""
        info, turns = self._source.info, self._source.turns
        width, height = display_size_px(*self._size_px, info.pixel_aspect, turns)
        fps, variable = frame_rate(np.array(self._times_s), info.fps)
        duration_s = len(self._times_s) / fps if fps else 0.0
        bitrate_bps = (self.bytes_read * 8 / duration_s if self.bytes_read and duration_s else info.bitrate_bps) or 0
        video = self._source.kind == "video"
        common: Row = {
            "width_px": width,
            "height_px": height,
            "short_side_px": min(width, height),
            "fps": fps if video else None,
            "technical_variable_fps": variable if video else None,
            "technical_codec": info.codec,
            "technical_pixel_format": info.pixel_format,
            "technical_rotation_deg": turns * 90,
            "technical_pixel_aspect": info.pixel_aspect,
            "technical_bitrate_kbps": bitrate_bps / 1000 if video else None,
            "technical_bits_per_pixel": bitrate_bps / (fps * width * height) if video and fps else None,
            "technical_has_audio": info.has_audio,
        }
        return [{**common, **self._borders(clip, width, height)} for clip in clips]

    def _borders(self, clip: Row, width: int, height: int) -> Row:
        at = np.array(self._sampled_at)
        inside = np.flatnonzero((at >= clip["start_frame"]) & (at < clip["end_frame"]))
        if not len(inside):
            inside = np.array([int(np.argmin(np.abs(at - clip["start_frame"])))])
        top, bottom = self._black_ends([self._rows[i] for i in inside])
        left, right = self._black_ends([self._columns[i] for i in inside])
        box = [round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height)]
        ratio = 1 - (1 - top - bottom) * (1 - left - right)
        return {"technical_black_border_ratio": float(ratio), "technical_active_box": box}

    def _black_ends(self, profiles: list[np.ndarray]) -> tuple[float, float]:
        """Shares of black at the beginning and the end of the brightest profile over the clip."""
        brightest = np.max([p for p in profiles if p.shape == profiles[0].shape], axis=0)
        lit = np.flatnonzero(brightest > self._options.black_level)
        if not len(lit):
            return 0.0, 0.0
        n = len(brightest)
        ends = (lit[0] / n, (n - 1 - lit[-1]) / n)
        limit = self._options.max_border_ratio
        first, last = (0.0 if e > limit or e * n < 2 else float(e) for e in ends)
        return first, last


def frame_rate(times_s: np.ndarray, declared_fps: float) -> tuple[float, bool]:
    """Mean rate of frames at the given times, and whether their spacing varies by more than half a typical step."""
    steps = np.diff(times_s)
    steps = steps[steps > 0]
    if len(steps) < 2:
        return declared_fps or 0.0, False
    mean_fps = len(steps) / float(steps.sum())
    low, high = np.percentile(steps, (2, 98))
    variable = bool(high - low > 0.5 * float(np.median(steps)))
    # Containers with millisecond clocks jitter; the declared rate is the exact one when both agree.
    exact = declared_fps if declared_fps and abs(mean_fps / declared_fps - 1) < 0.005 else mean_fps
    return float(exact), variable
