"""The durable store of jobs. Every method is one transaction: safe from threads, several processes and a kill at any moment.

A job is queued, in progress, and then ended, once. Who works on it names its attempt with all that it reports; where the job has
gone on without it (reclaimed, cancelled, ended) it is told so by False and changes nothing. Databases: `serving.database`.

The store has besides the methods of `serving.upkeep` (reclaim, expire, forget, delete, time_out_waiting), `serving.store_events`
(webhooks) and `serving.histograms` (metrics).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from sqlalchemy import Connection, and_, case, func, insert, literal, or_, select, union_all, update

from serving.histograms import Measures
from serving.jobs import STATES, IdempotencyConflict, Job, QueueFull, State
from serving.places import left_by
from serving.store_events import Events
from serving.tables import FINISHED, JOBS, MADE, META, QUEUE_ORDER, QUEUED, RUNNING, new_row, to_job
from serving.transitions import AGAIN, change, end, locked, locked_attempt, readable, well_formed
from serving.upkeep import Upkeep
from waver_core.errors import UserError

MAX_UNFINISHED_PROGRESS = 0.9999
"""Progress is 1.0 when a job is completed and only then."""
RECENT_S = 600.0
RETRY_AFTER_S = (1, 120)
UNKNOWN_RETRY_AFTER_S = 10
"""Where nothing was completed lately, there is nothing to estimate from."""

Jobs = list[Job]


class JobStore(Upkeep, Events, Measures):
    """All jobs of a server. `JobStore(url, clock=time.time)`; see `serving.database.Database` for what is raised."""

    def submit(
        self,
        job_id: str,
        owner: str,
        request: Mapping[str, Any],
        *,
        priority: int,
        resolved: Mapping[str, Any],
        idempotency_key: str | None = None,
        request_digest: str,
        webhook_url: str | None = None,
        max_queued: int,
        max_queued_of_owner: int | None = None,
    ) -> tuple[Job, bool]:
        """Accept a job: (job, True). When this returns, a kill or a power cut does not lose it any more.

        The same key of the same owner again: (the earlier job, False), even where the queue is full. Raises `IdempotencyConflict`
        if that was another request, `QueueFull` if `max_queued` jobs (of this owner: `max_queued_of_owner`) wait already.
        """
        now = self.clock()
        with self.write(exclusive=True) as connection:
            if idempotency_key is not None:
                query = select(JOBS).where(JOBS.c.owner == owner, JOBS.c.idempotency_key == idempotency_key)
                earlier = connection.execute(query).mappings().one_or_none()
                if earlier is not None:
                    if earlier["request_digest"] != request_digest:
                        raise IdempotencyConflict(
                            "This Idempotency-Key was used for another request: use a new key for a new one."
                        )
                    return to_job(earlier), False
            # In one query for both: asked for the owner's alone, SQLite would go through all that this owner ever had.
            own_or_none = case((JOBS.c.owner == owner, 1))
            all_waiting, own = connection.execute(select(func.count(), func.count(own_or_none)).where(QUEUED)).one()
            if all_waiting >= max_queued:
                raise QueueFull(f"{all_waiting} jobs wait already: ask again later.", _retry_after_s(connection, now))
            if max_queued_of_owner is not None and own >= max_queued_of_owner:
                raise QueueFull(f"{own} jobs of this key wait already: ask again later.", _retry_after_s(connection, now))
            job = Job(
                job_id,
                owner,
                "queued",
                priority,
                dict(request),
                now,
                idempotency_key=idempotency_key,
                resolved=dict(resolved),
                webhook_url=webhook_url,
                version=1,
            )
            connection.execute(insert(JOBS).values(new_row(job, request_digest)))
        return job, True

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """One job; with `owner`, only if it is theirs."""
        if not well_formed(job_id):
            return None
        query = select(JOBS).where(JOBS.c.id == job_id)
        with self.read() as connection:
            row = connection.execute(query if owner is None else query.where(JOBS.c.owner == owner)).mappings().one_or_none()
        return None if row is None else to_job(row)

    def ahead(self, job: Job) -> int:
        """How many queued jobs are begun before this one: 0 for the next, and for one that does not wait."""
        if job.state != "queued":
            return 0
        same = JOBS.c.priority == job.priority
        older = or_(JOBS.c.created_at < job.created_at, and_(JOBS.c.created_at == job.created_at, JOBS.c.id < job.id))
        rank = or_(JOBS.c.attempt > job.attempt, and_(JOBS.c.attempt == job.attempt, older))
        query = select(func.count()).select_from(JOBS).where(QUEUED, JOBS.c.priority >= job.priority)
        with self.read() as connection:
            return connection.scalar(query.where(or_(JOBS.c.priority > job.priority, and_(same, rank)))) or 0

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state, all at one moment."""
        # In parts, each of which has an index of its own; one statement, so that no job is seen twice on its way.
        ended = select(JOBS.c.state, func.count().label("n")).where(FINISHED).group_by(JOBS.c.state)
        waiting = select(literal("queued"), func.count()).select_from(JOBS).where(QUEUED)
        running = select(literal("in_progress"), func.count()).select_from(JOBS).where(RUNNING)
        query = union_all(ended, waiting, running)
        with self.read() as connection:
            rows = connection.execute(query).all()
        return dict.fromkeys(STATES, 0) | {row.state: row.n for row in rows}

    @cached_property
    def identity(self) -> str:
        """Drawn when the tables were made: tells one database from another."""
        with self.read() as connection:
            return str(connection.scalar(select(META.c.value).where(META.c.name == "identity")))

    def ping(self) -> None:
        """Ask the database for nothing; raises its error where it does not answer."""
        with self.read() as connection:
            connection.scalar(select(1))

    def claim(self, worker: str) -> Job | None:
        """Begin the next job: of the highest priority, begun before, oldest, in this order. None where none waits."""
        now = self.clock()
        query = select(JOBS).where(QUEUED, JOBS.c.cancel_requested.is_(False)).order_by(*QUEUE_ORDER).limit(1)
        with self.write() as connection:
            row = connection.execute(query.with_for_update(skip_locked=True)).mappings().one_or_none()
            if row is None:
                return None
            job = to_job(row)
            values = AGAIN | {"state": "in_progress", "worker": worker, "heartbeat_at": now, "attempt": job.attempt + 1}
            started_at = now if job.started_at is None else job.started_at
            return change(connection, job, **values, started_at=started_at)

    def heartbeat(self, worker: str) -> None:
        """This worker lives: `reclaim` leaves its jobs alone. Shows in no job, so no version grows."""
        mine = update(JOBS).where(RUNNING, JOBS.c.worker == worker).values(heartbeat_at=self.clock())
        with self.write(durable=False) as connection:
            connection.execute(mine)

    def report(self, job_id: str, attempt: int, *, stage: str, step: int, steps: int, progress: float) -> bool:
        """Note how far a job is; also a sign of life. False: stop, it is not this attempt's any more or is to be cancelled.

        Progress never falls within an attempt and stays below 1.
        """
        with self.write(durable=False) as connection:
            job = locked_attempt(connection, job_id, attempt)
            if job is None or job.cancel_requested:
                return False
            share = min(max(progress, job.progress), MAX_UNFINISHED_PROGRESS)
            change(connection, job, stage=stage, step=step, steps=steps, progress=share, heartbeat_at=self.clock())
        return True

    def resolve(self, job_id: str, attempt: int, resolved: Mapping[str, Any]) -> bool:
        """Add to what is needed to make the job again, such as the rewritten prompt. False: not this attempt's any more."""
        with self.write() as connection:
            job = locked_attempt(connection, job_id, attempt)
            if job is not None:
                change(connection, job, resolved={**job.resolved, **resolved})
        return job is not None

    def preview(self, job_id: str, attempt: int, path: str) -> bool:
        """The base model's result is there, at this path in the storage folder. False: not this attempt's any more."""
        with self.write() as connection:
            job = locked_attempt(connection, job_id, attempt)
            if job is not None:
                change(connection, job, preview=path)
        return job is not None

    def complete(self, job_id: str, attempt: int, *, output: str, stage_seconds: Mapping[str, float], expires_at: float) -> bool:
        """The result is there. True for one file, once: who gets False deletes its own. Wins over a cancellation asked for.

        May be called again where the answer was lost: the database may have kept what it never confirmed.
        """
        with self.write() as connection:
            job = locked(connection, job_id)
            if job is None or job.attempt != attempt:
                return False
            if job.state == "in_progress":
                made = {"output": output, "stage_seconds": dict(stage_seconds), "expires_at": expires_at}
                job = end(connection, job, "completed", self.clock(), stage=None, progress=1.0, **made)
            return job.state == "completed" and job.output == output

    def fail(self, job_id: str, attempt: int, code: str, message: str, stage_seconds: Mapping[str, float] = {}) -> bool:
        """The job cannot be done. False: not this attempt's any more."""
        error = {"error_code": code, "error_message": readable(message), "stage_seconds": dict(stage_seconds)}
        with self.write() as connection:
            job = locked_attempt(connection, job_id, attempt)
            if job is not None:
                end(connection, job, "failed", self.clock(), **error)
        return job is not None

    def retry(self, job_id: str, attempt: int, max_attempts: int, code: str, message: str) -> Job:
        """Give up this attempt, not the job: queued again before those not yet begun, or failed after `max_attempts`.

        Cancelled where that was asked; unchanged where it is not this attempt's any more. Raises KeyError for a job that is gone.
        """
        now = self.clock()
        with self.write() as connection:
            job = locked(connection, job_id)
            if job is None:
                raise KeyError(job_id)
            if job.state != "in_progress" or job.attempt != attempt:
                return job
            if job.cancel_requested:
                return end(connection, job, "cancelled", now)
            if attempt >= max_attempts:
                return end(connection, job, "failed", now, error_code=code, error_message=readable(message))
            return change(connection, job, queued_at=now, **AGAIN)

    def cancel(self, job_id: str) -> Job | None:
        """Ask for an end: at once if it waits, between two steps if it is in progress; one that has ended stays as it is."""
        if not well_formed(job_id):
            return None
        with self.write() as connection:
            job = locked(connection, job_id)
            if job is None or job.ended or job.cancel_requested:
                return job
            if job.state == "queued":
                return end(connection, job, "cancelled", self.clock(), cancel_requested=True)
            return change(connection, job, cancel_requested=True)

    def cancelled(self, job_id: str, attempt: int) -> bool:
        """The worker has stopped. False: not this attempt's any more."""
        with self.write() as connection:
            job = locked_attempt(connection, job_id, attempt)
            if job is not None:
                end(connection, job, "cancelled", self.clock(), cancel_requested=True)
        return job is not None

    def recent_stage_seconds(self, limit: int) -> Jobs:
        """The jobs completed last, newest first, with what their stages took: progress is calibrated by them."""
        query = select(JOBS).where(MADE).order_by(JOBS.c.finished_at.desc()).limit(limit)
        with self.read() as connection:
            return [to_job(row) for row in connection.execute(query).mappings()]

    def list(
        self,
        owner: str | None = None,
        *,
        limit: int = 20,
        after: str | None = None,
        order: Literal["desc", "asc"] = "desc",
        states: tuple[State, ...] | None = None,
    ) -> Jobs:
        """Jobs by the time they came, newest first; `after`: those that follow this job, or one deleted lately, in that order.

        Raises `UserError` where `after` is no job (of this owner): a page that is silently the first would repeat for ever.
        """
        query = select(JOBS) if owner is None else select(JOBS).where(JOBS.c.owner == owner)
        if states is not None:
            query = query.where(JOBS.c.state.in_(states))
        when, which = JOBS.c.created_at, JOBS.c.id
        query = query.order_by(when.desc(), which.desc()) if order == "desc" else query.order_by(when, which)
        with self.read() as connection:
            if after is not None:
                at = None
                if well_formed(after):
                    mark = select(when).where(which == after)
                    at = connection.scalar(mark if owner is None else mark.where(JOBS.c.owner == owner))
                    at = left_by(connection, after, owner) if at is None else at
                if at is None:
                    raise UserError(f"after: there is no job {after!r} to go on from; leave it out to begin with the first page")
                beyond = (when < at, which < after) if order == "desc" else (when > at, which > after)
                query = query.where(or_(beyond[0], and_(when == at, beyond[1])))
            return [to_job(row) for row in connection.execute(query.limit(limit)).mappings()]


def _retry_after_s(connection: Connection, now: float) -> int:
    """Seconds until a place is likely free: the mean gap between the jobs completed in the last ten minutes."""
    query = select(JOBS.c.finished_at).where(MADE, JOBS.c.finished_at > now - RECENT_S)
    times = list(connection.scalars(query.order_by(JOBS.c.finished_at.desc()).limit(20)))
    if not times:
        return UNKNOWN_RETRY_AFTER_S
    gap_s = (now - times[-1]) / len(times)
    return int(min(max(math.ceil(gap_s), RETRY_AFTER_S[0]), RETRY_AFTER_S[1]))
