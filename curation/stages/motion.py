"""Motion (Waver §3.1, §4.3): flow inside the foreground once the camera's own motion is taken away, and a camera label.

Magnitudes are in pixels per step at a stated size and rate, by default a short side of 192 px and 6 steps a second, and
do not depend on the source's size or frame rate. The report's scale (11.0 lively, 0.75 nearly static) uses its own size.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import stage
from curation.stage import BackendUse, ClipMedia, FrameRequest, Row
from waver_core.backends.contracts import FlowEstimator, ForegroundSegmenter
from waver_core.camera import CameraRules, CameraStep, drop_explained, fit_step, label_camera
from waver_core.config import Strict
from waver_core.manifest import Column


class Options(Strict):
    """Size and rate of the flow, and the thresholds of the camera's label."""

    flow_backend: str = "dis"
    flow_backend_options: dict[str, Any] = {}
    foreground_backend: str = "residual"
    foreground_backend_options: dict[str, Any] = {}
    short_side_px: int = Field(192, ge=64)
    fps: float = Field(6.0, gt=0)
    min_foreground_ratio: float = Field(0.005, ge=0)
    """A smaller foreground, as a share of the picture over the clip, counts as none."""
    min_active_px: float = Field(0.1, gt=0)
    """Mean flow of a step from which on it counts as active; a slide that flips is one step among many at rest."""
    min_move_px: float = Field(0.35, gt=0)
    min_shake_px: float = Field(0.9, gt=0)
    dominance: float = Field(1.6, ge=1)


class Stage(stage.Stage):
    """Flow, camera model, foreground."""

    name = "motion"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("clip",)
    columns = (
        Column(
            "motion_foreground_px", pa.float64(), "mean speed of the foreground's core against the scene", "px/step", score=True
        ),
        Column("motion_background_px", pa.float64(), "mean speed of the background: the camera's doing", "px/step", score=True),
        Column("motion_total_px", pa.float64(), "mean flow over the whole picture", "px/step", score=True),
        Column("motion_active_ratio", pa.float64(), "share of steps in which anything moves", score=True),
        Column("motion_foreground_ratio", pa.float64(), "share of the picture that moves by itself", score=True),
        Column(
            "motion_direction_entropy", pa.float64(), "spread of the foreground's directions, 0 one way to 1 all ways", score=True
        ),
        Column("motion_camera", pa.string(), "static, pan_*, tilt_*, zoom_*, shake or complex", score=True),
        Column("motion_short_side_px", pa.int32(), "size at which px are counted", "px"),
        Column("motion_fps", pa.float64(), "steps a second", "1/s"),
    )

    def backends(self) -> list[BackendUse]:
        """Flow and foreground."""
        o = self.options
        return [
            BackendUse("flow_estimator", o.flow_backend, o.flow_backend_options),
            BackendUse("foreground_segmenter", o.foreground_backend, o.foreground_backend_options),
        ]

    @cached_property
    def _flow(self) -> FlowEstimator:
        flow: FlowEstimator = self.backends()[0].create()
        return flow

    @cached_property
    def _segmenter(self) -> ForegroundSegmenter:
        segmenter: ForegroundSegmenter = self.backends()[1].create()
        return segmenter

    def requests(self) -> tuple[FrameRequest, ...]:
        """Frames at the flow's rate and size."""
        return (FrameRequest(self.options.short_side_px, fps=self.options.fps),)

    def score(self, media: ClipMedia) -> Row:
        """Motion columns of one clip; nulls for a still image."""
        frames = media.frames[self.requests()[0]]
        rgb, times_s = frames.rgb, frames.times_s
        distinct = np.flatnonzero(np.diff(times_s, prepend=-1.0) > 1e-6)  # a slow source repeats frames
        rgb, times_s = rgb[distinct], times_s[distinct]
        if media.row["kind"] == "image" or len(rgb) < 2:
            return {}
        # Frames fall where the source has them; scale every step to the stated rate and size.
        unit = (1 / (np.diff(times_s) * self.options.fps)) * (self.options.short_side_px / min(rgb.shape[1:3]))
        flow = self._flow.flow(rgb)
        grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in rgb]
        fitted = [fit_step(f, grey[t]) for t, f in enumerate(flow)]
        residual = np.stack([f.residual_px for f in fitted])
        mask = self._segmenter.segment(rgb, residual)
        mask = np.stack([drop_explained(m, grey[t], grey[t + 1], fitted[t].affine) for t, m in enumerate(mask)])
        steps = [_scaled(f.camera, float(k)) for f, k in zip(fitted, unit, strict=True)]
        o = self.options
        rules = CameraRules(o.min_move_px, o.min_shake_px, o.dominance)
        speed = np.hypot(flow[:, ::2, ::2, 0], flow[:, ::2, ::2, 1])
        ratio = float(mask.mean())
        seen = ratio >= o.min_foreground_ratio
        return {
            "motion_foreground_px": _masked_mean(residual, _core(residual, mask), unit) if seen else 0.0,
            "motion_background_px": _masked_mean(speed, ~mask, unit),
            "motion_total_px": _masked_mean(speed, np.ones_like(mask), unit),
            "motion_active_ratio": float((speed.mean(axis=(1, 2)) * unit > o.min_active_px).mean()),
            "motion_foreground_ratio": ratio,
            "motion_direction_entropy": direction_entropy(flow[:, ::2, ::2][mask]) if seen else 0.0,
            "motion_camera": label_camera(steps, (rgb.shape[2], rgb.shape[1]), rules),
            "motion_short_side_px": o.short_side_px,
            "motion_fps": o.fps,
        }


def _core(residual: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The part of a mask [T, h, w] that moves at least half as fast as its fastest tenth, step by step.

    Flow bleeds over a thing's outline and sinks in its plain inside; what is left out there is background and guesswork.
    """
    core = np.zeros_like(mask)
    for t, inside in enumerate(mask):
        if inside.any():
            core[t] = inside & (residual[t] >= 0.5 * np.percentile(residual[t][inside], 90))
    return core


def _scaled(step: CameraStep, unit: float) -> CameraStep:
    """A camera step brought to the stated size and rate."""
    return CameraStep(step.shift_x_px * unit, step.shift_y_px * unit, step.scale**unit, step.turn_rad * unit)


def _masked_mean(values: np.ndarray, mask: np.ndarray, unit: np.ndarray) -> float:
    """Mean of values [T, h, w] * unit [T] inside a mask; 0 where the mask is empty."""
    count = int(mask.sum())
    return float((np.where(mask, values, 0).sum(axis=(1, 2)) * unit).sum() / count) if count else 0.0


def direction_entropy(vectors: np.ndarray) -> float:
    """Entropy of the directions of flow vectors [N, 2] in eight sectors, weighted by length, over its maximum."""
    length = np.hypot(vectors[:, 0], vectors[:, 1])
    if not length.sum():
        return 0.0
    sector = np.floor((np.arctan2(vectors[:, 1], vectors[:, 0]) + np.pi) / (2 * np.pi) * 8).astype(int) % 8
    share = np.bincount(sector, length, minlength=8) / length.sum()
    share = share[share > 0]
    return float(max(0.0, -(share * np.log(share)).sum() / np.log(8)))
