"""The real server as a process of its own, with a Ray of its own, for benchmarks that talk to it over HTTP."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]

from benchmarks.common import ROOT

_READY_WITHIN_S = 180.0


class ServerProcess:
    """`serving/run.py` on a free port of this machine: a context in which it is ready. Jobs lie in a folder that goes with it.

    arguments: of `serving/run.py`, without host and port; the folder of jobs is set here.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="wv-"))  # a short path, for Ray's sockets lie in it
        self.jobs = self.folder / "jobs"
        self._log = self.folder / "server.log"
        self._command = [sys.executable, str(ROOT / "serving" / "run.py"), *arguments]
        self._command += ["--set", f"serving.storage.folder={self.jobs}", "--port", str(self.port)]
        self.client = httpx2.Client(base_url=self.url, timeout=600, trust_env=False)

    def __enter__(self) -> ServerProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_TMPDIR": str(self.folder)}
        started = time.perf_counter()
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        self.ready_s = time.perf_counter() - started
        """From the start of the process until every deployment was ready."""
        self._members = [psutil.Process(self._process.pid), *self.family()]
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        left = self.family()
        self._process.kill()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended:\n{self._log.read_text()[-3000:]}")
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.2)
        raise SystemExit(f"the server is not ready after {_READY_WITHIN_S:g} s:\n{self._log.read_text()[-3000:]}")

    def family(self) -> list[psutil.Process]:
        """What it has started, Ray's processes included: all that name its folder in their environment or command line."""
        found = []
        for process in psutil.process_iter():
            try:
                told = str(self.folder) in " ".join(process.cmdline())
                if told or process.environ().get("RAY_TMPDIR") == str(self.folder):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return [p for p in found if p.pid not in (os.getpid(), self._process.pid)]

    def cpu_s(self) -> float:
        """Processor seconds so far of all processes that it had when it was ready."""
        spent = 0.0
        for process in self._members:
            try:
                times = process.cpu_times()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            spent += times.user + times.system
        return spent

    def generate(self, **asked: Any) -> tuple[bytes, str]:
        """`POST /generate` with `wait`: the file and the job's id. Raises SystemExit with what the server says instead."""
        answer = self.client.post("/generate", json={**asked, "wait": True})
        if answer.status_code != 200:
            raise SystemExit(f"the server refused {asked}: {answer.status_code} {answer.text[:500]}")
        return answer.content, answer.headers["x-waver-job"]

    def job(self, job_id: str) -> dict[str, Any]:
        """`GET /jobs/{id}`."""
        answer: dict[str, Any] = self.client.get(f"/jobs/{job_id}").json()
        return answer
