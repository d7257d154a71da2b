"""Aesthetic (Waver §3.1, static visual quality): a score per frame and its mean, by photographic features when embedded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import stage
from curation.stage import BackendUse, ClipMedia, FrameRequest, Row
from waver_core.backends.contracts import Aesthetics, AestheticScorer
from waver_core.config import Strict
from waver_core.manifest import Column

_PARTS = {
    "exposure": "how well exposed (mid-tones, nothing clipped)",
    "contrast": "spread between dark and light",
    "colourfulness": "how colourful",
    "sharpness": "how sharp the sharpest parts are",
    "noise": "freedom from noise",
    "composition": "whether detail gathers in the middle ground",
}


class Options(Strict):
    """Which scorer, on how many frames."""

    backend: str = "photographic"
    backend_options: dict[str, Any] = {}
    frames: int = Field(3, ge=1)
    short_side_px: int = Field(360, ge=64)


class Stage(stage.Stage):
    """Scores a few frames of each clip."""

    name = "aesthetic"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("clip",)
    columns = (
        Column("aesthetic_score", pa.float64(), "mean over frames, on the scale 1 to 10", score=True),
        Column("aesthetic_frames", pa.list_(pa.float32()), "score of every sampled frame"),
        *(
            Column(f"aesthetic_{n}", pa.float64(), f"{d}, 0 to 1, by photographic features", score=True)
            for n, d in _PARTS.items()
        ),
    )

    def backends(self) -> list[BackendUse]:
        """The scorer."""
        return [BackendUse("aesthetic_scorer", self.options.backend, self.options.backend_options)]

    @cached_property
    def _scorer(self) -> AestheticScorer:
        scorer: AestheticScorer = self.backends()[0].create()
        return scorer

    def requests(self) -> tuple[FrameRequest, ...]:
        """A few frames, large enough to judge sharpness."""
        return (FrameRequest(self.options.short_side_px, count=self.options.frames),)

    def score(self, media: ClipMedia) -> Row:
        """Score per frame, pooled by the mean."""
        return _columns(self._scorer.score(media.frames[self.requests()[0]].rgb))

    def score_many(self, media: Sequence[ClipMedia]) -> list[Row | Exception]:
        """The frames of all clips of one size in one call, so that a model on a GPU gets full batches."""
        frames = [m.frames[self.requests()[0]].rgb for m in media]
        if len(media) < 2 or len({f.shape[1:] for f in frames}) > 1:
            return super().score_many(media)
        found = self._scorer.score(np.concatenate(frames))
        ends = np.cumsum([len(f) for f in frames])[:-1]
        parts = {name: np.split(values, ends) for name, values in found.parts.items()}
        return [
            _columns(Aesthetics(score, {name: values[i] for name, values in parts.items()}))
            for i, score in enumerate(np.split(found.score, ends))
        ]


def _columns(found: Aesthetics) -> Row:
    row: Row = {"aesthetic_score": float(found.score.mean()), "aesthetic_frames": [float(s) for s in found.score]}
    return {**row, **{f"aesthetic_{name}": float(v.mean()) for name, v in found.parts.items() if name in _PARTS}}
