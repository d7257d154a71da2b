"""From the path of a thing to phases of motion with directions, speeds and spans (Waver §3.3: sub-actions in time)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from waver_core.captions.facts import DIRECTIONS, Phase, speed_word

_MIN_DISTANCE = 0.04
"""Short sides that a thing must travel in a phase to count as moving."""
_MIN_SPEED = 0.015
_BEND = 0.012
"""Deviation from a straight path (rms, short sides) that is not looked into."""
_MIN_POINTS = 3


def phases_of(times_s: np.ndarray, path: np.ndarray, clip_s: float) -> tuple[Phase, ...]:
    """Phases of a path [N, 2] in short sides (y down) at times [N] from the clip's start; equal neighbours are joined.

    A phase has no span where it is the only one and covers nearly the whole clip.
    """
    if len(path) < 2 or times_s[-1] - times_s[0] <= 0:
        return ()
    cuts = _cuts(times_s, path, 0, len(path))
    parts = [(a, b, *_velocity(times_s, path, a, b)) for a, b in pairwise(cuts)]
    joined: list[tuple[int, int, str]] = []
    for a, b, motion, _ in parts:
        if joined and joined[-1][2] == motion:
            joined[-1] = (joined[-1][0], b, motion)
        else:
            joined.append((a, b, motion))
    out = []
    for a, b, motion in joined:
        _, velocity = _velocity(times_s, path, a, b)
        speed = round(velocity, 2)
        # The last frame of a clip stands for the time up to the clip's end.
        start_s = 0.0 if a == 0 and times_s[0] < 0.25 else float(times_s[a])
        end_s = float(times_s[min(b, len(times_s) - 1)])
        if b == len(times_s) and clip_s - times_s[-1] < 0.35:
            end_s = clip_s
        alone = len(joined) == 1 and end_s - start_s >= 0.85 * clip_s
        span = (None, None) if alone else (round(start_s, 1), round(end_s, 1))
        moving = motion != "rest"
        out.append(Phase(motion, speed_word(speed) if moving else None, speed if moving else None, *span))
    return tuple(out)


def direction_of(dx: float, dy: float) -> str:
    """Nearest of eight directions; y points down."""
    angles = {"right": 0, "down_right": 1, "down": 2, "down_left": 3, "left": 4, "up_left": 5, "up": 6, "up_right": 7}
    sector = round(float(np.arctan2(dy, dx)) / (np.pi / 4)) % 8
    return next(d for d in DIRECTIONS if angles[d] == sector)


def _velocity(times_s: np.ndarray, path: np.ndarray, a: int, b: int) -> tuple[str, float]:
    """Motion and speed (short sides a second) of points a to b by least squares."""
    t, p = times_s[a:b], path[a:b]
    centred = t - t.mean()
    velocity = (centred[:, None] * (p - p.mean(axis=0))).sum(axis=0) / max(float((centred**2).sum()), 1e-9)
    speed = float(np.hypot(*velocity))
    if speed * (t[-1] - t[0]) < _MIN_DISTANCE or speed < _MIN_SPEED:
        return "rest", 0.0
    return direction_of(*(float(v) for v in velocity)), speed


def _cuts(times_s: np.ndarray, path: np.ndarray, start: int, end: int) -> list[int]:
    """Indexes where straight stretches begin, and the end: split where two lines fit much better than one."""
    whole = _misfit(times_s[start:end], path[start:end])
    n = end - start
    if n < 2 * _MIN_POINTS or np.sqrt(whole / n) < _BEND:
        return [start, end]
    options = range(start + _MIN_POINTS, end - _MIN_POINTS + 1)
    errors = [_misfit(times_s[start:k], path[start:k]) + _misfit(times_s[k:end], path[k:end]) for k in options]
    best = int(np.argmin(errors))
    if errors[best] > 0.25 * whole:
        return [start, end]
    middle = options[best]
    return _cuts(times_s, path, start, middle)[:-1] + _cuts(times_s, path, middle, end)


def _misfit(times_s: np.ndarray, path: np.ndarray) -> float:
    """Sum of squared distances from the best straight and even motion."""
    design = np.column_stack([times_s, np.ones(len(times_s))])
    solution = np.linalg.lstsq(design, path, rcond=None)[0]
    return float(((path - design @ solution) ** 2).sum())
