"""Embeddings of some frames of a source, made in batches while the first decode passes by."""

from __future__ import annotations

import cv2
import numpy as np

from curation.stage import SourceFacts, StreamFrame
from waver_core.backends.contracts import FrameEmbedder
from waver_core.video import to_rgb

_BATCH_FRAMES = 32


class EmbeddedSamples:
    """Shows an embedder the frames it is given, upright and at the size it wants; keeps two bytes a value."""

    def __init__(self, embedder: FrameEmbedder, source: SourceFacts) -> None:
        self._embedder, self._source = embedder, source
        self._pending: list[np.ndarray] = []
        self._vectors: list[np.ndarray] = []
        self._at: list[int] = []

    def add(self, frame: StreamFrame) -> None:
        """Queue one frame; its picture is not kept beyond the batch."""
        rgb = self._shrink(frame)
        if self._pending and (len(self._pending) == _BATCH_FRAMES or self._pending[0].shape != rgb.shape):
            self._embed()
        self._pending.append(rgb)
        self._at.append(frame.index)

    def _shrink(self, frame: StreamFrame) -> np.ndarray:
        side_px = self._embedder.short_side_px
        if frame.picture is not None:
            return to_rgb(
                frame.picture, pixel_aspect=self._source.info.pixel_aspect, turns=self._source.turns, short_side_px=side_px
            )
        rgb = frame.full if frame.full is not None else frame.small
        scale = min(1.0, side_px / min(rgb.shape[:2]))
        size = (max(2, round(rgb.shape[1] * scale)), max(2, round(rgb.shape[0] * scale)))
        return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)

    def _embed(self) -> None:
        self._vectors.extend(self._embedder.embed(np.stack(self._pending)).astype(np.float16))
        self._pending = []

    def finish(self) -> tuple[list[int], list[np.ndarray]]:
        """Indexes of the frames, in order, and their embeddings of about unit length, each float16 [D]."""
        if self._pending:
            self._embed()
        return self._at, self._vectors
