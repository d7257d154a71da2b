"""Text and glyphs as small RGBA patches, in the font that ships with Pillow (nothing to download)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


def text_patch(
    lines: Sequence[str],
    size_px: int,
    colour: Colour,
    *,
    outline: Sequence[float] | None = None,
    align: str = "center",
    line_height: float = 1.35,
) -> np.ndarray:
    """Draw lines of text, ``size_px`` high each, as uint8 RGBA ``[h, w, 4]`` cut to what is written."""
    size_px = max(6, size_px)
    font = ImageFont.load_default(size=size_px)
    stroke = max(1, round(size_px / 14)) if outline is not None else 0
    widths = [font.getlength(line) for line in lines]
    width = int(max(widths)) + 4 * stroke + 4
    height = int(size_px * line_height * len(lines)) + size_px // 2 + 4 * stroke
    image = Image.new("RGBA", (width, height), (*colour, 0))
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        x = 2 * stroke + ((width - 4 * stroke - widths[number]) / 2 if align == "center" else 0)
        fill = (*colour, 255)
        edge = None if outline is None else (int(outline[0]), int(outline[1]), int(outline[2]), 255)
        y = number * size_px * line_height
        draw.text((x, y), line, font=font, fill=fill, stroke_width=stroke, stroke_fill=edge)
    patch = np.array(image)
    rows, columns = np.nonzero(patch[..., 3].any(axis=1))[0], np.nonzero(patch[..., 3].any(axis=0))[0]
    return patch[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def logo_patch(size_px: int) -> np.ndarray:
    """A round station logo (a white ring with a triangle), uint8 RGBA ``[size, size, 4]``."""
    scale = 4
    side = max(8, size_px) * scale
    image = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0, 0, side - 1, side - 1), fill=(20, 24, 32, 255))
    draw.ellipse((side * 0.05, side * 0.05, side * 0.95, side * 0.95), fill=(255, 255, 255, 255))
    draw.ellipse((side * 0.15, side * 0.15, side * 0.85, side * 0.85), fill=(20, 24, 32, 255))
    draw.polygon(((side * 0.4, side * 0.28), (side * 0.4, side * 0.72), (side * 0.74, side * 0.5)), fill=(255,) * 4)
    return np.array(image.resize((side // scale, side // scale), Image.Resampling.BOX))
