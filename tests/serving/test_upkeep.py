"""What becomes of jobs with time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from serving.store import JobStore
from tests.serving.jobs_to_test import begin, finish, now_is, submit


def test_jobs_of_a_silent_worker_go_back_or_end(store: JobStore, clock: Any) -> None:
    lost, last, stopped, kept = (begin(store, worker) for worker in ("a", "a", "a", "b"))
    for _ in range(2):
        store.retry(last.id, store.get(last.id).attempt, 9, "error", "!")  # type: ignore[union-attr]
        store.claim("a")
    store.cancel(stopped.id)
    clock.advance(4)
    store.heartbeat("b")
    assert store.reclaim(5, 3) == []
    clock.advance(2)
    states = {job.id: (job.state, job.error_code) for job in store.reclaim(5, 3)}
    assert states == {lost.id: ("queued", None), last.id: ("failed", "worker_lost"), stopped.id: ("cancelled", None)}
    assert not store.report(lost.id, 1, stage="base", step=1, steps=2, progress=0.5)
    assert not store.complete(lost.id, 1, output="x", stage_seconds={}, expires_at=0)
    again = store.claim("b")
    assert again is not None
    assert (again.id, again.attempt) == (lost.id, 2)
    assert store.get(kept.id) == kept  # a heartbeat is no change
    assert not store.complete(lost.id, 1, output="x", stage_seconds={}, expires_at=0)


def test_a_report_is_a_sign_of_life(store: JobStore, clock: Any) -> None:
    job = begin(store)
    clock.advance(6)
    store.report(job.id, 1, stage="base", step=1, steps=2, progress=0.5)
    assert store.reclaim(5, 3) == []


def test_waiting_has_an_end_that_counts_from_the_last_time_in_the_queue(store: JobStore, clock: Any) -> None:
    begun, waiting = begin(store), submit(store)
    clock.advance(100)
    store.retry(begun.id, 1, 9, "error", "!")
    (failed,) = store.time_out_waiting(99)
    assert (failed.id, failed.state, failed.error_code) == (waiting.id, "failed", "queue_timeout")
    assert store.time_out_waiting(99) == []


def test_results_expire_and_their_old_paths_are_told(store: JobStore, clock: Any) -> None:
    job = begin(store)
    store.preview(job.id, 1, "preview.mp4")
    done, lasting, waiting = finish(store, job, clock.now + 10), finish(store, begin(store), clock.now + 11), submit(store)
    assert store.expire(clock.now + 9.9) == []
    assert store.expire(clock.now + 10) == [done]
    now = now_is(store, done)
    assert now == replace(done, state="expired", output=None, preview=None, version=done.version + 1)
    assert store.get(lasting.id) == lasting
    assert store.expire(clock.now + 1e9) == [lasting]
    assert store.get(waiting.id) == waiting


def test_only_what_has_ended_is_deleted_or_forgotten(store: JobStore, clock: Any) -> None:
    ended, running, waiting = finish(store, begin(store)), begin(store), submit(store)
    assert [store.delete(job.id) for job in (waiting, running, ended, ended)] == [False, False, True, False]
    old = finish(store, running)
    clock.advance(10)
    store.cancel(waiting.id)
    assert store.forget(old.finished_at or 0) == []
    assert store.forget(clock.now) == [old.id]
    assert [job.id for job in store.list()] == [waiting.id]


def test_a_key_is_free_again_when_its_job_is_deleted(store: JobStore) -> None:
    job = submit(store, idempotency_key="k")
    store.cancel(job.id)
    store.delete(job.id)
    assert submit(store, idempotency_key="k").id != job.id
