"""The transitions of a job, on SQLite and on PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from serving import places
from serving.jobs import STATES, IdempotencyConflict, Job, QueueFull
from serving.store import JobStore
from tests.serving.jobs_to_test import begin, finish, now_is, submit
from waver_core.errors import UserError


def test_an_accepted_job_is_read_back_as_it_was_given(store: JobStore, clock: Any) -> None:
    request = {"prompt": "naïve \0 \ud800 \U0001f600", "seconds": 0.1, "first_frame": None, "wait": True}
    job, created = store.submit(
        "job_1", "alice", request, priority=2, resolved={"seed": 1}, request_digest="d", max_queued=1, webhook_url="https://h/x"
    )
    assert created
    assert store.get("job_1") == job
    assert (job.state, job.owner, job.priority, job.created_at, job.version) == ("queued", "alice", 2, clock.now, 1)
    assert job.request == request
    assert (job.attempt, job.started_at, job.progress, job.stage_seconds) == (0, None, 0.0, {})


def test_a_job_is_seen_by_its_owner_only(store: JobStore) -> None:
    job = submit(store, owner="alice")
    assert store.get(job.id, "alice") == job
    assert store.get(job.id, "bob") is None
    assert store.list("bob") == []


@pytest.mark.parametrize("job_id", ["job_none", "job_\0", "", "job_\ud800", "jöb"])
def test_an_unknown_id_is_none_and_never_an_error(store: JobStore, job_id: str) -> None:
    assert store.get(job_id) is None
    assert store.cancel(job_id) is None
    assert store.delete(job_id) is False
    with pytest.raises(UserError, match="first page"):
        store.list(after=job_id)


def test_a_key_gives_the_same_job_and_another_request_a_conflict(store: JobStore) -> None:
    first = submit(store, idempotency_key="k", request_digest="one")
    options: dict[str, Any] = {"priority": 1, "resolved": {}, "max_queued": 1000, "idempotency_key": "k"}
    again, created = store.submit("job_other", "local", {}, request_digest="one", **options)
    assert (again, created) == (first, False)
    with pytest.raises(IdempotencyConflict, match="new key"):
        store.submit("job_other", "local", {}, request_digest="two", **options)
    _, created = store.submit("job_of_bob", "bob", {}, request_digest="two", **options)
    assert created
    assert store.counts()["queued"] == 2


def test_a_key_is_found_again_though_the_queue_is_full_and_the_job_has_ended(store: JobStore) -> None:
    ended = finish(store, begin(store, idempotency_key="k"))
    submit(store, max_queued=1)
    options: dict[str, Any] = {"priority": 1, "resolved": {}, "max_queued": 1, "request_digest": "d"}
    assert store.submit("job_x", "local", {}, idempotency_key="k", **options) == (ended, False)


def test_the_queue_is_bounded_for_all_and_for_one_owner(store: JobStore) -> None:
    submit(store, "alice", max_queued=2, max_queued_of_owner=1)
    with pytest.raises(QueueFull, match="of this key"):
        submit(store, "alice", max_queued=2, max_queued_of_owner=1)
    submit(store, "bob", max_queued=2, max_queued_of_owner=1)
    with pytest.raises(QueueFull, match="2 jobs wait"):
        submit(store, "carol", max_queued=2)
    store.claim("w")
    submit(store, "carol", max_queued=2)
    assert store.counts() == dict.fromkeys(STATES, 0) | {"queued": 2, "in_progress": 1}


def test_when_to_ask_again_is_the_pace_of_late(store: JobStore, clock: Any) -> None:
    def refused() -> int:
        with pytest.raises(QueueFull) as caught:
            submit(store, max_queued=0)
        return caught.value.retry_after_s

    assert refused() == 10
    for _ in range(5):
        job = begin(store)
        clock.advance(30)
        finish(store, job)
    clock.advance(30)
    assert refused() == 30
    clock.advance(550)
    assert refused() == 120  # all but one too long ago; capped
    for _ in range(30):
        finish(store, begin(store))
    assert refused() == 1


def test_jobs_are_begun_by_priority_then_age(store: JobStore, clock: Any) -> None:
    low = submit(store, priority=0)
    clock.advance(1)
    old = submit(store)
    clock.advance(1)
    young, tied = submit(store), submit(store)
    high = submit(store, priority=2)
    assert [store.ahead(job) for job in (high, old, young, tied, low)] == [0, 1, 2, 3, 4]
    assert [claimed.id for _ in range(5) if (claimed := store.claim("w"))] == [job.id for job in (high, old, young, tied, low)]
    assert store.claim("w") is None
    assert store.ahead(now_is(store, low)) == 0


def test_a_claim_counts_the_attempt_and_the_first_start_is_kept(store: JobStore, clock: Any) -> None:
    job = submit(store)
    clock.advance(5)
    first = store.claim("w")
    assert first == now_is(store, job)
    assert first == replace(job, state="in_progress", attempt=1, started_at=clock.now, version=2)
    store.report(job.id, 1, stage="base", step=3, steps=9, progress=0.5)
    store.preview(job.id, 1, "jobs/x/preview-1.mp4")
    assert store.retry(job.id, 1, 3, "error", "!").state == "queued"
    clock.advance(5)
    second = store.claim("w")
    assert second is not None
    assert (second.attempt, second.started_at) == (2, first.started_at)
    assert (second.stage, second.step, second.steps, second.progress, second.preview) == (None, 0, 0, 0.0, None)


def test_progress_is_reported_and_neither_falls_nor_reaches_the_end(store: JobStore) -> None:
    job = begin(store)
    assert store.report(job.id, 1, stage="base", step=3, steps=10, progress=0.4)
    assert store.report(job.id, 1, stage="refine", step=0, steps=5, progress=0.3)
    now = now_is(store, job)
    assert (now.stage, now.step, now.steps, now.progress, now.version) == ("refine", 0, 5, 0.4, job.version + 2)
    assert store.report(job.id, 1, stage="decode", step=0, steps=0, progress=1.0)
    assert now_is(store, now).progress < 1


def test_what_is_resolved_is_added_and_the_preview_kept(store: JobStore) -> None:
    job = begin(store)
    assert store.resolve(job.id, 1, {"prompt": "richer", "seed": 8})
    assert store.preview(job.id, 1, "jobs/x/preview-1.mp4")
    ended = finish(store, job)
    assert ended.resolved == {"seed": 8, "prompt": "richer"}
    assert ended.preview == "jobs/x/preview-1.mp4"


def test_completion(store: JobStore, clock: Any) -> None:
    job = begin(store)
    clock.advance(9)
    ended = finish(store, job, clock.now + 60, base=8.5)
    assert (ended.state, ended.progress, ended.finished_at, ended.expires_at) == ("completed", 1.0, clock.now, clock.now + 60)
    assert (ended.output, ended.stage_seconds, ended.stage) == (f"jobs/{job.id}/result.mp4", {"base": 8.5}, None)
    assert ended.ended


def test_completing_once_more_tells_whether_the_file_is_the_jobs_own(store: JobStore, clock: Any) -> None:
    ended = finish(store, begin(store), clock.now + 60)
    assert store.complete(ended.id, 1, output=str(ended.output), stage_seconds={}, expires_at=0.0)
    assert not store.complete(ended.id, 1, output="jobs/x/another.mp4", stage_seconds={}, expires_at=0.0)
    assert not store.complete(ended.id, 2, output=str(ended.output), stage_seconds={}, expires_at=0.0)
    assert store.get(ended.id) == ended


def test_failure_keeps_where_it_was_and_a_readable_reason(store: JobStore, clock: Any) -> None:
    job = begin(store)
    store.report(job.id, 1, stage="refine", step=2, steps=5, progress=0.7)
    assert store.fail(job.id, 1, "out_of_memory", "no \0 room \ud800", {"base": 2.0})
    now = now_is(store, job)
    assert (now.state, now.error_code, now.error_message) == ("failed", "out_of_memory", "no  room ?")
    assert (now.stage, now.step, now.finished_at, now.stage_seconds) == ("refine", 2, clock.now, {"base": 2.0})


def test_retry_puts_a_job_before_those_not_yet_begun_and_ends(store: JobStore, clock: Any) -> None:
    job = begin(store)
    clock.advance(-100)  # even before one that is older
    older = submit(store)
    high = submit(store, priority=2)
    again = store.retry(job.id, 1, 2, "error", "!")
    assert (again.state, again.error_code) == ("queued", None)
    assert [store.ahead(j) for j in (high, again, older)] == [0, 1, 2]
    assert [store.claim("w").id for _ in range(3)] == [high.id, job.id, older.id]  # type: ignore[union-attr]
    assert store.retry(job.id, 1, 2, "error", "!") == store.get(job.id)  # an old attempt has no say
    failed = store.retry(job.id, 2, 2, "error", "twice")
    assert (failed.state, failed.error_code, failed.error_message) == ("failed", "error", "twice")
    store.cancel(older.id)
    assert store.retry(older.id, 1, 2, "error", "!").state == "cancelled"
    with pytest.raises(KeyError, match="gone"):
        store.retry("gone", 1, 2, "error", "!")


def test_a_waiting_job_is_cancelled_at_once(store: JobStore, clock: Any) -> None:
    job = submit(store)
    cancelled = store.cancel(job.id)
    assert cancelled == now_is(store, job)
    assert cancelled == replace(job, state="cancelled", cancel_requested=True, finished_at=clock.now, version=2)
    assert store.claim("w") is None
    assert store.cancel(job.id) == cancelled


def test_a_job_in_progress_is_asked_to_stop_and_does(store: JobStore, clock: Any) -> None:
    job = begin(store)
    asked = store.cancel(job.id)
    assert asked == replace(job, cancel_requested=True, version=job.version + 1)
    assert store.cancel(job.id) == asked
    assert not store.report(job.id, 1, stage="base", step=1, steps=2, progress=0.5)
    assert store.get(job.id) == asked
    assert store.cancelled(job.id, 1)
    now = now_is(store, job)
    assert (now.state, now.finished_at) == ("cancelled", clock.now)
    assert not store.cancelled(job.id, 1)


def test_a_result_that_is_there_wins_over_a_cancellation(store: JobStore) -> None:
    job = begin(store)
    store.cancel(job.id)
    assert finish(store, job).state == "completed"


def test_what_is_not_the_attempt_of_the_job_changes_nothing(store: JobStore) -> None:
    waiting, running, ended = submit(store, priority=0), begin(store), finish(store, begin(store))
    before = store.list()
    for job, attempt in ((waiting, 0), (waiting, 1), (running, 0), (running, 2), (ended, 1)):
        assert not store.report(job.id, attempt, stage="base", step=1, steps=2, progress=0.1)
        assert not store.resolve(job.id, attempt, {"seed": 0})
        assert not store.preview(job.id, attempt, "x")
        assert not store.complete(job.id, attempt, output="x", stage_seconds={}, expires_at=0)
        assert not store.fail(job.id, attempt, "error", "!")
        assert not store.cancelled(job.id, attempt)
        assert store.retry(job.id, attempt, 9, "error", "!") == store.get(job.id)
    assert store.list() == before


def test_pages_go_through_all_jobs_in_both_orders(store: JobStore, clock: Any) -> None:
    jobs = []
    for number in range(7):
        jobs.append(submit(store, "alice" if number != 3 else "bob"))
        clock.advance(number % 2)  # some at the same moment
    for order in ("asc", "desc"):
        for owner in (None, "alice"):
            seen: list[Job] = []
            while page := store.list(owner, limit=2, after=seen[-1].id if seen else None, order=order):  # type: ignore[arg-type]
                seen += page
            expected = [job for job in jobs if owner in (None, job.owner)]
            assert seen == (expected if order == "asc" else expected[::-1])
    store.cancel(jobs[0].id)
    assert [job.id for job in store.list(states=("cancelled", "failed"))] == [jobs[0].id]
    with pytest.raises(UserError, match="no job"):
        store.list("alice", after=jobs[3].id)


def test_a_page_begins_behind_a_place_whose_job_is_gone(store: JobStore, clock: Any) -> None:
    jobs = []
    for number in range(5):
        jobs.append(submit(store))
        clock.advance(number % 2)
    gone = jobs[2]
    store.cancel(gone.id)
    store.delete(gone.id)
    for owner in (None, gone.owner):
        assert store.list(owner, after=gone.id, order="asc") == jobs[3:]
        assert store.list(owner, after=gone.id) == jobs[1::-1]
    with pytest.raises(UserError, match="no job"):
        store.list("another", after=gone.id)
    clock.advance(places.KEEP_S + 1)
    store.cancel(jobs[0].id)
    store.delete(jobs[0].id)
    with pytest.raises(UserError, match="no job"):
        store.list(after=gone.id)
    assert store.list(after=jobs[0].id, order="asc") == [jobs[1], *jobs[3:]]
    assert store.identity and store.counts()["queued"] == 3, "what else stands beside them stays"


def test_the_last_completed_jobs_calibrate(store: JobStore, clock: Any) -> None:
    for seconds in (1.0, 2.0, 3.0):
        clock.advance(1)
        finish(store, begin(store), clock.now, base=seconds)
    store.fail(begin(store).id, 1, "error", "!")
    store.expire(clock.now - 1)
    assert [job.stage_seconds["base"] for job in store.recent_stage_seconds(2)] == [3.0, 2.0]
