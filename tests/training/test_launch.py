"""A stage through Ray Train: several workers, the death of one, and errors that must not be tried again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from training.encode import Resources, encode
from training.recipe import load_recipe
from training.trackers import read_metrics
from waver_core.command_line import new_console
from waver_core.config import load_config
from waver_core.errors import RunFailed

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
STAGE = "t2v_192p_12fps"
SETS = (
    "training.model={preset: tiny, overrides: {dual_blocks: 1, single_blocks: 1, heads: 2, head_dim: 16}}",
    "training.data.micro_batches_per_step=2",
    "training.data.max_per_pack=2",
    "training.schedule={max_steps: 12, checkpoint_every_steps: 3, log_every_steps: 1, validate_every_steps: 0, trackers: []}",
    "training.workers={count: 2, cpus: 1, max_failures: 2}",
)


@pytest.fixture(scope="module")
def encoded(curated: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the stage's samples, encoded in this process: what Ray does there is tested elsewhere."""
    run = tmp_path_factory.mktemp("encoded")
    config = load_config(None, ["embedded"], SETS)
    encode(load_recipe(config, STAGE), [curated], str(run), new_console(), Resources(serial=True))
    return run


def _command(output: Path, encoded: Path, *arguments: str) -> list[str]:
    shutil.copytree(encoded / "encoded", output / "encoded")
    sets = [word for setting in SETS for word in ("--set", setting)]
    return [sys.executable, "training/stage.py", "--stage", STAGE, "--from-scratch", "--output", str(output), *sets, *arguments]


def _run(output: Path, encoded: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = _command(output, encoded, *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def _losses(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output / STAGE) if "loss" in line]


def _training_workers(driver: int) -> list[psutil.Process]:
    """Processes of Ray Train's workers below a driver, by the name that Ray gives a process at work."""
    found = psutil.Process(driver).children(recursive=True)
    return [p for p in found if "RayTrainWorker" in " ".join(_command_line(p))]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.timeout(600)
def test_the_death_of_a_worker_leaves_the_curve_of_an_undisturbed_run(encoded: Path, tmp_path: Path) -> None:
    done = _run(tmp_path / "whole", encoded)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = _losses(tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(1, 13))

    output = tmp_path / "killed"
    driver = subprocess.Popen(
        _command(output, encoded), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )
    deadline = time.monotonic() + 200
    victims: list[psutil.Process] = []
    while time.monotonic() < deadline and driver.poll() is None:
        if len(_losses(output)) >= 5:
            victims = _training_workers(driver.pid)
            break
        time.sleep(0.02)
    assert victims, "no worker was found at work"
    victims[-1].send_signal(signal.SIGKILL)
    printed, _ = driver.communicate(timeout=280)
    assert driver.returncode == 0, printed
    assert _losses(output) == whole


@pytest.mark.timeout(300)
def test_an_error_for_the_user_is_told_once(encoded: Path, tmp_path: Path) -> None:
    result = _run(tmp_path, encoded, "--set", f"training.stages.{STAGE}.lr=1.0e30", "--set", "training.optimizer.warmup_steps=0")
    assert result.returncode == RunFailed.exit_code, result.stdout + result.stderr
    assert "gradient norm" in result.stderr and result.stderr.count("error: ") == 1


def test_more_workers_than_the_cluster_has_room_for(encoded: Path, tmp_path: Path) -> None:
    result = _run(tmp_path, encoded, "--set", "training.workers.cpus=999")
    assert result.returncode == 2
    assert "lower training.workers.count or training.workers.cpus" in result.stderr
