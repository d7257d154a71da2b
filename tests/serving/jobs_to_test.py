"""Jobs in the states that tests of the store begin with."""

from __future__ import annotations

import itertools
import math
from typing import Any

from serving.jobs import Job
from serving.store import JobStore

_numbers = itertools.count()


def submit(store: JobStore, owner: str = "local", **options: Any) -> Job:
    """Accept a plain job; ids grow, so that ties in time go by the order of submission."""
    settings: dict[str, Any] = {"priority": 1, "resolved": {"seed": 7}, "request_digest": "d", "max_queued": 1000}
    request = options.pop("request", {"prompt": "a red disc"})
    return store.submit(f"job_{next(_numbers):024x}", owner, request, **settings | options)[0]


def begin(store: JobStore, worker: str = "w", **options: Any) -> Job:
    """A job in progress."""
    job = submit(store, **options)
    claimed = store.claim(worker)
    assert claimed is not None
    assert claimed.id == job.id
    return claimed


def now_is(store: JobStore, job: Job) -> Job:
    """The job as the store has it now, with a greater version."""
    found = store.get(job.id)
    assert found is not None
    assert found.version > job.version
    return found


def finish(store: JobStore, job: Job, expires_at: float = math.inf, **stage_seconds: float) -> Job:
    assert store.complete(
        job.id, job.attempt, output=f"jobs/{job.id}/result.mp4", stage_seconds=stage_seconds, expires_at=expires_at
    )
    return now_is(store, job)
