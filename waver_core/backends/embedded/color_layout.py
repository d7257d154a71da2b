"""Frame descriptors from colour and layout: what the embedded profile has in place of DINOv2 (Waver §3.1).

Two parts, each of unit length, joined with equal weight: soft YCrCb histograms in a 3x3 grid (square-rooted, so that the
cosine is the Bhattacharyya coefficient) and the sign and size of coarse luma structure. It tells shots apart by colour
and composition; unlike DINOv2 it knows nothing of objects, so two views of one room are two things to it.
"""

from __future__ import annotations

import cv2
import numpy as np

from waver_core.registry import register

_GRID = 3
_LUMA_BINS, _CHROMA_BINS = 8, 4
_SIZE_PX = (48, 27)


@register("frame_embedder", "color_layout")
class ColorLayout:
    """Embeds frames at 48x27; about 0.1 ms a frame."""

    fingerprint = "color_layout-2"
    short_side_px = 72

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] RGB -> float32 [T, D], rows of unit length."""
        small = [cv2.resize(f, _SIZE_PX, interpolation=cv2.INTER_AREA) for f in frames]
        ycc = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2YCrCb) for f in small])
        joined = np.concatenate([_histograms(ycc), _layout(ycc[..., 0])], axis=1)
        return (joined / np.sqrt(2.0)).astype(np.float32)


def _histograms(ycc: np.ndarray) -> np.ndarray:
    """Square roots of 3x3 colour histograms, luma bins shared softly so that a slow brightening causes no jump."""
    n, height, width, _ = ycc.shape
    rows, cols = np.arange(height) * _GRID // height, np.arange(width) * _GRID // width
    cell = (rows[:, None] * _GRID + cols[None, :])[None]
    luma = ycc[..., 0].astype(np.float32) * ((_LUMA_BINS - 1) / 255.0)
    low = luma.astype(np.int64)
    weight_high = luma - low
    chroma = np.clip((ycc[..., 1:].astype(np.int64) - 64) * _CHROMA_BINS // 128, 0, _CHROMA_BINS - 1)
    per_cell = _LUMA_BINS * _CHROMA_BINS * _CHROMA_BINS
    size = _GRID * _GRID * per_cell
    base = (np.arange(n)[:, None, None] * size) + cell * per_cell + (chroma[..., 0] * _CHROMA_BINS + chroma[..., 1]) * _LUMA_BINS
    counts = np.bincount((base + low).ravel(), (1.0 - weight_high).ravel(), minlength=n * size)
    counts += np.bincount((base + np.minimum(low + 1, _LUMA_BINS - 1)).ravel(), weight_high.ravel(), minlength=n * size)
    # Grouping neighbouring bins' mass by the root keeps small patches visible beside large flat ones.
    roots = np.sqrt(counts.reshape(n, size))
    return roots / np.linalg.norm(roots, axis=1, keepdims=True)


def _layout(luma: np.ndarray) -> np.ndarray:
    """Coarse luma structure (16x9, mean removed) of unit length; a flat frame gets a constant direction of its own."""
    coarse = (
        np.stack([cv2.resize(f, (16, 9), interpolation=cv2.INTER_AREA) for f in luma]).reshape(len(luma), -1).astype(np.float32)
    )
    centred = coarse - coarse.mean(axis=1, keepdims=True)
    joined = np.concatenate([centred, np.full((len(luma), 1), 12.0, np.float32)], axis=1)
    return joined / np.linalg.norm(joined, axis=1, keepdims=True)
