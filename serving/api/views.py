"""Jobs as clients see them."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from serving.jobs import Job, State

PICTURES = ("first_frame", "last_frame")
ID_PATTERN = r"^job_[0-9a-f]{24}$"
EXAMPLE_ID = "job_0123456789abcdef01234567"


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class JobLinks(BaseModel):
    """Where to go on from a job; null where there is nothing yet."""

    self: str
    events: str
    video: str | None = Field(description="The result, a video or an image.")
    preview: str | None = Field(description="The base model's result, before the refiner.")


class JobView(BaseModel):
    """A job. Times are seconds since 1970, UTC."""

    id: str = Field(pattern=ID_PATTERN)
    object: Literal["job"]
    state: State
    stage: str | None = Field(description="rewrite, encode, base, upscale, refine or decode.")
    step: int
    steps: int
    progress: float = Field(ge=0, le=1, description="Share of the work that is done, weighted by cost.")
    queue_position: int | None = Field(description="Jobs that are begun before this one; null unless it is queued.")
    attempt: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None = Field(description="When the result is deleted.")
    cancel_requested: bool
    version: int = Field(description="Grows with every change: of two views the one with the larger is newer.")
    request: dict[str, Any] = Field(description="What was asked; true stands for a picture.")
    resolved: dict[str, Any] = Field(description="What is needed to make it again: seed, sizes, sampling, checkpoints, prompt.")
    stage_seconds: dict[str, float]
    error: JobError | None
    links: JobLinks


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"]
    data: list[JobView]
    first_id: str | None
    last_id: str | None = Field(description="Give it as `after` to get the next page.")
    has_more: bool


def job_view(job: Job, queue_position: int | None = None) -> dict[str, Any]:
    """`JobView` of a job as JSON; webhooks send the same."""
    home = f"/jobs/{job.id}"
    return {
        "id": job.id,
        "object": "job",
        "state": job.state,
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "progress": round(min(1.0, max(0.0, job.progress)), 4),
        "queue_position": queue_position if job.state == "queued" else None,
        "attempt": job.attempt,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "expires_at": job.expires_at,
        "cancel_requested": job.cancel_requested,
        "version": job.version,
        "request": _shown_request(job),
        "resolved": dict(job.resolved),
        "stage_seconds": {stage: round(s, 4) for stage, s in job.stage_seconds.items()},
        "error": {"code": job.error_code, "message": job.error_message or ""} if job.error_code else None,
        "links": {
            "self": home,
            "events": f"{home}/events",
            "video": f"{home}/video" if job.state == "completed" and job.output else None,
            "preview": f"{home}/preview" if job.preview else None,
        },
    }


def _shown_request(job: Job) -> dict[str, Any]:
    """The request without pictures, and of the webhook's address the host alone: its path and query are often secret."""
    shown = dict(job.request)
    for name in PICTURES:
        shown[name] = bool(shown.get(name))
    if shown.get("webhook_url"):
        parts = urlsplit(shown["webhook_url"])
        shown["webhook_url"] = f"{parts.scheme}://{parts.hostname}/"
    return shown


EXAMPLE_JOB = job_view(
    Job(
        id=EXAMPLE_ID,
        owner="local",
        state="in_progress",
        priority=1,
        request={
            "prompt": "A medium-sized red disc moves to the left over a white background.",
            "kind": "video",
            "size": None,
            "seed": 7,
        },
        created_at=1760000000.0,
        started_at=1760000000.2,
        attempt=1,
        stage="base",
        step=12,
        steps=30,
        progress=0.2731,
        resolved={"seed": 7, "width_px": 96, "height_px": 96, "frames": 9, "fps": 8, "steps": 30},
        stage_seconds={"rewrite": 0.0021, "encode": 0.0114},
    )
)
EXAMPLE_LIST = {"object": "list", "data": [EXAMPLE_JOB], "first_id": EXAMPLE_ID, "last_id": EXAMPLE_ID, "has_more": False}


NULL = "\0null"
"""Stands for null in examples, which FastAPI leaves out of the schema; `serving.api.app` puts it back."""


def json_example(value: Any, description: str) -> dict[str, Any]:
    """Part of `responses=`: an example in JSON."""
    return {"description": description, "content": {"application/json": {"example": kept_nulls(value)}}}


def kept_nulls(value: Any) -> Any:
    """`value` with `NULL` for None."""
    if isinstance(value, dict):
        return {name: kept_nulls(v) for name, v in value.items()}
    return [kept_nulls(v) for v in value] if isinstance(value, list) else NULL if value is None else value
