"""Where shots begin and end: hard cuts to the exact frame, dissolves and fades with both ends (Waver §3.1).

Pure numpy on per-frame signals, so it is tested without a video. PySceneDetect proposes hard cuts and is confirmed by the
similarity of frame descriptors, which also finds the cuts it misses. Gradual transitions come from `curation.gradual`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Transition(NamedTuple):
    """Frames [start, end) belong to no shot (none for a cut). Kinds: cut, dissolve, fade, blank and gap (damaged frames)."""

    kind: str
    start: int
    end: int


class Shot(NamedTuple):
    """Frames [start, end) of one camera take, and the kinds of transition on both sides ('edge' at the file's ends)."""

    start: int
    end: int
    transition_in: str
    transition_out: str


@dataclass(frozen=True)
class ShotRules:
    """Thresholds. Similarities are cosines of neighbouring frame descriptors."""

    cut_similarity: float = 0.6
    """Below this a lone drop is a cut whether PySceneDetect saw it or not."""
    confirm_similarity: float = 0.86
    """A cut of PySceneDetect stands only if the similarity next to it falls below this."""
    confirm_correlation: float = 0.87
    """Or if the luma structure on its two sides correlates less than this."""
    scene_cut_similarity: float = 0.5
    """Between sparse samples of a scene embedder: below this there is a cut between two neighbours."""
    scene_confirm_similarity: float = 0.75
    """Below this a cut of PySceneDetect between two neighbours stands."""
    contrast: float = 3.0
    """How many times larger than its neighbours' a drop must be."""
    min_blend_rms: float = 10.0
    """Luma RMS between the two ends of a gradual transition, of 255."""
    max_residual: float = 0.2
    """Share of the change that a mixture of the two ends leaves unexplained."""
    max_excess: float = 0.4
    """Contrast that the middle may have beyond a mixture's, between 0 (dissolve) and 1 (travel)."""
    max_blend_s: float = 2.6
    min_blend_s: float = 0.3
    min_coverage: float = 0.6
    """Share of the picture's cells that must take part in a dissolve."""
    max_ramp_error: float = 0.3
    """Median over those cells of the largest distance from a straight ramp."""
    flat_std: float = 2.5
    """A frame whose luma thumbnail deviates less is blank (black, white, one colour)."""


def hard_cuts(similarity: np.ndarray, proposed: list[int], rules: ShotRules, luma: np.ndarray | None = None) -> list[int]:
    """First frames of new shots. similarity[t] is the cosine of frames t-1 and t ([T], similarity[0] = 1).

    luma: thumbnails [T, h, w]; with them a proposed cut between alike colours stands by its change of structure.
    """
    drop = 1.0 - similarity
    n = len(drop)
    cuts: set[int] = set()
    for t in range(1, n):
        around = np.concatenate([drop[max(1, t - 6) : t], drop[t + 1 : t + 7]])
        usual = float(np.median(around)) if len(around) else 0.0
        lone = drop[t] >= rules.contrast * (usual + 0.02) and drop[t] == drop[max(1, t - 2) : t + 3].max()
        if similarity[t] < rules.cut_similarity and lone:
            cuts.add(t)
    for frame in proposed:
        low, high = max(1, frame - 2), min(n, frame + 3)
        if low < high:
            best = low + int(np.argmin(similarity[low:high]))
            if similarity[best] < rules.confirm_similarity:
                cuts.add(best)
            elif luma is not None and 0 < frame < n and _correlation(luma[frame - 1], luma[frame]) < rules.confirm_correlation:
                cuts.add(frame)
    return _apart(sorted(cuts), drop, min_frames=3)


def scene_cuts(
    at: np.ndarray,
    vectors: np.ndarray,
    similarity: np.ndarray,
    proposed: list[int],
    taken: list[tuple[int, int]],
    rules: ShotRules,
) -> list[int]:
    """First frames of the shots that only a scene embedder tells apart (Waver §3.1: a cut where the similarity falls).

    at, vectors: frames [K] that it saw, a few a second, and their embeddings [K, D] of about unit length. Where two of them
    are unlike, the cut is put where `similarity` [T] of neighbouring frames is least. `taken`: [start, end) of what is
    known already; a stretch that touches it is left alone. A drop among drops of its size is a fast move, not a cut.
    """
    drop = 1.0 - np.einsum("kd,kd->k", vectors[1:], vectors[:-1])
    cuts = []
    for k, (before, after) in enumerate(pairwise(at.tolist())):
        if any(start <= after + 1 and end >= before for start, end in taken):
            continue
        around = np.concatenate([drop[max(0, k - 3) : k], drop[k + 1 : k + 4]])
        usual = float(np.median(around)) if len(around) else 0.0
        seen = [p for p in proposed if before < p <= after]
        if drop[k] > 1 - rules.scene_cut_similarity and drop[k] >= rules.contrast * (usual + 0.02):
            cuts.append(before + 1 + int(np.argmin(similarity[before + 1 : after + 1])))
        elif seen and drop[k] > 1 - rules.scene_confirm_similarity:
            low = max(1, seen[0] - 2)
            cuts.append(low + int(np.argmin(similarity[low : seen[0] + 3])))
    return cuts


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two pictures; 1 where one of them is flat, for then it tells nothing."""
    ca, cb = a.astype(np.float32) - a.mean(), b.astype(np.float32) - b.mean()
    size = float(np.sqrt((ca * ca).sum() * (cb * cb).sum()))
    return float((ca * cb).sum()) / size if size > 1e-3 else 1.0


def _apart(cuts: list[int], drop: np.ndarray, min_frames: int) -> list[int]:
    """Of cuts closer than `min_frames` (a flash, an interlaced pair) keep the stronger."""
    kept: list[int] = []
    for cut in cuts:
        if kept and cut - kept[-1] < min_frames:
            if drop[cut] > drop[kept[-1]]:
                kept[-1] = cut
        else:
            kept.append(cut)
    return kept


def split_shots(n_frames: int, cuts: list[int], gradual: list[Transition], gaps: list[tuple[int, int]]) -> list[Shot]:
    """Shots between transitions; cuts inside a gradual one vanish in it, damaged stretches (`gaps`) belong to no shot."""
    borders = [*gradual, *(Transition("gap", a, b) for a, b in gaps)]
    borders += [Transition("cut", c, c) for c in cuts if not any(t.start - 1 <= c <= t.end + 1 for t in borders)]
    borders.sort(key=lambda t: (t.start, t.end))
    shots, start, kind_in = [], 0, "edge"
    for border in borders:
        if border.start > start:
            shots.append(Shot(start, border.start, kind_in, border.kind))
        if border.end >= start:
            start, kind_in = max(start, border.end), border.kind
    if start < n_frames:
        shots.append(Shot(start, n_frames, kind_in, "edge"))
    return shots
