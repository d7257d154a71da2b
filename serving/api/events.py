"""`GET /jobs/{id}/events`: every change of a job as server-sent events."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from serving.api.access import CallerOf, JobId, ServiceOf, find_job, in_thread
from serving.api.errors import GUARDED, STORE_AWAY, ApiError, documented
from serving.api.service import Service
from serving.api.views import EXAMPLE_JOB, job_view
from serving.api.watching import Watch
from serving.jobs import Job

router = APIRouter(tags=["jobs"])
LOOK_S = 1.0
"""How often a stream looks whether its client is still there; changes come at once."""
PING_S = 15.0
_EXAMPLE = {"id": "7", "event": "job", "data": json.dumps(EXAMPLE_JOB)}
_SCHEMA = {
    "type": "object",
    "description": "One event. `data` is a job as JSON, or the id of one that was deleted.",
    "properties": {"id": {"type": "string"}, "event": {"enum": ["job", "deleted"]}, "data": {"type": "string"}},
    "required": ["event", "data"],
}


@router.get(
    "/jobs/{job_id}/events",
    summary="Watch a job",
    response_model=None,
    responses={
        200: {
            "description": "`event: job` with a job as data, now and at every change; `event: deleted`. Ends with the job.",
            "model": None,
            "content": {"text/event-stream": {"schema": _SCHEMA, "example": _EXAMPLE}},
        },
        204: {"description": "Last-Event-ID is the job's last event: nothing will follow.", "model": None},
        **documented(*GUARDED, 404, 413, 422),
    },
    openapi_extra={
        "parameters": [
            {
                "name": "Last-Event-ID",
                "in": "header",
                "required": False,
                "description": "Id of the last event that came; events go on behind it.",
                "schema": {"type": "string"},
                "example": "7",
            }
        ]
    },
)
async def events(request: Request, job_id: JobId, caller: CallerOf, service: ServiceOf) -> Response:
    """Server-sent events; a comment every 15 s keeps the connection open."""
    if "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0":
        # Nobody would read it as long as events are sent, and it would gather in Serve's proxy.
        message = "GET /jobs/{id}/events takes no body: leave it out."
        raise ApiError(413, "body_too_large", message, headers={"Connection": "close"})
    job = await find_job(service, job_id, caller.name)
    seen = request.headers.get("last-event-id", "")
    if job.ended and seen == str(job.version):
        return Response(status_code=204)
    request.app.state.watch.require_room(caller.name)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_follow(request, service, job, seen), headers=headers, media_type="text/event-stream")


async def _follow(request: Request, service: Service, job: Job, seen: str) -> AsyncIterator[str]:
    """Texts of the events until the job ends, is deleted, or nobody listens."""
    yield "retry: 1000\n\n"
    told: tuple[str, int | None] | None = (seen, None) if seen else None
    pinged = time.monotonic()
    watch: Watch = request.app.state.watch
    async with watch.stream(job.owner), watch.watching(job) as watched:
        while True:
            changes, here = watched.changes, watched.job
            if here is None:
                yield _event("deleted", None, {"id": job.id, "object": "job.deleted", "deleted": True})
                return
            if here.state == "queued" and watched.place is None:
                with contextlib.suppress(*STORE_AWAY):  # the place comes later; `watching` has the patience
                    watched.place = await in_thread(service.store.ahead, here)
            state = (str(here.version), watched.place if here.state == "queued" else None)
            if told is None or state[0] != told[0] or (state[1] is not None and told[1] not in (None, state[1])):
                yield _event("job", here.version, job_view(here, state[1]))
                pinged = time.monotonic()
            told = state
            if here.ended:
                return
            if time.monotonic() - pinged >= PING_S:
                yield ": ping\n\n"
                pinged = time.monotonic()
            await watched.change(changes, LOOK_S)
            if await request.is_disconnected():
                return


def _event(kind: str, version: int | None, data: dict[str, Any]) -> str:
    number = "" if version is None else f"id: {version}\n"
    return f"{number}event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
