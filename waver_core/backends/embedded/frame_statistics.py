"""Classical features of video on a grid, in place of Qwen2.5-VL's for representation alignment (Waver §4.2).

What a cell of space and time holds: its colours and how much they vary, the directions of its edges (unsigned, in eight
soft bins: Dalal and Triggs, 2005), how strong they are, how much it changes from frame to frame, and where it moves (dense
flow: signed, against the rest of the picture, spread, expansion and rotation). They say nothing of what is seen; they do
hold direction and colour apart from texture, which is what a small model learns last.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from waver_core.backends.embedded.dis_flow import DisFlow
from waver_core.registry import register

SIDE_PX = 128
"""Short side at which everything is measured; motion is in its percent per frame, whatever the clip's size."""
_BINS = 8
_COLOURS = (np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]) / np.sqrt([[3], [2], [6]]) / 127.5).astype(np.float32)

# Name, mean and standard deviation over rendered scenes and film.
_STATISTICS = (
    ("luma", 0.0, 0.6),
    ("red_blue", 0.07, 0.23),
    ("green", 0.0, 0.11),
    ("luma_spread", 0.325, 0.18),
    ("red_blue_spread", 0.075, 0.09),
    ("green_spread", 0.04, 0.06),
    *((f"gradient_{k * 180 // _BINS}_deg", 0.31, 0.13) for k in range(_BINS)),
    ("gradient_size", 0.28, 0.1),
    ("change", 0.1, 0.095),
    ("flow_x", 0.0, 0.7),
    ("flow_y", 0.0, 0.7),
    ("speed", 0.73, 0.65),
    ("residual_x", 0.0, 0.56),
    ("residual_y", 0.0, 0.56),
    ("expansion", 0.0, 0.12),
    ("rotation", 0.0, 0.12),
    ("flow_spread", 0.5, 0.58),
)
NAMES = tuple(name for name, _, _ in _STATISTICS)
_MOTION = 9
"""Maps of `_motion`."""


@register("feature_extractor", "frame_statistics")
class FrameStatistics:
    """Standardised features, clipped to five deviations; about 1.5 ms a frame of 64x64 and 3 ms of 352x192."""

    fingerprint = "frame_statistics-1"
    dim = len(NAMES)

    def __init__(self) -> None:
        self._flow = DisFlow()

    def extract(self, clips: Sequence[np.ndarray], grids: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """See `FeatureExtractor`. A cell of time is an equal share of the clip; an image does not move."""
        means, deviations = (np.array([row[k] for row in _STATISTICS], np.float32) for k in (1, 2))
        raw = [self.measure(clip, grid) for clip, grid in zip(clips, grids, strict=True)]
        return [np.clip((features - means) / deviations, -5, 5) for features in raw]

    def measure(self, clip: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
        """The same before standardisation: float32 [Tf, Hf, Wf, dim], in the order of `NAMES`."""
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not clip.size:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], not {clip.dtype} {list(clip.shape)}")
        if min(grid) < 1:
            raise ValueError(f"a grid has at least one cell along each axis, not {grid}")
        frames = _sized(clip)
        flow = self._flow.flow(frames) * np.float32(100 / SIDE_PX)
        maps = np.stack([_cells(_appearance(frame), grid[1:]) for frame in frames])
        moves = np.zeros((len(frames), *grid[1:], _MOTION), np.float32)
        for t in range(1, len(frames)):  # motion into a frame belongs to it; the first one takes that of the second
            moves[t] = _cells(_motion(frames[t - 1], frames[t], flow[t - 1]), grid[1:])
        if len(frames) > 1:
            moves[0] = moves[1]
        shares = _overlaps(len(frames), grid[0])
        return _described(*(np.tensordot(shares, m, axes=1) for m in (maps, moves)))


def _sized(clip: np.ndarray) -> np.ndarray:
    """The clip at a short side of `SIDE_PX`, and at most four times that wide or high."""
    height, width = clip.shape[1:3]
    scale = SIDE_PX / min(height, width)
    size = tuple(min(4 * SIDE_PX, max(1, round(side * scale))) for side in (width, height))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.stack([cv2.resize(np.ascontiguousarray(frame), size, interpolation=how) for frame in clip])


def _appearance(frame: np.ndarray) -> np.ndarray:
    """Frame uint8 [H, W, 3] -> maps whose means over a cell say how it looks, float32 [H, W, 3 + 3 + 8]."""
    colours = (frame.astype(np.float32) - 127.5) @ _COLOURS.T
    grey = np.ascontiguousarray(colours[..., 0])
    x, y = cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=1 / 8)
    size, angle = cv2.cartToPolar(x, y)
    place = angle * (_BINS / np.pi)  # twice round the bins: an edge has no sign
    low = np.floor(place)
    upper = (place - low) * size
    maps = np.zeros((*grey.shape, 6 + _BINS), np.float32)
    maps[..., :3], maps[..., 3:6] = colours, colours * colours
    rows, columns = np.arange(grey.shape[0])[:, None], np.arange(grey.shape[1])
    maps[rows, columns, 6 + low.astype(np.int64) % _BINS] = size - upper
    maps[rows, columns, 6 + (low.astype(np.int64) + 1) % _BINS] = upper
    return maps


def _motion(before: np.ndarray, after: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Maps whose means over a cell say how it moves, float32 [H, W, 9]; flow in percent of the short side."""
    change = cv2.absdiff(before, after).astype(np.float32).mean(axis=2) / 255
    u, v = np.ascontiguousarray(flow[..., 0]), np.ascontiguousarray(flow[..., 1])
    common = np.median(flow.reshape(-1, 2), axis=0)
    ux, uy = cv2.Sobel(u, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(u, cv2.CV_32F, 0, 1, scale=1 / 8)
    vx, vy = cv2.Sobel(v, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(v, cv2.CV_32F, 0, 1, scale=1 / 8)
    square = u * u + v * v
    return np.stack([change, u, v, np.sqrt(square), square, u - common[0], v - common[1], ux + vy, vx - uy], axis=2)


def _cells(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Means over equal rectangles, float32 [H, W, K] -> [h, w, K]."""
    rows, columns = _overlaps(maps.shape[0], size[0]), _overlaps(maps.shape[1], size[1])
    return np.tensordot(rows, columns @ maps, axes=1)


def _overlaps(n: int, cells: int) -> np.ndarray:
    """Row c: how much of each of n equal pieces the c-th of `cells` equal parts covers, as shares of the part."""
    edges, pieces = np.arange(cells + 1) * (n / cells), np.arange(n)
    covered = np.minimum(edges[1:, None], pieces + 1) - np.maximum(edges[:-1, None], pieces)
    return (np.maximum(covered, 0) * (cells / n)).astype(np.float32)


def _described(look: np.ndarray, move: np.ndarray) -> np.ndarray:
    """Means over cells [..., 14] and [..., 9] -> the features [..., dim]; magnitudes are rooted, so that small ones count."""
    mean, square, edges = look[..., :3], look[..., 3:6], look[..., 6:]
    spread = np.sqrt(np.maximum(square - mean * mean, 0))
    strength = edges.sum(axis=-1, keepdims=True)
    directions = np.sqrt(edges / (strength + 0.004))
    change, flow, speed, energy, residual, turn = np.split(move, [1, 3, 4, 5, 7], axis=-1)
    uneven = np.sqrt(np.maximum(energy - (flow * flow).sum(axis=-1, keepdims=True), 0))
    signed = [np.sign(value) * np.sqrt(np.abs(value)) for value in (flow, residual, turn)]
    parts = [
        mean,
        spread,
        directions,
        np.sqrt(strength),
        np.sqrt(change),
        signed[0],
        np.sqrt(speed),
        *signed[1:],
        np.sqrt(uneven),
    ]
    return np.concatenate(parts, axis=-1, dtype=np.float32)
