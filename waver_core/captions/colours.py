"""Names of colours as people use them, from CIE Lab; and which pixels might belong to a thing of a clear colour."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

PALETTE: dict[str, tuple[int, int, int]] = {  # sRGB in the middle of what goes by the name, in the order of the classes
    "red": (222, 45, 48),
    "green": (38, 166, 75),
    "blue": (41, 98, 222),
    "yellow": (248, 212, 40),
    "orange": (246, 134, 24),
    "purple": (126, 52, 178),
    "cyan": (28, 200, 220),
    "magenta": (226, 40, 160),
    "white": (245, 245, 245),
    "black": (26, 26, 30),
}
CLASSES = tuple(PALETTE)
CHROMATIC = CLASSES[:8]


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """uint8 RGB [..., 3] -> float32 Lab [..., 3]: L in 0 to 100, a and b about -100 to 100."""
    flat = np.ascontiguousarray(rgb, np.uint8).reshape(1, -1, 3).astype(np.float32) / 255
    lab: np.ndarray = cv2.cvtColor(flat, cv2.COLOR_RGB2LAB)
    return lab.reshape(rgb.shape)


@cache
def _class_table() -> np.ndarray:
    """uint8 [32768]: class of every colour at five bits a channel: 0 for muted ones, then `CHROMATIC`, levels of white, black."""
    grid = np.indices((32, 32, 32)).reshape(3, -1).T * 8 + 4
    lab = to_lab(grid.astype(np.uint8))
    lightness, chroma, hue = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2]), np.arctan2(lab[:, 2], lab[:, 1])
    centres = to_lab(np.array([PALETTE[c] for c in CHROMATIC], np.uint8))
    apart = np.abs(np.angle(np.exp(1j * (hue[:, None] - np.arctan2(centres[:, 2], centres[:, 1])[None]))))
    nearest = apart.argmin(axis=1)
    enough = chroma > 0.55 * np.hypot(centres[:, 1], centres[:, 2])[nearest]
    table = np.where(enough, nearest + 1, 0)
    # White and black things are lit and shaded like all others, and how far depends on what lies around them: several levels.
    for level, limit in enumerate((74, 82, 89)):
        table[(lightness > limit) & (chroma < 11)] = _WHITE + level
    for level, limit in enumerate((40, 30, 20)):
        table[(lightness < limit) & (chroma < 14)] = _BLACK + level
    return table.astype(np.uint8)


class Layer(NamedTuple):
    """A colour that is searched for: its name, and the classes (from, to) that count as it."""

    colour: str
    low: int
    high: int


_WHITE, _BLACK = 9, 12
N_CLASSES = 15
LAYERS = (
    *(Layer(name, 1 + number, 2 + number) for number, name in enumerate(CHROMATIC)),
    *(Layer("white", _WHITE + level, _WHITE + 3) for level in range(3)),
    *(Layer("black", _BLACK + level, _BLACK + 3) for level in range(3)),
)


def classify(frames: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] -> uint8 [T, H, W] of classes, 0 where no clear colour; what belongs to which is in `LAYERS`."""
    bits = frames >> 3
    index = (bits[..., 0].astype(np.uint16) << 10) | (bits[..., 1].astype(np.uint16) << 5) | bits[..., 2]
    return _class_table()[index]


def name_of_lab(lab: np.ndarray) -> str:
    """The everyday name of a Lab colour [3], muted ones included."""
    lightness, a, b = (float(v) for v in lab)
    chroma, hue = float(np.hypot(a, b)), float(np.degrees(np.arctan2(b, a)) % 360)
    if lightness < 18 and chroma < 16:
        return "black"
    pale = lightness > 60 and chroma < 13 and 100 <= hue < 200  # clouds and haze have a tinge of green that no one names
    if chroma < 8 or pale or (lightness < 30 and chroma < 10):
        return "white" if lightness > 85 else "grey" if lightness > 20 else "black"
    if 45 <= hue < 112 and chroma < 34 and lightness > 64:
        return "beige"
    if hue < 20 or hue >= 355:
        return "pink" if lightness > 62 else "red"
    if hue < 48:
        return "beige" if lightness > 80 and hue > 40 else "pink" if lightness > 66 else "red" if chroma > 48 else "brown"
    if hue < 77:
        return "orange" if chroma > 45 and lightness > 52 else "brown"
    if hue < 105:
        return "yellow" if lightness > 65 and chroma > 34 else "brown" if lightness < 50 else "beige" if chroma < 34 else "yellow"
    if hue < 168:
        return "green"
    if hue < 250:
        if chroma > 26 and lightness > 60 and hue > 180:
            return "cyan" if hue < 238 else "blue"
        return "teal" if hue < 215 else "blue"
    if hue < 302:
        return "blue"
    if hue < 333:
        return "purple"
    return "magenta" if chroma > 40 else "pink" if lightness > 62 else "purple"


@cache
def _name_table() -> tuple[np.ndarray, tuple[str, ...]]:
    """uint8 [32768] of indexes into the names, for colours at five bits a channel."""
    grid = np.indices((32, 32, 32)).reshape(3, -1).T * 8 + 4
    words = [name_of_lab(lab) for lab in to_lab(grid.astype(np.uint8))]
    names = tuple(dict.fromkeys(words))
    return np.array([names.index(w) for w in words], np.uint8), names


def main_colours(pixels: np.ndarray, min_share: float = 0.5) -> tuple[str, ...]:
    """Names of the up to three colours that together cover `min_share` of pixels uint8 [N, 3], largest first; empty where more
    would be needed, for then no colour is the main one."""
    if not len(pixels):
        return ()
    table, names = _name_table()
    bits = (pixels >> 3).astype(np.uint16)
    counts = np.bincount(table[(bits[:, 0] << 10) | (bits[:, 1] << 5) | bits[:, 2]], minlength=len(names)) / len(pixels)
    found: list[str] = []
    covered = 0.0
    for index in np.argsort(-counts, kind="stable")[:3]:
        if counts[index] < 0.15:
            break
        # A second colour that is nearly as common as the first belongs to the picture as well.
        if covered >= min_share and counts[index] < 0.25:
            break
        found.append(names[index])
        covered += float(counts[index])
    return tuple(found) if covered >= min_share else ()
