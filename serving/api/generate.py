"""`POST /generate`: a request in, a job or the finished file out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import Any

import anyio
from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from serving.api.access import CallerOf, ServiceOf, in_thread, view
from serving.api.body import read_fields
from serving.api.errors import GUARDED, STORE_AWAY, ApiError, documented, not_found, unexpected
from serving.api.files import open_result, respond
from serving.api.keys import Caller
from serving.api.service import Service
from serving.api.submit import generate_order, idempotency_key, submit
from serving.api.views import EXAMPLE_JOB, JobView, json_example
from serving.api.watching import Watch
from serving.generate_request import GenerateRequest
from serving.jobs import Job

LOOK_S = 0.3
"""How often it is looked whether a waiting client is still there."""
router = APIRouter(tags=["generate"])
log = logging.getLogger("waver.http")
_left_behind: set[asyncio.Task[None]] = set()
"""Submissions whose clients have gone; asyncio itself keeps no task alive."""
_STATUS_OF_FAILURE = {"queue_timeout": 503, "worker_lost": 503, "timeout": 504}
_SEEN_HEADERS = {
    "Location": {"description": "Where the job is.", "schema": {"type": "string"}},
    "Idempotent-Replay": {"description": "true: the key was used before, this is that job.", "schema": {"type": "string"}},
}
_FILE_HEADERS = {
    "X-Waver-Job": {"description": "Id of the job.", "schema": {"type": "string"}},
    "X-Waver-Seed": {"description": "Seed that makes the same file again.", "schema": {"type": "string"}},
    "Idempotent-Replay": _SEEN_HEADERS["Idempotent-Replay"],
}
IDEMPOTENCY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key again answers with the same job instead of a new one, for as long as the job is known.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[ -~]+$"},
    "example": "7c0d4f0e-4a4e-4a6e-9d0c-0a3f6c1f2b11",
}


def _request_body() -> dict[str, Any]:
    """Both forms of the body for OpenAPI, made from `GenerateRequest`."""
    schema = GenerateRequest.model_json_schema()
    examples = schema.pop("examples")
    form = {**schema, "title": "GenerateForm", "properties": dict(schema["properties"])}
    for name in ("first_frame", "last_frame", "image"):
        form["properties"][name] = {"type": "string", "format": "binary", "description": "A PNG, JPEG or WebP file."}
    form["properties"]["image"]["description"] += " The same as first_frame."
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": schema,
                "examples": {e.get("kind", "video"): {"value": e} for e in examples},
            },
            "multipart/form-data": {"schema": form, "example": {"prompt": "The disc begins to move to the left."}},
        },
    }


@router.post(
    "/generate",
    status_code=202,
    summary="Make a video or an image",
    response_model=JobView,
    responses={
        202: {
            **json_example(EXAMPLE_JOB, "The job waits; with `wait`, it took longer than the server lets a client wait."),
            "headers": _SEEN_HEADERS,
        },
        200: {
            "description": "With `wait`: the file.",
            "model": None,
            "content": {
                "video/mp4": {"schema": {"type": "string", "format": "binary"}},
                "image/png": {"schema": {"type": "string", "format": "binary"}},
            },
            "headers": _FILE_HEADERS,
        },
        **documented(400, *GUARDED, 404, 408, 409, 410, 413, 415, 422, 504),
    },
    openapi_extra={"requestBody": _request_body(), "parameters": [IDEMPOTENCY_HEADER]},
)
async def generate(request: Request, caller: CallerOf, service: ServiceOf) -> Response:
    """Answers at once with a job to watch, or, with `wait`, with the file once it is there.

    A waiting client that goes away takes its job with it, unless an idempotency key or a webhook lets the result be found again.
    """
    key = idempotency_key(request.headers)
    fields = await read_fields(request, int(service.settings.http.max_body_mb * 1e6))
    order = await in_thread(generate_order, fields, key)
    wait, findable = order.request.wait, key is not None or order.request.webhook_url is not None
    watch: Watch = request.app.state.watch
    async with contextlib.AsyncExitStack() as stack:
        if wait:
            watch.require_room(caller.name)
            await stack.enter_async_context(watch.stream(caller.name))
        job, created = await submit_in_turn(request, service, caller, order, keep=findable or not wait)
        headers = {} if created else {"Idempotent-Replay": "true"}
        del fields, order  # pictures of many megabytes, which nobody needs while the job is waited for
        request.app.state.held.release(request.scope)
        try:
            if wait:
                job = await _wait(request, service, job, findable)
                if job.ended:
                    return await _finished(request, service, job, headers)
            headers |= {"Location": f"/jobs/{job.id}", "Cache-Control": "no-store"}
            return JSONResponse(await view(service, job), 202, headers)
        except STORE_AWAY as error:
            told = unexpected(error, request, f"ask for the job {job.id} later, for it goes on, and do not send it again")
            told.headers |= _found(job)
            raise told from None


def _found(job: Job) -> dict[str, str]:
    """Headers of an error by which the job can be found all the same."""
    return {"Location": f"/jobs/{job.id}", "X-Waver-Job": job.id}


async def submit_in_turn(
    request: Request, service: Service, caller: Caller, order: Any, *, keep: bool = True
) -> tuple[Job, bool]:
    """`submit` in a thread; few at once, for each may hold a decoded picture of many megapixels.

    It is a task of its own, for a thread goes on when its request is cancelled, and the job is made all the same: without
    `keep` it is cancelled then.
    """
    limiter: anyio.CapacityLimiter = request.app.state.submitting
    left = threading.Event()

    def begun() -> tuple[Job, bool]:
        if left.is_set():  # while it waited for its turn
            raise ClientDisconnect
        return submit(service, caller, order)

    async def submitted() -> tuple[Job, bool]:
        return await anyio.to_thread.run_sync(begun, limiter=limiter)

    task = asyncio.create_task(submitted())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        left.set()
        rest = asyncio.create_task(_without_client(service, task, keep))
        _left_behind.add(rest)
        rest.add_done_callback(_left_behind.discard)
        raise


async def _without_client(service: Service, submitted: asyncio.Task[tuple[Job, bool]], keep: bool) -> None:
    """See a submission through whose client has gone."""
    try:
        job, _ = await submitted
        if not keep:
            await in_thread(service.store.cancel, job.id)
            service.wake()
    except (ApiError, ClientDisconnect):
        pass  # nobody is there to be told
    except Exception:
        log.exception("a submission whose client hung up could not be seen through")


async def _wait(request: Request, service: Service, job: Job, findable: bool) -> Job:
    """Until the job has ended or the server's patience has. A client that goes is noticed by asking, or by being cancelled."""
    until = time.monotonic() + service.settings.http.max_wait_s
    watch: Watch = request.app.state.watch
    try:
        async with watch.watching(job) as watched:
            while True:
                changes = watched.changes
                if watched.job is None:
                    raise not_found()
                job, left_s = watched.job, until - time.monotonic()
                if job.ended or left_s <= 0:
                    return job
                if await request.is_disconnected():
                    raise ClientDisconnect
                await watched.change(changes, min(LOOK_S, left_s))
    except (ClientDisconnect, anyio.get_cancelled_exc_class()):
        if not findable:
            with anyio.CancelScope(shield=True):
                await in_thread(service.store.cancel, job.id)
            service.wake()
        raise


async def _finished(request: Request, service: Service, job: Job, headers: dict[str, str]) -> Response:
    if job.state == "failed":
        code, message = job.error_code or "failed", job.error_message or "The job failed; the server's log says why."
        raise ApiError(_STATUS_OF_FAILURE.get(code, 500), code, message, headers=_found(job))
    if job.state == "cancelled":
        raise ApiError(409, "cancelled", f"The job {job.id} was cancelled: send it again if that was a mistake.")
    opened = await in_thread(open_result, service, job, job.output)
    headers |= {"X-Waver-Job": job.id, "X-Waver-Seed": str(job.resolved.get("seed", ""))}
    return respond(request, opened, headers=headers)
