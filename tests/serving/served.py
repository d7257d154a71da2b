"""The real server as a process of its own, to be talked to, looked into and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
LONG = {"prompt": "a blue disc moves up over a white background", "steps": 100, "seconds": 10.0, "seed": 1}
"""Some seconds of work even for untrained networks."""


class Server:
    """`serving/run.py` over two exports and a folder of jobs, which outlives it."""

    def __init__(self, exports: Path, jobs: Path, *overrides: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.jobs = f"http://127.0.0.1:{self.port}", jobs
        self._temporary = tempfile.mkdtemp(prefix="wv-")  # short: sockets lie in it
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "RAY_TMPDIR": self._temporary,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0" * 64,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        sets = [f"serving.storage.folder={jobs}", "serving.queue.lease_s=2", *overrides]
        self._command = [sys.executable, str(ROOT / "serving/run.py"), "--profile", "embedded", "--profile", "tiny"]
        self._command += ["--base", str(exports / "base"), "--refiner", str(exports / "refiner"), "--port", str(self.port)]
        self._command += [part for value in sets for part in ("--set", value)]
        arguments = {"profile": "embedded,tiny", "base": str(exports / "base"), "refiner": str(exports / "refiner"), "set": sets}
        app = {"name": "videos", "route_prefix": "/", "import_path": "serving.app:build", "args": arguments}
        deployed = {"http_options": {"host": "127.0.0.1", "port": self.port}, "applications": [app]}
        self._file = Path(self._temporary) / "serve.yaml"
        self._file.write_text(yaml.safe_dump(deployed))
        self.client = httpx2.Client(base_url=self.url, timeout=60)
        self.log = Path(self._temporary) / "server.log"

    def start(self, serve_run: bool = False) -> None:
        """Returns when every deployment is ready. With `serve_run` Serve's own command line starts the app, from a file."""
        serve = [str(Path(sys.executable).with_name("serve")), "run", str(self._file)]
        command = serve if serve_run else self._command
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True, cwd=self._temporary
            )
        give_up = time.monotonic() + 150
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log.read_text()[-3000:]}")
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.3)
        raise RuntimeError(f"the server is not ready:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to the server and everything that it started, Ray included."""
        family = [self.process.pid, *(p.pid for p in self.family())]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, as an operator would; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.kill()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def family(self) -> list[psutil.Process]:
        """Everything that carries this server's own folder in its environment or command line."""
        found = []
        for process in psutil.process_iter():
            try:
                if self._temporary in " ".join(process.cmdline()) or process.environ().get("RAY_TMPDIR") == self._temporary:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return [p for p in found if p.pid not in (os.getpid(), self.process.pid)]

    def replica(self, name: str) -> int:
        """Process id of a deployment's replica."""
        (pid,) = [p.pid for p in self.family() if f"ServeReplica:waver:{name}" in " ".join(p.cmdline())]
        return pid

    @property
    def ray_address(self) -> str:
        """Where this server's own Ray listens. `auto` would take any that runs here, one of another test's among them."""
        (address,) = {
            part.removeprefix("--gcs-address=")
            for p in self.family()
            for part in p.cmdline()
            if part.startswith("--gcs-address=")
        }
        return address

    def failures(self) -> str:
        """What the server has logged of its own failures: each `500` is there under its reference."""
        logs = sorted(Path(self._temporary).rglob("*.log")) + sorted(Path(self._temporary).rglob("worker-*.err"))
        told = {text for log in logs if "failed (reference" in (text := log.read_text(errors="replace"))}
        return "\n".join(text[text.index("failed (reference") - 200 :][:6000] for text in told)

    def post(self, headers: dict[str, str] | None = None, **asked: Any) -> Any:
        """`POST /generate`."""
        return self.client.post("/generate", json=asked, headers=headers)

    def job(self, job_id: str) -> dict[str, Any]:
        """`GET /jobs/{id}`."""
        answer: dict[str, Any] = self.client.get(f"/jobs/{job_id}").json()
        return answer

    def until(self, job_id: str, *, states: tuple[str, ...] = (), stage: str = "", step: int = 0, within_s: float = 90) -> Any:
        """The job once it is in one of the states, or that far in that stage."""
        give_up = time.monotonic() + within_s
        while time.monotonic() < give_up:
            job = self.job(job_id)
            if job["state"] in states or (stage and job["stage"] == stage and job["step"] >= step):
                return job
            if stage and job["state"] in ("completed", "failed", "cancelled"):
                raise AssertionError(f"ended before it was seen in {stage}: {job}")
            time.sleep(0.02)
        raise AssertionError(f"still {self.job(job_id)}")


class Counters:
    """Asks the replicas themselves how many network steps they have made, by a second driver on the server's Ray."""

    def __init__(self, server: Server) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, server.ray_address],
            env=server.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> dict[str, int]:
        """Steps of `base` and `refiner` since their start; waits for what they compute now."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        counters: dict[str, int] = json.loads(self._process.stdout.readline())
        return counters

    def at_rest(self) -> dict[str, int]:
        """The steps once they stand still: one that was under way when its job was cancelled may still end. What is not stopped
        at all stands still, too, when it has made all of its steps, so compare with those."""
        last = self.read()
        for _ in range(40):
            time.sleep(0.5)
            if (now := self.read()) == last:
                return now
            last = now
        raise AssertionError(f"still computing after 20 s: {last}")

    def close(self) -> None:
        """End the second driver."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def main() -> None:
    """What `Counters` runs: a line of JSON for every line that comes in."""
    import ray
    from ray import serve

    sys.path.insert(0, str(ROOT))
    ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, logging_level="ERROR")
    handles = {name: serve.get_deployment_handle(name, "waver") for name in ("base", "refiner")}
    for _ in sys.stdin:
        print(json.dumps({name: handle.steps_done.remote().result() for name, handle in handles.items()}), flush=True)


if __name__ == "__main__":
    main()
