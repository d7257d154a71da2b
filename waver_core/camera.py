"""What the camera did, from dense flow: a robust similarity transform per pair of frames, and a label for the clip.

Waver §3.1 separates the subject's motion from the camera's; here the camera's part is modelled and subtracted, so a pan
over a still picture leaves next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

LABELS = ("static", "pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "shake", "complex")
_GRID_STEP_PX = 14


class CameraStep(NamedTuple):
    """Motion of the picture between two frames: shift of its centre in px, scale and turn (radians)."""

    shift_x_px: float
    shift_y_px: float
    scale: float
    turn_rad: float


@dataclass(frozen=True)
class CameraRules:
    """Thresholds in px per step at the flow's size (short side 192 px, 6 steps a second unless configured otherwise)."""

    min_move_px: float = 0.35
    """Mean move below which the camera counts as static."""
    min_shake_px: float = 0.9
    """Typical size of the back-and-forth part above which it shakes."""
    dominance: float = 1.6
    """How many times larger one kind of move must be than the next to name the clip."""


class FittedStep(NamedTuple):
    """The camera's move between two frames, what the flow has beyond it, and the whole model (affine [2, 3] about the centre)."""

    camera: CameraStep
    residual_px: np.ndarray
    """float32 [H/2, W/2]"""
    affine: np.ndarray


def fit_step(flow: np.ndarray, grey: np.ndarray | None = None) -> FittedStep:
    """Similarity that explains most of a flow field [H, W, 2], and the residual's magnitude in px.

    grey: the first frame, uint8 [H, W]; flow is then believed only where it has texture, for on a blank wall it is noise.
    RANSAC on a grid, then a least-squares affine fit to what agrees, so that a subject of under half the picture does
    not pull the model. Affine, not similarity, for the residual: a slight shear of perspective must not look like motion.
    """
    height, width = flow.shape[:2]
    ys, xs = (
        v.ravel() for v in np.mgrid[_GRID_STEP_PX // 2 : height : _GRID_STEP_PX, _GRID_STEP_PX // 2 : width : _GRID_STEP_PX]
    )
    if grey is not None:
        steep = cv2.boxFilter(cv2.Laplacian(grey, cv2.CV_16S, ksize=3).astype(np.float32) ** 2, -1, (9, 9))[ys, xs] > 30.0
        if steep.mean() >= 0.5:  # on less, the only texture may be the subject itself
            ys, xs = ys[steep], xs[steep]
    centre = np.array([width / 2, height / 2])
    points = np.stack([xs, ys], axis=1) - centre
    moved = points + flow[ys, xs]
    matrix, _ = cv2.estimateAffinePartial2D(
        points, moved, method=cv2.RANSAC, ransacReprojThreshold=0.75, maxIters=200, confidence=0.99, refineIters=5
    )
    if matrix is None or not np.isfinite(matrix).all():
        matrix = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    affine = _refine(points, moved, matrix).astype(np.float32)
    half = flow[::2, ::2]
    grid_x = np.arange(0, width, 2, dtype=np.float32)[None, :] - centre[0].astype(np.float32)
    grid_y = np.arange(0, height, 2, dtype=np.float32)[:, None] - centre[1].astype(np.float32)
    rest_x = half[..., 0] - ((affine[0, 0] - 1) * grid_x + affine[0, 1] * grid_y + affine[0, 2])
    rest_y = half[..., 1] - (affine[1, 0] * grid_x + (affine[1, 1] - 1) * grid_y + affine[1, 2])
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    turn = float(np.arctan2(matrix[1, 0], matrix[0, 0]))
    camera = CameraStep(float(matrix[0, 2]), float(matrix[1, 2]), scale, turn)
    return FittedStep(camera, cv2.magnitude(rest_x, rest_y), affine)


def drop_explained(mask: np.ndarray, first: np.ndarray, second: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Foreground mask [H/2, W/2] without the regions that the camera's move explains after all.

    Flow errs at the picture's edges and along stripes. So a region stays only if the second frame, moved back by the
    camera's model, differs from the first (uint8 [H, W] grey) in a fair part of it; what left the frame counts as equal.
    """
    if not mask.any():
        return mask
    height, width = mask.shape
    a, b = (cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA) for f in (first, second))
    centre = np.array([width / 2, height / 2])
    half = affine.astype(np.float64).copy()
    half[:, 2] = half[:, 2] / 2 + centre - half[:, :2] @ centre
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(b, half, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.full_like(b, 255), half, (width, height), flags=flags) > 250
    differs = ((cv2.absdiff(a, moved) > 12) & inside).astype(np.float64)
    count, labels = cv2.connectedComponents(mask.astype(np.uint8))
    share = np.bincount(labels.ravel(), differs.ravel(), minlength=count) / np.maximum(
        1, np.bincount(labels.ravel(), minlength=count)
    )
    keep = share > 0.12
    keep[0] = False
    return keep[labels]


def _refine(points: np.ndarray, moved: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Affine least squares over the points that agree with `matrix`, twice; `matrix` itself where too few agree."""
    best = matrix
    for _ in range(2):
        error = np.linalg.norm(points @ best[:, :2].T + best[:, 2] - moved, axis=1)
        near = error < max(0.5, 2.5 * float(np.median(error)))
        if near.sum() < 12:
            return matrix
        design = np.column_stack([points[near], np.ones(int(near.sum()))])
        best = np.linalg.lstsq(design, moved[near], rcond=None)[0].T
    # A foreground that fills the picture can drag the affine part into nonsense; then the rigid model is the safer one.
    return best if np.abs(best[:, :2] - matrix[:, :2]).max() < 0.05 else matrix


def label_camera(steps: list[CameraStep], size_px: tuple[int, int], rules: CameraRules) -> str:
    """One label for a clip from its steps; size_px is (width, height) of the flow.

    `pan_right` is a camera that turns to the right, so that the picture moves left; `tilt_up` moves the picture down.
    """
    if not steps:
        return "static"
    moves = np.array(steps, float)
    x, y, zoom = moves[:, 0], moves[:, 1], np.log(np.maximum(moves[:, 2], 1e-3))
    # A zoom moves a point in proportion to its distance from the centre; compare it at the mean distance.
    mean_radius_px = 0.25 * float(np.hypot(*size_px))
    trend_x, trend_y, trend_zoom = (_trend(v) for v in (x, y, zoom))
    shake_px = float(np.hypot(_jitter(x), _jitter(y)))
    sizes = {"pan": abs(trend_x), "tilt": abs(trend_y), "zoom": abs(trend_zoom) * mean_radius_px}
    ranked = sorted(sizes, key=lambda k: sizes[k], reverse=True)
    first, second = sizes[ranked[0]], sizes[ranked[1]]
    if shake_px > rules.min_shake_px and shake_px > 0.8 * first:
        return "shake"
    if first < rules.min_move_px:
        path_px = _trend(np.hypot(x, y))
        return "static" if path_px < 2 * rules.min_move_px else "complex"
    if first < rules.dominance * second:
        return "complex"
    if ranked[0] == "pan":
        return "pan_right" if trend_x < 0 else "pan_left"
    if ranked[0] == "tilt":
        return "tilt_up" if trend_y > 0 else "tilt_down"
    return "zoom_in" if trend_zoom > 0 else "zoom_out"


def _jitter(values: np.ndarray) -> float:
    """Typical size of what a running median over five steps leaves: the back and forth, not the travel, nor a lone misfit."""
    if len(values) < 6:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, 2, mode="edge"), 5)
    return float(1.4826 * np.median(np.abs(values - np.median(windows, axis=1))))


def _trend(values: np.ndarray) -> float:
    """Mean without the outermost tenth on either side."""
    cut = len(values) // 10
    return float(np.mean(np.sort(values)[cut : len(values) - cut]))
