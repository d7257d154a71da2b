"""The job store against a model of it in plain Python: any order of calls by several workers, on SQLite and on PostgreSQL."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from serving.jobs import IdempotencyConflict, Job, QueueFull
from serving.store import MAX_UNFINISHED_PROGRESS, JobStore
from serving.tables import METADATA

BOUND, LEASE_S, ATTEMPTS = 3, 5.0, 2
ANY = st.integers(0, 50)
WORKERS = st.sampled_from(["a", "b"])


class Machine(RuleBasedStateMachine):
    """Calls the store and does the same to `jobs`; after each call both must say the same of every job."""

    def __init__(self, store: JobStore, clock: Any) -> None:
        super().__init__()
        with store.write() as connection:
            for table in METADATA.sorted_tables:
                if table.name != "waver_meta":
                    connection.execute(table.delete())
        self.store, self.clock = store, clock
        self.jobs: dict[str, Job] = {}
        self.beats: dict[str, tuple[str, float]] = {}  # job in progress -> its worker and that one's last sign of life
        self.queued_at: dict[str, float] = {}
        self.keys: dict[str, tuple[str, str]] = {}  # idempotency key -> job, digest
        self.ends: dict[str, int] = {}  # job -> how often it ended
        self.versions: dict[str, int] = {}
        self.events = 0
        self.number = 0

    def pick(self, any_one: int) -> tuple[str, Job]:
        """One of the jobs there ever were, more often one in progress."""
        ids = sorted(self.beats) * 3 + sorted(self.jobs)
        job_id = ids[any_one % len(ids)]
        return job_id, self.jobs[job_id]

    def set(self, job_id: str, **changes: Any) -> Job:
        """Change the model's job; the store has counted its version up by at least one."""
        now = self.store.get(job_id)
        assert now is not None
        job = replace(self.jobs[job_id], **changes, version=now.version)
        assert now.version > self.jobs[job_id].version
        self.jobs[job_id] = job
        if job.state != "in_progress":
            self.beats.pop(job_id, None)
        if job.ended and changes.get("state") != "expired":
            self.ends[job_id] = self.ends.get(job_id, 0) + 1
            self.events += job.webhook_url is not None
        return job

    def end(self, job_id: str, state: str, **changes: Any) -> Job:
        return self.set(job_id, state=state, finished_at=self.clock.now, **changes)

    def again(self, job_id: str) -> Job:
        self.queued_at[job_id] = self.clock.now
        return self.set(job_id, state="queued", stage=None, step=0, steps=0, progress=0.0, preview=None)

    def is_current(self, job: Job, attempt: int) -> bool:
        return job.state == "in_progress" and job.attempt == attempt

    def order(self) -> list[Job]:
        waiting = [job for job in self.jobs.values() if job.state == "queued"]
        return sorted(waiting, key=lambda job: (-job.priority, -job.attempt, job.created_at, job.id))

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 30.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(
        priority=st.integers(0, 2), key=st.sampled_from([None, None, "k", "l"]), digest=st.sampled_from("xy"), hook=st.booleans()
    )
    def submit(self, priority: int, key: str | None, digest: str, hook: bool) -> None:
        self.number += 1
        job_id = f"job_{(self.number * 7919) % 10007:05d}"
        waiting = len(self.order())
        options: dict[str, Any] = {"idempotency_key": key, "webhook_url": "https://h" if hook else None}
        try:
            job, created = self.store.submit(
                job_id,
                "o",
                {"n": self.number},
                priority=priority,
                resolved={},
                request_digest=digest,
                max_queued=BOUND,
                **options,
            )
        except IdempotencyConflict:
            assert key in self.keys
            assert self.keys[key][1] != digest
        except QueueFull:
            assert waiting >= BOUND
            assert key not in self.keys
        else:
            assert created == (key not in self.keys)
            if not created:
                assert key is not None
                assert (self.jobs[job.id], self.keys[key]) == (job, (job.id, digest))
                return
            assert waiting < BOUND
            assert job == Job(job_id, "o", "queued", priority, {"n": self.number}, self.clock.now, version=1, **options)
            self.jobs[job_id], self.queued_at[job_id] = job, self.clock.now
            if key is not None:
                self.keys[key] = (job_id, digest)

    @rule(worker=WORKERS)
    def claim(self, worker: str) -> None:
        order = self.order()
        assert [self.store.ahead(job) for job in order] == list(range(len(order)))
        job = self.store.claim(worker)
        assert (job and job.id) == (order[0].id if order else None)
        if job is not None:
            before = self.jobs[job.id]
            started_at = self.clock.now if before.started_at is None else before.started_at
            assert job == self.set(job.id, state="in_progress", attempt=before.attempt + 1, started_at=started_at)
            self.beats[job.id] = (worker, self.clock.now)

    @rule(worker=WORKERS)
    def heartbeat(self, worker: str) -> None:
        self.store.heartbeat(worker)
        self.beats = {i: (who, self.clock.now if who == worker else at) for i, (who, at) in self.beats.items()}

    @precondition(lambda self: self.jobs)
    @rule(which=ANY, attempt=st.integers(0, 2), progress=st.floats(0, 1), step=st.integers(0, 9))
    def report(self, which: int, attempt: int, progress: float, step: int) -> None:
        job_id, job = self.pick(which)
        taken = self.store.report(job_id, attempt, stage="base", step=step, steps=9, progress=progress)
        assert taken == (self.is_current(job, attempt) and not job.cancel_requested)
        if taken:
            progress = min(max(progress, job.progress), MAX_UNFINISHED_PROGRESS)
            self.set(job_id, stage="base", step=step, steps=9, progress=progress)
            self.beats[job_id] = (self.beats[job_id][0], self.clock.now)

    @precondition(lambda self: self.jobs)
    @rule(
        which=ANY,
        attempt=st.integers(0, 2),
        way=st.sampled_from(["complete", "fail", "cancelled", "preview", "resolve", "retry"]),
    )
    def worker_says(self, which: int, attempt: int, way: str) -> None:
        job_id, job = self.pick(which)
        calls: dict[str, Callable[[], Any]] = {
            "complete": lambda: self.store.complete(
                job_id, attempt, output="o", stage_seconds={"base": 1.5}, expires_at=self.clock.now + 20
            ),
            "fail": lambda: self.store.fail(job_id, attempt, "error", "!", {"base": 0.5}),
            "cancelled": lambda: self.store.cancelled(job_id, attempt),
            "preview": lambda: self.store.preview(job_id, attempt, f"p{attempt}"),
            "resolve": lambda: self.store.resolve(job_id, attempt, {"seed": attempt}),
            "retry": lambda: self.store.retry(job_id, attempt, ATTEMPTS, "error", "!"),
        }
        answer = calls[way]()
        if not self.is_current(job, attempt):
            assert answer == (job if way == "retry" else False)
        elif way == "complete":
            made = {"output": "o", "stage_seconds": {"base": 1.5}, "expires_at": self.clock.now + 20}
            self.end(job_id, "completed", progress=1.0, stage=None, **made)
        elif way == "fail":
            self.end(job_id, "failed", error_code="error", error_message="!", stage_seconds={"base": 0.5})
        elif way == "cancelled":
            self.end(job_id, "cancelled", cancel_requested=True)
        elif way == "preview":
            self.set(job_id, preview=f"p{attempt}")
        elif way == "resolve":
            self.set(job_id, resolved={"seed": attempt})
        elif job.cancel_requested:
            assert answer == self.end(job_id, "cancelled")
        elif attempt >= ATTEMPTS:
            assert answer == self.end(job_id, "failed", error_code="error", error_message="!")
        else:
            assert answer == self.again(job_id)

    @precondition(lambda self: self.jobs)
    @rule(which=ANY)
    def cancel(self, which: int) -> None:
        job_id, job = self.pick(which)
        answer = self.store.cancel(job_id)
        if job.state == "queued":
            self.end(job_id, "cancelled", cancel_requested=True)
        elif job.state == "in_progress" and not job.cancel_requested:
            self.set(job_id, cancel_requested=True)
        assert answer == self.jobs[job_id]

    @rule()
    def reclaim(self) -> None:
        silent = {job_id for job_id, (_, at) in self.beats.items() if at < self.clock.now - LEASE_S}
        answer = {job.id: job for job in self.store.reclaim(LEASE_S, ATTEMPTS)}
        assert set(answer) == silent
        for job_id in silent:
            job = self.jobs[job_id]
            if job.cancel_requested:
                self.end(job_id, "cancelled")
            elif job.attempt >= ATTEMPTS:
                self.end(job_id, "failed", error_code="worker_lost", error_message=answer[job_id].error_message)
            else:
                self.again(job_id)
            assert answer[job_id] == self.jobs[job_id]

    @rule()
    def time_out_waiting(self) -> None:
        late = {job.id for job in self.order() if self.queued_at[job.id] < self.clock.now - 25}
        answer = {job.id: job for job in self.store.time_out_waiting(25)}
        assert set(answer) == late
        for job_id in late:
            self.end(job_id, "failed", error_code="queue_timeout", error_message=answer[job_id].error_message)

    @rule()
    def expire(self) -> None:
        now = self.clock.now
        past = {job.id: job for job in self.jobs.values() if job.state == "completed" and (job.expires_at or math.inf) <= now}
        assert {job.id: job for job in self.store.expire(now)} == past
        for job_id in past:
            self.set(job_id, state="expired", output=None, preview=None)

    @precondition(lambda self: self.jobs)
    @rule(which=ANY)
    def delete(self, which: int) -> None:
        job_id, job = self.pick(which)
        assert self.store.delete(job_id) == job.ended
        if job.ended:
            self.drop({job_id})

    @rule(age_s=st.sampled_from([2.0, 40.0]))
    def forget(self, age_s: float) -> None:
        before = self.clock.now - age_s
        old = {job.id for job in self.jobs.values() if job.finished_at is not None and job.finished_at < before}
        assert set(self.store.forget(before)) == old
        self.drop(old)
        self.events = sum(self.store.event_counts().values())  # their events' ages are not modelled

    def drop(self, ids: set[str]) -> None:
        self.jobs = {job_id: job for job_id, job in self.jobs.items() if job_id not in ids}
        self.keys = {key: (job_id, digest) for key, (job_id, digest) in self.keys.items() if job_id not in ids}

    @invariant()
    def both_say_the_same(self) -> None:
        found = {job.id: job for job in self.store.list(limit=1000)}
        assert found == self.jobs
        counts = self.store.counts()
        assert counts == {state: sum(job.state == state for job in found.values()) for state in counts}

    @invariant()
    def a_job_ends_once_and_versions_grow(self) -> None:
        assert all(ends == 1 for ends in self.ends.values())
        for job in self.jobs.values():
            assert job.version >= self.versions.get(job.id, 0)
            self.versions[job.id] = job.version
            assert (job.progress == 1.0) == (job.state in ("completed", "expired"))
        assert sum(self.store.event_counts().values()) == self.events


def test_the_store_is_as_its_model(store: JobStore, clock: Any) -> None:
    loose = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    machines = 0

    def machine() -> Machine:
        nonlocal machines
        machines += 1
        return Machine(store, clock)

    run_state_machine_as_test(machine, settings=loose)
    assert machines >= 60, "every example was run"
