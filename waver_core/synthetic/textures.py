"""Procedural world textures: rich at several scales, so that optical flow and homographies find something to hold.

Everything is laid out in short sides of the world; the resolution only decides how finely it is drawn. So the same
shot at another size shows the same world, which is what a near-duplicate needs.
"""

from __future__ import annotations

import cv2
import numpy as np

from waver_core.synthetic.lettering import text_patch
from waver_core.synthetic.scenes import PALETTES, Background

Bounds = tuple[float, float, float, float]


def world_texture(background: Background, seed: list[int], bounds: Bounds, px_per_unit: float) -> np.ndarray:
    """Paint the world within ``bounds`` (x0, y0, x1, y1 in short sides) as uint8 RGB ``[H, W, 3]``."""
    canvas = _Canvas(seed, bounds, px_per_unit)
    ramp = np.array(PALETTES[background.palette], dtype=np.float32)
    painters = {
        "terrain": _terrain,
        "hills": _hills,
        "checks": _checks,
        "stripes": _stripes,
        "brick": _brick,
        "bokeh": _bokeh,
        "plain": _plain,
    }
    picture = painters[background.kind](canvas, ramp)
    if background.kind != "plain":
        picture += (canvas.noise(90, 110.0, octaves=3, gain=1.0)[..., None] - 0.5) * 36  # fine, crisp grain
    painted = np.clip(picture, 0, 255).astype(np.uint8)
    if background.text:
        _write(painted, canvas, background.text, ramp)
    return painted


class _Canvas:
    """The grid of a texture: world coordinates ``x``, ``y`` float32 ``[H, W]`` and noise on them."""

    def __init__(self, seed: list[int], bounds: Bounds, px_per_unit: float) -> None:
        self.seed, self.bounds, self.px_per_unit = seed, bounds, px_per_unit
        x0, y0, x1, y1 = bounds
        self.width, self.height = round((x1 - x0) * px_per_unit), round((y1 - y0) * px_per_unit)
        xs = x0 + np.arange(self.width, dtype=np.float32) / px_per_unit
        ys = y0 + np.arange(self.height, dtype=np.float32) / px_per_unit
        self.x, self.y = np.meshgrid(xs, ys)

    def rng(self, salt: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, salt])

    def noise(self, salt: int, cells_per_unit: float, octaves: int = 6, gain: float = 0.55) -> np.ndarray:
        """Multi-octave value noise, float32 ``[H, W]`` around 0.5, nearly all of it within 0 to 1."""
        x0, y0, x1, y1 = self.bounds
        total = np.zeros((self.height, self.width), dtype=np.float32)
        power = 0.0
        for octave in range(octaves):
            cells = cells_per_unit * 2**octave
            weight = gain**octave
            power += weight**2
            if cells > self.px_per_unit / 1.5:
                continue
            rows, columns = round((y1 - y0) * cells) + 1, round((x1 - x0) * cells) + 1
            lattice = np.random.default_rng([*self.seed, salt, octave]).random((rows, columns), dtype=np.float32)
            total += weight * cv2.resize(lattice - 0.5, (self.width, self.height), interpolation=cv2.INTER_CUBIC)
        return np.clip(0.5 + total * float(0.85 / np.sqrt(power)), 0, 1)


def _ramp(ramp: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colour ``[H, W, 3]`` of values 0 to 1 along a palette ``[5, 3]``, dark to light."""
    at = np.arange(256) / 255 * (len(ramp) - 1)
    table = np.stack([np.interp(at, np.arange(len(ramp)), ramp[:, c]) for c in range(3)], axis=1).astype(np.float32)
    return table[np.clip(value * 255, 0, 255).astype(np.uint8)]


def _relief(height: np.ndarray, px_per_unit: float, strength: float) -> np.ndarray:
    """Light from the upper left on a height field: a factor around 1, float32 ``[H, W, 1]``."""
    gy, gx = np.gradient(height)
    return np.clip(1 + (gx + gy) * (px_per_unit * strength), 0.72, 1.22)[..., None]


def _terrain(canvas: _Canvas, ramp: np.ndarray) -> np.ndarray:
    bend = 0.08 * canvas.px_per_unit
    rows, columns = np.indices((canvas.height, canvas.width), dtype=np.float32)
    height = canvas.noise(0, 2.0, octaves=7, gain=0.58)
    map_x = columns + (canvas.noise(1, 1.5, octaves=3) - 0.5) * bend * 2
    map_y = rows + (canvas.noise(2, 1.5, octaves=3) - 0.5) * bend * 2
    height = cv2.remap(height, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return _ramp(ramp, 0.08 + (height - 0.15) * 1.25) * _relief(height, canvas.px_per_unit, 0.024)


def _hills(canvas: _Canvas, ramp: np.ndarray) -> np.ndarray:
    rng = canvas.rng(10)
    x, y = canvas.x, canvas.y
    fraction = np.clip((y + 0.55) / 0.7, 0, 1)[..., None]
    sky = ramp[3] * (1 - fraction) + ramp[4] * fraction
    sun_x, sun_y, radius = rng.uniform(-0.5, 0.5), rng.uniform(-0.34, -0.2), rng.uniform(0.06, 0.1)
    distance = np.hypot(x - sun_x, y - sun_y)[..., None]
    glow = np.exp(-((distance / 0.35) ** 2)) * 0.45
    disc = np.clip((radius - distance) * canvas.px_per_unit, 0, 1)
    warm = np.array([255, 240, 208], dtype=np.float32)
    clouds = np.clip((canvas.noise(11, 2.4, octaves=6) - 0.5) * 3.2, 0, 1)[..., None] * 0.75
    picture = sky + (warm - sky) * np.clip(glow + disc, 0, 1)
    picture += (np.array([252, 250, 248], dtype=np.float32) - picture) * clouds
    shade = canvas.noise(12, 5.0, octaves=6, gain=0.7)
    for layer, tone in enumerate((2.7, 1.9, 1.1, 0.3)):
        waves = sum(
            rng.uniform(0.4, 1) / k * np.sin(2 * np.pi * (x[0] * k * rng.uniform(0.35, 0.5) + rng.random()))
            for k in (1, 2, 3, 5, 8, 13)
        )
        line = 0.02 + 0.14 * layer + 0.07 * np.asarray(waves)
        low = int(tone)
        colour = ramp[low] + (ramp[low + 1] - ramp[low]) * (tone - low)
        cover = np.clip((y - line[None, :]) * canvas.px_per_unit, 0, 1)[..., None]
        depth = np.clip((y - line[None, :]) / 0.5, 0, 1)
        texture = 0.92 + (shade - 0.5) * (0.35 + 0.10 * layer) + 0.26 * depth
        picture += (colour * texture[..., None] - picture) * cover
    return picture


def _turned(canvas: _Canvas, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    angle = np.deg2rad(degrees)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return canvas.x * cos + canvas.y * sin, canvas.y * cos - canvas.x * sin


def _pick(table: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """One random entry per cell: a table that repeats only after its own size."""
    return table[row.astype(np.int32) % table.shape[0], column.astype(np.int32) % table.shape[1]]


def _cells(canvas: _Canvas, u: np.ndarray, v: np.ndarray, gap: float, salt: int) -> tuple[np.ndarray, ...]:
    """Cells of one unit: random tone per cell, cover 0 in the gap, and a bevel factor. Each ``[H, W]``."""
    row, column = np.floor(v), np.floor(u)
    tone = _pick(canvas.rng(salt).random((61, 67), dtype=np.float32), row, column)
    du, dv = u - column, v - row
    inset = np.minimum(np.minimum(du, 1 - du), np.minimum(dv, 1 - dv))
    cover = np.clip((inset - gap / 2) * 40, 0, 1)
    bevel = 1 + 0.10 * np.clip(1 - (inset - gap / 2) / 0.12, 0, 1) * np.sign((1 - du) + (1 - dv) - 1)
    return tone, cover, bevel


def _checks(canvas: _Canvas, ramp: np.ndarray) -> np.ndarray:
    rng = canvas.rng(20)
    u, v = _turned(canvas, rng.uniform(-24, 24))
    size = rng.uniform(0.15, 0.22)
    tone, cover, bevel = _cells(canvas, u / size, v / size, 0.05, 21)
    even = (np.floor(u / size) + np.floor(v / size)) % 2
    stain = canvas.noise(22, 3.0, octaves=7)
    picture = _ramp(ramp, 0.28 + 0.32 * even + 0.26 * tone) * bevel[..., None] * (0.78 + 0.44 * stain)[..., None]
    return ramp[4] * 0.92 + (picture - ramp[4] * 0.92) * cover[..., None]


def _brick(canvas: _Canvas, ramp: np.ndarray) -> np.ndarray:
    height = canvas.rng(30).uniform(0.075, 0.1)
    v = canvas.y / height
    u = canvas.x / (height * 2.4) + 0.5 * (np.floor(v) % 2)
    tone, cover, bevel = _cells(canvas, u, v, 0.09, 31)
    stain = canvas.noise(32, 2.0, octaves=7)
    picture = _ramp(ramp, 0.22 + 0.46 * tone) * bevel[..., None] * (0.74 + 0.52 * stain)[..., None]
    mortar = ramp[4] * (0.72 + 0.24 * canvas.noise(33, 12.0, octaves=4))[..., None]
    return mortar + (picture - mortar) * cover[..., None]


def _stripes(canvas: _Canvas, ramp: np.ndarray) -> np.ndarray:
    rng = canvas.rng(40)
    u, v = _turned(canvas, rng.uniform(20, 70) * rng.choice((-1, 1)))
    u = u + 0.10 * canvas.noise(41, 1.2, octaves=2)
    edges = np.cumsum(rng.uniform(0.03, 0.14, size=256))
    edges -= edges[128]
    tones = rng.permuted(np.tile(np.linspace(0.15, 0.95, 8), 33))[:257]
    position = np.searchsorted(edges, u.ravel()).reshape(u.shape)
    nearest = np.minimum(np.abs(u - edges[np.minimum(position, 255)]), np.abs(u - edges[np.maximum(position - 1, 0)]))
    weave = 0.5 + 0.5 * np.sin(v * 95) * np.sin(u * 95)
    cloth = 0.8 + 0.12 * weave + 0.34 * (canvas.noise(42, 4.0, octaves=6) - 0.35)
    seam = np.clip(nearest * canvas.px_per_unit / 2.5, 0.45, 1)
    return _ramp(ramp, tones[position]) * (cloth * seam)[..., None]


def _bokeh(canvas: _Canvas, ramp: np.ndarray) -> np.ndarray:
    picture = _ramp(ramp, 0.12 + 0.5 * canvas.noise(50, 0.9, octaves=5))
    rng = canvas.rng(51)
    x0, y0, x1, y1 = canvas.bounds
    n_lights = int(150 * (x1 - x0) * (y1 - y0))
    radii = np.sort(0.012 * (0.13 / 0.012) ** rng.random(n_lights))[::-1]  # log-uniform; large ones lie below
    for radius, px, py, tone, alpha in zip(radii, *rng.random((4, n_lights)), strict=True):
        r, cx, cy = radius * canvas.px_per_unit, px * canvas.width, py * canvas.height
        left, top = max(0, int(cx - r - 2)), max(0, int(cy - r - 2))
        view = picture[top : int(cy + r + 3), left : int(cx + r + 3)]
        rows, columns = np.ogrid[top : top + view.shape[0], left : left + view.shape[1]]
        distance = np.sqrt((rows - cy) ** 2 + (columns - cx) ** 2, dtype=np.float32)
        rim = 0.75 + 0.25 * (distance / r) ** 3
        cover = np.clip(r - distance, 0, 1) * np.clip(rim, 0, 1) * (0.14 + 0.4 * alpha)
        view += (ramp[2 + int(tone * 3)] - view) * cover[..., None]
    return picture


def _plain(canvas: _Canvas, ramp: np.ndarray) -> np.ndarray:
    fraction = np.clip(canvas.y + 0.5, 0, 1)[..., None]
    return (ramp[4] * 0.55 + 255 * 0.45) * (1 - fraction) + ramp[4] * fraction


def _write(painted: np.ndarray, canvas: _Canvas, text: str, ramp: np.ndarray) -> None:
    """Paint the text on the world, in place, above the middle of the opening view; cropped where it does not fit."""
    red, green, blue = (int(level * 0.6) for level in ramp[0])
    patch = text_patch((text,), round(0.15 * canvas.px_per_unit), (red, green, blue), outline=tuple(ramp[4]))
    x0, y0, _, _ = canvas.bounds
    left = round(-x0 * canvas.px_per_unit - patch.shape[1] / 2)
    top = round((-0.34 - y0) * canvas.px_per_unit)
    skip_x, skip_y = max(0, -left), max(0, -top)
    view = painted[top + skip_y : top + patch.shape[0], left + skip_x : left + patch.shape[1]]
    patch = patch[skip_y : skip_y + view.shape[0], skip_x : skip_x + view.shape[1]]
    alpha = patch[..., 3:].astype(np.float32) * (0.9 / 255)
    view[:] = (view + (patch[..., :3] - view.astype(np.float32)) * alpha).astype(np.uint8)
