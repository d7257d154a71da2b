"""A still picture brought to the size that a model asks for."""

from __future__ import annotations

import cv2
import numpy as np


def fitted(picture: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """uint8 [h, w, 3], resized to cover the size and cut to it in the middle: uint8 [height_px, width_px, 3]."""
    height, width = picture.shape[:2]
    if (height, width) == (height_px, width_px):
        return picture
    scale = max(height_px / height, width_px / width)
    resized = cv2.resize(
        picture,
        (max(width_px, round(width * scale)), max(height_px, round(height * scale))),
        interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC,
    )
    return np.ascontiguousarray(middle(resized, height_px, width_px))


def middle(frames: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """The middle of one picture or of several: [..., H, W, 3] -> [..., height_px, width_px, 3]."""
    top, left = (frames.shape[-3] - height_px) // 2, (frames.shape[-2] - width_px) // 2
    return frames[..., top : top + height_px, left : left + width_px, :]
