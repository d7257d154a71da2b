"""Many wait for one job: the store is asked once for all of them, and those that wait are woken when something has changed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator

from serving.api.access import in_thread
from serving.api.errors import STORE_AWAY, ApiError
from serving.api.service import Service
from serving.jobs import Job

POLL_S = 0.1
FIRST_POLL_S = 0.02
FEW = 4
"""Jobs that are watched twice as closely."""
QUEUED_POLL_S = 0.4
"""For a job that others are before: it cannot begin at once."""
PLACE_S = 1.0
"""The place in the queue changes without the job; it is looked up this often."""
MAX_STREAMS = 100
"""Of one caller at once in this replica, or one key could take all the connections that a replica serves."""
PATIENCE_S = 60.0
"""A store that is away for so long is waited for: the job goes on, and whoever is sent off would ask for it a second time."""
AWAY_S = (0.25, 5.0)
"""Pauses while it is away, the first and the longest."""


class Watched:
    """A job as it was last seen; `job` is None once it is deleted."""

    def __init__(self, job: Job) -> None:
        self.job: Job | None = job
        self.place: int | None = None
        """In the queue, 0 for the next; None while that is not known, and once it has begun."""
        self.listeners = 0
        self.task: asyncio.Task[None] | None = None
        self.error: Exception | None = None
        self.changes = 0
        self._changed = asyncio.Event()

    async def change(self, since: int, timeout_s: float) -> None:
        """Wait until there are more changes than `since`, at most so long. Raises what asking the store did."""
        if self.error is None and self.changes == since:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
        if self.error is not None:
            raise self.error

    def wake(self) -> None:
        """Let all go on that wait now."""
        self.changes += 1
        self._changed.set()
        self._changed = asyncio.Event()


class Watch:
    """The jobs that somebody waits for. One in each replica, used from its event loop alone."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: dict[str, Watched] = {}
        self.streams: Counter[str] = Counter()
        """Streams of each caller, and requests that wait for their file."""

    def require_room(self, owner: str) -> None:
        """Raises `ApiError` 429 where this caller has as many streams as one may have."""
        if self.streams[owner] >= MAX_STREAMS:
            message = f"{MAX_STREAMS} streams and waiting requests are open already: end some, or ask GET /jobs now and then."
            raise ApiError(429, "too_many_streams", message, headers={"Retry-After": "5"})

    @contextlib.asynccontextmanager
    async def stream(self, owner: str) -> AsyncIterator[None]:
        """Counts one more of this caller's."""
        self.streams[owner] += 1
        try:
            yield
        finally:
            self.streams[owner] -= 1
            if not self.streams[owner]:
                del self.streams[owner]

    @contextlib.asynccontextmanager
    async def watching(self, job: Job) -> AsyncIterator[Watched]:
        """The job, kept up to date while anybody is in here."""
        watched = self._jobs.get(job.id)
        if watched is None or watched.error is not None or watched.job is None:
            watched = self._jobs[job.id] = Watched(job)
            watched.task = asyncio.get_running_loop().create_task(self._follow(watched, job))
        elif watched.job.version < job.version:
            watched.job = job
            watched.wake()
        watched.listeners += 1
        try:
            yield watched
        finally:
            watched.listeners -= 1
            if not watched.listeners:
                if watched.task is not None:
                    watched.task.cancel()
                if self._jobs.get(job.id) is watched:
                    del self._jobs[job.id]

    async def _follow(self, watched: Watched, job: Job) -> None:
        """Ask the store until the job has ended or is gone, or the store has been away for too long."""
        store, placed, begun = self._service.store, 0.0, time.monotonic()
        heard, pause = begun, AWAY_S[0]
        try:
            while watched.job is not None and not watched.job.ended:
                waits = watched.job.state == "queued" and (watched.place or 0) > 1
                soon = max(FIRST_POLL_S, 0.05 * (time.monotonic() - begun))  # short jobs are not made long by looking late
                await asyncio.sleep(QUEUED_POLL_S if waits else min(POLL_S if len(self._jobs) > FEW else POLL_S / 2, soon))
                place = None
                try:
                    now = await in_thread(store.get, job.id, job.owner)
                    if now is not None and now.state == "queued":
                        place = watched.place
                        if time.monotonic() - placed >= PLACE_S:
                            place, placed = await in_thread(store.ahead, now), time.monotonic()
                except STORE_AWAY:
                    if time.monotonic() - heard >= PATIENCE_S:
                        raise
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, AWAY_S[1])
                    continue
                heard, pause = time.monotonic(), AWAY_S[0]
                if now is not None and watched.job is not None and now.version <= watched.job.version:
                    now = watched.job  # whoever came in last had a newer one, perhaps
                if now is not watched.job or place != watched.place:
                    watched.job, watched.place = now, place
                    watched.wake()
        except Exception as error:
            watched.error = error
            watched.wake()
