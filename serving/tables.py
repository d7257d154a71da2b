"""The tables of the job store and what a row of `waver_jobs` is as a `Job`. Times are seconds since 1970, UTC.

Finished jobs stay for weeks (`storage.forget_days`), so every question that is asked often has a partial index over the few rows
it is about: the waiting, the running, the ones to expire. SQLite and PostgreSQL use a partial index only where the query repeats
its condition word for word; `in_state` writes states into the SQL for that, instead of binding them.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Dialect,
    Double,
    Index,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    literal_column,
)

from serving.jobs import Job

SCHEMA_VERSION = 1
METADATA = MetaData()


class JsonText(TypeDecorator[Any]):
    """JSON as plain ASCII text: NUL and lone surrogates in a prompt are escapes then, which PostgreSQL's text would refuse.

    NaN and Infinity are errors (ValueError): no reader of the API could parse them.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, allow_nan=False, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


META = Table(
    "waver_meta",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

JOBS = Table(
    "waver_jobs",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("owner", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("queued_at", Double, nullable=False),  # when it last came into the queue: `queue.max_wait_s` counts from here
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("expires_at", Double),
    Column("worker", Text),  # the dispatcher that runs it
    Column("heartbeat_at", Double),  # that dispatcher's last sign of life
    Column("idempotency_key", Text),
    Column("request_digest", Text, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("stage", String(32)),
    Column("step", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("progress", Double, nullable=False),
    Column("preview", Text),
    Column("output", Text),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("webhook_url", Text),
    Column("version", Integer, nullable=False),
    Column("stage_seconds", JsonText, nullable=False),
    Column("resolved", JsonText, nullable=False),
    Column("request", JsonText, nullable=False),
    UniqueConstraint("owner", "idempotency_key", name="waver_jobs_idempotency"),
)

EVENTS = Table(
    "waver_events",
    METADATA,
    Column("event_id", String(64), primary_key=True),
    Column("job_id", String(64), nullable=False),
    Column("type", String(32), nullable=False),
    Column("url", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("state", String(16), nullable=False),  # pending, delivered or failed
    Column("attempts", Integer, nullable=False),
    Column("next_at", Double, nullable=False),  # a claimed one is due again after this, should its sender die
    Column("worker", Text),
    Column("note", Text, nullable=False),
)

STAGE_TIMES = Table(
    "waver_stage_times",
    METADATA,
    Column("stage", String(32), primary_key=True),
    Column("bound_s", Double, primary_key=True),  # upper bound of the bucket
    Column("count", Integer, nullable=False),
    Column("seconds", Double, nullable=False),  # sum of what fell into the bucket
)

STAGE_STEPS = Table(
    "waver_stage_steps",
    METADATA,
    Column("stage", String(32), primary_key=True),
    Column("steps", Integer, nullable=False),
)


def in_state(table: Table, *states: str) -> ColumnElement[bool]:
    """`state = 'queued'` or `state IN ('completed', 'expired')` with the words in the SQL, so that partial indexes are found."""
    words: list[ColumnElement[str]] = [literal_column(f"'{state}'") for state in states]
    return table.c.state == words[0] if len(words) == 1 else table.c.state.in_(words)


def _partial(name: str, *columns: Any, where: ColumnElement[bool]) -> None:
    Index(name, *columns, sqlite_where=where, postgresql_where=where)


# The order of the queue. Jobs that were begun before come first in their priority: they have waited once already.
QUEUE_ORDER = (JOBS.c.priority.desc(), JOBS.c.attempt.desc(), JOBS.c.created_at, JOBS.c.id)
QUEUED = in_state(JOBS, "queued")
RUNNING = in_state(JOBS, "in_progress")
EXPIRING = in_state(JOBS, "completed")
MADE = in_state(JOBS, "completed", "expired")
PENDING = in_state(EVENTS, "pending")
FINISHED: ColumnElement[bool] = JOBS.c.finished_at.is_not(None)

# With `state` in it SQLite answers how many wait, and how many before one, from this index alone.
_partial("waver_jobs_queue", *QUEUE_ORDER, JOBS.c.owner, JOBS.c.state, where=QUEUED)
_partial("waver_jobs_running", JOBS.c.heartbeat_at, JOBS.c.worker, where=RUNNING)
_partial("waver_jobs_expiring", JOBS.c.expires_at, where=EXPIRING)
_partial("waver_jobs_made", JOBS.c.finished_at, where=MADE)
_partial("waver_jobs_finished", JOBS.c.finished_at, where=FINISHED)
# Partial so that SQLite does not prefer it to the indexes above wherever a state is asked for.
_partial("waver_jobs_ended", JOBS.c.state, where=FINISHED)
_partial("waver_events_due", EVENTS.c.next_at, where=PENDING)
Index("waver_jobs_of_owner", JOBS.c.owner, JOBS.c.created_at, JOBS.c.id)
Index("waver_jobs_by_time", JOBS.c.created_at, JOBS.c.id)
Index("waver_events_of_job", EVENTS.c.job_id)
Index("waver_events_by_time", EVENTS.c.created_at)

JOB_FIELDS = tuple(item.name for item in fields(Job))


def to_job(row: RowMapping) -> Job:
    """A row of `waver_jobs` as a `Job`; the columns that only the store needs are left out."""
    return Job(**{name: row[name] for name in JOB_FIELDS})


def new_row(job: Job, request_digest: str) -> dict[str, Any]:
    """The row of a job that was just accepted."""
    values = {name: getattr(job, name) for name in JOB_FIELDS}
    values |= {"request": dict(job.request), "resolved": dict(job.resolved), "stage_seconds": dict(job.stage_seconds)}
    return values | {"queued_at": job.created_at, "request_digest": request_digest, "worker": None, "heartbeat_at": None}
