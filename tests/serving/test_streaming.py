"""Work in a thread: its steps in order, its errors, and an end that waits for the thread."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from serving.streaming import Done, OnStep, Step, result_of, stream
from waver_core.flow.sampler import Stop


def counting(steps: int, log: list[int], pause_s: float = 0.0):  # type: ignore[no-untyped-def]
    def work(on_step: OnStep) -> str:
        for done in range(steps + 1):
            if not on_step(done, steps):
                raise Stop(done, steps)
            log.append(done)
            time.sleep(pause_s)
        return "made"

    return work


@pytest.fixture(autouse=True)
def told_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.streaming.EVERY_S", 0.0)


def test_steps_in_order_then_the_result() -> None:
    async def main() -> list[object]:
        return [item async for item in stream(counting(3, []))]

    assert asyncio.run(main()) == [Step(0, 3), Step(1, 3), Step(2, 3), Step(3, 3), Done("made")]


def test_closing_stops_between_two_steps_and_waits_for_the_thread() -> None:
    log: list[int] = []

    async def main() -> None:
        steps = stream(counting(1000, log, 0.005))
        async for item in steps:
            if item == Step(3, 1000):
                break
        await steps.aclose()
        assert not [t for t in threading.enumerate() if t.name.startswith("cascade") and t.is_alive() and len(log) > 900]
        then = len(log)
        await asyncio.sleep(0.05)
        assert len(log) == then < 50

    asyncio.run(main())


def test_a_task_cancelled_twice_still_waits_for_the_thread() -> None:
    log: list[int] = []
    ended = threading.Event()

    def work(on_step: OnStep) -> None:
        while on_step(len(log), 10):
            log.append(1)
            time.sleep(0.01)
        time.sleep(0.1)
        ended.set()

    async def main() -> None:
        task = asyncio.create_task(result_of(stream(work)))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(main())


def test_errors_come_through() -> None:
    def work(on_step: OnStep) -> None:
        on_step(0, 1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(result_of(stream(work)))


def test_quick_steps_are_not_all_told_of_but_the_last_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.streaming.EVERY_S", 10.0)

    async def main() -> list[object]:
        return [item async for item in stream(counting(50, []))]

    assert asyncio.run(main()) == [Step(0, 50), Step(50, 50), Done("made")]
