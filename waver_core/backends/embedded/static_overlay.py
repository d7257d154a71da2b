"""Watermarks as what stays still while the picture moves: the embedded stand-in for a watermark classifier.

Where the picture moves, gradients at one place average out; the edges of a logo add up. So the mean gradient over frames
that differ is large and steady exactly at overlays. Nothing can be told of a clip in which nothing moves, and a logo over
a static background in a single shot looks like the background: give frames of several shots where there are any.
"""

from __future__ import annotations

import cv2
import numpy as np

from waver_core.backends.contracts import Overlay
from waver_core.registry import register

_SHORT_SIDE_PX = 180


@register("watermark_scorer", "static_overlay")
class StaticOverlay:
    """Compact groups of steady edges in frames whose other edges move; about 1 ms a frame."""

    fingerprint = "static_overlay-1"

    def __init__(self, min_frames: int = 8, min_moved: float = 0.3, max_frames: int = 64) -> None:
        self._min_frames, self._min_moved, self._max_frames = min_frames, min_moved, max_frames

    def score(self, frames: np.ndarray) -> Overlay:
        """uint8 [T, H, W, 3] -> probability (None when fewer than `min_frames` frames differ), area and box."""
        moving = self._frames_that_differ(frames)
        if len(moving) < self._min_frames:
            return Overlay(None, 0.0, None)
        steady, lively, gradient = _steady_edges(moving)
        _drop_straight_borders(steady)
        if not steady.any():
            return Overlay(0.0, 0.0, None)
        return _verdict(steady, lively, gradient, np.stack(moving).std(axis=0, dtype=np.float32))

    def _frames_that_differ(self, frames: np.ndarray) -> list[np.ndarray]:
        picked: list[np.ndarray] = []
        for frame in frames:
            height, width = frame.shape[:2]
            scale = _SHORT_SIDE_PX / min(height, width)
            size = (max(8, round(width * scale)), max(8, round(height * scale)))
            grey = cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
            if grey.std() < 6:  # blank: between two fades the logo itself may be gone
                continue
            if not picked or _moved(grey, picked[-1]) > self._min_moved:
                picked.append(grey)
        step = -(-len(picked) // self._max_frames) or 1
        return picked[::step]


def _moved(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the picture that differs once a change of brightness is taken off: small under a static camera."""
    difference = a.astype(np.int16) - b
    return float((np.abs(difference - np.median(difference)) > 10).mean())


def _steady_edges(frames: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges that keep place and direction in nearly all frames, places that ever have edges (both bool [H, W]), and the
    mean gradient [H, W, 2].

    The 15th percentile over frames decides, not the mean: an edge that lasts for one long shot is no overlay.
    """
    dx = np.stack([cv2.Sobel(f, cv2.CV_16S, 1, 0) for f in frames])
    dy = np.stack([cv2.Sobel(f, cv2.CV_16S, 0, 1) for f in frames])
    mean_dx, mean_dy = dx.mean(axis=0, dtype=np.float32), dy.mean(axis=0, dtype=np.float32)
    size = cv2.magnitude(mean_dx, mean_dy)
    lively = np.abs(dx).mean(axis=0, dtype=np.float32) + np.abs(dy).mean(axis=0, dtype=np.float32) > 36.0
    rows, columns = np.nonzero(size > 24.0)
    steady = np.zeros(size.shape, bool)
    if len(rows):
        strength = size[rows, columns]
        along = dx[:, rows, columns] * (mean_dx[rows, columns] / strength) + dy[:, rows, columns] * (
            mean_dy[rows, columns] / strength
        )
        steady[rows, columns] = np.percentile(along, 15, axis=0) > 0.45 * strength
    return steady, lively, np.stack([mean_dx, mean_dy], axis=-1)


def _drop_straight_borders(steady: np.ndarray) -> None:
    """Remove rows and columns that are steady almost throughout: the edges of black bars, not of a logo."""
    rows, columns = steady.mean(axis=1) > 0.5, steady.mean(axis=0) > 0.5
    for line in np.flatnonzero(rows):
        steady[max(0, line - 1) : line + 2] = False
    for line in np.flatnonzero(columns):
        steady[:, max(0, line - 1) : line + 2] = False


def _edges_in_two_directions(gradient: np.ndarray) -> bool:
    """Whether gradients [N, 2] point more than one way. Lines that travel along themselves (a wall's joints in a pan) do not."""
    tensor = gradient.T @ gradient
    low, high = np.linalg.eigvalsh(tensor)
    return bool(low > 0.12 * high)


def _verdict(steady: np.ndarray, lively: np.ndarray, gradient: np.ndarray, change: np.ndarray) -> Overlay:
    """Join steady edges into groups; the best group must be compact and alone among moving edges."""
    height, width = steady.shape
    reach = cv2.getStructuringElement(cv2.MORPH_RECT, (9, 5))
    joined = cv2.morphologyEx(steady.astype(np.uint8), cv2.MORPH_CLOSE, reach)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(joined)
    edges = np.bincount(labels[steady], minlength=count)
    best, best_score = 0, 0.0
    for i in range(1, count):
        area = float(stats[i, cv2.CC_STAT_WIDTH] * stats[i, cv2.CC_STAT_HEIGHT])
        # Lettering and logos are dense with edges; a few specks that closing has joined are not.
        if edges[i] >= 24 and area < 0.15 * steady.size and edges[i] > 0.14 * area and edges[i] > best_score:
            if not _edges_in_two_directions(gradient[steady & (labels == i)]):
                continue
            best, best_score = i, float(edges[i])
    if not best:
        return Overlay(0.0, 0.0, None)
    left, top = int(stats[best, cv2.CC_STAT_LEFT]), int(stats[best, cv2.CC_STAT_TOP])
    right, bottom = left + int(stats[best, cv2.CC_STAT_WIDTH]), top + int(stats[best, cv2.CC_STAT_HEIGHT])
    elsewhere = np.ones(steady.shape, bool)
    elsewhere[top:bottom, left:right] = False
    # Steady edges all over mean a static camera: the one group is then nothing special.
    steady_share = float((steady & elsewhere).sum()) / max(1.0, float((lively & elsewhere).sum()))
    # Round an overlay the picture changes; round a steady piece of background it does not.
    ring = elsewhere.copy()
    margin = max(6, (bottom - top) // 2)
    ring[: max(0, top - margin)], ring[bottom + margin :] = False, False
    ring[:, : max(0, left - margin)], ring[:, right + margin :] = False, False
    around = float(np.median(change[ring])) if ring.any() else 0.0
    evidence = min(3.5, 1.6 * np.log2(best_score / 40.0)) - 14.0 * max(0.0, steady_share - 0.06) + min(2.0, (around - 18.0) / 5.0)
    probability = float(1.0 / (1.0 + np.exp(-evidence)))
    box = (left / width, top / height, right / width, bottom / height)
    return Overlay(probability, (right - left) * (bottom - top) / steady.size, box)
