"""Facts from the frames of one clip (Waver §3.3): background, light, camera, and the things in the foreground.

Two kinds of things are found: regions of one clear colour that keep together over time (told apart by silhouette, at rest or
moving), and regions that move against the scene. Paths are freed from the camera's motion, so directions and speeds are those
against the scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from waver_core.backends.contracts import FlowEstimator, ForegroundSegmenter
from waver_core.captions.colours import CLASSES, LAYERS, N_CLASSES, classify, main_colours, name_of_lab, to_lab
from waver_core.captions.facts import ObjectFacts, SceneFacts, position_word, size_word
from waver_core.captions.movers import movers
from waver_core.captions.paths import phases_of
from waver_core.captions.scene import Scene, camera_evidence, camera_fact, held_still, look, onto
from waver_core.captions.silhouettes import normalised, overlaps
from waver_core.captions.tracking import Track, filled, link, regions_of

_MAX_FRAMES = 32
"""In which colours are searched; a long clip is thinned."""


@dataclass(frozen=True)
class Limits:
    """When a region counts as a thing."""

    min_area: float = 0.003
    max_area: float = 0.35
    min_presence: float = 0.5
    """Share of the frames in which it is seen."""
    min_overlap: float = 0.86
    """With the outline of its shape."""
    min_lead: float = 0.01
    """Of the best shape's overlap before the next one's."""
    most: int = 3


class Thing(NamedTuple):
    """Something in the foreground: where it is over time, and its shape where that is clear."""

    track: Track
    shape: str | None


def measure(
    rgb: np.ndarray,
    times_s: np.ndarray,
    clip_s: float,
    flow: FlowEstimator,
    segmenter: ForegroundSegmenter,
    camera: str | None = None,
) -> SceneFacts:
    """Facts of frames uint8 [T, H, W, 3] at times [T] from the clip's start; camera: its label where known already."""
    scene, limits = look(rgb, times_s, flow), Limits()
    things = pick(coloured_tracks(scene, limits), limits)
    found = [thing.track for thing in things]
    label, others = None, []
    if len(scene.rgb) > 1:
        evidence = camera_evidence(scene, found)
        label = camera_fact(scene, evidence, camera)
        scene = scene if evidence.moves else held_still(scene)
        if label not in (None, "shake") and evidence.agreement > 0.5:
            others = movers(scene, found, segmenter, clip_s)
    objects = [*(facts_of(scene, thing, clip_s) for thing in things), *others]
    return SceneFacts(
        background=background_colours(scene, found),
        light=light_of(scene.rgb),
        camera=label,
        objects=tuple(objects[: limits.most]),
    )


def coloured_tracks(scene: Scene, limits: Limits) -> list[Track]:
    """Regions of each clear colour, followed over the clip."""
    stride = -(-len(scene.rgb) // _MAX_FRAMES)
    classes = classify(scene.rgb[::stride])
    n, height, width = classes.shape
    counts = np.stack([np.bincount(c.ravel(), minlength=N_CLASSES) for c in classes]) / (height * width)
    found = []
    for layer in LAYERS:
        share = counts[:, layer.low : layer.high].sum(axis=1)
        if (share > limits.min_area).mean() < limits.min_presence:
            continue
        by_frame = []
        for t, c in enumerate(classes):
            mask = (c >= layer.low) & (c < layer.high)
            by_frame.append(regions_of(mask, t * stride, limits.min_area * c.size, limits.max_area * c.size))
        tracks = link(layer.colour, by_frame, 0.2 * min(height, width), stride)
        lasting = [t for t in tracks if len(t.regions) >= max(1, limits.min_presence * n)]
        found += [Track(t.colour, [filled(r) for r in t.regions]) for t in lasting]
    return found


def pick(tracks: list[Track], limits: Limits) -> list[Thing]:
    """Tracks that have the outline of a shape, the largest first."""
    found = [(score, Thing(track, shape)) for track in tracks for score, shape in [shape_of(track, limits)] if shape]
    # Of several levels of one colour the clearest outline counts; of a thing and a spot on it the larger.
    found.sort(key=lambda f: -f[0])
    clearest: list[Thing] = []
    for _, thing in found:
        track = thing.track
        same = [other.track for other in clearest if other.track.colour == track.colour]
        if not any(_inside(track, other) or _inside(other, track) for other in same):
            clearest.append(thing)
    clearest.sort(key=lambda thing: -_area(thing.track))
    kept: list[Thing] = []
    for thing in clearest:
        if not any(_inside(thing.track, other.track) for other in kept):
            kept.append(thing)
    return kept[: limits.most]


def _area(track: Track) -> float:
    return float(np.median([r.area_px for r in track.regions]))


def _inside(track: Track, other: Track) -> bool:
    """Whether a track lies within another's boxes: a highlight or a hole, not a thing of its own."""
    boxes = {r.frame: r.box for r in other.regions}
    shared = [(r.centre, boxes[r.frame]) for r in track.regions if r.frame in boxes]
    return sum(b[0] <= c[0] < b[2] and b[1] <= c[1] < b[3] for c, b in shared) > 0.7 * max(1, len(shared))


def shape_of(track: Track, limits: Limits) -> tuple[float, str | None]:
    """Best overlap with an outline, and the shape that the mean silhouette of up to twelve regions clearly has."""
    whole = [r for r in track.regions if not r.cut]
    if len(whole) < max(1, min(3, 0.3 * len(track.regions))):
        return 0.0, None
    silhouettes = []
    for r in whole[:: max(1, len(whole) // 12)]:
        local = r.centre[0] - r.box[0], r.centre[1] - r.box[1]
        silhouettes.append(normalised(r.mask, local, r.area_px))
    scores = overlaps(np.mean(silhouettes, axis=0))
    best, second, *_ = sorted(scores, key=lambda s: -scores[s])
    lead = scores[best] - scores[second]
    # Thin parts lose their rims, so a ring overlaps little with its outline, but with every other one far less.
    clear = (scores[best] >= limits.min_overlap and lead >= limits.min_lead) or (scores[best] >= 0.72 and lead >= 0.25)
    return scores[best], best if clear else None


def facts_of(scene: Scene, thing: Thing, clip_s: float) -> ObjectFacts:
    """Colour, shape, size, place and motion of a thing."""
    height, width = scene.rgb.shape[1:3]
    short, track = min(height, width), thing.track
    whole = [r for r in track.regions if not r.cut]
    path = np.array([onto(scene.to_middle[r.frame], r.centre) for r in whole]) / short
    times = scene.times_s[[r.frame for r in whole]]
    diameter = 2 * float(np.sqrt(np.median([r.area_px for r in whole]) / np.pi)) / short
    first = track.regions[0].centre
    return ObjectFacts(
        colour=_colour_of(scene, track),
        shape=thing.shape,
        size=size_word(diameter),
        position=position_word(first[0] / width, first[1] / height),
        phases=phases_of(times, path, clip_s) if len(scene.rgb) > 1 else (),
    )


def _colour_of(scene: Scene, track: Track) -> str:
    """Name of the median colour inside."""
    inside = []
    for r in track.regions[:: max(1, len(track.regions) // 6)]:
        left, top, right, bottom = r.box
        inside.append(scene.rgb[r.frame, top:bottom, left:right][r.mask])
    median = np.median(np.concatenate(inside), axis=0).astype(np.uint8)
    name = name_of_lab(to_lab(median[None])[0])
    return name if name in CLASSES else track.colour


def background_colours(scene: Scene, things: list[Track]) -> tuple[str, ...]:
    """Main colours of what is left of three frames without the things and without black bars."""
    height, width = scene.rgb.shape[1:3]
    rows, columns = _within_bars(scene.rgb)
    pixels = []
    for t in sorted({0, len(scene.rgb) // 2, len(scene.rgb) - 1}):
        outside = np.ones((height, width), bool)
        for track in things:
            for r in track.regions:
                if r.frame == t:
                    left, top, right, bottom = r.box
                    outside[top:bottom, left:right] &= ~r.mask
        pixels.append(cv2.blur(scene.rgb[t], (5, 5))[rows, columns][outside[rows, columns]])
    return main_colours(np.concatenate(pixels))


def _within_bars(rgb: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns between bars that are black in all frames; everything where little would be left."""
    brightest = rgb[:: max(1, len(rgb) // 8), ::2, ::2].max(axis=0).max(axis=2)
    spans = []
    for axis in (1, 0):
        lit = np.flatnonzero(np.percentile(brightest, 98, axis=axis) > 28)
        spans.append(slice(int(lit[0]), int(lit[-1]) + 1) if len(lit) else slice(0, 0))
    kept = brightest[spans[0], spans[1]].size
    if kept <= 0.3 * brightest.size:
        return slice(None), slice(None)
    return slice(2 * spans[0].start, 2 * spans[0].stop), slice(2 * spans[1].start, 2 * spans[1].stop)


def light_of(rgb: np.ndarray) -> str | None:
    """Bright, dim or dark by mean luma without the bars, where it is so from first to last; None in between."""
    rows, columns = _within_bars(rgb)
    words = set()
    for t in np.linspace(0, len(rgb) - 1, 5).round().astype(int):
        luma = float(cv2.cvtColor(rgb[t], cv2.COLOR_RGB2GRAY)[rows, columns].mean()) / 255
        words.add("bright" if luma > 0.68 else "dark" if luma < 0.14 else "dim" if luma < 0.27 else None)
    return words.pop() if len(words) == 1 else None
