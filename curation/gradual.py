"""Dissolves and fades, with both ends (Waver §3.1): what PySceneDetect mostly misses.

They are found by what they are: for some stretch every frame is a mixture of the frames at its two ends, the share of the
second grows steadily, and the contrast of the middle is that of a mixture. A pan or a zoom fails that test, since its
middle frames keep their contrast and hold what neither end does. Pure numpy on small luma thumbnails.
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

from curation.shots import ShotRules, Transition


def gradual_transitions(luma: np.ndarray, cuts: list[int], fps: float, rules: ShotRules) -> list[Transition]:
    """Fades and dissolves in luma thumbnails [T, h, w] (uint8).

    `cuts` are sure hard cuts: dissolves that cross one are not looked for. Fades are, for a short fade into black looks
    like a cut to a colour descriptor.
    """
    x = luma.reshape(len(luma), -1).astype(np.float32)
    fades = _fades(x, rules)
    bounds = sorted({0, len(x), *cuts, *(edge for f in fades for edge in (f.start, f.end))})
    candidates: list[tuple[float, int, int]] = []
    for start, end in pairwise(bounds):
        if not any(f.start <= start < f.end for f in fades):
            for length in _window_lengths(fps, rules.max_blend_s):
                candidates.extend(_blend_windows(x, start, end, length, rules))
    candidates.sort(reverse=True)
    taken = list(fades)
    for _, start, end in candidates:
        if any(start < t.end + 2 and t.start < end + 2 for t in taken):
            continue
        fitted = _fit_ends(x, start, end, bounds)
        if fitted is None or any(fitted.start < t.end and t.start < fitted.end for t in taken):
            continue
        if _is_dissolve(luma, fitted, fps, rules):
            taken.append(fitted)
    return sorted(taken, key=lambda t: t.start)


def _fades(x: np.ndarray, rules: ShotRules) -> list[Transition]:
    """Stretches of one flat colour with the ramps that lead in and out; the whole belongs to no shot.

    From a flat frame outwards the picture must keep its structure while its contrast grows, frame by frame. Without a
    ramp on either side (a cut to black) only the flat frames themselves are left out.
    """
    flat = x.std(axis=1) < rules.flat_std
    found: list[Transition] = []
    t = 0
    while t < len(x):
        if not flat[t]:
            t += 1
            continue
        end = t
        while end < len(x) and flat[end]:
            end += 1
        start_ramp = _ramp(x, t - 1, -1, x[t], found[-1].end if found else 0)
        end_ramp = _ramp(x, end, 1, x[end - 1], len(x) - 1)
        found.append(Transition("fade" if start_ramp < t - 1 or end_ramp > end else "blank", start_ramp, end_ramp))
        t = max(end, end_ramp)
    return found


def _ramp(x: np.ndarray, first: int, step: int, blank: np.ndarray, limit: int) -> int:
    """Walk from a flat frame's neighbour outwards while contrast grows; the first frame beyond the ramp (or its start)."""
    t, misses, best, reach = first, 0, 0.0, first
    colour = float(blank.mean())
    while (t > limit if step < 0 else t < limit) and misses < 3:
        here, beyond = x[t] - colour, x[t + step] - colour
        size_here, size_beyond = float(np.linalg.norm(here)), float(np.linalg.norm(beyond))
        alike = float(here @ beyond) / max(size_here * size_beyond, 1e-6)
        if alike < 0.8 and t != first:
            break
        if size_beyond > max(best, size_here) * 1.012:
            best, misses, reach = size_beyond, 0, t + step
        else:
            misses += 1
        t += step
    length = abs(reach - first)
    if length < 2:
        return first + 1 if step < 0 else first
    return reach + 1 if step < 0 else reach


def _window_lengths(fps: float, max_s: float) -> list[int]:
    lengths, length = [], 5.0
    while length <= max_s * fps:
        lengths.append(round(length))
        length *= 1.35
    return sorted(set(lengths))


def _blend_windows(x: np.ndarray, start: int, end: int, length: int, rules: ShotRules) -> list[tuple[float, int, int]]:
    """Windows of one length whose inner frames are steady mixtures of the end frames, as (score, first, last)."""
    if end - start <= length:
        return []
    firsts = np.arange(start, end - length, max(1, length // 8))
    a, b = x[firsts], x[firsts + length]
    change = b - a
    energy = np.einsum("td,td->t", change, change)
    rms = np.sqrt(energy / x.shape[1])
    ok = rms > rules.min_blend_rms
    if not ok.any():
        return []
    firsts, a, b, change, energy, rms = (v[ok] for v in (firsts, a, b, change, energy, rms))
    shares, residuals = [], []
    for part in (0.2, 0.35, 0.5, 0.65, 0.8):
        inner = x[firsts + round(part * length)] - a
        share = np.einsum("td,td->t", inner, change) / energy
        rest = inner - share[:, None] * change
        shares.append(share - round(part * length) / length)
        residuals.append(np.einsum("td,td->t", rest, rest) / energy)
    # The largest residual a mixture may leave is at the middle, 1/4 of the energy for unrelated inner frames.
    residual = np.max(residuals, axis=0)
    skew = np.max(np.abs(shares), axis=0)
    good = (residual < rules.max_residual) & (skew < 0.2) & _different_pictures(a, b)
    good &= _excess(a, x[firsts + length // 2], b) < rules.max_excess
    score = rms * (1 - residual / rules.max_residual * 0.7) * (1 - skew)
    return [(float(s), int(f), int(f) + length) for s, f in zip(score[good], firsts[good], strict=True)]


def _excess(a: np.ndarray, middle: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Contrast of middle frames beyond that of an even mixture of the ends: near 0 in a dissolve, near 1 for travel.

    Two unrelated pictures mixed lose half of their variance, moving content or not; a pan keeps it. [T, D] each -> [T].
    """
    ca, cm, cb = (v - v.mean(axis=1, keepdims=True) for v in (a, middle, b))
    mixture = (ca + cb) / 2
    gap = np.maximum(np.einsum("td,td->t", cb - ca, cb - ca) / 4, 1e-6)
    return (np.einsum("td,td->t", cm, cm) - np.einsum("td,td->t", mixture, mixture)) / gap


def _different_pictures(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """True where two pictures are not one scene under other light: their structures differ, or one of them has none."""
    ca, cb = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    na, nb = np.linalg.norm(ca, axis=1), np.linalg.norm(cb, axis=1)
    correlation = np.einsum("td,td->t", ca, cb) / np.maximum(na * nb, 1e-6)
    flat = np.minimum(na, nb) < 0.12 * np.maximum(na, nb)
    return (correlation < 0.75) | flat


def _fit_ends(x: np.ndarray, first: int, last: int, bounds: list[int]) -> Transition | None:
    """Exact ends of a transition near [first, last]: a line through the middle of the mixture's share, carried to 0 and 1."""
    low = max(b for b in bounds if b <= first)
    high = min(b for b in bounds if b > last)
    length = last - first
    a_at, b_at = first, last
    for _ in range(4):  # anchors inside the blend shorten it: move them out and fit again
        a, b = x[a_at], x[b_at]
        change = b - a
        span = np.arange(max(low, first - length), min(high, last + length + 1))
        share = (x[span] - a) @ change / max(float(change @ change), 1e-6)
        inner = (share > 0.15) & (share < 0.85) & (span > a_at) & (span < b_at)
        if inner.sum() < 2:
            return None
        slope, offset = np.polyfit(span[inner], share[inner], 1)
        if slope <= 0:
            return None
        start, end = -offset / slope, (1 - offset) / slope
        margin = max(1, round(0.12 * (end - start)))
        a_new = int(np.clip(np.floor(start) - margin, low, first))
        b_new = int(np.clip(np.ceil(end) + margin, last, high - 1))
        if (a_new, b_new) == (a_at, b_at):
            break
        a_at, b_at = a_new, b_new
    begin, finish = int(np.floor(start)) + 1, int(np.ceil(end))
    begin, finish = max(low, begin), min(high, finish)
    if finish - begin < 2:
        return None
    contrast = sorted((float(x[max(low, begin - 1)].std()), float(x[min(high - 1, finish)].std())))
    return Transition("fade" if contrast[0] < 0.3 * contrast[1] else "dissolve", begin, finish)


def _is_dissolve(luma: np.ndarray, found: Transition, fps: float, rules: ShotRules) -> bool:
    """A dissolve changes the whole picture at one pace, then stops: what a passing car or a pan does not do.

    Judged on a grid of 48 cells: most of those that change must rise from 0 to 1 along the same ramp, and outside the
    transition the picture must be at rest compared with the change inside.
    """
    if found.end - found.start < max(3, rules.min_blend_s * fps):
        return False
    n, height, width = luma.shape
    before, after = max(0, found.start - 1), min(n - 1, found.end)
    inner = luma[before : after + 1].astype(np.float32)
    level = np.median(inner, axis=(1, 2), keepdims=True)
    inner -= np.clip(level - level[0], -40, 40)  # a small change of exposure is no change of picture
    rows, columns = (6, 8) if width >= height else (8, 6)
    cells = inner[:, : height // rows * rows, : width // columns * columns]
    cells = cells.reshape(len(inner), rows, height // rows, columns, width // columns)
    cells = cells.transpose(0, 1, 3, 2, 4).reshape(len(inner), 48, -1)
    change = cells[-1] - cells[0]
    energy = np.einsum("cp,cp->c", change, change)
    lively = cells.std(axis=(0, 2)) > 1.0  # letterbox bars never change and have no vote
    strong = energy > 0.25 * energy[lively].mean() if lively.any() else energy > 0
    if strong.sum() < rules.min_coverage * max(1, int(lively.sum())):
        return False
    if _is_travel(luma[before], luma[(before + after) // 2], luma[after]):
        return False
    share = np.einsum("tcp,cp->tc", cells[:, strong] - cells[0, strong], change[strong]) / energy[strong]
    ramp = np.linspace(0, 1, len(inner))[:, None]
    return float(np.median(np.abs(share - ramp).max(axis=0))) < rules.max_ramp_error


def _is_travel(first: np.ndarray, middle: np.ndarray, last: np.ndarray) -> bool:
    """Whether three pictures are one scene seen in passing: the middle one is the first moved, the last moved twice as far.

    Regular patterns (tiles, blinds) that travel by half their period can pass for a mixture; nothing that dissolves moves.
    """
    big = [cv2.resize(p, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC) for p in (first, middle, last)]
    height, width = big[0].shape
    top, left = height // 5, width // 5
    template = big[0][top : height - top, left : width - left]
    if template.std() < 1:
        return False
    found = []
    for picture in big[1:]:
        scores = cv2.matchTemplate(picture, template, cv2.TM_CCOEFF_NORMED)
        _, best, _, (x, y) = cv2.minMaxLoc(scores)
        found.append((best, np.array([x - left, y - top], float)))
    (match_middle, half), (match_last, whole) = found
    length = float(np.hypot(*whole))
    steady = float(np.hypot(*(whole - 2 * half))) < 0.5 * length + 2
    return length >= 3 and steady and match_middle > 0.8 and match_last > 0.7
