"""Takes jobs from the store, runs each through the cascade, and writes what becomes of them. No Ray here.

Several dispatchers may share a store: a job belongs to whoever claimed it, for as long as heartbeats come. One that died, with
its whole server or alone, loses its jobs to the queue after `queue.lease_s`; what it reported before is not believed afterwards
(`Job.attempt`), so a job is begun again rather than lost, and completed once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import numpy as np

from serving.cascade import Result, Stages, Wish, generate
from serving.jobs import Job
from serving.plan import Plan, checkpoints
from serving.progress import Progress, Rates, work
from serving.rewriting import Rewritten
from serving.settings import Settings
from serving.store import JobStore
from serving.webhooks import Webhooks
from waver_core.errors import UserError
from waver_core.storage import is_local, join, local_path, remove, write_atomic
from waver_core.video import read_image

log = logging.getLogger("waver.dispatcher")
_REPORT_EVERY_S = 0.1
_TIDY_EVERY_S = 5.0
_CANCEL_EVERY_S = 0.1
_ORPHAN_AFTER_S = 3600.0
_SWEEP_EVERY_S = 600.0


class Lost(Exception):
    """The job is not this dispatcher's any more, or is to be cancelled: stop computing it."""


class Dispatcher:
    """Runs until its task is cancelled. `retryable`: errors of workers, not of the request, after which a job is begun again."""

    def __init__(
        self, store: JobStore, stages: Stages, settings: Settings, webhooks: Webhooks, retryable: Callable[[BaseException], bool]
    ) -> None:
        self._store, self._stages, self._settings, self._webhooks = store, stages, settings, webhooks
        self._retryable = retryable
        self._name = f"dispatcher-{uuid.uuid4().hex[:12]}"
        base, refiner = checkpoints(settings)
        self._models = base.model, refiner.model if refiner else None
        self._rates = Rates()
        self._claims = itertools.count()
        self._running: dict[str, tuple[Job, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """Claim and run jobs, for ever."""
        await self._learn_from_the_past()
        chores = [self._every(self._settings.queue.lease_s / 4, self._heartbeat), self._every(_CANCEL_EVERY_S, self._cancel)]
        chores += [self._every(1.0, self._send_webhooks), self._every(_TIDY_EVERY_S, self._tidy)]
        chores.append(self._every(_SWEEP_EVERY_S, self._sweep_up))
        try:
            async with asyncio.TaskGroup() as group:
                for chore in chores:
                    group.create_task(chore)
                group.create_task(self._claim())
        finally:
            for _, task in self._running.values():
                task.cancel()

    async def _claim(self) -> None:
        queue = self._settings.queue
        while True:
            job = None
            if len(self._running) < queue.running:
                worker = f"{self._name}-{next(self._claims)}"
                job = await self._steadily(asyncio.to_thread(self._store.claim, worker))
            if job is None:
                await asyncio.sleep(queue.poll_s)
                continue
            task = asyncio.create_task(self._job(job))
            self._running[worker] = job, task
            task.add_done_callback(partial(self._forget, worker))

    def _forget(self, worker: str, task: asyncio.Task[None]) -> None:
        del self._running[worker]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a job's end could not be written down; it is begun again after its lease: %s", _one_line(error))

    async def _job(self, job: Job) -> None:
        """One attempt at one job, whatever comes of it."""
        observer = _Observer(job, self._store, self._settings, self._units(job), self._rates)
        limit = asyncio.timeout(self._settings.queue.max_run_s)
        try:
            async with limit:
                result = await generate(await asyncio.to_thread(self._wish, job), self._stages, observer)
                await self._complete(job, result, observer)
        except (Lost, asyncio.CancelledError):
            await asyncio.shield(asyncio.to_thread(self._let_go, job))
        except UserError as error:
            await self._fail(job, observer, "impossible", str(error))
        except Exception as error:
            if limit.expired():
                message = f"the job ran longer than {self._settings.queue.max_run_s:g} s and was stopped"
                await self._fail(job, observer, "timeout", message)
            elif self._retryable(error):
                log.warning("job %s, attempt %d: %s", job.id, job.attempt, _one_line(error))
                message = "a worker of the server died under the job, more often than it is begun anew"
                attempts = self._settings.queue.max_attempts
                await asyncio.to_thread(self._store.retry, job.id, job.attempt, attempts, "worker_lost", message)
            else:
                log.exception("job %s failed", job.id)
                await self._fail(
                    job, observer, "internal", f"the server could not make it; its log has the reason under {job.id}"
                )
        finally:
            for stage, steps in observer.steps.items():
                await asyncio.shield(asyncio.to_thread(self._store.add_steps, stage, steps))

    async def _fail(self, job: Job, observer: _Observer, code: str, message: str) -> None:
        await asyncio.to_thread(self._store.fail, job.id, job.attempt, code, message, observer.seconds)

    def _let_go(self, job: Job) -> None:
        """The job is no longer computed: because that was asked for, or because this dispatcher ends; then it waits again."""
        now = self._store.get(job.id)
        if now is not None and now.attempt == job.attempt and now.cancel_requested:
            self._store.cancelled(job.id, job.attempt)
        elif now is not None and now.attempt == job.attempt and now.state == "in_progress":
            self._store.retry(job.id, job.attempt, job.attempt + 1, "worker_lost", "the server was stopped")

    async def _complete(self, job: Job, result: Result, observer: _Observer) -> None:
        plan = observer.plan
        name = f"jobs/{job.id}/result-{job.attempt}.{'png' if plan.kind == 'image' else 'mp4'}"
        await asyncio.to_thread(write_atomic, self._path(name), result.data)
        expires_at = time.time() + 3600 * self._settings.storage.keep_hours
        seconds = dict(result.stage_seconds)
        done = await asyncio.to_thread(
            self._store.complete, job.id, job.attempt, output=name, stage_seconds=seconds, expires_at=expires_at
        )
        if not done:  # cancelled, or reclaimed by another: this file is nobody's
            await asyncio.to_thread(remove, self._path(name))
            raise Lost
        for stage, taken in seconds.items():
            self._rates.learn(stage, observer.units.get(stage, 0.0), taken)
            await asyncio.to_thread(self._store.add_stage_seconds, stage, taken)

    def _wish(self, job: Job) -> Wish:
        pictures = {0: job.request.get("first_frame"), -1: job.request.get("last_frame")}
        frames: dict[int, np.ndarray] = {k: read_image(self._path(name)) for k, name in pictures.items() if name}
        return Wish(job.request["prompt"], plan_of(job), bool(job.request.get("rewrite", True)), frames)

    def _units(self, job: Job) -> dict[str, float]:
        return work(plan_of(job), *self._models)

    async def _learn_from_the_past(self) -> None:
        for job in reversed(await asyncio.to_thread(self._store.recent_stage_seconds, 20)):
            try:
                units = self._units(job)
            except (KeyError, TypeError, UserError):
                continue  # written by another version, for another model
            for stage, seconds in job.stage_seconds.items():
                self._rates.learn(stage, units.get(stage, 0.0), seconds)

    async def _heartbeat(self) -> None:
        queue = self._settings.queue
        for worker in list(self._running):  # each job has a worker's name of its own: one whose end was not written falls silent
            await asyncio.to_thread(self._store.heartbeat, worker)
        for job in await asyncio.to_thread(self._store.reclaim, queue.lease_s, queue.max_attempts):
            log.warning("job %s: its dispatcher fell silent; it is %s now", job.id, job.state)

    async def _cancel(self) -> None:
        """Stop jobs that are asked to stop; also those that another dispatcher has taken over."""
        for job, task in list(self._running.values()):
            now = await asyncio.to_thread(self._store.get, job.id)
            gone = now is None or now.attempt != job.attempt or now.state == "queued"
            if gone or (now and now.state == "in_progress" and now.cancel_requested):
                task.cancel()

    async def _tidy(self) -> None:
        storage = self._settings.storage
        await asyncio.to_thread(self._store.time_out_waiting, self._settings.queue.max_wait_s)
        for job in await asyncio.to_thread(self._store.expire, time.time()):
            await asyncio.to_thread(remove, self._path(f"jobs/{job.id}"), recursive=True)
        for job_id in await asyncio.to_thread(self._store.forget, time.time() - 86400 * storage.forget_days):
            await asyncio.to_thread(remove, self._path(f"jobs/{job_id}"), recursive=True)

    async def _sweep_up(self) -> None:
        await asyncio.to_thread(self._sweep)

    def _sweep(self) -> None:
        """Delete folders of no job: left by a server that was killed between writing pictures and accepting the job, or between
        forgetting a job and deleting its files."""
        folder = self._path("jobs")
        if not is_local(folder) or not os.path.isdir(local_path(folder)):
            return
        with os.scandir(local_path(folder)) as entries:
            old = [e.name for e in entries if e.is_dir() and e.stat().st_mtime < time.time() - _ORPHAN_AFTER_S]
        for name in old:
            if self._store.get(name) is None:
                remove(join(folder, name), recursive=True)

    async def _send_webhooks(self) -> None:
        await asyncio.to_thread(self._webhooks.send_due)

    def _path(self, name: str) -> str:
        return join(self._settings.storage.folder, name)

    async def _every(self, seconds: float, chore: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._steadily(chore())
            await asyncio.sleep(seconds)

    async def _steadily(self, chore: Awaitable[Any]) -> Any:
        """A database that is away for a while must not end the dispatcher."""
        try:
            return await chore
        except Exception:
            log.exception("a chore of the dispatcher failed; it will be tried again")
            await asyncio.sleep(1.0)
            return None


class _Observer:
    """Writes progress to the store, not more often than a person can see, and each stage's beginning at once."""

    def __init__(self, job: Job, store: JobStore, settings: Settings, units: dict[str, float], rates: Rates) -> None:
        self.plan, self.units = plan_of(job), units
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        """Network steps so far, of this attempt."""
        self._job, self._store, self._settings = job, store, settings
        self._progress = Progress(rates.expected_s(units))
        self._stage, self._begun, self._told = "", 0.0, 0.0

    async def step(self, stage: str, done: int, steps: int) -> None:
        """See `serving.cascade.Observer`."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun, self._told = stage, now, 0.0
        self.seconds[stage] = now - self._begun
        if stage in ("base", "refine") and steps > 1:
            self.steps[stage] = max(done, self.steps.get(stage, 0))
        progress = self._progress.at(stage, done, steps)
        if now - self._told < _REPORT_EVERY_S and done < steps:
            return
        self._told = now
        await self._write(self._store.report, stage=stage, step=done, steps=steps, progress=progress)

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
        if not await asyncio.to_thread(method, self._job.id, self._job.attempt, *args, **values):
            raise Lost


def plan_of(job: Job) -> Plan:
    """The plan that was settled when the job came in."""
    return Plan(**{name: job.resolved[name] for name in Plan.__dataclass_fields__})


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
