"""Things that have no clear colour or outline and still are seen to move: regions whose flow is not the camera's.

Only what keeps to one way over a fair distance is told, and only under a camera that is understood; on real footage the rest
is limbs, smoke and errors of flow.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from waver_core.backends.contracts import ForegroundSegmenter
from waver_core.camera import drop_explained
from waver_core.captions.colours import main_colours
from waver_core.captions.facts import ObjectFacts, Phase
from waver_core.captions.paths import direction_of
from waver_core.captions.scene import Scene
from waver_core.captions.tracking import Track, link, regions_of

_MIN_AREA, _MAX_AREA = 0.006, 0.3
_MIN_STEPS = 5
_MIN_DURATION_S = 0.7
_MIN_DISTANCE = 0.25
"""Short sides that the flow must carry a thing, all steps together."""
_STRAIGHT = 0.85
"""Net distance over the length of the path."""
_MAX_SHARE = 0.35
"""Of the picture that may move by itself; more is a crowd, or a camera that was misread."""
_MOST = 2


class Mover(NamedTuple):
    """A moving region and what is known of it."""

    track: Track
    distance: float
    facts: ObjectFacts


def movers(scene: Scene, things: list[Track], segmenter: ForegroundSegmenter, clip_s: float) -> list[ObjectFacts]:
    """Moving things beside those found already, those that go farthest first."""
    vectors = _residual_vectors(scene)
    residual = np.linalg.norm(vectors, axis=3)
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in scene.rgb]
    masks = segmenter.segment(scene.rgb, residual)
    identity = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    masks = np.stack(
        [
            drop_explained(m, grey[t], grey[t + 1], scene.fitted[t].affine if scene.moves else identity)
            for t, m in enumerate(masks)
        ]
    )
    if masks.mean() > _MAX_SHARE:
        return []
    _leave_out(masks, things)
    height, width = masks.shape[1:]
    area = height * width
    by_step = [regions_of(m, t, _MIN_AREA * area, _MAX_AREA * area) for t, m in enumerate(masks)]
    found = []
    for track in link("", by_step, 0.25 * min(height, width)):
        if not any(_beside(track, thing) for thing in things) and (mover := _judge(scene, track, vectors, residual, clip_s)):
            found.append(mover)
    found.sort(key=lambda m: -m.distance)
    kept: list[Mover] = []
    for mover in found:
        if not any(_together(mover.track, other.track) for other in kept):
            kept.append(mover)
    return [m.facts for m in kept[:_MOST]]


def _residual_vectors(scene: Scene) -> np.ndarray:
    """Flow without the camera's part at half size: float32 [T-1, H/2, W/2, 2] in px of the full size."""
    half = scene.flow[:, ::2, ::2]
    if not scene.moves:
        return half
    height, width = scene.rgb.shape[1:3]
    ys, xs = np.mgrid[0:height:2, 0:width:2].astype(np.float32)
    points = np.stack([xs - width / 2, ys - height / 2], axis=2)
    camera = [points @ (f.affine[:, :2] - np.eye(2, dtype=np.float32)).T + f.affine[:, 2] for f in scene.fitted]
    return half - np.stack(camera).astype(np.float32)


def _leave_out(masks: np.ndarray, things: list[Track]) -> None:
    """Clear the masks [T-1, h, w] where things lie, a margin included, in place."""
    for region in (r for track in things for r in track.regions):
        for step in (region.frame - 1, region.frame):
            if 0 <= step < len(masks):
                x0, y0, x1, y1 = (v // 2 for v in region.box)
                pad = max(4, (x1 - x0) // 3)
                masks[step, max(0, y0 - pad) : y1 + pad, max(0, x0 - pad) : x1 + pad] = False


def _beside(track: Track, thing: Track) -> bool:
    """Whether a region (at half size) keeps close to a thing: its shadow, or flow that bled over its outline."""
    near = 0
    for region in track.regions:
        other = min(thing.regions, key=lambda r: abs(r.frame - region.frame))
        x0, y0, x1, y1 = other.box
        reach = 1.6 * max(x1 - x0, y1 - y0)  # over a plain ground flow bleeds far
        x, y = 2 * region.centre[0] - (x0 + x1) / 2, 2 * region.centre[1] - (y0 + y1) / 2
        near += max(abs(x), abs(y)) < reach
    return near > 0.4 * len(track.regions)


def _judge(scene: Scene, track: Track, vectors: np.ndarray, residual: np.ndarray, clip_s: float) -> Mover | None:
    """What a moving region does, if it is plain: long enough, far enough, straight enough."""
    short = min(scene.rgb.shape[1:3])
    first, last = track.regions[0].frame, track.regions[-1].frame + 1
    start_s, end_s = float(scene.times_s[first]), float(scene.times_s[last])
    if len(track.regions) < _MIN_STEPS or end_s - start_s < _MIN_DURATION_S:
        return None
    steps = []
    for r in track.regions:
        x0, y0, x1, y1 = r.box
        speed = residual[r.frame, y0:y1, x0:x1]
        core = r.mask & (speed >= 0.5 * np.percentile(speed[r.mask], 90))
        steps.append(np.median(vectors[r.frame, y0:y1, x0:x1][core], axis=0) / short)
    net = np.sum(steps, axis=0)
    distance, length = float(np.hypot(*net)), float(np.linalg.norm(steps, axis=1).sum())
    # The region itself must have gone the same way: flow alone is misled by flicker and by shadows.
    went = np.subtract(track.regions[-1].centre, track.regions[0].centre) * 2 / short
    agrees = float(went @ net) / max(distance, 1e-6)
    if distance < _MIN_DISTANCE or distance < _STRAIGHT * length or agrees < 0.3 * distance:
        return None
    whole = end_s - start_s >= 0.85 * clip_s
    span = (None, None) if whole else (max(0.0, round(start_s, 1)), round(min(end_s, clip_s), 1))
    motion = direction_of(float(net[0]), float(net[1]))
    colour = None if scene.moves else _colour_of(scene, track)
    # No place: a region at its first is smeared over where the thing comes from.
    facts = ObjectFacts(colour, phases=(Phase(motion, start_s=span[0], end_s=span[1]),))
    return Mover(track, distance, facts)


def _colour_of(scene: Scene, track: Track) -> str | None:
    """The colour of most of what differs from the still background within the regions, or None."""
    background = np.median(scene.rgb[:: max(1, len(scene.rgb) // 15)], axis=0).astype(np.uint8)
    inside = []
    for r in track.regions[:: max(1, len(track.regions) // 5)]:
        x0, y0, x1, y1 = (v * 2 for v in r.box)
        frame = scene.rgb[r.frame, y0:y1, x0:x1]
        mask = cv2.resize(r.mask.astype(np.uint8), (frame.shape[1], frame.shape[0]), interpolation=cv2.INTER_NEAREST) > 0
        differs = cv2.absdiff(frame, background[y0:y1, x0:x1]).max(axis=2) > 30
        inside.append(frame[mask & differs])
    names = main_colours(np.concatenate(inside), min_share=0.55)
    # Grey is what glass, shadow and blur make of any colour.
    return names[0] if len(names) == 1 and names[0] not in ("grey", "brown", "beige") else None


def _together(a: Track, b: Track) -> bool:
    """Whether two tracks share time and are near: parts of one thing for all that can be told."""
    at = {r.frame: r for r in b.regions}
    shared = [(r, at[r.frame]) for r in a.regions if r.frame in at]
    if len(shared) < 0.3 * min(len(a.regions), len(b.regions)):
        return False
    size = np.mean([np.sqrt(r.area_px) + np.sqrt(s.area_px) for r, s in shared])
    return bool(np.median([np.hypot(*np.subtract(r.centre, s.centre)) for r, s in shared]) < 1.5 * size)
