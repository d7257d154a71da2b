"""Filmstrips for the report, made while the first decode passes by, so that no frame is decoded for them."""

from __future__ import annotations

import cv2
import numpy as np

from curation.stage import Row, SourceFacts, StreamFrame
from waver_core.video import display_size_px, resize

_SAMPLES_PER_S = 2.0
_HEIGHT_PX = 108
MAX_FRAMES = 8


class Thumbnails:
    """Small JPEGs of a source, twice a second, joined to one strip per clip."""

    def __init__(self, source: SourceFacts) -> None:
        self._turns, self._aspect = source.turns, source.info.pixel_aspect
        self._at: list[int] = []
        self._jpegs: list[np.ndarray] = []
        self._next_s = 0.0

    def add(self, frame: StreamFrame) -> None:
        """Keep a frame now and then."""
        if frame.time_s < self._next_s:
            return
        self._next_s = frame.time_s + 1 / _SAMPLES_PER_S
        if frame.picture is not None:
            rgb = self._shrink(frame)
        else:
            assert frame.full is not None
            width = max(2, round(frame.full.shape[1] * _HEIGHT_PX / frame.full.shape[0]))
            rgb = cv2.resize(frame.full, (width, _HEIGHT_PX), interpolation=cv2.INTER_AREA)
        ok, jpeg = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 80])
        if ok:
            self._at.append(frame.index)
            self._jpegs.append(jpeg)

    def _shrink(self, frame: StreamFrame) -> np.ndarray:
        picture = frame.picture
        assert picture is not None
        shown_width, shown_height = display_size_px(picture.width, picture.height, self._aspect, self._turns)
        size = (max(2, round(shown_width * _HEIGHT_PX / shown_height)), _HEIGHT_PX)
        stored = size[::-1] if self._turns % 2 else size
        rgb = resize(picture, *stored)
        return np.rot90(rgb, self._turns) if self._turns else rgb

    def filmstrip(self, clip: Row) -> tuple[bytes, int] | None:
        """JPEG of up to eight frames side by side and their number; None where the clip fell between two samples."""
        at = np.array(self._at)
        inside = np.flatnonzero((at >= clip["start_frame"]) & (at < clip["end_frame"]))
        if not len(inside):
            return None
        picked = inside[np.linspace(0, len(inside) - 1, min(MAX_FRAMES, len(inside))).round().astype(int)]
        strip = cv2.hconcat([cv2.imdecode(self._jpegs[i], cv2.IMREAD_COLOR) for i in picked])
        ok, jpeg = cv2.imencode(".jpg", strip, [cv2.IMWRITE_JPEG_QUALITY, 72])
        return (jpeg.tobytes(), len(picked)) if ok else None
