"""Work in a thread, seen from an event loop: its steps as they are made, then its result; closing the stream stops the work."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from waver_core.flow.sampler import Stop

T = TypeVar("T")
EVERY_S = 0.2
"""Steps that follow one another faster are not all told of: each costs a message between processes (some 4 ms), and nobody sees
them."""
OnStep = Callable[..., bool]
"""`on_step(done, steps)`: False asks to stop; further arguments are ignored, so that a sampler may call it."""


@dataclass(frozen=True)
class Step:
    """So many steps of `steps` are done."""

    done: int
    steps: int


@dataclass(frozen=True)
class Done(Generic[T]):
    """The result."""

    value: T


async def stream(work: Callable[[OnStep], T]) -> AsyncGenerator[Step | Done[T], None]:
    """Run `work(on_step)` in a thread of its own and yield its steps (see `EVERY_S`) and, last, its result.

    A consumer that goes away (`aclose`, or its task cancelled) makes `on_step` answer False; the stream is closed only when the
    thread has ended, so whoever waits for the next turn does not start beside it. Errors of the work come through.
    """
    loop = asyncio.get_running_loop()
    last = -EVERY_S
    told: asyncio.Queue[Step | None] = asyncio.Queue()
    stop = threading.Event()

    def on_step(done: int, steps: int, *_: Any) -> bool:
        if stop.is_set():
            return False
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY_S or done == steps:
            last = now
            loop.call_soon_threadsafe(told.put_nowait, Step(done, steps))
        return True

    pool = ThreadPoolExecutor(1, thread_name_prefix="cascade")
    future = loop.run_in_executor(pool, work, on_step)
    future.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (step := await told.get()) is not None:
            yield step
        yield Done(future.result())
    finally:
        stop.set()
        pool.shutdown(wait=False)
        while not future.done():  # a second cancellation must not leave the thread behind
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        if not future.cancelled() and isinstance(future.exception(), Stop):
            pass  # asked for; reading the exception keeps asyncio from reporting it


async def result_of(steps: AsyncGenerator[Step | Done[T], None], on_step: Callable[[Step], Any] | None = None) -> T:
    """The result at the end of a stream; `on_step` sees each step (and is awaited where it is a coroutine function)."""
    try:
        async for item in steps:
            if isinstance(item, Done):
                return item.value
            if on_step is not None:
                told = on_step(item)
                if asyncio.iscoroutine(told):
                    await told
    finally:
        await steps.aclose()
    raise RuntimeError("the work ended without a result")
