"""`/v1/videos`: the same jobs in the dialect of the official OpenAI clients' `client.videos`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.access import CallerOf, JobId, ServiceOf, cancel_job, in_thread
from serving.api.access import find_job as find_any_job
from serving.api.body import Fields, read_fields
from serving.api.errors import GUARDED, ApiError, documented, not_found
from serving.api.files import open_result, respond
from serving.api.generate import IDEMPOTENCY_HEADER, submit_in_turn
from serving.api.jobs import FILE_RESPONSES, NO_STORE, RANGE_HEADER, After, Limit, Order, page, remove
from serving.api.openai_views import ALIAS, EXAMPLE_VIDEO, ImageReference, Video, VideoCreate, VideoDeleted, VideoList, video_view
from serving.api.service import Service
from serving.api.submit import idempotency_key, order, validated
from serving.api.thumbnails import first_frame_png
from serving.api.views import EXAMPLE_ID, json_example
from serving.generate_request import GenerateRequest
from serving.jobs import Job
from serving.plan import Facts
from waver_core.errors import did_you_mean

router = APIRouter(prefix="/v1/videos", tags=["videos (OpenAI dialect)"])
POLL_AFTER_MS = 500
_FILES = {"input_reference": "first_frame", "last_frame": "last_frame"}
"""The dialect's files, as `GenerateRequest` calls them."""


async def find_video(service: Service, job_id: str, owner: str) -> Job:
    """One of the caller's jobs that makes a video; raises `ApiError` 404."""
    job = await find_any_job(service, job_id, owner)
    if job.request.get("kind", "video") != "video":
        raise not_found("video")
    return job


def _names(facts: Facts) -> tuple[str, ...]:
    return (ALIAS, facts.base, facts.base.partition("@")[0])


def _order(fields: Fields, facts: Facts, key: str | None) -> Any:
    """The dialect's body as an order; raises `ApiError`."""
    values, files = dict(fields.values), dict(fields.files)
    for part in ("image_url", "file_id"):  # how the client's multipart writes an object
        if f"input_reference[{part}]" in values:
            values["input_reference"] = {part: values.pop(f"input_reference[{part}]")}
    pictures = {ours: files.pop(theirs) for theirs, ours in _FILES.items() if theirs in files}
    if "first_frame" in pictures and "input_reference" in values:
        raise ApiError(422, "duplicate_field", "'input_reference' stands there twice: send it once.", param="input_reference")
    for name in files:
        message = f"'{name[:64]}' is no file of this request: send input_reference or last_frame."
        raise ApiError(422, "unknown_field", message, param=name[:64])
    asked = validated(VideoCreate, Fields(values, {}, fields.multipart))
    if asked.model is not None and asked.model not in _names(facts):
        message = f"There is no model '{asked.model[:64]}': {did_you_mean(asked.model, _names(facts))}."
        raise ApiError(400, "model_not_found", message, param="model")
    request = asked.model_dump(exclude_unset=True, exclude={"model", "input_reference", "seconds"})
    if asked.seconds is not None:
        request["seconds"] = float(asked.seconds)
    reference = asked.input_reference
    if isinstance(reference, ImageReference):
        if reference.file_id is not None or reference.image_url is None:
            message = "This server keeps no files to name by id: send the picture as a file, or image_url with a data URL."
            raise ApiError(400, "invalid_input_reference", message, param="input_reference")
        reference = reference.image_url
    if reference is not None:
        request["first_frame"] = reference
    return order(GenerateRequest, Fields(request, pictures), key)


def _request_body() -> dict[str, Any]:
    schema = VideoCreate.model_json_schema(ref_template="#/components/schemas/{model}")
    example = schema.pop("examples")[0]
    schema["properties"]["input_reference"]["anyOf"] = [
        schema.pop("$defs")["ImageReference"],
        {"type": "string", "description": "A data URL."},
        {"type": "null"},
    ]
    form = {**schema, "title": "VideoCreateForm", "properties": dict(schema["properties"])}
    for name in _FILES:
        form["properties"][name] = {"type": "string", "format": "binary", "description": "A PNG, JPEG or WebP file."}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": form, "example": example},
            "application/json": {"schema": schema, "example": example},
        },
    }


@router.post(
    "",
    summary="Create a video",
    response_model=Video,
    responses={200: json_example(EXAMPLE_VIDEO, "The video, queued."), **documented(400, *GUARDED, 408, 409, 413, 415, 422)},
    openapi_extra={"requestBody": _request_body(), "parameters": [IDEMPOTENCY_HEADER]},
)
async def create(request: Request, caller: CallerOf, service: ServiceOf) -> Response:
    """What `client.videos.create` calls. Lengths and sizes the model lacks are 400, with those it has."""
    key = idempotency_key(request.headers)
    fields = await read_fields(request, int(service.settings.http.max_body_mb * 1e6))
    wanted = await in_thread(partial(_order, fields, service.facts, key))
    job, created = await submit_in_turn(request, service, caller, wanted)
    headers = {**NO_STORE, "openai-poll-after-ms": str(POLL_AFTER_MS), **({} if created else {"Idempotent-Replay": "true"})}
    return JSONResponse(video_view(job), headers=headers)


@router.get(
    "",
    summary="List videos",
    response_model=VideoList,
    responses={
        200: json_example(
            {"object": "list", "data": [EXAMPLE_VIDEO], "first_id": EXAMPLE_ID, "last_id": EXAMPLE_ID, "has_more": False},
            "A page of videos.",
        ),
        **documented(400, *GUARDED, 422),
    },
)
async def list_videos(
    caller: CallerOf, service: ServiceOf, limit: Limit = 20, after: After = None, order: Order = "desc"
) -> Response:
    """Jobs of this key that make videos, a page at a time."""
    found: list[Job] = []
    more = True
    while more and len(found) <= limit:  # one beyond the page tells whether there are more
        jobs, more = await page(service, caller.name, 100, after, order)
        found += [job for job in jobs if job.request.get("kind", "video") == "video"]
        after = jobs[-1].id if jobs else None
    data = [video_view(job) for job in found[:limit]]
    ids = [video["id"] for video in data] or [None]
    body = {"object": "list", "data": data, "first_id": ids[0], "last_id": ids[-1], "has_more": len(found) > limit}
    return JSONResponse(body, headers=NO_STORE)


@router.get(
    "/{job_id}",
    summary="Look at a video",
    response_model=Video,
    responses={200: json_example(EXAMPLE_VIDEO, "The video as it is now."), **documented(*GUARDED, 404, 422)},
)
async def retrieve(job_id: JobId, caller: CallerOf, service: ServiceOf) -> Response:
    """Status and progress."""
    job = await find_video(service, job_id, caller.name)
    return JSONResponse(video_view(job), headers={**NO_STORE, "openai-poll-after-ms": str(POLL_AFTER_MS)})


@router.head("/{job_id}/content", include_in_schema=False)
@router.get(
    "/{job_id}/content",
    summary="Download a video",
    response_model=None,
    responses={**FILE_RESPONSES, **documented(400)},
    openapi_extra={"parameters": [RANGE_HEADER]},
)
async def content(
    request: Request,
    job_id: JobId,
    caller: CallerOf,
    service: ServiceOf,
    variant: Annotated[str, Query(description="video (MP4) or thumbnail (PNG of the first frame).", max_length=32)] = "video",
) -> Response:
    """The MP4, or its first frame. There are no spritesheets."""
    if variant not in ("video", "thumbnail"):
        message = "This server makes the variants video and thumbnail only: ask for one of them."
        raise ApiError(400, "invalid_variant", message, param="variant")
    job = await find_video(service, job_id, caller.name)
    opened = await in_thread(open_result, service, job, job.output)
    if variant == "video":
        return respond(request, opened, download=True)
    return Response(
        await in_thread(first_frame_png, opened), media_type="image/png", headers={"Cache-Control": "private, no-cache"}
    )


@router.delete(
    "/{job_id}",
    summary="Delete a video",
    response_model=VideoDeleted,
    responses={
        200: json_example({"id": EXAMPLE_ID, "object": "video.deleted", "deleted": True}, "The video and its files are gone."),
        **documented(*GUARDED, 404, 409, 422),
    },
)
async def delete(job_id: JobId, caller: CallerOf, service: ServiceOf) -> Response:
    """Deletes a video that is completed or failed; one that is still made must be cancelled first."""
    job = await find_video(service, job_id, caller.name)
    if not job.ended:
        raise ApiError(409, "not_ended", f"The video is still being made: POST /v1/videos/{job.id}/cancel first.")
    await in_thread(remove, service, job)
    return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a video",
    response_model=Video,
    responses={200: json_example(EXAMPLE_VIDEO, "The video; it stops between two steps."), **documented(*GUARDED, 404, 422)},
)
async def cancel(job_id: JobId, caller: CallerOf, service: ServiceOf) -> Response:
    """Ends a video that waits or is being made; nothing happens to one that has ended. Beyond the official dialect."""
    job = await find_video(service, job_id, caller.name)
    return JSONResponse(video_view(await cancel_job(service, job)), headers=NO_STORE)
