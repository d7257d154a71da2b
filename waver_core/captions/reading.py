"""Text that stands in a clip, read with RapidOCR; only what is read alike and surely in at least two frames is believed."""

from __future__ import annotations

import logging
import re
from functools import cached_property
from typing import Any

import numpy as np

from waver_core.errors import BackendUnavailable

_MAX_TEXTS = 4
_MAX_LETTERS = 80
_MIN_HEIGHT = 0.03


class TextReader:
    """PP-OCR detection and recognition; about 0.1 s a frame with text on one core."""

    def __init__(self, longest_side_px: int = 640, min_confidence: float = 0.9) -> None:
        self._longest_side_px, self._min_confidence = longest_side_px, min_confidence
        self.fingerprint = f"rapidocr-3-read1-{longest_side_px}-{min_confidence:g}"

    @cached_property
    def _engine(self) -> Any:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise BackendUnavailable("reading text needs rapidocr: pip install rapidocr onnxruntime") from error
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        return RapidOCR(
            params={
                "Global.log_level": "error",
                "Det.limit_type": "max",
                "Det.limit_side_len": self._longest_side_px,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, frames: np.ndarray) -> tuple[str, ...]:
        """Lines of text in frames uint8 [N, H, W, 3], from top to bottom; of a single frame, what is read with confidence."""
        seen: dict[str, tuple[int, str, tuple[int, float]]] = {}
        for frame in frames:
            for key, (text, place) in self._lines(frame).items():
                count, best, at = seen.get(key, (0, text, place))
                seen[key] = count + 1, best, at
        sure = [(at, text) for count, text, at in seen.values() if count >= min(2, len(frames))]
        return tuple(text for _, text in sorted(sure)[:_MAX_TEXTS])

    def _lines(self, frame: np.ndarray) -> dict[str, tuple[str, tuple[int, float]]]:
        """Confident lines of one frame: text and place (line, left) by what is compared between frames."""
        found = self._engine(np.ascontiguousarray(frame[..., ::-1]), use_det=True, use_cls=False, use_rec=True)
        if found is None or found.boxes is None or found.txts is None:
            return {}
        out = {}
        for corners, text, confidence in zip(np.asarray(found.boxes, float), found.txts, found.scores, strict=True):
            clean = " ".join(text.replace('"', "").split())
            (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
            height, width = frame.shape[:2]
            # Small print is misread with confidence, and what the picture's edge cuts off is read as another word.
            large = bottom - top >= _MIN_HEIGHT * min(height, width)
            whole = min(left, width - right) > 0.01 * width and min(top, height - bottom) > 0
            if confidence >= self._min_confidence and large and whole and makes_sense(clean):
                out[re.sub(r"\W", "", clean).casefold()] = clean, (round(top / (0.05 * height)), float(left))
        return out


def makes_sense(text: str) -> bool:
    """Whether a line is text and no pattern taken for it: letters or digits for the most part, three of them at least, not
    all alike; only scripts that an English caption can quote."""
    signs = [c for c in text if not c.isspace()]
    words = [c for c in signs if c.isalnum()]
    if len(words) < 3 or len(text) > _MAX_LETTERS or len(set(words)) < 2 or not text.isascii():
        return False
    return len(words) >= 0.75 * len(signs)
