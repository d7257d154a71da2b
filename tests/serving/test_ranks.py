"""Groups of ranks (gloo, two and four processes): the same latents, stopped together, and built anew when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.exports import write_export
from tests.serving.served import LONG, ROOT, Server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    script = Path(__file__).with_name("rank_groups.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=280)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return answer


@pytest.mark.parametrize("group", ["cfg", "ulysses", "both"])
def test_a_group_makes_what_one_process_makes(found: dict[str, Any], group: str) -> None:
    assert found[group]["difference"] < 1e-4


def test_the_refiner_too(found: dict[str, Any]) -> None:
    assert found["refiner"] < 1e-4


@pytest.mark.parametrize("group", ["cfg", "ulysses", "both"])
def test_stopping_stops_all_ranks_and_keeps_the_group(found: dict[str, Any], group: str) -> None:
    assert found[group]["stopped"] == {"stands_still": True, "built": 1}


@pytest.mark.parametrize("group", ["cfg", "ulysses", "both"])
def test_a_dead_rank_is_an_error_at_once_and_the_next_sample_is_right(found: dict[str, Any], group: str) -> None:
    killed = found[group]["killed"]
    assert killed["error"] and killed["seconds"] < 14, killed  # below the time-out of a step
    assert found[group]["afterwards"] < 1e-4


def test_a_frozen_rank_is_an_error_after_the_time_out(found: dict[str, Any]) -> None:
    assert found["ulysses"]["frozen"]["error"] and found["ulysses"]["frozen"]["seconds"] < 30
    assert found["ulysses"]["thawed"] < 1e-4


def test_what_cannot_be_built_says_why(found: dict[str, Any]) -> None:
    assert "is missing" in found["cannot_be_built"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("exports")
    write_export(folder / "base", "t2v_192p_12fps")
    write_export(folder / "refiner", "refine_1080p", seed=1)
    base = "serving.deployments.base={cpus: 0.2, ranks: 2, cfg_parallel: true, threads: 1, step_timeout_s: 20}"
    made = Server(folder, tmp_path_factory.mktemp("jobs"), base)
    made.start()
    yield made
    made.stop()


def ranks_of(server: Server) -> list[int]:
    """Process ids of the replica's ranks."""
    return sorted(p.pid for p in server.family() if "ray::Rank" in " ".join(p.cmdline()))


def test_a_replica_of_two_ranks_serves_cancels_and_survives_the_death_of_one(server: Server) -> None:
    assert server.post(prompt="a red disc", steps=4, seed=3, wait=True).status_code == 200
    first = ranks_of(server)
    assert len(first) == 2
    for _ in range(2):
        cancelled = server.post(**LONG).json()["id"]
        server.until(cancelled, stage="base", step=3)
        server.client.post(f"/jobs/{cancelled}/cancel")
        server.until(cancelled, states=("cancelled",), within_s=20)
    assert server.post(prompt="a red disc", steps=4, seed=3, wait=True).status_code == 200
    assert ranks_of(server) == first, "a cancellation stops the ranks together and leaves them their weights"
    job_id = server.post(**LONG).json()["id"]
    server.until(job_id, stage="base", step=3)
    os.kill(first[1], signal.SIGKILL)
    job = server.until(job_id, states=("completed", "failed"))
    assert job["state"] == "completed" and job["attempt"] == 2
    assert not set(ranks_of(server)) & set(first)
