"""A dispatcher's surroundings without models: a store, stages that can be told to fail, hang or die, and a way to run it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serving.cascade import BaseWork, Conditions, DecodeWork, RefineWork, Upscaled, UpscaleWork, Vectors
from serving.dispatcher import Dispatcher
from serving.jobs import PRIORITIES, Job
from serving.plan import facts, plan
from serving.rewriting import Rewritten
from serving.settings import Settings
from serving.store import JobStore
from serving.streaming import Done, OnStep, Step, stream
from serving.webhooks import Webhooks
from tests.serving.generate_requests import request
from waver_core.backends.contracts import Rewriting
from waver_core.flow.sampler import Stop
from waver_core.shapes import VideoShape


class WorkerDied(Exception):
    """Stands for Ray's errors of dead actors."""


@dataclass
class FakeStages:
    """Small numbers for every stage. `base_raises`: what the base model raises on its first runs; `step_s`: how slow it is."""

    base_raises: list[Exception] = field(default_factory=list)
    step_s: float = 0.0
    slow: str = ""
    """A stage of the autoencoder that takes 200 steps of 10 ms."""
    steps_done: int = 0
    running: int = 0
    most_running: int = 0

    async def rewrite(self, asked: Rewriting, enabled: bool) -> Rewritten:
        return Rewritten(asked.prompt + "!", asked.prompt, "fake-1")

    async def encode(self, texts: Sequence[str]) -> list[Vectors]:
        return [(np.zeros((1, 4), np.float32),) for _ in texts]

    async def conditions(self, shapes: Sequence[VideoShape], frames: Mapping[int, np.ndarray]) -> list[Conditions]:
        return [Conditions(np.zeros((16, 1, 8, 8), np.float32), {}) for _ in shapes]

    def base(self, work: BaseWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        def compute(on_step: OnStep) -> np.ndarray:
            if self.base_raises:
                raise self.base_raises.pop(0)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                for done in range(work.plan.steps + 1):
                    if not on_step(done, work.plan.steps):
                        raise Stop(done, work.plan.steps)
                    self.steps_done += done > 0
                    time.sleep(self.step_s)
            finally:
                self.running -= 1
            return np.zeros((16, 3, 8, 8), np.float32)

        return stream(compute)

    def _walk(self, stage: str, on_step: OnStep) -> None:
        for done in range(200 if self.slow == stage else 0):
            if not on_step(done, 200):
                raise Stop(done, 200)
            self.steps_done += 1
            time.sleep(0.01)

    def upscale(self, work: UpscaleWork) -> AsyncGenerator[Step | Done[Upscaled], None]:
        def compute(on_step: OnStep) -> Upscaled:
            self._walk("upscale", on_step)
            return Upscaled(work.latents, b"preview")

        return stream(compute)

    def refine(self, work: RefineWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        return stream(lambda on_step: work.latents)

    def decode(self, work: DecodeWork) -> AsyncGenerator[Step | Done[bytes], None]:
        def compute(on_step: OnStep) -> bytes:
            self._walk("decode", on_step)
            return b"the file of seed %d" % work.plan.seed

        return stream(compute)


class House:
    """A store, settings over untrained exports, and dispatchers as they are asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.store, self.number = settings, JobStore(settings.database_url), 0
        self.folder = Path(settings.storage.folder)

    def submit(self, seed: int = 1, priority: str = "normal", **asked: Any) -> str:
        wanted = request(**{"steps": 5, "seed": seed, **asked})
        made = plan(wanted, facts(self.settings), self.settings, seed)
        self.number += 1
        job, _ = self.store.submit(
            f"job_{self.number:024x}",
            "local",
            wanted.model_dump(),
            priority=PRIORITIES[priority],
            resolved=made.to_json(),
            request_digest="",
            max_queued=100,
        )
        return job.id

    def dispatcher(self, stages: Any, settings: Settings | None = None) -> Dispatcher:
        used = settings or self.settings
        webhooks = Webhooks(self.store, used.http, lambda job: {"id": job.id})
        return Dispatcher(self.store, stages, used, webhooks, lambda error: isinstance(error, WorkerDied))

    def job(self, job_id: str) -> Job:
        job = self.store.get(job_id)
        assert job is not None
        return job

    def files(self, job_id: str) -> list[str]:
        return sorted(p.name for p in (self.folder / "jobs" / job_id).glob("*"))

    def with_queue(self, **changes: Any) -> Settings:
        return self.settings.model_copy(update={"queue": self.settings.queue.model_copy(update=changes)})


def run(
    dispatchers: Sequence[Dispatcher], until: Callable[[], Any], meanwhile: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Dispatchers until something holds; fails after ten seconds."""

    async def main() -> None:
        tasks = [asyncio.create_task(d.run()) for d in dispatchers]
        if meanwhile is not None:
            await meanwhile()
        async with asyncio.timeout(10):
            while not until():
                await asyncio.sleep(0.01)
                assert not any(task.done() for task in tasks), [t.exception() for t in tasks if t.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.1)

    asyncio.run(main())
