"""What the store is told of a job while it is computed (`serving.cascade.Observer`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
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
    """Writes to the store what there is to tell, beside the work, which never waits for a disk before `settle`.

    Progress is written not more often than a person can see, and each stage's beginning at once; the prompt and the preview in
    the order in which they come.
    """

    def __init__(
        self, job: Job, store: JobStore, settings: Settings, units: dict[str, float], rates: Rates, limit: asyncio.Timeout
    ) -> None:
        self.plan, self.units = plan_of(job), units
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        """Network steps so far, of this attempt."""
        self._job, self._store, self._settings = job, store, settings
        self._progress = Progress(rates.expected_s(units))
        self._stage, self._begun = "", 0.0
        self._left_s: float | None = None
        """While it waits for a replica: what was left of the time it may compute."""
        self._mine, self._limit = (job.id, job.attempt), limit
        self._news: Callable[[], bool] | None = None
        self._others: deque[Callable[[], bool]] = deque()
        self._hurry = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._lost = False

    async def step(self, stage: str, done: int, steps: int) -> None:
        """See `serving.cascade.Observer`."""
        now = asyncio.get_running_loop().time()
        if stage != self._stage:
            self._stage, self._begun = stage, now
            if self._left_s is None:
                self._left_s = (self._limit.when() or now) - now
            self._limit.reschedule(now + self._settings.queue.max_wait_s)
        elif self._left_s is not None:  # the first step: until now it waited for a free replica
            self._limit.reschedule(now + self._left_s)
            self._begun, self._left_s = now, None
        self.seconds[stage] = now - self._begun
        if stage in ("base", "refine") and done:
            self.steps[stage] = max(done, self.steps.get(stage, 0))
        progress = self._progress.at(stage, done, steps)
        values: dict[str, Any] = {"stage": stage, "step": done, "steps": steps, "progress": progress}
        self._news = partial(self._store.report, *self._mine, **values)
        self._tell()

    @property
    def waiting(self) -> bool:
        """Whether a stage has begun of which no step was told yet."""
        return self._left_s is not None

    async def rewritten(self, prompt: Rewritten) -> None:
        """See `serving.cascade.Observer`."""
        told = {"prompt": prompt.prompt, "original_prompt": prompt.original, "rewritten_by": prompt.by}
        self._others.append(partial(self._store.resolve, *self._mine, told | {"rewrite_fell_back": prompt.fell_back}))
        self._tell()

    async def preview(self, data: bytes) -> None:
        """See `serving.cascade.Observer`."""
        name = f"jobs/{self._job.id}/preview-{self._job.attempt}.{'png' if self.plan.kind == 'image' else 'mp4'}"

        def write() -> bool:
            write_atomic(join(self._settings.storage.folder, name), data)
            return self._store.preview(*self._mine, name)

        self._others.append(write)
        self._tell()

    async def settle(self) -> None:
        """Until everything is written that must not come after the job's end. Raises `Lost`."""
        self._news = None
        self._hurry.set()
        if self._writer is not None:
            await self._writer
        if self._lost:
            raise Lost

    async def close(self) -> None:
        """Nothing more is to be told."""
        self._news = None
        self._others.clear()
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])

    def _tell(self) -> None:
        if self._lost:
            raise Lost
        if self._others:
            self._hurry.set()
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        """All there is to tell, of progress only the newest, until there is nothing more."""
        while self._others or self._news is not None:
            if self._others:
                write = self._others.popleft()
            else:
                assert self._news is not None
                write, self._news = self._news, None
                self._hurry.clear()
            try:
                ours = await asyncio.to_thread(write)
            except Exception:
                log.exception("progress of job %s could not be written", self._job.id)  # no reason to throw its work away
                continue
            if not ours:
                self._lost = True
                return
            if not self._others:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_WRITE_EVERY_S):
                        await self._hurry.wait()


def plan_of(job: Job) -> Plan:
    """The plan that was settled when the job came in."""
    return Plan(**{name: job.resolved[name] for name in Plan.__dataclass_fields__})
