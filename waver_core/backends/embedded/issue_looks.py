"""What single frames tell of quality issues (Waver §3.2): exposure, blur, noise, colour cast, black bars.

All of it is measured on frames of a short side of about 192 px, within any black bars, and pooled over a few frames of
the clip by the median. Compression blocks do not survive that size: the technical stage's bits per pixel tell of them.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

_MAX_FRAMES = 6
_GRID = (10, 6)


class Looks(NamedTuple):
    """Measures of a clip's pictures."""

    border_ratio: float
    """Share of the picture that black bars take."""
    clipped_ratio: float
    """Share of pixels with a luma of 248 or more."""
    half_clipped_ratio: float
    """Share of pixels with one channel at its limit and another clearly below: light lost, not paper or lettering."""
    high_luma: float
    """98th percentile of luma, 8-bit levels."""
    middle_luma: float
    """Median luma, 8-bit levels."""
    blur_px: float
    """Gaussian sigma of the sharpest edges, in px at a short side of 192; 0 where nothing has edges."""
    grain_levels: float
    """Standard deviation of what varies from pixel to pixel, in the calm quarter of the picture."""
    light_saturation: float
    """Saturation of a region's lightest part, 0 to 1, that nine regions in ten exceed: a cast spares nothing, while almost
    every scene has white, grey or pastel in some places."""


def looks_of(frames: np.ndarray) -> Looks:
    """uint8 [T, H, W, 3] -> measures, each the median over up to six frames spread evenly."""
    picked = frames[np.unique(np.linspace(0, len(frames) - 1, min(_MAX_FRAMES, len(frames))).round().astype(int))]
    top, bottom, left, right = black_bars(picked)
    inside = picked[:, top : picked.shape[1] - bottom, left : picked.shape[2] - right]
    ratio = 1 - inside.shape[1] * inside.shape[2] / (picked.shape[1] * picked.shape[2])
    rows = np.array([_measure(np.ascontiguousarray(frame)) for frame in inside])
    return Looks(ratio, *(float(v) for v in np.median(rows, axis=0)))


def black_bars(frames: np.ndarray, level: int = 24, max_ratio: float = 0.4) -> tuple[int, int, int, int]:
    """Rows and columns of black at top, bottom, left and right that no frame of uint8 [T, H, W, 3] lights up.

    Black from farther in than `max_ratio` is a dark scene, a single line is an artefact of scaling, and black that ends in
    a twilight is the night: none of them is a bar, whose end is a straight edge.
    """
    brightest = frames.max(axis=(0, 3))
    ends = []
    for axis in (1, 0):
        profile = np.percentile(brightest, 90, axis=axis)
        lit = np.flatnonzero(profile > level)
        n = len(profile)
        both = (int(lit[0]), int(n - 1 - lit[-1])) if len(lit) else (0, 0)
        mean = brightest.mean(axis=axis)
        for end, inward in zip(both, (mean, mean[::-1]), strict=True):
            straight = float(inward[end : end + 3].max() - inward[:end].mean()) > 14 if 0 < end < n - 3 else False
            ends.append(end if straight and 2 <= end <= max_ratio * n else 0)
    return ends[0], ends[1], ends[2], ends[3]


def _measure(rgb: np.ndarray) -> tuple[float, ...]:
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    largest, smallest = rgb.max(axis=2), rgb.min(axis=2)
    middle, high = np.percentile(grey, (50, 98))
    half_clipped = float(((largest >= 252) & (smallest < 240)).mean())
    return (
        float((grey >= 248).mean()),
        half_clipped,
        float(high),
        float(middle),
        _blur_px(grey) * 192 / min(grey.shape),
        _grain_levels(grey),
        _light_saturation(rgb),
    )


def _blur_px(grey: np.ndarray) -> float:
    """Sigma of the sharpest edges by blurring once more (Zhuo and Sim, 2011): soft edges lose little by it.

    The strongest edges of every region count, and of the regions the second sharpest tenth, so that neither a shallow
    depth of field nor a subtitle on a soft picture decides.
    """
    more_px = 1.0
    gradients = []
    for picture in (grey.astype(np.float32), cv2.GaussianBlur(grey.astype(np.float32), (0, 0), more_px)):
        gradients.append(cv2.magnitude(*(cv2.Sobel(picture, cv2.CV_32F, x, 1 - x, scale=1 / 8) for x in (1, 0))))
    sharp, soft = gradients
    found = []
    for rows in np.array_split(np.arange(grey.shape[0]), _GRID[1]):
        for columns in np.array_split(np.arange(grey.shape[1]), _GRID[0]):
            cell = sharp[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            limit = float(np.percentile(cell, 97))
            if limit < 3.0:
                continue
            softened = soft[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            strong = cell >= limit
            ratio = float(np.median(cell[strong] / np.maximum(softened[strong], 0.1)))
            found.append(more_px / np.sqrt(max(ratio**2 - 1.0, 0.02)))
    return float(np.percentile(found, 15)) if len(found) >= 3 else 0.0


def _grain_levels(grey: np.ndarray) -> float:
    """Immerkær's estimate of noise (1996) over the calm quarter of the regions."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = np.abs(cv2.filter2D(grey.astype(np.float32), -1, kernel))
    cells = cv2.resize(response, _GRID, interpolation=cv2.INTER_AREA)
    return float(np.percentile(cells, 25) * np.sqrt(np.pi / 2) / 6)


def _light_saturation(rgb: np.ndarray) -> float:
    """HSV saturation of the lightest ninth of every region, its tenth percentile over regions that are not black."""
    columns, rows = _GRID
    small = cv2.resize(rgb, (columns * 6, rows * 6), interpolation=cv2.INTER_AREA).astype(np.float32)
    cells = small.reshape(rows, 6, columns, 6, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 36, 3)
    luma = cells @ np.array([0.299, 0.587, 0.114], np.float32)
    lights = np.take_along_axis(cells, luma.argsort(axis=1)[:, -4:, None], axis=1).mean(axis=1)
    lights = lights[lights.max(axis=1) > 60]
    return float(np.percentile(1 - lights.min(axis=1) / lights.max(axis=1), 10)) if len(lights) >= 6 else 0.0
