"""The parts of the app as deployments of Ray Serve: each scales and is placed by itself (`serving.deployments`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from serving.api import create_app
from serving.api.service import Service
from serving.cascade import BaseWork, Conditions, DecodeWork, RefineWork, Upscaled, UpscaleWork, Vectors
from serving.dispatcher import Dispatcher
from serving.models import Denoiser, Pictures, TextEncoders, rewritten
from serving.plan import Checkpoint, Facts
from serving.ranks import GroupBroken, RankGroup
from serving.rewriting import Rewritten, make_rewriter
from serving.settings import Cascade, Deployment, Settings
from serving.store import JobStore
from serving.streaming import Done, Step, stream
from serving.vitals import Owner, Vitals, this_actor
from serving.webhooks import Webhooks
from waver_core.backends.contracts import Rewriting
from waver_core.errors import UserError
from waver_core.shapes import VideoShape

Readiness = Callable[[], Awaitable[dict[str, str]]]
"""Deployment -> "ready", or why it is not."""


@serve.ingress()
class HttpDeployment:
    """The API and the page (`serving.api`). Between it and the dispatcher stands the store; the one call only saves time."""

    def __init__(self, settings: Settings, known: Facts, readiness: Callable[[], Readiness], dispatcher: Any) -> None:
        self._settings, self._known, self._readiness, self._dispatcher = settings, known, readiness(), dispatcher

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is built."""
        store = JobStore(self._settings.database_url)
        return create_app(Service(self._settings, self._known, store, self._readiness, self._wake))

    def _wake(self) -> None:
        self._dispatcher.wake.remote()  # nothing is lost where this is: the dispatcher looks by itself, a little later


class RewriterDeployment:
    """Prompts (Waver §4.6)."""

    def __init__(self, settings: Settings) -> None:
        self._vitals = Vitals(settings.deployments.rewriter.step_timeout_s)
        self._rewriter = make_rewriter(settings.rewriting, fatal=torch.AcceleratorError)
        self._rewriter.rewrite(Rewriting("A red disc.", 5.0))  # reads its dictionaries now, not under the first request

    async def rewrite(self, request: Rewriting, enabled: bool) -> Rewritten:
        """See `Stages.rewrite`; in a thread, for it may wait for an endpoint."""
        with self._vitals.working():
            return await asyncio.to_thread(rewritten, self._rewriter, request, enabled)

    async def check_health(self) -> None:
        """See `Vitals`."""
        self._vitals.check()


class TextDeployment:
    """Text encoders."""

    def __init__(self, checkpoint: Checkpoint, options: Deployment) -> None:
        _set_threads(options)
        self._vitals = Vitals(options.step_timeout_s)
        self._texts = TextEncoders(checkpoint)
        # Loads the weights: a replica is not ready before, and calls from several threads would load them several times.
        self._texts.encode(["A red disc."])

    async def encode(self, texts: Sequence[str]) -> list[Vectors]:
        """See `Stages.encode`."""
        with self._vitals.working():
            return await asyncio.to_thread(self._texts.encode, texts)

    async def check_health(self) -> None:
        """See `Vitals`."""
        self._vitals.check()


class NetworkDeployment:
    """The base model or the refiner, in this process or in a group of ranks."""

    def __init__(self, kind: Literal["base", "refine"], checkpoint: Checkpoint, cascade: Cascade, options: Deployment) -> None:
        self._kind, self._turn, self._vitals = kind, asyncio.Lock(), Vitals(options.step_timeout_s)
        self._group = RankGroup(checkpoint, cascade, options) if options.ranks > 1 else None
        if self._group is None:
            _set_threads(options)
            self._denoiser = Denoiser(checkpoint, cascade)

    async def run(self, work: BaseWork | RefineWork, owner: Owner | None = None) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        """Steps and, last, the latents; cancelling the call stops the loop between two steps, on every rank."""
        if self._group is not None:
            steps = self._group.run(self._kind, work)
        else:
            model: Callable[..., np.ndarray] = self._denoiser.base if self._kind == "base" else self._denoiser.refine
            steps = stream(partial(model, work))
        # Serve frees a cancelled call's place at once; the thread behind it may still be in its last step.
        async with self._turn, contextlib.aclosing(self._vitals.steps(steps, owner)) as watched:
            async for item in watched:
                yield item

    async def steps_done(self) -> int:
        """Network steps since the start: stands still while nothing is computed."""
        return await self._group.steps_done() if self._group is not None else self._denoiser.steps_done

    async def check_health(self) -> None:
        """Build a poisoned group anew while nothing else happens. One that cannot be built makes the replica unhealthy, and Serve
        replaces it. A single process: see `Vitals`."""
        if self._group is None:
            self._vitals.check()
        elif not self._group.busy:
            await self._group.ready()


class AutoencoderDeployment:
    """Pixels and files."""

    def __init__(self, checkpoint: Checkpoint, cascade: Cascade, options: Deployment) -> None:
        _set_threads(options)
        self._pictures, self._turn, self._vitals = Pictures(checkpoint, cascade), asyncio.Lock(), Vitals(options.step_timeout_s)
        height_px, width_px = checkpoint.recipe["video_sizes"][0]
        self._pictures.conditions(VideoShape(1, height_px, width_px), {})  # loads the weights: it is not ready before

    async def conditions(self, shapes: Sequence[VideoShape], frames: Mapping[int, np.ndarray]) -> list[Conditions]:
        """See `Stages.conditions`; without given frames it does not wait behind another job's decoding."""
        kept = [Conditions(black, {}) for s in shapes if (black := self._pictures.black(s.height_px, s.width_px)) is not None]
        if not frames and len(kept) == len(shapes):
            return kept
        async with self._turn:
            with self._vitals.working():
                return await asyncio.to_thread(lambda: [self._pictures.conditions(shape, frames) for shape in shapes])

    async def upscale(self, work: UpscaleWork, owner: Owner | None = None) -> AsyncGenerator[Step | Done[Upscaled], None]:
        """See `Stages.upscale`."""
        steps = self._vitals.steps(stream(partial(self._pictures.upscale, work)), owner)
        async with self._turn, contextlib.aclosing(steps):
            async for item in steps:
                yield item

    async def decode(self, work: DecodeWork, owner: Owner | None = None) -> AsyncGenerator[Step | Done[bytes], None]:
        """See `Stages.decode`."""
        steps = self._vitals.steps(stream(partial(self._pictures.decode, work)), owner)
        async with self._turn, contextlib.aclosing(steps):
            async for item in steps:
                yield item

    async def check_health(self) -> None:
        """See `Vitals`."""
        self._vitals.check()


class ServeStages:
    """See `serving.cascade.Stages`: every stage is a call of a deployment. `owner`: the actor that calls."""

    def __init__(self, owner: Owner, rewriter: Any, text: Any, base: Any, refiner: Any, autoencoder: Any) -> None:
        self._owner, self._rewriter, self._text, self._autoencoder = owner, rewriter, text, autoencoder
        self._base, self._refiner = base, refiner

    async def rewrite(self, request: Rewriting, enabled: bool) -> Rewritten:
        """See `Stages`."""
        prompt: Rewritten = await _answered(self._rewriter.rewrite.remote(request, enabled))
        return prompt

    async def encode(self, texts: Sequence[str]) -> list[Vectors]:
        """See `Stages`."""
        vectors: list[Vectors] = await _answered(self._text.encode.remote(list(texts)))
        return vectors

    async def conditions(self, shapes: Sequence[VideoShape], frames: Mapping[int, np.ndarray]) -> list[Conditions]:
        """See `Stages`."""
        conditions: list[Conditions] = await _answered(self._autoencoder.conditions.remote(list(shapes), dict(frames)))
        return conditions

    def base(self, work: BaseWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        """See `Stages`."""
        return _called(self._base.options(stream=True).run, work, self._owner)

    def upscale(self, work: UpscaleWork) -> AsyncGenerator[Step | Done[Upscaled], None]:
        """See `Stages`."""
        return _called(self._autoencoder.options(stream=True).upscale, work, self._owner)

    def refine(self, work: RefineWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        """See `Stages`."""
        return _called(self._refiner.options(stream=True).run, work, self._owner)

    def decode(self, work: DecodeWork) -> AsyncGenerator[Step | Done[bytes], None]:
        """See `Stages`."""
        return _called(self._autoencoder.options(stream=True).decode, work, self._owner)


class DispatcherDeployment:
    """`serving.dispatcher.Dispatcher` over the other deployments."""

    def __init__(self, settings: Settings, view: Callable[..., dict[str, Any]], *handles: Any) -> None:
        logging.getLogger("waver").setLevel(logging.INFO)
        store = JobStore(settings.database_url)
        webhooks = Webhooks(store, settings.http, view)
        stages = ServeStages(this_actor(), *handles)
        self._dispatcher = Dispatcher(store, stages, settings, webhooks, retryable)
        self._task: asyncio.Task[None] | None = None

    async def reconfigure(self, _: Any) -> None:
        """Called by Serve once the replica is built, on the loop that stays."""
        if self._task is None:
            loop = asyncio.get_running_loop()
            # Heartbeats must not wait behind the writing of large files, and Serve's own pool is small.
            loop.set_default_executor(ThreadPoolExecutor(32, thread_name_prefix="dispatcher"))
            self._task = loop.create_task(self._dispatcher.run())

    async def wake(self) -> None:
        """See `Dispatcher.wake`."""
        self._dispatcher.wake()

    async def __del__(self) -> None:
        """Called by Serve when the replica is to end: what is not done yet goes back to the queue."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def check_health(self) -> None:
        """A dispatcher whose task has ended is replaced."""
        if self._task is not None and self._task.done():
            raise RuntimeError(f"the dispatcher ended: {self._task.exception() if not self._task.cancelled() else 'cancelled'}")


def retryable(error: BaseException) -> bool:
    """Whether a worker failed rather than the request: then the job is begun again."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, GroupBroken | RayError)
    return isinstance(error, GroupBroken | RayError | RayServeException)


async def _called(method: Any, work: Any, owner: Owner) -> AsyncGenerator[Any, None]:
    """A streaming call of a deployment; closing it cancels the call there."""
    response, ended = method.remote(work, owner), False
    try:
        async for item in response:
            ended = isinstance(item, Done)
            yield item
    except RayTaskError as error:
        ended = True
        raise _told(error) from None
    finally:
        if not ended:
            response.cancel()


async def _answered(call: Any) -> Any:
    """The answer of a call of a deployment."""
    try:
        return await call
    except RayTaskError as error:
        raise _told(error) from None


def _told(error: RayTaskError) -> Exception:
    """What a replica raised, where it is meant for the user: Ray's own text holds tracebacks, addresses and paths."""
    return error.cause if isinstance(error.cause, UserError) else error


def options_of(options: Deployment, *, name: str, ongoing: int, drain_s: float = 5.0) -> dict[str, Any]:
    """Arguments of `Deployment.options` in Ray Serve. A replica that is to go has `drain_s` for what it computes."""
    answer: dict[str, Any] = {"name": name, "max_ongoing_requests": ongoing, "graceful_shutdown_timeout_s": drain_s}
    if name == "dispatcher":
        answer["user_config"] = {}  # without one, Serve does not call `reconfigure`
    if options.max_replicas is None:
        answer["num_replicas"] = options.replicas
    else:
        scaling = {"min_replicas": options.replicas, "max_replicas": options.max_replicas, "target_ongoing_requests": ongoing}
        answer["autoscaling_config"] = scaling
    if options.ranks > 1:
        own, rank = {"CPU": 0.1}, {"CPU": options.cpus, **({"GPU": options.gpus} if options.gpus else {})}
        answer["placement_group_bundles"] = [own, *([rank] * options.ranks)]
        answer["placement_group_strategy"] = "PACK"
        answer["health_check_timeout_s"] = options.build_timeout_s + 60  # a health check may build the group
        answer["ray_actor_options"] = {"num_cpus": 0.1, "num_gpus": 0}
    else:
        answer["ray_actor_options"] = {"num_cpus": options.cpus, "num_gpus": options.gpus}
    return answer


def _set_threads(options: Deployment) -> None:
    torch.set_num_threads(options.threads or max(1, int(options.cpus)))
