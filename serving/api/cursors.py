"""Where deleted jobs stood in the lists, so that whoever goes through a list and deletes what it sees comes to its end.

Clients go on with the id of the last job they have seen, and an id alone says nothing of its time. So a deleted job leaves its
owner and its time behind, for a day, in the same database: any replica may be asked for the next page.
"""

from __future__ import annotations

import json

from sqlalchemy import delete, insert, select

from serving.jobs import Job
from serving.store import JobStore
from serving.tables import META
from serving.transitions import well_formed

KEEP_S = 86_400.0
_PREFIX = "deleted "


def remember(store: JobStore, job: Job) -> None:
    """Keep the place of a job that is about to be deleted, and drop those of long ago."""
    now = store.clock()
    with store.write(durable=False, exclusive=True) as connection:
        old = META.c.value < _when(now - KEEP_S)
        connection.execute(delete(META).where(META.c.name.startswith(_PREFIX), old | (META.c.name == _PREFIX + job.id)))
        value = _when(now) + json.dumps([job.owner, job.created_at])
        connection.execute(insert(META).values(name=_PREFIX + job.id, value=value))


def place(store: JobStore, owner: str, job_id: str) -> tuple[float, str] | None:
    """Where a deleted job of this owner stood, for `JobStore.list`; None for any other."""
    if not well_formed(job_id):
        return None
    with store.read() as connection:
        value = connection.scalar(select(META.c.value).where(META.c.name == _PREFIX + job_id))
    if value is None:
        return None
    of, created_at = json.loads(value[len(_when(0.0)) :])
    return (created_at, job_id) if of == owner else None


def _when(time_s: float) -> str:
    """A time as text of one length, which sorts like the time."""
    return f"{time_s:017.6f} "
