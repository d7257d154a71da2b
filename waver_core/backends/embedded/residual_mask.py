"""Foreground as what does not follow the camera: the embedded stand-in for a segmentation model.

It sees only things that move by themselves; a person who stands still belongs to the background until he moves.
"""

from __future__ import annotations

import cv2
import numpy as np

from waver_core.registry import register


@register("foreground_segmenter", "residual")
class ResidualMask:
    """Thresholds the flow's residual, cleans it by opening and closing, and drops specks."""

    def __init__(self, min_residual_px: float = 0.6, relative: float = 4.0, min_area_ratio: float = 0.0015) -> None:
        self._min_residual_px, self._relative, self._min_area_ratio = min_residual_px, relative, min_area_ratio
        self.fingerprint = f"residual-1-{min_residual_px:g}-{relative:g}-{min_area_ratio:g}"

    def segment(self, frames: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """Residual float32 [T-1, H, W] in px -> bool [T-1, H, W]. The threshold rises with the background's own noise."""
        masks = np.zeros(residual.shape, bool)
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
        for t, plane in enumerate(residual):
            noise_px = float(np.median(plane[::2, ::2]))
            raw = (plane > max(self._min_residual_px, self._relative * noise_px)).astype(np.uint8)
            if not raw.any():
                continue
            clean = cv2.morphologyEx(cv2.morphologyEx(raw, cv2.MORPH_OPEN, kernel), cv2.MORPH_CLOSE, kernel)
            count, labels, stats, _ = cv2.connectedComponentsWithStats(clean)
            big = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= self._min_area_ratio * plane.size]
            if big:
                masks[t] = np.isin(labels, big)
        return masks
