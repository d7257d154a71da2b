"""Takes jobs from the store, runs each through the cascade, and writes what becomes of them. No Ray here.

Several dispatchers may share a store: a job belongs to whoever claimed it, for as long as heartbeats come. One that died, with
its whole server or alone, loses its jobs to the queue after `queue.lease_s`; what it reported before is not believed afterwards
(`Job.attempt`), so a job is begun again rather than lost, and completed once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from serving.cascade import Result, Stages, Wish, generate
from serving.housekeeping import sweep, tidy
from serving.jobs import Job
from serving.plan import Plan, checkpoints
from serving.progress import Rates, work
from serving.reporting import Lost, Reporter, plan_of
from serving.rewriting import Rewritten
from serving.settings import Settings
from serving.store import JobStore
from serving.webhooks import Webhooks
from waver_core.errors import UserError
from waver_core.storage import join, remove, write_atomic
from waver_core.video import read_image

log = logging.getLogger("waver.dispatcher")
T = TypeVar("T")
_RETRY_AFTER_S = 1.0
_PAUSES_S = (0.1, 0.5, 2.0, 5.0, 10.0)
_TIDY_EVERY_S = 5.0
_CANCEL_EVERY_S = 0.1
_SWEEP_EVERY_S = 600.0


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
        self._labels = base.label, refiner.label if refiner else None
        self._rates = Rates()
        self._claims, self._woken = itertools.count(), asyncio.Event()
        self._running: dict[str, tuple[Job, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """Claim and run jobs, for ever."""
        await self._learn_from_the_past()
        chores = [self._every(self._settings.queue.lease_s / 4, self._heartbeat), self._every(_CANCEL_EVERY_S, self._cancel)]
        chores += [self._every(1.0, self._send_webhooks), self._every(_TIDY_EVERY_S, self._tidy)]
        chores.append(self._every(_SWEEP_EVERY_S, self._sweep))
        try:
            async with asyncio.TaskGroup() as group:
                for chore in chores:
                    group.create_task(chore)
                group.create_task(self._claim())
        finally:
            tasks = [task for _, task in self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # they give their jobs back

    async def _claim(self) -> None:
        queue = self._settings.queue
        while True:
            job = None
            if len(self._running) < queue.running:
                worker = f"{self._name}-{next(self._claims)}"
                job = await self._steadily(asyncio.to_thread(self._store.claim, worker))
            if job is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(queue.poll_s):
                        await self._woken.wait()
                self._woken.clear()
                continue
            task = asyncio.create_task(self._job(job))
            self._running[worker] = job, task
            task.add_done_callback(partial(self._forget, worker))

    def wake(self) -> None:
        """There may be something to claim: look now. (Polling finds it, too, a little later.)"""
        self._woken.set()

    def _forget(self, worker: str, task: asyncio.Task[None]) -> None:
        del self._running[worker]
        self.wake()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a job's end could not be written down; it is begun again after its lease: %s", _one_line(error))

    async def _job(self, job: Job) -> None:
        """One attempt at one job, whatever comes of it."""
        limit = asyncio.timeout(self._settings.queue.max_run_s)
        try:
            observer = Reporter(job, self._store, self._settings, self._units(job), self._rates, limit)
        except (KeyError, TypeError) as error:
            log.error("job %s is of another version: %s", job.id, _one_line(error))
            message = "it was accepted by another version of the server: send it again"
            await self._surely(self._store.fail, job.id, job.attempt, "impossible", message)
            return
        try:
            self._require_its_models(observer.plan)
            async with limit:
                result = await generate(await asyncio.to_thread(self._wish, job), self._stages, observer)
                await observer.settle()
                await self._complete(job, result, observer)
        except Lost:
            await asyncio.shield(self._surely(self._let_go, job))
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                await asyncio.shield(self._surely(self._let_go, job))
            else:  # Serve's word for a call that it has cancelled by itself
                await self._begin_again(job, error)
        except UserError as error:
            await self._fail(job, observer, "impossible", str(error))
        except Exception as error:
            if limit.expired():
                queue = self._settings.queue
                message = f"the job ran longer than {queue.max_run_s:g} s and was stopped"
                if observer.waiting:
                    message = f"no part of the server was free for the job for {queue.max_wait_s:g} s"
                await self._fail(job, observer, "timeout", message)
            elif self._retryable(error):
                await self._begin_again(job, error)
            else:
                log.exception("job %s failed", job.id)
                await self._fail(
                    job, observer, "internal", f"the server could not make it; its log has the reason under {job.id}"
                )
        finally:
            await asyncio.shield(observer.close())
            for stage, steps in observer.steps.items():
                await asyncio.shield(asyncio.to_thread(self._store.add_steps, stage, steps))

    def _require_its_models(self, plan: Plan) -> None:
        """A queue outlives its server; what this one serves may not be what the job was accepted, and is labelled, for."""
        asked, served = (plan.checkpoint, plan.refiner_checkpoint if plan.refine else None), self._labels
        if asked[0] != served[0] or (asked[1] is not None and asked[1] != served[1]):
            raise UserError("the server has other checkpoints by now than when it accepted this: send it again")

    async def _fail(self, job: Job, observer: Reporter, code: str, message: str) -> None:
        write = self._surely(self._store.fail, job.id, job.attempt, code, " ".join(message.split()), observer.seconds)
        await asyncio.shield(write)

    async def _begin_again(self, job: Job, error: BaseException) -> None:
        log.warning("job %s, attempt %d: %s", job.id, job.attempt, _one_line(error))
        message = "a worker of the server died under the job, more often than it is begun anew"
        attempts = self._settings.queue.max_attempts
        try:
            await asyncio.sleep(_RETRY_AFTER_S)  # replicas need a moment to be replaced
        finally:  # also where the dispatcher ends meanwhile
            again = self._surely(self._store.retry, job.id, job.attempt, attempts, "worker_lost", message)
            await asyncio.shield(again)

    async def _surely(self, write: Callable[..., T], *args: Any, **values: Any) -> T:
        """Write to the store; where it is away, again after a while, for as long as the job's heartbeat may last."""
        for pause_s in _PAUSES_S:
            try:
                return await asyncio.to_thread(write, *args, **values)
            except Exception:
                log.exception("the store could not be written; trying again")
                await asyncio.sleep(pause_s)
        return await asyncio.to_thread(write, *args, **values)

    def _let_go(self, job: Job) -> None:
        """The job is no longer computed: because that was asked for, or because this dispatcher ends; then it waits again."""
        now = self._store.get(job.id)
        if now is not None and now.attempt == job.attempt and now.cancel_requested:
            self._store.cancelled(job.id, job.attempt)
        elif now is not None and now.attempt == job.attempt and now.state == "in_progress":
            self._store.retry(job.id, job.attempt, job.attempt + 1, "worker_lost", "the server was stopped")

    async def _complete(self, job: Job, result: Result, observer: Reporter) -> None:
        plan = observer.plan
        name = f"jobs/{job.id}/result-{job.attempt}.{'png' if plan.kind == 'image' else 'mp4'}"
        await asyncio.to_thread(write_atomic, self._path(name), result.data)
        expires_at = time.time() + 3600 * self._settings.storage.keep_hours
        seconds = dict(result.stage_seconds)
        done = await self._surely(
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
        settled = None
        if job.attempt > 1 and "prompt" in job.resolved:
            told = job.resolved
            settled = Rewritten(told["prompt"], told["original_prompt"], told["rewritten_by"], told["rewrite_fell_back"])
        return Wish(job.request["prompt"], plan_of(job), bool(job.request.get("rewrite", True)), frames, settled)

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
        await asyncio.to_thread(tidy, self._store, self._settings)

    async def _sweep(self) -> None:
        await asyncio.to_thread(sweep, self._store, self._settings.storage)

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


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
