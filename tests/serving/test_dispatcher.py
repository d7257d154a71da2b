"""The dispatcher over stages that can be told to fail, hang or die: what becomes of jobs, and of their files."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from serving.cascade import DecodeWork
from serving.jobs import Job
from serving.streaming import Done, Step
from tests.serving.dispatcher_house import FakeStages, House, WorkerDied, run
from tests.serving.exports import write_settings
from waver_core.errors import UserError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.dispatcher._RETRY_AFTER_S", 0.01)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(write_settings(tmp_path, "serving.queue.lease_s=0.4", "serving.queue.poll_s=0.01"))


def test_a_job_is_made_with_its_preview_its_prompt_and_its_times(house: House) -> None:
    job_id = house.submit(seed=9)
    run([house.dispatcher(FakeStages())], lambda: "base" in house.store.step_counts())
    job = house.job(job_id)
    assert (job.state, job.progress, job.attempt) == ("completed", 1.0, 1)
    assert house.files(job_id) == ["preview-1.mp4", "result-1.mp4"]
    assert (house.folder / str(job.output)).read_bytes() == b"the file of seed 9"
    assert job.resolved["prompt"].endswith("!") and job.resolved["rewritten_by"] == "fake-1"
    assert list(job.stage_seconds) == ["rewrite", "encode", "base", "upscale", "refine", "decode"]
    assert house.store.step_counts()["base"] == 5 and house.store.stage_histogram()["base"].count == 1


def test_no_stage_waits_for_a_slow_store_but_the_job_ends_after_all_that_was_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, decoded, preview = house.submit(), threading.Event(), house.store.preview
    in_time: list[bool] = []

    class Stages(FakeStages):
        def decode(self, work: DecodeWork) -> AsyncGenerator[Step | Done[bytes], None]:
            decoded.set()
            return super().decode(work)

    def slow(*told: Any) -> bool:
        in_time.append(decoded.wait(5))  # the last stage begins while this is still being written
        time.sleep(0.2)
        return preview(*told)

    monkeypatch.setattr(house.store, "preview", slow)
    run([house.dispatcher(Stages())], lambda: house.job(job_id).ended)
    job = house.job(job_id)
    assert in_time == [True] and job.state == "completed" and job.preview == f"jobs/{job_id}/preview-1.mp4"


def test_a_dead_worker_begins_the_job_again(house: House) -> None:
    job_id = house.submit()
    run([house.dispatcher(FakeStages([WorkerDied(), WorkerDied()]))], lambda: house.job(job_id).ended)
    assert (house.job(job_id).state, house.job(job_id).attempt) == ("completed", 3)


def test_but_not_for_ever(house: House) -> None:
    job_id = house.submit()
    run([house.dispatcher(FakeStages([WorkerDied()] * 9))], lambda: house.job(job_id).ended)
    job = house.job(job_id)
    assert (job.state, job.error_code, job.attempt) == ("failed", "worker_lost", 3)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(RuntimeError("secret /etc/passwd"), "internal", "log"), (UserError("take less of it"), "impossible", "take less of it")],
)
def test_what_is_wrong_with_a_request_is_not_tried_again(house: House, error: Exception, code: str, told: str) -> None:
    job_id = house.submit()
    run([house.dispatcher(FakeStages([error]))], lambda: house.job(job_id).ended)
    job = house.job(job_id)
    assert (job.state, job.error_code, job.attempt) == ("failed", code, 1)
    assert told in str(job.error_message) and "passwd" not in str(job.error_message)


def test_a_stage_that_times_out_by_itself_is_no_time_out_of_the_job(house: House) -> None:
    job_id = house.submit()
    run([house.dispatcher(FakeStages([TimeoutError("an endpoint")]))], lambda: house.job(job_id).ended)
    assert house.job(job_id).error_code == "internal"


def test_a_job_that_runs_too_long_is_stopped(house: House) -> None:
    stages, job_id = FakeStages(step_s=0.05), house.submit(steps=100)
    run([house.dispatcher(stages, house.with_queue(max_run_s=0.3))], lambda: house.job(job_id).ended)
    assert (house.job(job_id).state, house.job(job_id).error_code) == ("failed", "timeout")
    assert stages.steps_done < 50 and stages.running == 0


def test_cancelling_in_mid_run_stops_the_steps(house: House) -> None:
    stages, job_id = FakeStages(step_s=0.02), house.submit(steps=100)

    async def cancel() -> None:
        while stages.steps_done < 3:
            await asyncio.sleep(0.01)
        house.store.cancel(job_id)

    run([house.dispatcher(stages)], lambda: house.job(job_id).ended, cancel)
    assert house.job(job_id).state == "cancelled" and stages.steps_done < 60
    assert "result-1.mp4" not in house.files(job_id)


@pytest.mark.parametrize("stage", ["upscale", "decode"])
def test_cancelling_stops_the_autoencoder_between_two_runs_of_frames(house: House, stage: str) -> None:
    stages, job_id = FakeStages(slow=stage), house.submit()

    async def cancel() -> None:
        while house.job(job_id).stage != stage:
            await asyncio.sleep(0.01)
        house.store.cancel(job_id)

    run([house.dispatcher(stages)], lambda: house.job(job_id).ended, cancel)
    then = stages.steps_done
    assert house.job(job_id).state == "cancelled" and then < 200
    assert "result-1.mp4" not in house.files(job_id)


def test_a_dispatcher_that_ends_gives_its_jobs_back(house: House) -> None:
    stages, job_id = FakeStages(step_s=0.02), house.submit(steps=50)
    run([house.dispatcher(stages)], lambda: stages.steps_done > 2)
    assert house.job(job_id).state == "queued" and stages.running == 0
    run([house.dispatcher(FakeStages())], lambda: house.job(job_id).ended)
    assert (house.job(job_id).state, house.job(job_id).attempt) == ("completed", 2)


def test_a_dispatcher_that_falls_silent_loses_its_job_and_its_result(house: House) -> None:
    """The old one goes on computing, unaware; what it brings later is thrown away."""
    job_id = house.submit()
    old = house.store.claim("silent")
    assert old is not None and old.id == job_id
    run([house.dispatcher(FakeStages())], lambda: house.job(job_id).ended)
    job = house.job(job_id)
    assert (job.state, job.attempt) == ("completed", 2)
    assert not house.store.complete(job_id, 1, output="late", stage_seconds={}, expires_at=0.0)
    assert house.job(job_id).output == job.output


def test_two_dispatchers_share_the_work_and_nothing_is_made_twice(house: House) -> None:
    stages = [FakeStages(step_s=0.002), FakeStages(step_s=0.002)]
    ids = [house.submit(seed=n) for n in range(12)]
    run([house.dispatcher(s) for s in stages], lambda: all(house.job(i).ended for i in ids))
    assert {house.job(i).state for i in ids} == {"completed"} and {house.job(i).attempt for i in ids} == {1}
    assert sum(s.steps_done for s in stages) == 12 * 5 and all(s.steps_done for s in stages)


def test_no_more_run_at_once_than_may_and_higher_priorities_come_first(house: House) -> None:
    stages = FakeStages(step_s=0.005)
    low = [house.submit(priority="low") for _ in range(3)]
    high = [house.submit(priority="high") for _ in range(3)]
    run([house.dispatcher(stages)], lambda: all(house.job(i).ended for i in low + high))
    assert stages.most_running == 2
    assert max(house.job(i).started_at or 0 for i in high) <= min(house.job(i).started_at or 0 for i in low)


def test_results_past_their_date_and_folders_of_no_job_are_deleted(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.dispatcher._TIDY_EVERY_S", 0.05)
    storage = house.settings.storage.model_copy(update={"keep_hours": 0.1 / 3600})
    orphan, new = house.folder / "jobs" / "job_nobodys", house.folder / "jobs" / "job_on_its_way"
    for folder in (orphan, new):
        folder.mkdir(parents=True)
    os.utime(orphan, (0, 0))
    job_id = house.submit()
    expiring = house.settings.model_copy(update={"storage": storage})
    run([house.dispatcher(FakeStages(), expiring)], lambda: house.job(job_id).state == "expired")
    assert house.job(job_id).output is None and house.files(job_id) == []
    assert not orphan.exists() and new.exists()


def test_a_store_that_is_away_for_a_moment_does_not_end_the_dispatcher(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, claim, failures = house.submit(), house.store.claim, [OSError("no database")]

    def flaky(worker: str) -> Job | None:
        if failures:
            raise failures.pop()
        return claim(worker)

    monkeypatch.setattr(house.store, "claim", flaky)
    run([house.dispatcher(FakeStages())], lambda: house.job(job_id).ended)
    assert house.job(job_id).state == "completed"


def test_a_job_whose_end_could_not_be_written_is_begun_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.dispatcher._PAUSES_S", (0.01,))
    job_id, complete, failures = house.submit(), house.store.complete, [OSError("disk full")] * 2

    def flaky(*args: Any, **values: Any) -> bool:
        if failures:
            raise failures.pop()
        return complete(*args, **values)

    monkeypatch.setattr(house.store, "complete", flaky)
    monkeypatch.setattr(house.store, "fail", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    run([house.dispatcher(FakeStages())], lambda: house.job(job_id).ended)
    assert (house.job(job_id).state, house.job(job_id).attempt) == ("completed", 2)
