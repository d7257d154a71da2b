"""The cascade, in order: rewrite, tag, encode, base, upscale, refine, decode (Waver §2.2, §4.5, §4.6). No Ray here.

`generate` is the whole way of one request. Where its stages run is for `Stages` to know: in this process (`serving.local`) or in
deployments of Ray Serve (`serving.deployments`); the bytes are the same.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from serving.plan import Plan
from serving.rewriting import Rewritten
from serving.streaming import Done, Step, result_of
from waver_core import __version__
from waver_core.backends.contracts import Rewriting
from waver_core.shapes import VideoShape

_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's word for media made by a trained model."""

Vectors = tuple[np.ndarray, ...]
"""One text: fp32 [L, dim] from every encoder."""


@dataclass(frozen=True)
class Wish:
    """What the cascade is asked for. `frames`: uint8 [H, W, 3] of any size, 0 for the first and -1 for the last."""

    prompt: str
    plan: Plan
    rewrite: bool = True
    frames: Mapping[int, np.ndarray] = field(default_factory=dict)
    settled: Rewritten | None = None
    """The prompt as an earlier attempt rewrote it: a language model may word it differently the next time."""


@dataclass(frozen=True)
class Conditions:
    """Latents [16, 1, h, w] of a black image, and of the given frames by place."""

    black: np.ndarray
    given: Mapping[int, np.ndarray]


@dataclass(frozen=True)
class BaseWork:
    """For the base model."""

    plan: Plan
    text: Vectors
    negative: Vectors
    conditions: Conditions


@dataclass(frozen=True)
class UpscaleWork:
    """The base model's latents [16, T, h, w], to be decoded, enlarged and encoded."""

    plan: Plan
    latents: np.ndarray
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Upscaled:
    """Latents of the enlarged video, and the base model's own video as a file."""

    latents: np.ndarray
    preview: bytes


@dataclass(frozen=True)
class RefineWork:
    """For the refiner; the conditions are of the result's size."""

    plan: Plan
    text: Vectors
    latents: np.ndarray
    conditions: Conditions


@dataclass(frozen=True)
class DecodeWork:
    """Latents to become a file."""

    plan: Plan
    latents: np.ndarray
    metadata: Mapping[str, str]


class Stages(Protocol):
    """Where the models are. Streams end with `Done`; closing one stops its work between two steps."""

    async def rewrite(self, request: Rewriting, enabled: bool) -> Rewritten:
        """The prompt as the model likes it, with the words of its style."""

    async def encode(self, texts: Sequence[str]) -> list[Vectors]:
        """Every text by every encoder, lengthened as in training."""

    async def conditions(self, shapes: Sequence[VideoShape], frames: Mapping[int, np.ndarray]) -> list[Conditions]:
        """Given frames, cut to each size and encoded as images."""

    def base(self, work: BaseWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        """Latents fp32 [16, T, h, w] from noise."""

    def upscale(self, work: UpscaleWork) -> AsyncGenerator[Step | Done[Upscaled], None]:
        """Pixels and back, larger."""

    def refine(self, work: RefineWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        """Latents fp32 [16, T, h, w] from degraded ones."""

    def decode(self, work: DecodeWork) -> AsyncGenerator[Step | Done[bytes], None]:
        """An MP4, or a PNG of an image."""


class Observer(Protocol):
    """Who is told how far it is. Raising ends the cascade."""

    async def step(self, stage: str, done: int, steps: int) -> None:
        """`done` runs from 0 (the stage begins) to `steps`."""

    async def rewritten(self, prompt: Rewritten) -> None:
        """The prompt is settled."""

    async def preview(self, data: bytes) -> None:
        """The base model's result is there, the refiner is still to come."""


@dataclass(frozen=True)
class Result:
    """The file, how it came about, and the seconds that each stage took."""

    data: bytes
    prompt: Rewritten
    stage_seconds: Mapping[str, float]


async def generate(wish: Wish, stages: Stages, observer: Observer) -> Result:
    """Make one video or image. What any stage raises comes through."""
    plan, clock = wish.plan, _Clock(observer)

    async with clock.stage("rewrite"):
        seconds = plan.seconds if plan.kind == "video" else 0.0
        prompt = wish.settled or await stages.rewrite(Rewriting(wish.prompt, seconds, plan.style_words), wish.rewrite)
        await observer.rewritten(prompt)
    metadata = metadata_of(plan, prompt)

    async with clock.stage("encode"):
        shapes = [plan.base_shape, plan.shape] if plan.refine else [plan.base_shape]
        texts = stages.encode([prompt.prompt, plan.negative])
        (text, negative), conditions = await asyncio.gather(texts, stages.conditions(shapes, wish.frames))

    async with clock.stage("base") as told:
        latents = await result_of(stages.base(BaseWork(plan, text, negative, conditions[0])), told)

    if plan.refine:
        async with clock.stage("upscale") as told:
            upscaled = await result_of(stages.upscale(UpscaleWork(plan, latents, metadata)), told)
            await observer.preview(upscaled.preview)
        async with clock.stage("refine") as told:
            work = RefineWork(plan, text, upscaled.latents, conditions[1])
            latents = await result_of(stages.refine(work), told)

    async with clock.stage("decode") as told:
        data = await result_of(stages.decode(DecodeWork(plan, latents, metadata)), told)
    return Result(data, prompt, clock.seconds)


def metadata_of(plan: Plan, prompt: Rewritten) -> dict[str, str]:
    """What the file says of itself: that it is generated, by what, from which words and seed. The same for the same request."""
    told: dict[str, Any] = {"generated": True, "digital_source_type": _SOURCE_TYPE, "software": f"OpenWaver {__version__}"}
    told |= {"prompt": prompt.prompt, "original_prompt": prompt.original, **plan.to_json()}
    return {  # keys that every player knows: with one of our own, MP4 hides them all from file managers
        "title": prompt.original,
        "comment": f"Generated by a video model (OpenWaver {__version__}, {plan.checkpoint}, seed {plan.seed}).",
        "description": json.dumps(told, ensure_ascii=False, sort_keys=True),
    }


class _Clock:
    """Tells the observer of each stage's steps and keeps its seconds."""

    def __init__(self, observer: Observer) -> None:
        self.observer, self.seconds = observer, dict[str, float]()

    def stage(self, name: str) -> _Stage:
        return _Stage(self, name)


class _Stage:
    def __init__(self, clock: _Clock, name: str) -> None:
        self._clock, self._name = clock, name
        self._last: Step | None = None

    async def __aenter__(self) -> Any:
        self._start = time.perf_counter()
        await self._clock.observer.step(self._name, 0, 1)
        return self._told

    async def __aexit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._clock.seconds[self._name] = round(time.perf_counter() - self._start, 6)
            steps = self._last.steps if self._last else 1
            await self._clock.observer.step(self._name, steps, steps)

    async def _told(self, step: Step) -> None:
        if self._last is None:
            self._start = time.perf_counter()  # waiting for a free replica is no part of the stage
        self._last = step
        await self._clock.observer.step(self._name, step.done, step.steps)
