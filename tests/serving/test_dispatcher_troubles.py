"""What goes wrong around the dispatcher: busy replicas, other checkpoints, lost answers of the store, its own end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.cascade import BaseWork, RefineWork
from serving.housekeeping import sweep
from serving.settings import Settings
from serving.store import JobStore
from serving.streaming import Done, OnStep, Step, stream
from tests.serving.dispatcher_house import FakeStages, House, WorkerDied, run
from tests.serving.exports import write_settings


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(write_settings(tmp_path, "serving.queue.lease_s=60", "serving.queue.poll_s=0.01"))


class Busy(FakeStages):
    """A base model that is free after `wait_s`."""

    wait_s = 0.6

    def base(self, work: BaseWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        inner = super().base(work)

        async def later() -> AsyncGenerator[Step | Done[np.ndarray], None]:
            await asyncio.sleep(self.wait_s)
            async for item in inner:
                yield item

        return later()


def test_waiting_for_a_free_replica_is_not_computing(house: House) -> None:
    job_id = house.submit()
    run([house.dispatcher(Busy(), house.with_queue(max_run_s=0.3))], lambda: house.job(job_id).ended)
    assert house.job(job_id).state == "completed"


def test_but_a_job_computes_no_longer_for_having_waited(house: House) -> None:
    stages, job_id = Busy(step_s=0.05), house.submit(steps=100)
    run([house.dispatcher(stages, house.with_queue(max_run_s=0.5))], lambda: house.job(job_id).ended)
    job = house.job(job_id)
    assert (job.error_code, job.stage) == ("timeout", "base") and "ran longer than 0.5 s" in str(job.error_message)
    assert stages.steps_done < 50


def test_a_replica_that_never_comes_free_is_named_as_the_reason(house: House) -> None:
    class Never(Busy):
        wait_s = 60.0

    job_id = house.submit()
    run([house.dispatcher(Never(), house.with_queue(max_wait_s=0.2))], lambda: house.job(job_id).ended)
    job = house.job(job_id)
    assert job.error_code == "timeout" and "no part of the server was free for the job for 0.2 s" in str(job.error_message)


@pytest.mark.parametrize("changed", ["base", "refiner", "no refiner"])
def test_a_job_accepted_for_other_checkpoints_is_refused_before_it_is_computed(
    house: House, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    from serving import dispatcher

    base, refiner = dispatcher.checkpoints(house.settings)
    assert refiner is not None
    served = {
        "base": (replace(base, digest="f" * 32), refiner),
        "refiner": (base, replace(refiner, digest="f" * 32)),
        "no refiner": (base, None),
    }[changed]
    refined, plain = house.submit(), house.submit(refine=False)
    monkeypatch.setattr(dispatcher, "checkpoints", lambda _: served)
    stages = FakeStages()
    run([house.dispatcher(stages)], lambda: house.job(refined).ended and house.job(plain).ended)
    job = house.job(refined)
    assert (job.state, job.error_code, job.attempt) == ("failed", "impossible", 1)
    assert "other checkpoints" in str(job.error_message)
    assert house.job(plain).state == ("failed" if changed == "base" else "completed"), "it needs no refiner"
    assert stages.steps_done == (0 if changed == "base" else 5)


def test_a_job_of_another_version_of_the_server_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import reporting

    job_id = house.submit()
    monkeypatch.setattr(reporting, "plan_of", lambda job: job.resolved["a field of tomorrow"])
    run([house.dispatcher(FakeStages())], lambda: house.job(job_id).ended)
    job = house.job(job_id)
    assert (job.error_code, job.attempt) == ("impossible", 1) and "another version" in str(job.error_message)


def test_a_dispatcher_that_ends_between_two_attempts_gives_the_job_back_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.dispatcher._RETRY_AFTER_S", 60.0)
    stages, job_id = FakeStages([WorkerDied()]), house.submit()
    run([house.dispatcher(stages)], lambda: not stages.base_raises)
    assert house.job(job_id).state == "queued", "the lease of a minute need not run out first"


def test_a_completion_whose_answer_was_lost_keeps_its_file(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a database commits and its connection breaks before it has said so."""
    monkeypatch.setattr("serving.dispatcher._PAUSES_S", (0.01,))
    job_id, complete, lost = house.submit(), house.store.complete, [ConnectionError("server closed the connection")]

    def committed(*args: Any, **values: Any) -> bool:
        done = complete(*args, **values)
        if lost:
            raise lost.pop()
        return done

    monkeypatch.setattr(house.store, "complete", committed)
    run([house.dispatcher(FakeStages())], lambda: "decode" in house.store.stage_histogram())
    job = house.job(job_id)
    assert job.state == "completed" and not lost
    assert (house.folder / str(job.output)).read_bytes() == b"the file of seed 1"


def test_every_step_is_counted_of_a_run_of_one_step_too(house: House) -> None:
    class Quick(FakeStages):
        def refine(self, work: RefineWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
            def compute(on_step: OnStep) -> np.ndarray:
                on_step(0, 1)
                on_step(1, 1)
                return work.latents

            return stream(compute)

    job_id = house.submit(steps=1)
    run([house.dispatcher(Quick())], lambda: "refine" in house.store.step_counts())
    assert house.job(job_id).state == "completed"
    assert house.store.step_counts() == {"base": 1, "refine": 1}


def _old_folder(settings: Settings, name: str) -> Path:
    folder = Path(settings.storage.folder) / "jobs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result-1.mp4").write_bytes(b"x")
    return folder


def test_files_that_a_killed_server_left_of_an_expired_job_are_swept(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.housekeeping._ORPHAN_AFTER_S", -1.0)
    expired, kept = house.submit(), house.submit()
    for job_id in (expired, kept):
        _old_folder(house.settings, job_id)
        house.store.claim(job_id)
        house.store.complete(job_id, 1, output=f"jobs/{job_id}/result-1.mp4", stage_seconds={}, expires_at=time.time() + 60)
    house.store.expire(time.time() + 3600)  # and then it was killed
    again = house.submit()
    folder = _old_folder(house.settings, again)
    sweep(house.store, house.settings.storage)
    assert not house.files(expired) and not house.files(kept) and folder.exists()


def test_a_folder_is_another_stores_or_ones_own_and_never_nobodys(house: House) -> None:
    sweep(house.store, house.settings.storage)
    jobs = Path(house.settings.storage.folder) / "jobs"
    assert (jobs / ".store").read_text() == house.store.identity
    assert [p.name for p in jobs.glob(".*")] == [".store"], "written whole or not at all"
    other = JobStore(f"sqlite:///{jobs}/other.sqlite")
    folder = _old_folder(house.settings, "job_nobodys")
    sweep(other, house.settings.storage)
    other.close()
    assert folder.exists()
