"""The cascade's stages in this process, without Ray: for one machine, for tests, and as the yardstick of what serving costs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial

import numpy as np

from serving.cascade import BaseWork, Conditions, DecodeWork, RefineWork, Upscaled, UpscaleWork, Vectors
from serving.models import Denoiser, Pictures, TextEncoders, rewritten
from serving.plan import checkpoints
from serving.rewriting import Rewritten, make_rewriter
from serving.settings import Settings
from serving.streaming import Done, Step, stream
from waver_core.backends.contracts import Rewriting
from waver_core.errors import UserError
from waver_core.shapes import VideoShape


class LocalStages:
    """See `serving.cascade.Stages`. Loads every model of the settings; one request at a time."""

    def __init__(self, settings: Settings) -> None:
        base, refiner = checkpoints(settings)
        self.rewriter = make_rewriter(settings.rewriting)
        self.texts = TextEncoders(base)
        self.pictures = Pictures(base, settings.cascade)
        self.base_model = Denoiser(base, settings.cascade)
        self.refiner_model = Denoiser(refiner, settings.cascade) if refiner else None

    async def rewrite(self, request: Rewriting, enabled: bool) -> Rewritten:
        """See `Stages`."""
        return rewritten(self.rewriter, request, enabled)

    async def encode(self, texts: Sequence[str]) -> list[Vectors]:
        """See `Stages`."""
        return self.texts.encode(texts)

    async def conditions(self, shapes: Sequence[VideoShape], frames: Mapping[int, np.ndarray]) -> list[Conditions]:
        """See `Stages`."""
        return [self.pictures.conditions(shape, frames) for shape in shapes]

    def base(self, work: BaseWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        """See `Stages`."""
        return stream(partial(self.base_model.base, work))

    def upscale(self, work: UpscaleWork) -> AsyncGenerator[Step | Done[Upscaled], None]:
        """See `Stages`."""
        return stream(partial(self.pictures.upscale, work))

    def refine(self, work: RefineWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        """See `Stages`."""
        if self.refiner_model is None:
            raise UserError("there is no refiner: set serving.cascade.refiner")
        return stream(partial(self.refiner_model.refine, work))

    def decode(self, work: DecodeWork) -> AsyncGenerator[Step | Done[bytes], None]:
        """See `Stages`."""
        return stream(partial(self.pictures.decode, work))
