"""A job's row, read under a lock and changed by compare-and-swap; the one place where jobs end and their webhooks come to be."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, insert, select, update

from serving.jobs import Job, State
from serving.tables import EVENTS, JOB_FIELDS, JOBS, to_job

AGAIN: dict[str, Any] = {
    "state": "queued",
    "worker": None,
    "heartbeat_at": None,
    "stage": None,
    "step": 0,
    "steps": 0,
    "progress": 0.0,
    "preview": None,
}
"""What a job loses when its attempt is given up: all that only this attempt said of it."""


def locked(connection: Connection, job_id: str) -> Job | None:
    """A job that nobody else changes until this transaction ends."""
    row = connection.execute(select(JOBS).where(JOBS.c.id == job_id).with_for_update()).mappings().one_or_none()
    return None if row is None else to_job(row)


def locked_attempt(connection: Connection, job_id: str, attempt: int) -> Job | None:
    """The same, if the job is in progress and this is its attempt; else None: somebody else has it, or it has ended."""
    job = locked(connection, job_id)
    return job if job is not None and job.state == "in_progress" and job.attempt == attempt else None


def locked_where(connection: Connection, *conditions: ColumnElement[bool], order: ColumnElement[Any], limit: int) -> list[Job]:
    """Up to `limit` jobs, those left out that another transaction is just changing: they are for the next call."""
    query = select(JOBS).where(*conditions).order_by(order).limit(limit).with_for_update(skip_locked=True)
    return [to_job(row) for row in connection.execute(query).mappings()]


def change(connection: Connection, job: Job, **values: Any) -> Job:
    """Write `values` into a job that is still as it was read, and count its version up.

    Raises RuntimeError if it is not: the row was not locked, which is an error in the store.
    """
    values["version"] = job.version + 1
    done = connection.execute(update(JOBS).where(JOBS.c.id == job.id, JOBS.c.version == job.version).values(**values))
    if done.rowcount != 1:
        raise RuntimeError(f"{job.id} changed under a lock")
    return replace(job, **{name: value for name, value in values.items() if name in JOB_FIELDS})


def end(connection: Connection, job: Job, state: State, now: float, **values: Any) -> Job:
    """Bring a job to its end; the event of its webhook is written in the same transaction, so neither is without the other."""
    changed = change(connection, job, state=state, finished_at=now, worker=None, heartbeat_at=None, **values)
    if changed.webhook_url is not None:
        event = {"event_id": f"evt_{secrets.token_hex(12)}", "job_id": job.id, "type": f"job.{state}", "url": changed.webhook_url}
        times = {"created_at": now, "next_at": now, "attempts": 0, "state": "pending", "worker": None, "note": ""}
        connection.execute(insert(EVENTS).values(event | times))
    return changed


def readable(text: str) -> str:
    """An error's text as every database takes it: PostgreSQL refuses NUL, and no encoder takes half a surrogate pair."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def well_formed(job_id: str) -> bool:
    """Whether this can be an id at all; others are unknown rather than an error of the database."""
    return job_id.isascii() and job_id.isprintable()
