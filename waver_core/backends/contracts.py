"""What a stage may ask of a backend. Implementations: `embedded/` (no weights) and, with later profiles, `pretrained/`.

Every backend has a `fingerprint`: name, version and whatever else changes its numbers; it is written beside the scores.
Frames are uint8 [T, H, W, 3] RGB throughout.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class FrameEmbedder(Protocol):
    """Descriptors whose cosine tells whether two frames show the same scene (Waver §3.1: DINOv2)."""

    fingerprint: str
    short_side_px: int

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [T, D] of unit length."""


@runtime_checkable
class FlowEstimator(Protocol):
    """Dense optical flow (Waver §3.1: RAFT)."""

    fingerprint: str

    def flow(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [T-1, H, W, 2], (x, y) in pixels from each frame to the next."""


@runtime_checkable
class ForegroundSegmenter(Protocol):
    """Which pixels belong to what moves by itself."""

    fingerprint: str

    def segment(self, frames: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """frames uint8 [T, H, W, 3], flow residual float32 [T-1, h, w] in px of the frames' size -> bool [T-1, h, w]."""


class TextBox(NamedTuple):
    """An upright box around text, in fractions of width and height, and the detector's confidence."""

    left: float
    top: float
    right: float
    bottom: float
    score: float

    @property
    def area(self) -> float:
        """Share of the frame that the box covers."""
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)


@runtime_checkable
class TextDetector(Protocol):
    """Where text stands in a frame; it need not be read."""

    fingerprint: str

    def detect(self, frame: np.ndarray) -> list[TextBox]:
        """uint8 [H, W, 3] -> boxes."""


class Overlay(NamedTuple):
    """Something that stays still while the picture moves: how sure, and where (fractions of width and height)."""

    probability: float | None
    """None where the picture does not move enough to tell."""
    area_ratio: float
    box: tuple[float, float, float, float] | None


@runtime_checkable
class WatermarkScorer(Protocol):
    """Whether a logo or watermark lies over the picture."""

    fingerprint: str

    def score(self, frames: np.ndarray) -> Overlay:
        """uint8 [T, H, W, 3] of one clip, or of several shots of one source -> verdict."""


class Aesthetics(NamedTuple):
    """Scores of T frames: `score` float32 [T] on the scale 1 to 10, and its parts, each float32 [T]."""

    score: np.ndarray
    parts: dict[str, np.ndarray]


@runtime_checkable
class AestheticScorer(Protocol):
    """How good a frame looks as a photograph."""

    fingerprint: str

    def score(self, frames: np.ndarray) -> Aesthetics:
        """uint8 [T, H, W, 3] -> scores per frame."""
