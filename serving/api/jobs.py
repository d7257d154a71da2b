"""`/jobs`: look at jobs, fetch what they made, end them, delete them."""

from __future__ import annotations

import shutil
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.access import CallerOf, JobId, ServiceOf, cancel_job, find_job, in_thread, view, views
from serving.api.errors import GUARDED, ApiError, documented
from serving.api.files import open_result, respond
from serving.api.service import Service
from serving.api.views import EXAMPLE_JOB, EXAMPLE_LIST, ID_PATTERN, JobList, JobView, json_example
from serving.jobs import Job, State
from waver_core.errors import UserError

router = APIRouter(tags=["jobs"])
NO_STORE = {"Cache-Control": "no-store"}
FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "model": None,
        "content": {
            "video/mp4": {"schema": {"type": "string", "format": "binary"}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
        },
        "headers": {
            "ETag": {"schema": {"type": "string"}},
            "Accept-Ranges": {"schema": {"type": "string"}},
            "Content-Disposition": {"schema": {"type": "string"}},
        },
    },
    206: {
        "description": "The part that Range asked for.",
        "content": {
            "video/mp4": {"schema": {"type": "string", "format": "binary"}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
        },
        "headers": {"Content-Range": {"schema": {"type": "string"}}},
    },
    304: {"description": "It is still what If-None-Match names."},
    **documented(*GUARDED, 404, 409, 410, 416, 422),
}
RANGE_HEADER = {
    "name": "Range",
    "in": "header",
    "required": False,
    "description": "One range of bytes; several at once are answered with the whole file.",
    "schema": {"type": "string"},
    "example": "bytes=0-65535",
}
After = Annotated[str | None, Query(description="`last_id` of the page before, deleted or not.", pattern=ID_PATTERN)]
Limit = Annotated[int, Query(ge=1, le=100, description="Jobs on a page.")]
Order = Annotated[Literal["asc", "desc"], Query(description="By the time they came; newest first is desc.")]
Download = Annotated[bool, Query(description="Ask browsers to save it instead of showing it.")]


@router.get(
    "/jobs",
    summary="List jobs",
    response_model=JobList,
    responses={200: json_example(EXAMPLE_LIST, "A page of jobs."), **documented(400, *GUARDED, 422)},
)
async def list_jobs(
    caller: CallerOf,
    service: ServiceOf,
    limit: Limit = 20,
    after: After = None,
    order: Order = "desc",
    state: Annotated[list[State] | None, Query(description="Only those in one of these states.", max_length=6)] = None,
) -> Response:
    """Jobs of this key, a page at a time."""
    jobs, more = await page(service, caller.name, limit, after, order, tuple(state) if state else None)
    data = await views(service, jobs)
    ids: list[str | None] = [*(job.id for job in jobs)] or [None]
    body = {"object": "list", "data": data, "first_id": ids[0], "last_id": ids[-1], "has_more": more}
    return JSONResponse(body, headers=NO_STORE)


async def page(
    service: Service,
    owner: str,
    limit: int,
    after: str | None,
    order: Literal["asc", "desc"],
    states: tuple[State, ...] | None = None,
) -> tuple[list[Job], bool]:
    """(jobs, whether there are more); raises `ApiError` 400 where `after` is none of this owner's, nor was one lately."""
    try:
        jobs = await in_thread(service.store.list, owner, limit=limit + 1, after=after, order=order, states=states)
    except UserError:
        message = "There is no job 'after' to go on from: leave it out to begin with the first page."
        raise ApiError(400, "invalid_after", message, param="after") from None
    return jobs[:limit], len(jobs) > limit


@router.get(
    "/jobs/{job_id}",
    summary="Look at a job",
    response_model=JobView,
    responses={200: json_example(EXAMPLE_JOB, "The job as it is now."), **documented(*GUARDED, 404, 422)},
)
async def get_job(job_id: JobId, caller: CallerOf, service: ServiceOf) -> Response:
    """State, stage, progress, place in the queue, and what is needed to make it again."""
    return JSONResponse(await view(service, await find_job(service, job_id, caller.name)), headers=NO_STORE)


@router.post(
    "/jobs/{job_id}/cancel",
    summary="Cancel a job",
    response_model=JobView,
    responses={
        200: json_example({**EXAMPLE_JOB, "cancel_requested": True}, "The job; it stops between two steps."),
        **documented(*GUARDED, 404, 422),
    },
)
async def cancel(job_id: JobId, caller: CallerOf, service: ServiceOf) -> Response:
    """Ends a job that waits or is in progress; nothing happens to one that has ended, which `DELETE` would delete."""
    job = await find_job(service, job_id, caller.name)
    return JSONResponse(await view(service, await cancel_job(service, job)), headers=NO_STORE)


@router.delete(
    "/jobs/{job_id}",
    summary="Cancel or delete a job",
    status_code=202,
    response_model=JobView,
    responses={
        202: json_example({**EXAMPLE_JOB, "cancel_requested": True}, "It had not ended: it is cancelled, between two steps."),
        204: {"description": "It had ended: its files and all that is known of it are gone.", "model": None},
        **documented(*GUARDED, 404, 422),
    },
)
async def delete_job(job_id: JobId, caller: CallerOf, service: ServiceOf) -> Response:
    """A job that has not ended is cancelled (202); one that has is deleted with its files (204)."""
    job = await find_job(service, job_id, caller.name)
    if job.ended:
        await in_thread(remove, service, job)
        return Response(status_code=204)
    return JSONResponse(await view(service, await cancel_job(service, job)), 202, NO_STORE)


def remove(service: Service, job: Job) -> None:
    """Delete an ended job: files first, so that whoever breaks off here can ask again."""
    shutil.rmtree(service.folder / "jobs" / job.id, ignore_errors=True)
    service.store.delete(job.id)


@router.head("/jobs/{job_id}/video", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/video",
    summary="Fetch the result",
    response_model=None,
    responses=FILE_RESPONSES,
    openapi_extra={"parameters": [RANGE_HEADER]},
)
async def video(request: Request, job_id: JobId, caller: CallerOf, service: ServiceOf, download: Download = False) -> Response:
    """The MP4, or the PNG of an image. Takes Range, If-Range, If-None-Match and HEAD."""
    job = await find_job(service, job_id, caller.name)
    return respond(request, await in_thread(open_result, service, job, job.output), download=download)


@router.head("/jobs/{job_id}/preview", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/preview",
    summary="Fetch the base model's result",
    response_model=None,
    responses=FILE_RESPONSES,
    openapi_extra={"parameters": [RANGE_HEADER]},
)
async def preview(request: Request, job_id: JobId, caller: CallerOf, service: ServiceOf, download: Download = False) -> Response:
    """What the base model made, while the refiner works and afterwards."""
    job = await find_job(service, job_id, caller.name)
    return respond(request, await in_thread(open_result, service, job, job.preview), download=download)
