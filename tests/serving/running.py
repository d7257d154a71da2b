"""The real HTTP side with the painting dispatcher, on a port of this machine: what the page and `waver` are tested against."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from serving.api import create_app
from tests.serving.api.fake_dispatcher import FakeDispatcher, make_service


class Running:
    """A server in a thread. It can be stopped and started again on the same port, with the same store."""

    def __init__(self, folder: Path, *, step_s: float = 0.01, **serving: Any) -> None:
        self.service = make_service(folder, **serving)
        self.dispatcher = FakeDispatcher(self.service, step_s=step_s)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Running:
        self.dispatcher.__enter__()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.dispatcher.__exit__()
        self.service.store.close()

    def start(self) -> None:
        """Listen; returns once it does."""
        config = uvicorn.Config(
            create_app(self.service), host="127.0.0.1", port=self.port, log_level="error", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop listening; open streams are cut."""
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)
        self._server = None
