"""Coloured shapes as shaded sprites with soft edges, and how one is laid on a picture with sub-pixel precision."""

from __future__ import annotations

import cv2
import numpy as np

from waver_core.synthetic.lettering import text_patch
from waver_core.synthetic.scenes import COLOURS, Shape

SPRITE_EXTENT = 1.5  # side of the sprite in diameters of the shape: room for its shadow
SUPERSAMPLING = 3


def _polygon(radii: tuple[float, ...], turn_rad: float, points: int) -> np.ndarray:
    angles = turn_rad + 2 * np.pi * np.arange(points) / points
    radius = np.resize(radii, points)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def outline(kind: str) -> np.ndarray:
    """Corners ``[N, 2]`` of a shape of diameter 1 around the origin, its centroid; discs and rings have 180."""
    up = -np.pi / 2
    if kind == "square":
        return _polygon((0.5,), np.pi / 4, 4) * 1.2
    if kind == "triangle":
        return _polygon((0.56,), up, 3)
    if kind == "star":
        return _polygon((0.54, 0.23), up, 10)
    if kind == "diamond":
        return _polygon((0.54,), up, 4) * (0.8, 1.0)
    if kind == "hexagon":
        return _polygon((0.5,), 0, 6)
    if kind == "cross":
        a, b = 0.16, 0.48
        corners = (
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        )
        return np.array(corners)
    return _polygon((0.5,), 0, 180)


def sprite(shape: Shape, diameter_px: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a shape with premultiplied alpha, uint8 RGBA ``[S, S, 4]`` with S about 1.5 diameters.

    The colour is shaded by about a tenth around its stated sRGB value, lit from the upper left, with a darker rim and
    a soft shadow to the lower right that moves with the shape.
    """
    side = max(8, int(np.ceil(diameter_px * SPRITE_EXTENT)))
    fine = side * SUPERSAMPLING
    unit = fine / SPRITE_EXTENT  # fine pixels per diameter
    mask = np.zeros((fine, fine), np.uint8)
    corners = outline(shape.kind) * unit + (fine - 1) / 2
    cv2.fillPoly(mask, [np.round(corners * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    if shape.kind == "ring":
        cv2.circle(mask, (fine * 8 - 8, fine * 8 - 8), round(0.27 * unit * 16), 0, -1, cv2.LINE_AA, 4)

    grid = ((np.arange(fine, dtype=np.float32) - (fine - 1) / 2) / unit)[None, :]
    x, y = np.broadcast_to(grid, (fine, fine)), np.broadcast_to(grid.T, (fine, fine))
    grain = cv2.resize(rng.random((14, 14), dtype=np.float32) - 0.5, (fine, fine), interpolation=cv2.INTER_CUBIC)
    light = np.clip(-(x + y) * 0.30 + grain * 0.16, -0.3, 0.3)
    light = light + 0.32 * np.exp(-((x + 0.17) ** 2 + (y + 0.2) ** 2) / 0.012)
    inside = cv2.distanceTransform(mask, cv2.DIST_L2, 3) / unit
    light = light - 0.34 * np.clip(1 - inside / 0.035, 0, 1)
    base = np.array(COLOURS[shape.colour], dtype=np.float32)
    light = light[..., None]
    colour = base + np.maximum(light, 0) * (255 - base) + np.minimum(light, 0) * base

    alpha = cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)[..., None] / 255
    small = cv2.resize(np.ascontiguousarray(colour), (side, side), interpolation=cv2.INTER_AREA)
    if shape.text:
        small = _print(small, shape.text, base, diameter_px)
    shift = np.array([[1, 0, 0.045 * diameter_px], [0, 1, 0.06 * diameter_px]])
    shadow = cv2.warpAffine(alpha[..., 0], shift, (side, side))
    shadow = cv2.GaussianBlur(shadow, (0, 0), max(0.6, 0.045 * diameter_px))[..., None] * 0.32
    cover = alpha + shadow * (1 - alpha)
    return np.clip(np.concatenate([small * alpha, cover * 255], axis=2) + 0.5, 0, 255).astype(np.uint8)


def _print(picture: np.ndarray, text: str, base: np.ndarray, diameter_px: float) -> np.ndarray:
    """The word in the middle of the shape, dark on light colours and light on dark ones."""
    ink = (250, 250, 250) if base @ (0.3, 0.59, 0.11) < 140 else (30, 30, 36)
    patch = text_patch((text,), 64, ink)
    scale = 0.62 * diameter_px / max(patch.shape[1], 1.6 * patch.shape[0])
    size = (max(1, round(patch.shape[1] * scale)), max(1, round(patch.shape[0] * scale)))
    patch = cv2.resize(patch, size, interpolation=cv2.INTER_AREA)
    top, left = (picture.shape[0] - size[1]) // 2, (picture.shape[1] - size[0]) // 2
    view = picture[top : top + size[1], left : left + size[0]]
    view += (patch[..., :3] - view) * (patch[..., 3:].astype(np.float32) / 255)
    return picture


def lay_sprite(picture: np.ndarray, rgba: np.ndarray, to_picture: np.ndarray) -> None:
    """Lay a premultiplied sprite on a uint8 RGB picture, in place.

    to_picture: affine [2, 3] from diameters around the shape's centre to pixels of the picture.
    """
    side = rgba.shape[0]
    half = np.abs(to_picture[:, :2]).sum(axis=1) * (SPRITE_EXTENT / 2) + 1
    low = np.maximum(np.floor(to_picture[:, 2] - half), 0).astype(int)
    high = np.minimum(np.ceil(to_picture[:, 2] + half) + 1, (picture.shape[1], picture.shape[0])).astype(int)
    if (high <= low).any():
        return  # out of sight
    pitch = SPRITE_EXTENT / side  # diameters per sprite pixel
    linear = to_picture[:, :2] * pitch
    offset = to_picture[:, 2] - low - linear @ np.full(2, (side - 1) / 2)
    warped = cv2.warpAffine(rgba, np.column_stack([linear, offset]), tuple(int(n) for n in high - low))
    view = picture[low[1] : high[1], low[0] : high[0]]
    keep = cv2.merge([255 - warped[..., 3]] * 3)
    cv2.add(cv2.multiply(view, keep, scale=1 / 255), warped[..., :3], dst=view)
