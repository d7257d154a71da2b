"""A stage goes on at another number of workers with the same data in the same order; a worker that hangs is not waited for."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from training.encode import Resources, encode
from training.group import Worker
from training.job import Job
from training.loop import train
from training.recipe import Recipe
from training.trackers import read_metrics
from training.watch import HUNG
from waver_core.command_line import new_console

pytestmark = pytest.mark.slow
GROUP = Path(__file__).with_name("gloo_group.py")
STOPPED = 9
"""Exit code of the group's workers after the step that they are told to die at."""
STAGE = "t2v_192p_12fps"
STEPS = 8
SMALL = (
    "training.model={preset: tiny, overrides: {dual_blocks: 1, single_blocks: 1, heads: 2, head_dim: 16}}",
    *(f"training.data.{one}" for one in ("max_per_pack=1", "micro_batches_per_step=4", "text_dropout=0.2", "held_out_share=0")),
    "training.optimizer.warmup_steps=2",
    f"training.schedule.max_steps={STEPS}",
    "training.schedule.checkpoint_every_steps=1",
    "training.schedule.log_every_steps=1",
    "training.schedule.validate_every_steps=0",
    "training.schedule.trackers=[]",
)

MakeJob = Callable[..., Job]
Lines = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make_job(encoding_recipe: Callable[..., Recipe], curated: str, tmp_path_factory: pytest.TempPathFactory) -> MakeJob:
    """`make_job(output, *overrides)`: the stage on samples that are encoded once."""
    run = tmp_path_factory.mktemp("samples")
    encode(encoding_recipe(STAGE, *SMALL), [curated], str(run), new_console(), Resources(serial=True))
    return lambda output, *sets: Job(encoding_recipe(STAGE, *SMALL, *sets), str(output), f"{run}/encoded/{STAGE}")


@pytest.fixture(scope="module")
def expected(make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """What one worker finds that is never disturbed."""
    torch.set_num_threads(1)
    job = make_job(tmp_path_factory.mktemp("alone"))
    train(job, Worker(), lambda news: None)
    assert [line["step"] for line in _lines(job)] == list(range(1, STEPS + 1))
    return _lines(job)


def _lines(job: Job) -> Lines:
    return [line for line in read_metrics(job.folder) if "loss" in line]


def _start(job: Job, world: int, stop_after: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, str(GROUP), pickle.dumps(job).hex(), str(world), str(stop_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _on_group(job: Job, world: int, stop_after: int = 0) -> None:
    told, errors = _start(job, world, stop_after).communicate(timeout=100)
    codes = told.splitlines()[-1].split()
    assert codes == [str(STOPPED if stop_after else 0)] * world, errors


class _Gone(Exception):
    pass


def _alone(job: Job, stop_after: int = 0) -> int:
    """Train in this process; returns the step that it went on with."""
    steps: list[int] = []

    def report(news: dict[str, Any]) -> None:
        if "step" in news:
            steps.append(news["step"])
        if stop_after and news.get("step") == stop_after:
            raise _Gone

    try:
        train(job, Worker(), report)
    except _Gone:
        assert stop_after
    return steps[0]


def _same(found: Lines, expected: Lines) -> None:
    """The same steps of the same samples, and their losses up to the order of a sum."""
    for key in ("step", "samples", "bucket"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5)


def test_it_goes_on_at_other_numbers_of_workers_and_on_other_meshes(make_job: MakeJob, expected: Lines, tmp_path: Path) -> None:
    """Two shards, one worker, two replicas of two shards, a sequence group."""
    job = make_job(tmp_path)
    _on_group(job, 2, stop_after=3)
    assert 2 <= _alone(job, stop_after=5) <= 3, "it went on from a checkpoint of two workers"
    _on_group(make_job(tmp_path, "training.parallel.shard=2"), 4, stop_after=7)
    _on_group(make_job(tmp_path, "training.parallel={sequence: 2, checkpointing: full}"), 2)
    _same(_lines(job), expected)


def test_a_stopped_worker_ends_the_one_that_waits(make_job: MakeJob, expected: Lines, tmp_path: Path) -> None:
    """A stopped process can neither compute nor watch itself: the one that waits for it ends itself, and says where."""
    job = make_job(tmp_path, "training.workers.hang_after_s=5")
    group = _start(job, 2)
    assert group.stdout is not None
    waiting, stopped = (psutil.Process(int(word)) for word in group.stdout.readline().split())
    while len(_lines(job)) < 3:
        assert group.poll() is None
        time.sleep(0.02)
    stopped.suspend()
    waiting.wait(timeout=60)
    stopped.kill()
    told, errors = group.communicate(timeout=60)
    assert told.split() == [str(HUNG), "-9"], errors
    assert "worker 0 of 2 on " in errors and "was silent for 5." in errors
    assert 2 <= _alone(job) <= 5
    _same(_lines(job), expected)
