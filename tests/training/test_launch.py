"""A stage through Ray Train: four workers, the death of one, and errors that must not be tried again."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from training.encode import Resources, encode
from training.job import Job
from training.launch import check_mesh, check_room, policy_in_multiples, scaling_config
from training.recipe import Recipe, load_recipe
from training.trackers import read_metrics
from waver_core.command_line import new_console
from waver_core.config import load_config
from waver_core.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parents[2]
STAGE = "sft"
STEPS = 12
SETS = (
    "training.model={preset: tiny, overrides: {dual_blocks: 1, single_blocks: 1, heads: 2, head_dim: 16}}",
    f"training.stages.{STAGE}.data={{micro_batches_per_step: 4, max_per_pack: 1, max_dropped_share: 1.0}}",
    f"training.schedule.max_steps={STEPS}",
    "training.schedule.checkpoint_every_steps=3",
    "training.schedule.log_every_steps=1",
    "training.schedule.trackers=[]",
    "training.workers={count: 4, cpus: 0.25, max_failures: 2}",
)


@pytest.fixture(scope="module")
def encoded(curated: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the stage's samples, encoded in this process: what Ray does there is tested elsewhere."""
    run = tmp_path_factory.mktemp("encoded")
    encode(_recipe(), [curated], str(run), new_console(), Resources(serial=True))
    return run


def _recipe(*sets: str) -> Recipe:
    return load_recipe(load_config(None, ["embedded"], [*SETS, *sets]), STAGE)


def _parallel(shard: int | None = None, sequence: int = 1) -> str:
    """An override of the stage's mesh."""
    return f"training.stages.{STAGE}.parallel={{shard: {'null' if shard is None else shard}, sequence: {sequence}}}"


def _command(output: Path, encoded: Path, *sets: str) -> list[str]:
    shutil.copytree(encoded / "encoded", output / "encoded")
    words = [word for setting in (*SETS, *sets) for word in ("--set", setting)]
    script = [sys.executable, "training/stage.py", "--stage", STAGE, "--profile", "embedded"]
    return [*script, "--from-scratch", "--output", str(output), *words]


def _run(output: Path, encoded: Path, *sets: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}  # the same on a laptop as on a large machine
    command = _command(output, encoded, *sets)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


def _losses(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output / STAGE) if "loss" in line]


def _workers_at_work(driver: subprocess.Popen[str], output: Path, after: int) -> list[psutil.Process]:
    """Processes of Ray Train's workers, by the name that Ray gives them, once `after` steps are done."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and driver.poll() is None:
        if len(_losses(output)) >= after:
            found = psutil.Process(driver.pid).children(recursive=True)
            return [p for p in found if "RayTrainWorker" in " ".join(_command_line(p))]
        time.sleep(0.02)
    raise AssertionError(f"step {after} was not reached: {driver.communicate()[0]}")


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def whole(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Losses of an undisturbed run of four workers; without Ray, which takes half a minute to start and must not matter."""
    output = tmp_path_factory.mktemp("whole")
    job = Job(_recipe(), str(output), str(encoded / "encoded" / STAGE))
    command = [sys.executable, str(Path(__file__).with_name("gloo_group.py")), pickle.dumps(job).hex(), "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.splitlines()[-1] == "0 0 0 0", done.stderr
    losses = _losses(output)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    return losses


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_death_of_a_worker_leaves_the_curve_of_an_undisturbed_run(
    encoded: Path, whole: list[tuple[int, float]], tmp_path: Path
) -> None:
    driver = subprocess.Popen(
        _command(tmp_path, encoded), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )
    victims = _workers_at_work(driver, tmp_path, 5)
    assert len(victims) == 4
    victims[-1].send_signal(signal.SIGKILL)
    printed, _ = driver.communicate(timeout=280)
    assert driver.returncode == 0, printed
    assert f"{STAGE}: started again, with 4 of 4 workers" in printed
    assert _losses(tmp_path) == whole


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_for_the_user_is_told_once_by_as_many_workers_as_fit(encoded: Path, tmp_path: Path) -> None:
    """Of 2 to 4 workers in pairs, three would have room: so one pair starts, and its error is not tried again."""
    elastic = ("training.workers.min_count=2", "training.workers.cpus=0.6", _parallel(shard=2))
    fatal = (f"training.stages.{STAGE}.lr=1.0e30", "training.optimizer.warmup_steps=0")
    result = _run(tmp_path, encoded, *elastic, *fatal)
    assert result.returncode == RunFailed.exit_code, result.stdout + result.stderr
    assert f"{STAGE}: started with 2 of 4 workers" in result.stdout and "again" not in result.stdout
    assert "gradient norm" in result.stderr and result.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("cpus=1",), "4 workers want 4 CPUs but the cluster has 2: lower training.workers.count or training.workers.cpus"),
        (("gpus=1",), "4 workers want 4 GPUs but the cluster has 0: lower training.workers.count or training.workers.gpus"),
        (("cpus=1", "min_count=3"), "3 workers want 3 CPUs but the cluster has 2: lower training.workers.min_count or"),
    ],
)
def test_more_workers_than_the_cluster_has_room_for(sets: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(told)}"):
        check_room({"CPU": 2.0}, _recipe(*(f"training.workers.{one}" for one in sets)))


def test_room_for_the_fewest_is_enough() -> None:
    check_room({"CPU": 2.0}, _recipe("training.workers.cpus=1", "training.workers.min_count=2"))


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ((_parallel(shard=3),), "count is 4: parallel.shard 3 does not fit 4 workers: 1, 2, 4 would"),
        ((_parallel(sequence=2), "training.workers.count=3"), "count is 3: parallel.sequence 2 does not fit 3 workers"),
        ((_parallel(sequence=2), "training.workers.min_count=3"), "min_count is 3: parallel.sequence 2 does not fit 3 workers"),
        (("training.workers.min_count=5",), "min_count 5 is more than training.workers.count 4: lower it"),
    ],
)
def test_workers_that_do_not_fit_the_mesh(sets: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=f"^training.workers.{re.escape(told)}"):
        check_mesh(_recipe(*sets))


def test_a_mesh_that_fits_all_sizes() -> None:
    check_mesh(_recipe(_parallel(shard=2), "training.workers.min_count=2"))
    check_mesh(_recipe(_parallel(), "training.workers.min_count=3"))  # shards over all that are there


@pytest.mark.parametrize(("sets", "workers"), [((), 4), (("min_count=2",), (2, 4)), (("min_count=4",), 4)])
def test_the_numbers_of_workers_that_ray_may_start(sets: tuple[str, ...], workers: Any) -> None:
    assert scaling_config(_recipe(*(f"training.workers.{one}" for one in sets))).num_workers == workers


def test_only_multiples_of_the_mesh_are_started() -> None:
    """Of Ray's own policy, so that a new version of Ray that decides elsewhere is noticed here."""
    scaling = scaling_config(_recipe("training.workers={count: 16, min_count: 4, cpus: 2}"))
    nodes = {"one": {"CPU": 10.0}, "two": {"CPU": 5.0}}  # room for five and two
    for multiple, expected in ((1, 7), (2, 6), (4, 4)):
        policy = policy_in_multiples(scaling, multiple)
        policy._get_reserved_resources = lambda: nodes
        policy._maybe_send_resource_request = lambda: None
        assert policy.make_decision_for_non_running_worker_group().num_workers == expected
