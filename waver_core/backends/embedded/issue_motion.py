"""What flow between sampled frames tells of quality issues (Waver §3.2): speed, a subject cut off, a still that is animated.

Needs frames at about six a second and a short side of 192 px. A dozen pairs spread over the clip are looked at; each gives
a camera model and, as what it leaves unexplained, the subject. A subject that stands still is not seen.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from waver_core.backends.embedded.dis_flow import DisFlow
from waver_core.backends.embedded.residual_mask import ResidualMask
from waver_core.camera import CameraRules, drop_explained, fit_step, label_camera

_MAX_PAIRS = 12
_BLOCK_PX = 16


class Moves(NamedTuple):
    """Measures of a clip's motion; all 0 where there are no two frames."""

    subject_speed: float = 0.0
    """Speed of the subject's core against the scene, in short sides a second; the median over pairs."""
    subject_pace: float = 0.0
    """That speed over the subject's size: lengths of its own a second."""
    camera_speed: float = 0.0
    """Median speed of the whole picture as the camera model has it, in short sides a second."""
    subject_ratio: float = 0.0
    """Share of the picture that moves by itself."""
    unexplained: float = 0.0
    """Part of the picture's change that the camera model leaves, 0 to 1, in the tenth of the blocks where it leaves most."""
    cut_off_ratio: float = 0.0
    """Share of the pairs with a subject in which the picture's left, right or top edge cuts through it."""
    shaky: bool = False
    """Whether the camera's steps go back and forth, as far as six a second show it."""


def moves_of(frames: np.ndarray, times_s: np.ndarray) -> Moves:
    """uint8 [T, H, W, 3] at times [T] in seconds -> measures."""
    pairs = [t for t in range(len(frames) - 1) if times_s[t + 1] - times_s[t] > 1e-3]
    if not pairs:
        return Moves()
    picked = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, min(_MAX_PAIRS, len(pairs))).round().astype(int))]
    flow, segmenter = DisFlow(), ResidualMask()
    side = min(frames.shape[1:3])
    rows, steps = [], []
    for t in picked:
        rate = 1 / (float(times_s[t + 1] - times_s[t]) * side)  # px per pair -> short sides a second
        pair = frames[t : t + 2]
        first, second = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in pair)
        field = flow.flow(pair)[0]
        fitted = fit_step(field, first)
        mask = segmenter.segment(pair, fitted.residual_px[None])[0]
        mask = drop_explained(mask, first, second, fitted.affine)
        steps.append(fitted.camera)
        back, inside = _moved_back(second, fitted.affine)
        unexplained = _explained(first, second, back, inside)
        core = fitted.residual_px[mask]
        speed = float(core[core >= 0.5 * np.percentile(core, 90)].mean()) * rate if core.size else 0.0
        camera = float(np.median(np.hypot(*_camera_field(fitted.affine, field.shape[:2])))) * rate
        pace = speed * side / float(np.sqrt(4.0 * max(1, int(mask.sum()))))  # the mask has half the frame's size
        cut = _cut_off(mask, (cv2.absdiff(first, back) > 14) & inside)
        rows.append((speed, pace, camera, float(mask.mean()), unexplained, cut))
    speeds, paces, cameras, ratios, unexplained_parts, cuts = np.array(rows).T
    seen = ~np.isnan(cuts)
    return Moves(
        float(np.median(speeds)),
        float(np.median(paces)),
        float(np.median(cameras)),
        float(ratios.mean()),
        float(np.median(unexplained_parts)),
        float(cuts[seen].mean() * min(1.0, seen.mean() / 0.5)) if seen.any() else 0.0,
        label_camera(steps, (frames.shape[2], frames.shape[1]), CameraRules()) == "shake",
    )


def _camera_field(affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Motion in px of a coarse grid of points under a camera model about the picture's centre."""
    height, width = shape[:2]
    y, x = np.mgrid[-height / 2 : height / 2 : 24, -width / 2 : width / 2 : 24]
    return (
        (affine[0, 0] - 1) * x + affine[0, 1] * y + affine[0, 2],
        affine[1, 0] * x + (affine[1, 1] - 1) * y + affine[1, 2],
    )


def _moved_back(second: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The second frame [H, W] as the camera model would have it look from where the first was taken; and where it does."""
    height, width = second.shape
    centre = np.array([width / 2, height / 2])
    moved = affine.astype(np.float64).copy()
    moved[:, 2] += centre - moved[:, :2] @ centre
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    back = cv2.warpAffine(second, moved, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return back, cv2.warpAffine(np.full_like(second, 255), moved, (width, height), flags=flags) > 250


def _explained(first: np.ndarray, second: np.ndarray, back: np.ndarray, inside: np.ndarray) -> float:
    """How much of the change between two frames remains once the second is moved back, 0 to 1, where it is worst."""
    height, width = first.shape
    grid = (max(1, width // _BLOCK_PX), max(1, height // _BLOCK_PX))
    covered = cv2.resize(inside.astype(np.float32), grid, interpolation=cv2.INTER_AREA) > 0.99
    if covered.sum() < 4:
        return 1.0
    left, change = (
        cv2.resize(cv2.absdiff(first, f).astype(np.float32), grid, interpolation=cv2.INTER_AREA)[covered] for f in (back, second)
    )
    worst = float(np.sort(left)[-max(1, len(left) // 10) :].mean())
    return min(1.0, worst / max(float(change.mean()), 1.0))


def _cut_off(mask: np.ndarray, differs: np.ndarray) -> float:
    """1 where an edge of the picture cuts the largest subject through its breadth, else 0; not a number without a subject.

    mask [H/2, W/2] is the subject as flow has it, which spreads over its outline; so the pixels along that edge of the
    picture must change as well (differs [H, W]; where the camera brings new picture in, nobody knows). The lower edge
    does not count: it cuts everyone who is shown from the waist up.
    """
    count, labels, stats, centres = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    best = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])) if count > 1 else 0
    if not best or stats[best, cv2.CC_STAT_AREA] < 0.004 * mask.size:
        return float("nan")
    x, y = centres[best] / (mask.shape[1], mask.shape[0])
    inside = labels == best
    sides = (
        (inside, differs, x),
        (inside[:, ::-1], differs[:, ::-1], 1 - x),
        (inside.T, differs.T, y),
    )
    return float(any(distance < 0.22 and _touches_first_column(*picture) for *picture, distance in sides))


def _touches_first_column(inside: np.ndarray, differs: np.ndarray) -> bool:
    """Whether a region [h, w] meets its first columns over most of its height, and pixels [2 h, 2 w] change there."""
    rows = np.flatnonzero(inside.max(axis=1))
    contact = np.count_nonzero(inside[:, :3].max(axis=1)) / len(rows)
    rim = differs[2 * rows[0] : 2 * rows[-1] + 2, :2].max(axis=1)
    return bool(contact > 0.55 and np.count_nonzero(rim) >= max(4, 0.08 * len(rim)))
