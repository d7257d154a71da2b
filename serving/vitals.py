"""Whether a replica's process can still be trusted with work; one that cannot ends itself, and Ray Serve starts another at once.

Ending the process is what Serve notices soonest: the call fails with an error of a dead actor, so its job is begun again by
another replica. A failing health check is noticed after half a minute, in which a broken replica would burn every waiting job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, TypeAlias, TypeVar

import ray
import torch
from ray.exceptions import ActorDiedError, RayError

T = TypeVar("T")
log = logging.getLogger("waver.vitals")
OWNER_EVERY_S = 1.0
"""How often the caller of a long piece of work is asked whether it lives."""


Owner: TypeAlias = bytes
"""A pickled handle of an actor. As it is, a handle costs whoever receives it some milliseconds, used or not."""


def this_actor() -> Owner:
    """The actor that calls this."""
    return bytes(ray.cloudpickle.dumps(ray.get_runtime_context().current_actor))


class Vitals:
    """One in each replica that computes. `step_timeout_s`: a single piece of work that does not move for so long hangs."""

    def __init__(self, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._moved_s: dict[object, float] = {}

    @contextlib.contextmanager
    def working(self) -> Iterator[object]:
        """Around a piece of work. An error of the accelerator spoils its context for the life of the process: that ends here."""
        work = object()
        self.moved(work)
        try:
            yield work
        except torch.AcceleratorError as error:
            _end(f"{type(error).__name__}: {error}")
            raise
        finally:
            del self._moved_s[work]

    def moved(self, work: object) -> None:
        """This piece of work goes on."""
        self._moved_s[work] = time.monotonic()

    async def steps(self, stream: AsyncGenerator[T, None], owner: Owner | None = None) -> AsyncGenerator[T, None]:
        """The stream, watched: each item is a sign of life. It ends when `owner` has died: nobody waits for it then, but Ray goes
        on with the calls of a dead actor."""
        task = asyncio.current_task()
        watcher = None if owner is None else asyncio.ensure_future(_until_dead(owner, task))
        try:
            with self.working() as work:
                async with contextlib.aclosing(stream):
                    async for item in stream:
                        self.moved(work)
                        yield item
        finally:
            if watcher is not None:
                watcher.cancel()

    def check(self) -> None:
        """To be called now and then (by Serve's health checks)."""
        for moved_s in list(self._moved_s.values()):
            if time.monotonic() - moved_s > self._step_timeout_s:
                _end(f"no step in {self._step_timeout_s:g} s")
        with self.working():
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.default_stream().query()  # raises after an error, waits for nothing


async def _until_dead(owner: Owner, task: asyncio.Task[Any] | None) -> None:
    handle: Any = None
    while task is not None:
        await asyncio.sleep(OWNER_EVERY_S)
        try:
            handle = handle or ray.cloudpickle.loads(owner)
            await handle.__ray_ready__.remote()
        except ActorDiedError:
            log.warning("the dispatcher that asked for this is gone; its work is given up")
            task.cancel()
            return
        except RayError:  # it cannot be reached for a moment
            continue


def _end(reason: str) -> None:
    log.critical("this replica ends itself and is replaced: %s", reason)
    os._exit(1)
