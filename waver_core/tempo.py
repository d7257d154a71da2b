"""What only shows at the full frame rate: repeated and blended frames, freezes, jumps, shake and noise (Waver §3.2).

Six frames a second, enough for flow and captions, cannot tell slow motion from a slow scene nor a freeze from a pause.
These signals come from every frame of a small picture (short side about 72 px) and from a few rows of full-size luma, at
about a third of a millisecond each, while a source is decoded for the first time; the frames of a generated video give
the same columns by `full_rate_columns`. Slow motion from a high-speed camera repeats and blends nothing: it looks like a
slow scene, and nothing here sees it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import pairwise
from math import hypot
from typing import Any, NamedTuple

import cv2
import numpy as np

SMALL_SHORT_SIDE_PX = 72
SIGNALS_VERSION = 1
"""Goes up when the same frames give other numbers, so that stored ones are made anew."""
COLUMNS = {
    "repeat_factor": ("times that every picture is shown, where repeats are regular; 1 where they are not", "frames"),
    "blend_factor": ("frames from one sharp picture to the next, where those between are blends; 1 where none are", "frames"),
    "freeze_ratio": ("share of frames that stand still before the picture jumps on", ""),
    "jumps": ("times that the whole picture changes from one frame to the next", ""),
    "shake_short_sides": ("rms of the camera's path above about 1 Hz, in short sides of the picture", "short sides"),
    "camera_speed": ("median speed of the whole picture", "short sides/s"),
    "subject_speed": ("speed of the fastest fiftieth of the picture against the rest, median over time", "short sides/s"),
    "subject_pace": ("the same over the size of what moves at half that speed or more: lengths that it covers", "1/s"),
    "noise_levels": ("standard deviation of noise from frame to frame, at a short side of 72 px", "8-bit levels"),
}
"""Name -> (meaning, unit) of the columns."""
PREFIX = "quality_source_"
"""Stands before the names in the clip table, where a judge looks for them."""

_GRID_ROWS = 6
_HALF_SHORT_SIDE_PX = 36
_LUMA_ROWS = 24
_HIGH_PASS_S = 0.22
_MIN_AGREEMENT = 0.6
_FLOW_EVERY = 3
_FACTORS = (3, 4, 5, 6, 7, 8)  # twice is how drawn animation is shot, and 12 fps material kept in files of 24


class FrameSignals(NamedTuple):
    """One frame against those before it. Levels are of 8-bit luma; a block is a sixth of the short side."""

    change: float = 0.0
    """Mean absolute difference from the frame before, in the block where it is largest."""
    change_mean: float = 0.0
    """The same over the picture, once a change of brightness that all share is taken off."""
    moved: float = 0.0
    """Share of blocks in which that difference is beyond what a texture makes when it moves a little."""
    bend: float = 0.0
    """Rms of f[t-2] - 2 f[t-1] + f[t] in full-size luma: little where f[t-1] is the mean of its neighbours."""
    noise: float = 0.0
    """Standard deviation of noise that would explain the bend of the calmest quarter of the blocks."""
    shift_x: float = 0.0
    shift_y: float = 0.0
    """Median over blocks of the picture's shift since the frame before, in short sides."""
    camera_step: float = float("nan")
    subject_step: float = float("nan")
    """Median flow, and the 98th percentile of what differs from it, in short sides a frame; of every third frame only."""
    subject_pace: float = float("nan")
    """That percentile over the root of the area that moves at half of it or more, per frame."""


def luma_rows(luma: np.ndarray) -> np.ndarray:
    """uint8 [H, W] -> a few of its rows, float32 [about 24, W]: detail enough to tell a blend, at little cost."""
    step = max(1, len(luma) // _LUMA_ROWS)
    return luma[step // 2 :: step].astype(np.float32)


class SignalTracker:
    """Takes in the frames of a video in order and keeps ten numbers of each."""

    def __init__(self) -> None:
        self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._flow.setFinestScale(1)  # at a quarter of so small a picture, small things would be smoothed away
        self._grey: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._half = np.zeros((0, 0), np.float32)
        self._n_frames = 0
        self._numbers = array("f")  # a long source has a million frames: four bytes a number, not a Python object

    def signals(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """float32 [T, 10]: the signals of frames start to end, a column for every field of `FrameSignals`."""
        width = len(FrameSignals._fields)
        numbers = np.array(self._numbers[start * width : None if end is None else end * width], np.float32)
        return numbers.reshape(-1, width)

    def add(self, small: np.ndarray, rows: np.ndarray | None) -> None:
        """small: uint8 [h, w, 3]; rows: as `luma_rows` gives them, None where full-size luma is not at hand.

        A frame of another size than the one before has nothing to be compared with: all its numbers are 0.
        """
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
        rows = rows if rows is not None else grey
        height, width = grey.shape
        scale = _HALF_SHORT_SIDE_PX / min(height, width)
        half = cv2.resize(grey, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
        half = cv2.GaussianBlur(half, (0, 0), 1.2)
        if self._grey and (self._grey[-1].shape != grey.shape or self._rows[-1].shape != rows.shape):
            self._grey, self._rows = [], []
        self._numbers.extend(self._compare(grey, rows, half) if self._grey else FrameSignals())
        self._n_frames += 1
        self._grey, self._rows, self._half = [*self._grey[-1:], grey], [*self._rows[-1:], rows], half

    def _compare(self, grey: np.ndarray, rows: np.ndarray, half: np.ndarray) -> FrameSignals:
        height, width = grey.shape
        scale = _GRID_ROWS / min(height, width)
        grid = (max(1, round(width * scale)), max(1, round(height * scale)))
        before = self._grey[-1]
        difference = cv2.subtract(grey, before)
        blocks = _block_means(cv2.absdiff(grey, before), grid)
        steady = _block_means(np.abs(difference - float(cv2.mean(difference)[0])), grid)
        bend = noise = 0.0
        if len(self._grey) > 1:
            calm = _block_means(np.abs(self._grey[-2] + grey - 2.0 * before), grid)
            noise = float(np.percentile(calm, 25)) * float(np.sqrt(np.pi / 2 / 6))
            second = self._rows[-2] + rows - 2.0 * self._rows[-1]
            bend = float(cv2.norm(second) / np.sqrt(second.size))
        shift_x, shift_y = _block_shift(self._half, half, grid)
        moved = float((steady > 12.0).mean())
        steps = self._steps(before, grey) if self._n_frames % _FLOW_EVERY == 1 else (np.nan, np.nan, np.nan)
        return FrameSignals(float(blocks.max()), float(steady.mean()), moved, bend, noise, shift_x, shift_y, *steps)

    def _steps(self, before: np.ndarray, grey: np.ndarray) -> tuple[float, float, float]:
        flow = self._flow.calc(before.astype(np.uint8), grey.astype(np.uint8), None)[::2, ::2]
        camera = np.median(flow, axis=(0, 1))
        own = np.hypot(flow[..., 0] - camera[0], flow[..., 1] - camera[1])
        subject_px = float(np.percentile(own, 98))
        size_px = 2.0 * float(np.sqrt((own >= 0.5 * subject_px).sum()))  # every second pixel in either direction was taken
        side = min(grey.shape)
        return float(np.hypot(*camera)) / side, subject_px / side, subject_px / size_px


def _block_means(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    means: np.ndarray = cv2.resize(values, grid, interpolation=cv2.INTER_AREA)
    return means


def _block_shift(before: np.ndarray, after: np.ndarray, grid: tuple[int, int]) -> tuple[float, float]:
    """Lucas and Kanade's shift (1981) of every block with texture, and their median, in short sides.

    Not a number where few blocks agree with it: then it is not the camera that moves but what stands before it.
    """
    middle = (before + after) * 0.5
    dx, dy = (cv2.Scharr(middle, cv2.CV_32F, x, 1 - x, scale=1 / 32) for x in (1, 0))
    dt = after - before
    xx, xy, yy = cv2.split(_block_means(cv2.merge([dx * dx, dx * dy, dy * dy]), grid))
    xt, yt = (_block_means(d * dt, grid) for d in (dx, dy))
    determinant, trace = xx * yy - xy * xy, xx + yy
    good = (determinant > 0.02 * trace * trace) & (trace > 2.0)
    if good.sum() < 4:
        return np.nan, np.nan
    x = (xy * yt - yy * xt)[good] / determinant[good]
    y = (xy * xt - xx * yt)[good] / determinant[good]
    middle_x, middle_y = float(np.median(x)), float(np.median(y))
    distance = np.hypot(x - middle_x, y - middle_y)
    if (distance < 0.25 + 0.3 * np.hypot(middle_x, middle_y)).mean() < _MIN_AGREEMENT:
        return np.nan, np.nan
    side = min(before.shape)
    return middle_x / side, middle_y / side


def describe_signals(signals: np.ndarray, fps: float) -> dict[str, float]:
    """The columns of one clip from the signals of its frames [T, 10], in order; the first one's look back and are left out."""
    rows = signals[1:].astype(np.float64)
    change, change_mean, moved, bend, noise, shift_x, shift_y, camera_step, subject_step, pace = rows.T
    known = np.isfinite(camera_step)
    speeds = {
        "camera_speed": float(np.median(camera_step[known])) * fps if known.any() else 0.0,
        "subject_speed": float(np.median(subject_step[known])) * fps if known.any() else 0.0,
        "subject_pace": float(np.median(pace[known])) * fps if known.any() else 0.0,
    }
    still = {"repeat_factor": 1.0, "blend_factor": 1.0, "freeze_ratio": 0.0, "jumps": 0.0, "shake_short_sides": 0.0}
    if len(rows) < 5:
        return {**still, **speeds, "noise_levels": float(np.median(noise[1:])) if len(noise) > 1 else 0.0}
    lively = float(np.percentile(change, 90))
    repeats = change < max(0.5, 0.12 * lively) if lively > 1.5 else np.zeros(len(change), bool)
    frozen = _frozen(repeats, change)
    jumped = (lively > 1.5) & _jumps(change_mean, moved) & ~np.concatenate([[False], frozen[:-1]])
    return {
        "repeat_factor": _period(change, 3.0) if lively > 1.5 else 1.0,
        "blend_factor": _period(bend[1:], 1.5),
        "freeze_ratio": float(frozen.mean()),
        "jumps": float(jumped.sum()),
        "shake_short_sides": hypot(*(_shake(np.where(jumped, np.nan, s), fps) for s in (shift_x, shift_y))),
        **speeds,
        "noise_levels": float(np.median(noise[1:])),
    }


def _period(values: np.ndarray, min_contrast: float) -> float:
    """Distance in frames between regular bursts in a series [T]; 1 where it has none.

    A burst stands out from every other frame of its period by the contrast, and falls on the same beat most of the time.
    """
    best, best_contrast = 1.0, min_contrast / 1.1
    for factor in _FACTORS:
        periods = len(values) // factor
        if periods < 5:
            continue
        folded = values[: periods * factor].reshape(periods, factor)
        typical = np.median(folded, axis=0)
        beat = int(typical.argmax())
        contrast = float(typical[beat] / max(0.05, *np.delete(typical, beat)))
        if contrast > 1.1 * best_contrast and (folded.argmax(axis=1) == beat).mean() >= 0.6:
            best, best_contrast = float(factor), contrast
    return best


def _frozen(repeats: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Frames [T] within a stop of three or more after which the picture is farther on than one step would bring it.

    At least two stops, and motion at every frame in between: a scene that comes to rest, or slow motion, is none.
    """
    frozen = np.zeros(len(repeats), bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], repeats, [False]]).astype(int)))
    flowing = ~repeats & ~np.concatenate([[False], repeats[:-1]])
    if flowing.mean() < 0.15:
        return frozen
    step = float(np.median(change[flowing]))
    stops = 0
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start >= 3 and end < len(change) and change[end] > 1.3 * step:
            frozen[start:end] = True
            stops += 1
    return frozen if stops >= 2 else np.zeros(len(repeats), bool)


def _jumps(change_mean: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Steps [T] at which most of the picture changes far more than at the steps around; one that comes back is a flash."""
    found = np.zeros(len(moved), bool)
    for t in range(len(moved)):
        around = np.r_[change_mean[max(0, t - 6) : max(0, t - 1)], change_mean[t + 2 : t + 7]]
        if len(around) >= 4 and moved[t] >= 0.6 and change_mean[t] > 3.0 * max(2.0, float(np.percentile(around, 80))):
            found[t] = True
    close = np.flatnonzero(found)
    for a, b in pairwise(close):
        if b - a <= 6:
            found[a] = found[b] = False
    return found


def _shake(shift: np.ndarray, fps: float) -> float:
    """Typical size of the back and forth in the path that per-frame shifts [T] add up to: what a Gaussian takes off it.

    By the median, so that one jerk, or the start of a pan, is no shake; and 0 for what turns less than twice a second, or
    where most steps are unknown (not a number).
    """
    known = np.isfinite(shift)
    if known.mean() < 0.6:
        return 0.0
    at = np.arange(len(shift))
    path = np.cumsum(np.interp(at, at[known], shift[known]))
    path -= np.polyval(np.polyfit(at, path, 1), at)  # a steady pan leaves nothing, not even at the ends
    reach = min(max(1, round(3 * _HIGH_PASS_S * fps)), (len(path) - 1) // 2)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (_HIGH_PASS_S * fps)) ** 2)
    rough = path - np.convolve(path, weights, "same") / np.convolve(np.ones(len(path)), weights, "same")
    size = 1.4826 * float(np.median(np.abs(rough)))
    sides = np.sign(rough[np.abs(rough) > 0.5 * size])
    turns = int((np.diff(sides) != 0).sum())
    return size if turns >= max(3.0, 2.0 * len(shift) / fps) else 0.0


def full_rate_columns(frames: Iterable[np.ndarray], fps: float) -> dict[str, Any]:
    """`quality_source_*` columns of a video's frames, uint8 [H, W, 3] at the full rate: for videos that are no files yet."""
    tracker = SignalTracker()
    for frame in frames:
        scale = min(1.0, SMALL_SHORT_SIDE_PX / min(frame.shape[:2]))
        size = (max(2, round(frame.shape[1] * scale)), max(2, round(frame.shape[0] * scale)))
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        tracker.add(small, luma_rows(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)))
    return {f"{PREFIX}{name}": value for name, value in describe_signals(tracker.signals(), fps).items()}
