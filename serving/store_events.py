"""Webhook events of the store: written with the transition they tell of, claimed by one sender at a time, kept with outcome."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import func, select, update

from serving.database import Database
from serving.tables import EVENTS, PENDING
from serving.transitions import readable

CLAIM_S = 60.0
"""A sender has so long for its events; then they are due again."""
EVENT_STATES = ("pending", "delivered", "failed")


class WebhookEvent(NamedTuple):
    """One call to make. The id stays the same however often it is tried, so a receiver can tell a repetition."""

    event_id: str
    job_id: str
    type: str
    """job.completed, job.failed or job.cancelled."""
    url: str
    created_at: float
    attempt: int
    """1 for the first try. Counted when it is claimed, so a sender that dies of an event does not try it for ever."""


class Events(Database):
    """The part of the store that webhooks use."""

    def due_events(self, now: float, limit: int, worker: str) -> list[WebhookEvent]:
        """Claim up to `limit` events, oldest due first. Nobody else gets them for `CLAIM_S`, within which `event_done` is due."""
        query = select(EVENTS).where(PENDING, EVENTS.c.next_at <= now).order_by(EVENTS.c.next_at).limit(limit)
        with self.write() as connection:
            rows = connection.execute(query.with_for_update(skip_locked=True)).mappings().all()
            for row in rows:
                values = {"attempts": row["attempts"] + 1, "next_at": now + CLAIM_S, "worker": worker}
                connection.execute(update(EVENTS).where(EVENTS.c.event_id == row["event_id"]).values(values))
        return [
            WebhookEvent(row["event_id"], row["job_id"], row["type"], row["url"], row["created_at"], row["attempts"] + 1)
            for row in rows
        ]

    def event_done(self, event_id: str, delivered: bool, next_at: float | None, note: str) -> None:
        """Say how a try went: delivered; to be tried again at `next_at`; or, with None, given up and kept as failed.

        An event that another sender has settled meanwhile stays as that one left it.
        """
        values: dict[str, Any] = {"worker": None, "note": readable(note)}
        if delivered:
            values |= {"state": "delivered"}
        elif next_at is None:
            values |= {"state": "failed"}
        else:
            values |= {"next_at": next_at}
        with self.write() as connection:
            connection.execute(update(EVENTS).where(EVENTS.c.event_id == event_id, PENDING).values(values))

    def event_counts(self) -> dict[str, int]:
        """How many events are in each state."""
        with self.read() as connection:
            rows = connection.execute(select(EVENTS.c.state, func.count().label("n")).group_by(EVENTS.c.state)).all()
        return dict.fromkeys(EVENT_STATES, 0) | {row.state: row.n for row in rows}

    def events_of(self, job_id: str) -> list[tuple[str, str, int, str]]:
        """(event id, state, tries, note) of a job's events, oldest first: for a person who wonders where a call remained."""
        query = select(EVENTS.c.event_id, EVENTS.c.state, EVENTS.c.attempts, EVENTS.c.note)
        with self.read() as connection:
            rows = connection.execute(query.where(EVENTS.c.job_id == job_id).order_by(EVENTS.c.created_at)).all()
        return [(event_id, state, attempts, note) for event_id, state, attempts, note in rows]
