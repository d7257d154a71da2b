"""`GET /jobs/{id}/events`: every change of a job as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from serving.api.access import CallerOf, JobId, ServiceOf, find_job, in_thread
from serving.api.errors import GUARDED, documented
from serving.api.service import Service
from serving.api.views import EXAMPLE_JOB, job_view
from serving.jobs import Job

router = APIRouter(tags=["jobs"])
POLL_S = 0.1
PLACE_S = 1.0
"""The place in the queue changes without the job; it is looked up this often."""
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
        **documented(*GUARDED, 404, 422),
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
    job = await find_job(service, job_id, caller.name)
    seen = request.headers.get("last-event-id", "")
    if job.ended and seen == str(job.version):
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_follow(request, service, job, seen), headers=headers, media_type="text/event-stream")


async def _follow(request: Request, service: Service, job: Job, seen: str) -> AsyncIterator[str]:
    """Texts of the events until the job ends, is deleted, or nobody listens."""
    yield "retry: 1000\n\n"
    told: tuple[str, int | None] | None = (seen, None) if seen else None
    place: int | None = None
    pinged = looked = time.monotonic()
    here: Job | None = job
    while True:
        now = time.monotonic()
        if here is None:
            yield _event("deleted", None, {"id": job.id, "object": "job.deleted", "deleted": True})
            return
        job = here
        if job.state != "queued":
            place = None
        elif place is None or now - looked >= PLACE_S:
            place, looked = await in_thread(service.store.ahead, job), now
        state = (str(job.version), place)
        if told is None or state[0] != told[0] or (place is not None and told[1] not in (None, place)):
            yield _event("job", job.version, job_view(job, place))
            pinged = now
        told = state
        if job.ended:
            return
        if now - pinged >= PING_S:
            yield ": ping\n\n"
            pinged = now
        await anyio.sleep(POLL_S)
        if await request.is_disconnected():
            return
        here = await in_thread(service.store.get, job.id, job.owner)


def _event(kind: str, version: int | None, data: dict[str, Any]) -> str:
    number = "" if version is None else f"id: {version}\n"
    return f"{number}event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
