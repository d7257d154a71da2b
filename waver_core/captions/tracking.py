"""Regions of one colour followed over the frames of a clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

_MAX_PER_FRAME = 6
_MAX_GAP = 2


class Region(NamedTuple):
    """A connected region in one frame: centre (x, y) and box (left, top, right, bottom) in px; `cut` by the picture's edge."""

    frame: int
    centre: tuple[float, float]
    area_px: int
    box: tuple[int, int, int, int]
    cut: bool
    mask: np.ndarray
    """bool within the box"""


@dataclass
class Track:
    """One thing over time; regions in order of frames."""

    colour: str
    regions: list[Region] = field(default_factory=list)


def regions_of(mask: np.ndarray, frame: int, min_area_px: float, max_area_px: float) -> list[Region]:
    """Connected regions of a mask [H, W], largest first, after specks are opened away."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    clean = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, kernel)
    _, labels, stats, centres = cv2.connectedComponentsWithStats(clean)
    height, width = mask.shape
    found = []
    order = 1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA], kind="stable")
    for label in order[:_MAX_PER_FRAME]:
        left, top, w, h, area = (int(v) for v in stats[label])
        if not min_area_px <= area <= max_area_px:
            continue
        inside = labels[top : top + h, left : left + w] == label
        cut = left <= 1 or top <= 1 or left + w >= width - 1 or top + h >= height - 1
        centre = float(centres[label][0]), float(centres[label][1])
        found.append(Region(frame, centre, area, (left, top, left + w, top + h), cut, inside))
    return found


def filled(region: Region) -> Region:
    """The region with holes of under a twelfth of its area filled (highlights, seams); the hole of a ring stays."""
    padded = np.pad(~region.mask, 1, constant_values=True).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(padded, connectivity=4)
    small = [i for i in range(1, count) if i != labels[0, 0] and stats[i, cv2.CC_STAT_AREA] < region.area_px / 12]
    if not small:
        return region
    mask = region.mask | np.isin(labels[1:-1, 1:-1], small)
    moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
    area = moments["m00"]
    centre = region.box[0] + moments["m10"] / area, region.box[1] + moments["m01"] / area
    return region._replace(centre=centre, area_px=int(area), mask=mask)


def link(colour: str, by_frame: list[list[Region]], gate_px: float, stride: int = 1) -> list[Track]:
    """Chain regions of consecutive frames by nearness to where the track was heading and by area; short gaps are
    bridged. Frames are numbered in steps of `stride`."""
    tracks: list[Track] = []
    for number, regions in enumerate(by_frame):
        t = number * stride
        free = list(regions)
        for track in sorted(tracks, key=lambda k: -len(k.regions)):
            last = track.regions[-1]
            if not free or t - last.frame > (1 + _MAX_GAP) * stride:
                continue
            expected = np.array(last.centre)
            if len(track.regions) > 1:
                before = track.regions[-2]
                expected = expected + (expected - before.centre) * (t - last.frame) / (last.frame - before.frame)
            costs = [_cost(last, r, expected, gate_px * (t - last.frame) / stride) for r in free]
            best = int(np.argmin(costs))
            if np.isfinite(costs[best]):
                track.regions.append(free.pop(best))
        tracks += [Track(colour, [r]) for r in free]
    return tracks


def _cost(last: Region, region: Region, expected: np.ndarray, gate_px: float) -> float:
    distance = min(float(np.hypot(*(expected - region.centre))), float(np.hypot(*np.subtract(last.centre, region.centre))))
    ratio = abs(float(np.log(region.area_px / last.area_px)))
    limit = 1.1 if last.cut or region.cut else 0.7
    return distance + 10 * ratio if distance < gate_px and ratio < limit else float("inf")
