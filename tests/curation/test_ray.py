"""The funnel on real Ray: same rows as in one process, survives SIGKILL of worker and driver, and runs as a submitted job."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def sets(sizes: tuple[str, ...]) -> list[str]:
    return [part for override in sizes for part in ("--set", override)]


def _command(source: Path, output: Path, sets: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "curation" / "run_funnel.py"), "--input", str(source), "--output", str(output), *sets]


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def _finish(process: subprocess.Popen[str], timeout_s: float = 100) -> str:
    text, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, text
    return text


def _start(source: Path, output: Path, sets: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(source, output, sets), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment()
    )


def _wait_for(condition: Any, timeout_s: float = 60) -> Any:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("the run never reached the state that the test waits for")


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Actor processes of the run that are at work on a batch."""
    busy = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(child.cmdline()):
                busy.append(child)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return busy


def test_a_worker_killed_in_its_work_costs_nothing(
    collection: Path, tmp_path: Path, rows_of: Any, undisturbed: Any, sets: list[str]
) -> None:
    process = _start(collection, tmp_path, sets)
    attempts = tmp_path / "work" / "attempts"
    _wait_for(lambda: attempts.exists() and any(attempts.rglob("*.1")) and _workers(process))
    os.kill(_workers(process)[0].pid, signal.SIGKILL)
    _finish(process)
    assert rows_of(tmp_path) == undisturbed


def test_a_driver_killed_in_the_second_pass_goes_on_where_it_stopped(
    collection: Path, tmp_path: Path, rows_of: Any, undisturbed: Any, sets: list[str]
) -> None:
    process = _start(collection, tmp_path, sets)
    _wait_for(lambda: list((tmp_path / "work").glob("scores-*/done-*")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=20)
    assert not (tmp_path / "report.html").exists()
    shots = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("shots-*/*")}
    assert shots
    _finish(_start(collection, tmp_path, sets))
    assert rows_of(tmp_path) == undisturbed
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("shots-*/*")} == shots


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        ports = []
        for s in sockets:
            while True:  # Ray's workers claim 10002 to 19999
                s.bind(("127.0.0.1", 0))
                if s.getsockname()[1] > 20000:
                    break
                s.close()
            ports.append(s.getsockname()[1])
        return ports
    finally:
        for s in sockets:
            s.close()


@pytest.fixture()
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head of its own on loopback with a token; yields the environment and address for its clients."""
    home = tmp_path_factory.mktemp("ray")
    gcs, dashboard, agent, client = _free_ports(4)
    environment = {
        **_environment(),
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    ray = str(Path(sys.executable).parent / "ray")
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ports += [f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"]
    arguments = ["--head", "--block", "--num-cpus=2", "--dashboard-host=127.0.0.1", "--object-store-memory=100000000"]
    process = subprocess.Popen(
        [ray, "start", *arguments, *ports, f"--temp-dir={home}/t", "--disable-usage-stats"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{dashboard}"
    request = urllib.request.Request(
        f"{address}/api/version", headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    )

    def answers() -> bool:
        try:
            return bool(urllib.request.urlopen(request, timeout=2).status == 200)
        except (urllib.error.URLError, OSError):
            return False

    try:
        _wait_for(answers, 60)
        yield {**environment, "RAY_API_SERVER_ADDRESS": address}
    finally:
        # Asked politely Ray drains for half a minute; these processes are this test's own, so end them.
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(timeout=20)


def test_the_funnel_runs_as_a_submitted_job(
    head: dict[str, str], collection: Path, tmp_path: Path, rows_of: Any, undisturbed: Any, sets: list[str]
) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    script = ["python", "curation/run_funnel.py", "--input", str(collection), "--output", str(tmp_path / "out"), *sets]
    done = subprocess.run(
        [ray, "job", "submit", "--working-dir", ".", "--", *script],
        cwd=ROOT,
        env=head,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert "succeeded" in done.stdout.lower(), done.stdout + done.stderr
    assert done.returncode == 0
    assert rows_of(tmp_path / "out") == undisturbed
