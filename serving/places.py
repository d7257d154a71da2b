"""Where deleted jobs stood in the lists, so that whoever goes through a list and deletes what it sees comes to its end.

Clients go on with the id of the last job they have seen, and an id alone says nothing of its time. So a deleted job leaves its
owner and its time behind, for a day. Functions of an open transaction, for the store.
"""

from __future__ import annotations

import json

from sqlalchemy import Connection, delete, insert, select

from serving.jobs import Job
from serving.tables import META

KEEP_S = 86_400.0
_PREFIX = "deleted "


def leave(connection: Connection, job: Job, now: float) -> None:
    """Keep the place of a job that this transaction deletes, and drop those of long ago."""
    old = META.c.value < _when(now - KEEP_S)
    connection.execute(delete(META).where(META.c.name.startswith(_PREFIX), old))
    value = _when(now) + json.dumps([job.owner, job.created_at])
    connection.execute(insert(META).values(name=_PREFIX + job.id, value=value))


def left_by(connection: Connection, job_id: str, owner: str | None) -> float | None:
    """When a deleted job (of this owner) had come; None where none is known of that id."""
    value = connection.scalar(select(META.c.value).where(META.c.name == _PREFIX + job_id))
    if value is None:
        return None
    of, created_at = json.loads(value[len(_when(0.0)) :])
    return float(created_at) if owner in (None, of) else None


def _when(time_s: float) -> str:
    """A time as text of one length, which sorts like the time."""
    return f"{time_s:017.6f} "
