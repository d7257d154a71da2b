"""What the store is told of a job while it is computed (`serving.cascade.Observer`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from serving.jobs import Job
from serving.plan import Plan
from serving.progress import Progress, Rates
from serving.rewriting import Rewritten
from serving.settings import Settings
from serving.store import JobStore
from waver_core.storage import join, write_atomic

log = logging.getLogger("waver.dispatcher")
_WRITE_EVERY_S = 0.05


class Lost(Exception):
    """The job is not this dispatcher's any more, or is to be cancelled: stop computing it."""


class Reporter:
    """Writes progress to the store, not more often than a person can see, and each stage's beginning at once."""

    def __init__(
        self, job: Job, store: JobStore, settings: Settings, units: dict[str, float], rates: Rates, limit: asyncio.Timeout
    ) -> None:
        self.plan, self.units = plan_of(job), units
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        """Network steps so far, of this attempt."""
        self._job, self._store, self._settings = job, store, settings
        self._progress = Progress(rates.expected_s(units))
        self._stage, self._begun, self._waits = "", 0.0, False
        self._limit = limit
        self._news: dict[str, Any] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._lost = False

    async def step(self, stage: str, done: int, steps: int) -> None:
        """See `serving.cascade.Observer`."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun, self._waits = stage, now, True
        elif self._waits:  # the first step: until now it waited for a free replica
            self._waits = False
            if (when := self._limit.when()) is not None:
                self._limit.reschedule(when + now - self._begun)
            self._begun = now
        self.seconds[stage] = now - self._begun
        if stage in ("base", "refine") and steps > 1:
            self.steps[stage] = max(done, self.steps.get(stage, 0))
        progress = self._progress.at(stage, done, steps)
        self._news = {"stage": stage, "step": done, "steps": steps, "progress": progress}
        if self._lost:
            raise Lost
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_news())

    async def close(self) -> None:
        """Nothing more is to be told."""
        self._news = None
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])

    async def _write_news(self) -> None:
        """The newest of what there is to tell, until there is nothing more: the cascade does not wait for the store."""
        while self._news is not None:
            news, self._news = self._news, None
            try:
                await self._write(self._store.report, **news)
            except Lost:
                self._lost = True
                return
            await asyncio.sleep(_WRITE_EVERY_S)

    async def rewritten(self, prompt: Rewritten) -> None:
        """See `serving.cascade.Observer`."""
        told = {"prompt": prompt.prompt, "original_prompt": prompt.original, "rewritten_by": prompt.by}
        await self._write(self._store.resolve, told | {"rewrite_fell_back": prompt.fell_back})

    async def preview(self, data: bytes) -> None:
        """See `serving.cascade.Observer`."""
        name = f"jobs/{self._job.id}/preview-{self._job.attempt}.{'png' if self.plan.kind == 'image' else 'mp4'}"
        await asyncio.to_thread(write_atomic, join(self._settings.storage.folder, name), data)
        await self._write(self._store.preview, name)

    async def _write(self, method: Callable[..., bool], *args: Any, **values: Any) -> None:
        try:
            ours = await asyncio.to_thread(method, self._job.id, self._job.attempt, *args, **values)
        except Exception:
            log.exception("progress of job %s could not be written", self._job.id)  # no reason to throw its work away
            return
        if not ours:
            raise Lost


def plan_of(job: Job) -> Plan:
    """The plan that was settled when the job came in."""
    return Plan(**{name: job.resolved[name] for name in Plan.__dataclass_fields__})
