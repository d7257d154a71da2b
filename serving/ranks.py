"""Several processes (GPUs) that compute every sample together: Ulysses over the tokens, and the two prompts apart (CFG parallel).

All ranks are called with the same work; the first one tells of its steps and decides, between two steps and for all, whether to
go on. An error or silence of any rank poisons the group: its process group cannot be trusted any more, so all ranks are ended
and built anew, and the job is begun again. Nothing waits for a collective that will never come.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import socket
from collections.abc import AsyncGenerator, Coroutine, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError

from serving.cascade import BaseWork, RefineWork
from serving.models import Denoiser
from serving.plan import Checkpoint
from serving.settings import Cascade, Deployment
from serving.streaming import Done, OnStep, Step, stream
from waver_core.errors import UserError
from waver_core.flow.sampler import Stop
from waver_core.sequence_parallel import PromptBranches, Ulysses

log = logging.getLogger("waver.ranks")
Kind = Literal["base", "refine"]
_CLOSING_S = 30.0
_ANSWER_S = 10.0


class GroupBroken(Exception):
    """A rank died, failed or fell silent; the group is built anew and the job may be begun again."""


class Rank:
    """One process of a group."""

    def __init__(self, checkpoint: Checkpoint, cascade: Cascade, options: Deployment, rank: int) -> None:
        torch.set_num_threads(options.threads or max(1, int(options.cpus)))
        self._checkpoint, self._cascade, self._options, self._rank = checkpoint, cascade, options, rank
        self._stopped_run = 0

    def address(self) -> str:
        """A free port of this rank's node, to meet at."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, address: str) -> None:
        """Meet the other ranks and load the weights."""
        ranks, cuda = self._options.ranks, torch.cuda.is_available()
        timeout = timedelta(seconds=self._options.step_timeout_s)
        where = {"rank": self._rank, "world_size": ranks, "init_method": f"tcp://{address}", "timeout": timeout}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **where)
        size = ranks // 2 if self._options.cfg_parallel else ranks
        # Every rank makes every group, in the same order, as torch asks for.
        halves = [dist.new_group(list(range(first, first + size)), timeout=timeout) for first in range(0, ranks, size)]
        sequence = Ulysses(halves[self._rank // size]) if size > 1 else None
        branches = None
        if self._options.cfg_parallel:
            pairs = [dist.new_group([k, k + size], timeout=timeout) for k in range(size)]
            branches = PromptBranches(pairs[self._rank % size])
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        self._denoiser = Denoiser(self._checkpoint, self._cascade, sequence, branches)

    async def run(self, number: int, kind: Kind, work: BaseWork | RefineWork) -> AsyncGenerator[Step | Done[Any], None]:
        """Steps and, last, the latents; of all ranks but the first only that they are done. `number`: of this run, from 1."""
        async for item in stream(partial(self._compute, number, kind, work)):
            if self._rank == 0:
                yield item
            elif isinstance(item, Done):
                yield Done(None)

    async def stop(self, number: int) -> None:
        """End that run before its next step; to be told to the first rank. It may come before its run, or after it."""
        self._stopped_run = number

    async def process_id(self) -> int:
        """Of this rank; an answer shows that it lives."""
        return os.getpid()

    async def steps_done(self) -> int:
        """See `Denoiser.steps_done`."""
        return self._denoiser.steps_done

    def _compute(self, number: int, kind: Kind, work: Any, on_step: OnStep) -> Any:
        def agreed(done: int, steps: int, *_: Any) -> bool:
            go_on = torch.tensor([int(on_step(done, steps) and self._stopped_run != number)])
            dist.broadcast(go_on, src=0, group=self._control)
            return bool(go_on.item())

        return self._denoiser.base(work, agreed) if kind == "base" else self._denoiser.refine(work, agreed)


class RankGroup:
    """The ranks of one replica; lives in the replica and in its placement group."""

    def __init__(self, checkpoint: Checkpoint, cascade: Cascade, options: Deployment) -> None:
        self._arguments = checkpoint, cascade, options
        self.options = options
        self.built = 0
        """Times that the group was built."""
        self._ranks: list[Any] = []
        self._runs = 0
        self._turn, self._building = asyncio.Lock(), asyncio.Lock()

    async def run(self, kind: Kind, work: BaseWork | RefineWork) -> AsyncGenerator[Step | Done[Any], None]:
        """As `Rank.run` of the first rank, one sample at a time. Raises `GroupBroken`; closing it ends the loop on every rank."""
        async with self._turn:
            try:
                await self.ready()
            except Exception as error:
                raise GroupBroken(f"a group could not be built: {_one_line(error)}") from error
            self._runs += 1
            # In a context without Ray's: else these calls are children of the call that Serve runs now, and a cancellation of
            # that one would reach every rank at a step of its own, where only `stop` can let them end together.
            outputs = contextvars.Context().run(self._start, self._runs, kind, ray.put(work))
            others = [asyncio.ensure_future(_drained(output)) for output in outputs[1:]]
            ended = False
            try:
                async for item in self._watched(outputs[0], others):
                    if isinstance(item, Done):
                        await asyncio.wait_for(asyncio.gather(*others), self.options.step_timeout_s)
                        ended = True
                    yield item
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as error:
                ended = True
                self.poison()
                if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
                    raise error.cause from None
                raise GroupBroken(_one_line(error)) from error
            finally:
                if not ended:
                    await _despite_cancellation(self._stopped(outputs, others))
                for other in others:
                    other.cancel()

    def _start(self, number: int, kind: Kind, shared: Any) -> list[Any]:
        return [rank.run.options(num_returns="streaming").remote(number, kind, shared) for rank in self._ranks]

    @property
    def busy(self) -> bool:
        """Whether a sample is being computed."""
        return self._turn.locked()

    async def ready(self) -> None:
        """Build the group where it is not there, or not whole; of two callers one builds and the other waits for it."""
        async with self._building:
            if self._ranks and not await self._answers():
                self.poison()
            if not self._ranks:
                self._ranks = await asyncio.wait_for(self._build(), self.options.build_timeout_s)

    async def _answers(self) -> bool:
        """Whether every rank still lives; one may have died since the last sample."""
        try:
            await asyncio.wait_for(asyncio.gather(*(rank.process_id.remote() for rank in self._ranks)), _ANSWER_S)
        except Exception as error:
            log.warning("a rank does not answer (%s); the group is built anew", _one_line(error))
            return False
        return True

    def poison(self) -> None:
        """End all ranks; the next run builds new ones."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            ray.kill(rank)

    async def steps_done(self) -> int:
        """Of the first rank."""
        return int(await self._ranks[0].steps_done.remote()) if self._ranks else 0

    async def _build(self) -> list[Any]:
        actor = ray.remote(Rank).options(num_cpus=self.options.cpus, num_gpus=self.options.gpus, max_restarts=0)
        ranks = [actor.remote(*self._arguments, rank) for rank in range(self.options.ranks)]
        try:
            address = await ranks[0].address.remote()
            await asyncio.gather(*(rank.join.remote(address) for rank in ranks))
        except BaseException:
            for rank in ranks:
                ray.kill(rank)
            raise
        self.built += 1
        return ranks

    async def _watched(self, first: Any, others: Sequence[asyncio.Future[None]]) -> AsyncGenerator[Step | Done[Any], None]:
        """What the first rank yields, while any other one's error, or silence of all, ends it."""
        items = first.__aiter__()
        while True:
            told = asyncio.ensure_future(_next(items))
            try:
                while not told.done():
                    waiting = {told, *(other for other in others if not other.done())}
                    done, _ = await asyncio.wait(
                        waiting, timeout=self.options.step_timeout_s, return_when=asyncio.FIRST_COMPLETED
                    )
                    if not done:
                        raise TimeoutError(f"no step in {self.options.step_timeout_s:g} s")
                    for other in others:
                        if other.done() and (error := other.exception()) is not None:
                            raise error
            finally:
                told.cancel()
            item = told.result()
            if item is None:
                return
            yield item

    async def _stopped(self, outputs: list[Any], others: Sequence[asyncio.Future[None]]) -> None:
        """Ask the first rank to stop and wait until all have; a group that does not is poisoned."""
        try:
            await contextvars.Context().run(lambda: self._ranks[0].stop.remote(self._runs))
            ends = asyncio.gather(_drained(outputs[0]), *others, return_exceptions=True)
            told = await asyncio.wait_for(ends, min(_CLOSING_S + self.options.step_timeout_s, 2 * self.options.step_timeout_s))
            for error in told:
                if error is not None and not isinstance(getattr(error, "cause", error), Stop):
                    raise error
        except BaseException as error:
            log.warning("a group did not stop when asked to (%s) and is built anew", type(error).__name__)
            self.poison()


async def _next(items: Any) -> Any:
    try:
        return await (await anext(items))
    except StopAsyncIteration:
        return None


async def _drained(output: Any) -> None:
    async for item in output:
        await item


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


async def _despite_cancellation(work: Coroutine[Any, Any, None]) -> None:
    """Wait to the end: the next sample must not begin on ranks that still compute this one."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
