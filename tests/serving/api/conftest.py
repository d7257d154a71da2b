"""A server over loopback for each test that wants one: real sockets, a new store, and a dispatcher that paints."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from PIL import Image
from sqlalchemy import create_engine, text

from serving.api import create_app
from serving.api.service import Service
from tests.serving.api.fake_dispatcher import FakeDispatcher, make_service


@contextlib.contextmanager
def serving(service: Service) -> Iterator[str]:
    """The service's app behind a real port of this machine; the address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(service), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.002)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            service.store.close()


class Client(httpx2.Client):
    """A client that knows what its server runs on."""

    service: Service


Start = Callable[..., Client]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(paint=False, step_s=0, **serving)` -> a client of a new server."""
    with contextlib.ExitStack() as stack:

        def started(*, paint: bool = True, step_s: float = 0.0, **options: Any) -> Client:
            service = make_service(tmp_path / "server", **options)
            address = stack.enter_context(serving(service))
            if paint:
                stack.enter_context(FakeDispatcher(service, step_s=step_s))
            client = stack.enter_context(Client(base_url=address, timeout=20))
            client.service = service
            return client

        yield started


def written(service: Service) -> tuple[int, list[str]]:
    """(rows in the store, files below the folder of jobs): what a refused request must leave as it was."""
    engine = create_engine(service.settings.database_url)
    with engine.connect() as connection:
        rows = connection.execute(text("select count(*) from waver_jobs")).scalar_one()
    engine.dispose()
    jobs = service.folder / "jobs"
    return rows, sorted(str(p.relative_to(jobs)) for p in jobs.rglob("*")) if jobs.exists() else []


def wait_for(client: Client, job_id: str, *states: str) -> dict[str, Any]:
    """The job once it is in one of these states (any end by default)."""
    states = states or ("completed", "failed", "cancelled", "expired")
    for _ in range(1000):
        job: dict[str, Any] = client.get(f"/jobs/{job_id}").json()
        if job["state"] in states:
            return job
        time.sleep(0.02)
    raise AssertionError(f"{job['state']} for 20 s, not {states}")


def picture(width_px: int = 64, height_px: int = 48, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """A picture whose left half is red and right half blue."""
    image = Image.new("RGB", (width_px, height_px), (220, 30, 30))
    image.paste((30, 30, 220), (width_px // 2, 0, width_px, height_px))
    file = io.BytesIO()
    image.convert(mode, palette=Image.Palette.ADAPTIVE).save(file, kind, **options)
    return file.getvalue()
