"""Webhook events in the store."""

from __future__ import annotations

import re
from typing import Any

from serving.store import JobStore
from tests.serving.jobs_to_test import begin, finish, submit


def test_each_end_with_a_webhook_makes_one_event(store: JobStore, clock: Any) -> None:
    done, failed, plain = (begin(store, webhook_url=url) for url in ("https://h/1", "https://h/2", None))
    finish(store, done, clock.now)
    store.fail(failed.id, 1, "error", "!")
    finish(store, plain)
    cancelled = submit(store, webhook_url="https://h/3")
    store.cancel(cancelled.id)
    store.expire(clock.now)
    events = store.due_events(clock.now, 10, "s")
    ends = {(done.id, "job.completed", "https://h/1"), (failed.id, "job.failed", "https://h/2")}
    assert {(e.job_id, e.type, e.url) for e in events} == ends | {(cancelled.id, "job.cancelled", "https://h/3")}
    assert all(e.attempt == 1 and e.created_at == clock.now and re.fullmatch("evt_[0-9a-f]{24}", e.event_id) for e in events)


def test_an_event_is_lent_to_one_sender_and_its_outcome_kept(store: JobStore, clock: Any) -> None:
    for _ in range(3):
        store.cancel(submit(store, webhook_url="https://h").id)
    taken, rest = store.due_events(clock.now, 1, "a"), store.due_events(clock.now, 9, "b")
    assert (len(taken), len(rest)) == (1, 2)
    assert store.due_events(clock.now + 59, 9, "b") == []
    (lost,) = [e for e in store.due_events(clock.now + 61, 9, "b") if e.event_id == taken[0].event_id]
    assert lost.attempt == 2
    store.event_done(rest[0].event_id, True, None, "")
    store.event_done(rest[0].event_id, False, None, "a late failure does not undo it")
    store.event_done(rest[1].event_id, False, None, "given up")
    store.event_done(lost.event_id, False, clock.now + 500, "later")
    assert store.event_counts() == {"pending": 1, "delivered": 1, "failed": 1}
    assert store.due_events(clock.now + 499, 9, "b") == []
    assert [e.event_id for e in store.due_events(clock.now + 500, 9, "b")] == [lost.event_id]
    assert store.events_of(rest[1].job_id) == [(rest[1].event_id, "failed", 2, "given up")]


def test_a_deleted_job_owes_no_webhook(store: JobStore, clock: Any) -> None:
    job = submit(store, webhook_url="https://h")
    store.cancel(job.id)
    store.delete(job.id)
    assert store.due_events(clock.now, 9, "a") == []
    assert store.event_counts()["failed"] == 1
    store.forget(clock.now + 1)
    assert store.event_counts()["failed"] == 0
