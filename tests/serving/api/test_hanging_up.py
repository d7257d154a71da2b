"""Clients that hang up while their job is still being accepted: whoever waited for a file leaves no job behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from starlette.types import Message, Scope

from serving.api import create_app, generate
from serving.api.service import Service
from tests.serving.api.fake_dispatcher import make_service

WAITING = {"prompt": "A disc", "wait": True}


class Slow:
    """An app whose submissions stop half way, in `submit`, until `go` is set."""

    def __init__(self, folder: Path) -> None:
        self.service: Service = make_service(folder)
        self.begun, self.go, self.woken = threading.Event(), threading.Event(), 0
        plan = self.service.plan

        def slow(*arguments: Any) -> Any:
            self.begun.set()
            assert self.go.wait(30)
            return plan(*arguments)

        def wake() -> None:
            self.woken += 1

        self.service.plan, self.service.wake = slow, wake
        self.app: FastAPI = create_app(self.service)

    async def post(self, body: dict[str, Any], headers: dict[str, str], gone: Exception | None = None) -> None:
        """`POST /generate` by a client that stays silent after its body, or is gone then, so that `receive` raises."""
        messages: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            if gone is not None:
                raise gone
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            raise AssertionError(f"nobody listens to {message}")

        given = {"host": "127.0.0.1", "content-type": "application/json", **headers}
        scope: Scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/generate", "raw_path": b"/generate"}
        scope |= {"query_string": b"", "client": ("127.0.0.1", 1)}
        scope["headers"] = [(name.encode(), value.encode()) for name, value in given.items()]
        with contextlib.suppress(ClientDisconnect):
            await self.app(scope, receive, send)

    async def cancelled(self, body: dict[str, Any], **headers: str) -> None:
        """A request that Ray Serve cancels (`asyncio.Task.cancel`) while its job is being accepted, seen through to its end."""
        request = asyncio.create_task(self.post(body, headers))
        await asyncio.to_thread(self.begun.wait, 30)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert self.service.store.list() == []
        self.go.set()
        await self.settled()

    async def settled(self) -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(*generate._left_behind)


@pytest.fixture
def slow(tmp_path: Path) -> Any:
    made = Slow(tmp_path)
    yield made
    made.go.set()
    made.service.store.close()


def test_a_waiting_client_that_is_cancelled_while_its_job_is_accepted_takes_it_along(slow: Slow) -> None:
    asyncio.run(slow.cancelled(WAITING))
    assert [job.state for job in slow.service.store.list()] == ["cancelled"]
    assert slow.woken == 2, "for the new job, and for its end"


@pytest.mark.parametrize(
    ("body", "headers"),
    [({"prompt": "A disc"}, {}), (WAITING, {"idempotency-key": "mine"})],
    ids=["one that does not wait", "one that can ask for it again"],
)
def test_any_other_client_that_is_cancelled_leaves_its_job(slow: Slow, body: dict[str, Any], headers: dict[str, str]) -> None:
    asyncio.run(slow.cancelled(body, **headers))
    assert [job.state for job in slow.service.store.list()] == ["queued"]


def test_a_waiting_client_of_which_receive_raises_while_its_job_is_accepted_takes_it_along(slow: Slow) -> None:
    async def call() -> None:
        request = asyncio.create_task(slow.post(WAITING, {}, gone=ValueError("Task was cancelled")))
        await asyncio.to_thread(slow.begun.wait, 30)
        slow.go.set()
        await request

    asyncio.run(call())
    assert [job.state for job in slow.service.store.list()] == ["cancelled"]


def test_a_client_that_is_cancelled_before_its_turn_makes_no_job(slow: Slow) -> None:
    slow.app.state.submitting = anyio.CapacityLimiter(1)

    async def call() -> None:
        first = asyncio.create_task(slow.post({"prompt": "first"}, {}))
        await asyncio.to_thread(slow.begun.wait, 30)
        second = asyncio.create_task(slow.post({"prompt": "second"}, {}))
        while slow.app.state.submitting.statistics().tasks_waiting < 1:
            await asyncio.sleep(0.005)
        for request in (first, second):
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        slow.go.set()
        await slow.settled()

    asyncio.run(call())
    assert [job.request["prompt"] for job in slow.service.store.list()] == ["first"]
