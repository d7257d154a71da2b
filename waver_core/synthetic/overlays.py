"""What is burned into the picture: titles, subtitles, watermarks, logos and text slides."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from waver_core.synthetic.lettering import logo_patch, text_patch
from waver_core.synthetic.scenes import Overlay

MARGIN_SHORT_SIDES = 0.05


class Stamp(NamedTuple):
    """A patch with alpha, ready to lay on: ``colour`` and ``alpha`` float32 ``[h, w, 3]`` and ``[h, w, 1]`` 0 to 1."""

    colour: np.ndarray
    alpha: np.ndarray
    left_px: int
    top_px: int

    @property
    def box_px(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1, the last two exclusive."""
        height, width = self.alpha.shape[:2]
        return self.left_px, self.top_px, self.left_px + width, self.top_px + height


def line_at(overlay: Overlay, time_s: float) -> int:
    """Which line of a subtitle shows at a time since its shot or video began; other overlays show all lines."""
    return int(max(0.0, time_s) / overlay.period_s + 1e-9) % len(overlay.lines) if overlay.kind == "subtitle" else 0


def stamp(overlay: Overlay, line: int, size_px: tuple[int, int]) -> Stamp | None:
    """Draw an overlay for a picture of ``size_px`` (width, height); None where the subtitle's line is blank."""
    width, height = size_px
    short = min(size_px)
    text_px = round(overlay.height_short_sides * short)
    place = overlay.place
    if overlay.kind == "logo":
        patch = logo_patch(text_px)
    elif overlay.kind == "slide":
        patch, place = _slide(overlay.lines, text_px), "centre"
    elif overlay.kind == "subtitle":
        if not overlay.lines[line].strip():
            return None
        patch, place = text_patch((overlay.lines[line],), text_px, (252, 252, 248), outline=(16, 16, 20)), "bottom"
    else:
        patch = text_patch(overlay.lines, text_px, (255, 255, 255), outline=(28, 30, 38))
    h, w = patch.shape[:2]
    margin = round(MARGIN_SHORT_SIDES * short)
    left = margin if "left" in place else width - margin - w if "right" in place else (width - w) // 2
    top = margin if "top" in place else height - margin - h if "bottom" in place else (height - h) // 2
    x0, y0 = max(0, left), max(0, top)
    patch = patch[y0 - top : height - top, x0 - left : width - left].astype(np.float32)
    return Stamp(patch[..., :3], patch[..., 3:] * (overlay.opacity / 255), x0, y0)


def _slide(lines: tuple[str, ...], text_px: int) -> np.ndarray:
    """A heading, a rule and left-aligned lines in dark ink."""
    ink = (44, 50, 64)
    head = text_patch(lines[:1], round(text_px * 1.5), ink, align="left")
    body = text_patch([f"-  {line}" for line in lines[1:]] or [" ."], text_px, ink, align="left", line_height=1.7)
    gap = text_px
    width = max(head.shape[1], body.shape[1])
    patch = np.zeros((head.shape[0] + 2 * gap + body.shape[0], width, 4), np.uint8)
    patch[: head.shape[0], : head.shape[1]] = head
    rule = head.shape[0] + gap * 2 // 3
    patch[rule : rule + max(2, text_px // 12)] = (*ink, 150)
    patch[head.shape[0] + 2 * gap :, : body.shape[1]] = body
    return patch


def lay_stamp(picture: np.ndarray, what: Stamp | None) -> None:
    """Lay a stamp on a uint8 RGB picture, in place."""
    if what is None:
        return
    x0, y0, x1, y1 = what.box_px
    view = picture[y0:y1, x0:x1]
    view[:] = (view + (what.colour - view) * what.alpha + 0.5).astype(np.uint8)
