"""Photographic features on the familiar scale of 1 to 10: the embedded stand-in for the LAION aesthetic head.

It measures craft, not beauty: exposure, contrast, colour, sharpness, noise and where the detail lies. The scale is set so
that clean, well exposed footage lands between 5 and 7 and spoilt footage below 4, which makes the usual thresholds (4.5
to 5.5) mean something; it was not fitted to human votes, and its numbers must not be compared with LAION scores.
"""

from __future__ import annotations

import cv2
import numpy as np

from waver_core.backends.contracts import Aesthetics
from waver_core.registry import register

_SHORT_SIDE_PX = 288
_WEIGHTS = {"exposure": 0.22, "contrast": 0.18, "colourfulness": 0.16, "sharpness": 0.22, "noise": 0.1, "composition": 0.12}


@register("aesthetic_scorer", "photographic")
class Photographic:
    """Six features in [0, 1] per frame; about 3 ms a frame."""

    fingerprint = "photographic-1"

    def score(self, frames: np.ndarray) -> Aesthetics:
        """uint8 [T, H, W, 3] -> score [T] on 1 to 10 and its parts in [0, 1]; 1 is best in each (little noise, say)."""
        rows = [_features(frame) for frame in frames]
        parts = {name: np.array([row[name] for row in rows], np.float32) for name in _WEIGHTS}
        weighted = np.sum([weight * parts[name] for name, weight in _WEIGHTS.items()], axis=0)
        # One thing badly wrong spoils a picture whatever the rest is: half of the weight lies on the two worst parts.
        worst = np.sort(np.stack(list(parts.values())), axis=0)[:2].mean(axis=0)
        return Aesthetics((1.0 + 9.0 * (0.65 * weighted + 0.35 * worst)).astype(np.float32), parts)


def _features(frame: np.ndarray) -> dict[str, float]:
    height, width = frame.shape[:2]
    scale = min(1.0, _SHORT_SIDE_PX / min(height, width))
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    low, middle, high = np.percentile(grey, (2, 50, 98))
    # Mid-grey between 70 and 170 is well exposed; clipped shadows and lights count against it.
    clipped = float(np.mean(grey < 4) + np.mean(grey > 250))
    exposure = _ramp(middle, 15, 75) * (1 - _ramp(middle, 175, 235)) * (1 - _ramp(clipped, 0.05, 0.6))
    return {
        "exposure": exposure,
        "contrast": _ramp(float(high - low), 25, 170),
        "colourfulness": _ramp(_colourfulness(small), 4, 55),
        "sharpness": _ramp(_sharpness(grey), 0.08, 0.42),
        "noise": 1 - _ramp(_noise_levels(grey), 2.0, 12.0),
        "composition": _composition(grey),
    }


def _ramp(value: float, low: float, high: float) -> float:
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def _colourfulness(rgb: np.ndarray) -> float:
    """Hasler and Süsstrunk's measure (2003): about 15 is slightly, 45 quite and 80 highly colourful."""
    red, green, blue = (rgb[..., i].astype(np.float32) for i in range(3))
    rg, yb = red - green, 0.5 * (red + green) - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def _sharpness(grey: np.ndarray) -> float:
    """Share of detail that a further blur destroys (Crété et al., 2007): high for a sharp picture, low for a soft one.

    The sharpest tenth of 6x6 cells decides, since a shallow depth of field is no flaw.
    """
    fine = grey.astype(np.float32)
    blurred = cv2.blur(fine, (5, 5))
    lost, total = np.zeros_like(fine), np.zeros_like(fine)
    for axis in (0, 1):
        before, after = np.abs(np.diff(fine, axis=axis)), np.abs(np.diff(blurred, axis=axis))
        part = (slice(None, -1), slice(None)) if axis == 0 else (slice(None), slice(None, -1))
        lost[part] += np.maximum(0, before - after)
        total[part] += before
    cells = [cv2.resize(plane, (6, 6), interpolation=cv2.INTER_AREA) for plane in (lost, total)]
    ratio = cells[0] / (cells[1] + 1.0)
    return float(np.percentile(ratio, 90))


def _noise_levels(grey: np.ndarray) -> float:
    """Standard deviation of noise by Immerkær's kernel (1996), over the calm half of the picture."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = np.abs(cv2.filter2D(grey.astype(np.float32), -1, kernel))
    cells = cv2.resize(response, (8, 8), interpolation=cv2.INTER_AREA)
    return float(np.percentile(cells, 25) * np.sqrt(np.pi / 2) / 6)


def _composition(grey: np.ndarray) -> float:
    """Whether detail gathers in and about the middle ground (thirds and centre) rather than at the very edges."""
    energy = cv2.resize(np.abs(cv2.Laplacian(grey, cv2.CV_32F)), (9, 9), interpolation=cv2.INTER_AREA)
    total = float(energy.sum())
    if total < 1e-3:
        return 0.0
    inner = float(energy[2:7, 2:7].sum()) / total
    return _ramp(inner, 0.15, 0.5)
