"""What shape a silhouette has: compared by overlap with eight outlines of equal area and centre, upright."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

from waver_core.captions.facts import SHAPES

_SIDE_PX = 96
_ROOT_AREA_PX = 40.0  # every silhouette is scaled to 1600 px of area
_RING_HOLE = 0.54  # hole over outer diameter


def normalised(mask: np.ndarray, centre: tuple[float, float], area_px: float) -> np.ndarray:
    """A mask [H, W] moved and scaled so that its centre lies in the middle and its area is standard: float32 [96, 96]."""
    scale = _ROOT_AREA_PX / np.sqrt(max(area_px, 1.0))
    middle = (_SIDE_PX - 1) / 2
    matrix = np.array([[scale, 0, middle - scale * centre[0]], [0, scale, middle - scale * centre[1]]])
    return cv2.warpAffine(mask.astype(np.float32), matrix, (_SIDE_PX, _SIDE_PX), flags=cv2.INTER_LINEAR)


def overlaps(silhouette: np.ndarray) -> dict[str, float]:
    """Intersection over union of a soft silhouette [96, 96] with each shape, at the best of a few small shifts."""
    found = {}
    for shape, template in _templates().items():
        best = 0.0
        for scale in (0.96, 1.0, 1.04):
            warped = _rescaled(silhouette, scale)
            best = max(best, float(np.minimum(warped, template).sum() / np.maximum(warped, template).sum()))
        found[shape] = best
    return found


def _rescaled(picture: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1.0:
        return picture
    middle = (_SIDE_PX - 1) / 2 * (1 - scale)
    return cv2.warpAffine(picture, np.array([[scale, 0, middle], [0, scale, middle]]), (_SIDE_PX, _SIDE_PX))


def _regular(points: int, radii: tuple[float, ...], turn: float) -> np.ndarray:
    angles = turn + 2 * np.pi * np.arange(points) / points
    radius = np.resize(radii, points)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _corners(shape: str) -> np.ndarray:
    up = -np.pi / 2
    if shape == "square":
        return _regular(4, (1.0,), np.pi / 4)
    if shape == "triangle":
        return _regular(3, (1.0,), up)
    if shape == "star":
        return _regular(10, (1.0, 0.43), up)
    if shape == "diamond":
        return _regular(4, (1.0,), up) * (0.8, 1.0)
    if shape == "hexagon":
        return _regular(6, (1.0,), 0.0)
    if shape == "cross":
        a, b = 1 / 3, 1.0
        quarter = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        return np.array(quarter)
    return _regular(120, (1.0,), 0.0)


@cache
def _templates() -> dict[str, np.ndarray]:
    """Every shape as a soft silhouette of standard area and centre."""
    fine = 768
    out = {}
    for shape in SHAPES:
        picture = np.zeros((fine, fine), np.uint8)
        cv2.fillPoly(picture, [np.round(_corners(shape) * fine * 0.4 + fine / 2).astype(np.int32)], 255)
        if shape == "ring":
            cv2.circle(picture, (fine // 2, fine // 2), round(fine * 0.4 * _RING_HOLE), 0, -1)
        moments = cv2.moments(picture, binaryImage=True)
        centre = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
        # Scaled down in one go, so smooth first.
        soft = cv2.GaussianBlur(picture.astype(np.float32) / 255, (0, 0), 3.0)
        out[shape] = normalised(soft, centre, moments["m00"])
    return out
