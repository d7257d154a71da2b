"""What a language model is shown of a clip: a few frames, brought to size, with their times from the clip's own start."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from waver_core.backends.contracts import ClipView


class Sampled(NamedTuple):
    """Frames uint8 [T, H, W, 3], their times in seconds from the clip's start [T], and the clip's length in seconds (0 for
    an image)."""

    rgb: np.ndarray
    times_s: np.ndarray
    duration_s: float


def span_of(view: ClipView) -> tuple[float, float]:
    """Start in seconds from the start of the source's stream, and length in seconds.

    From the row where it has them; else from the frames' times, the last frame lasting as long as the frames' usual step.
    """
    if view.row.get("kind") == "image":
        return (float(view.times_s[0]) if len(view.times_s) else 0.0), 0.0
    start, end = view.row.get("start_s"), view.row.get("end_s")
    if start is not None and end is not None:
        return float(start), float(end) - float(start)
    times = np.asarray(view.times_s, float)
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return float(times[0]), float(times[-1] - times[0]) + step


def sample(view: ClipView, frames: int, fps: float | None = None, short_side_px: int | None = None) -> Sampled:
    """At most `frames` frames: at `fps` from the clip's start where that suffices, else spread evenly from first to last.

    Frames are only ever made smaller. Raises `ValueError` for a clip without frames.
    """
    n = len(view.rgb)
    if n == 0 or len(view.times_s) != n:
        raise ValueError(f"the clip has {n} frames and {len(view.times_s)} times")
    start_s, duration_s = span_of(view)
    times = np.asarray(view.times_s, float) - start_s
    wanted = math.ceil(duration_s * fps - 1e-6) if fps else n
    if fps and 0 < wanted <= frames:
        targets = np.arange(wanted) / fps
        picked = np.unique([int(np.argmin(np.abs(times - t))) for t in targets])
    else:
        picked = np.unique(np.linspace(0, n - 1, min(frames, n)).round().astype(int))
    rgb = np.stack([_shrunk(view.rgb[k], short_side_px) for k in picked])
    return Sampled(rgb, np.clip(times[picked], 0.0, None), duration_s)


def _shrunk(frame: np.ndarray, short_side_px: int | None) -> np.ndarray:
    height, width = frame.shape[:2]
    if short_side_px is None or min(height, width) <= short_side_px:
        return frame
    scale = short_side_px / min(height, width)
    return cv2.resize(frame, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
