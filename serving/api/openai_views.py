"""The objects of `/v1/videos`, as the official OpenAI clients define them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serving.api.views import EXAMPLE_ID, ID_PATTERN
from serving.jobs import Job

ALIAS = "waver"
"""A name for whatever model is served."""


def _plain_seconds(value: Any) -> Any:
    """The dialect writes a length as text, people write numbers."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else value


class ImageReference(BaseModel):
    """A picture that is named instead of sent along."""

    model_config = ConfigDict(extra="forbid")

    image_url: str | None = Field(None, min_length=1, description="A data URL, or a URL of an allowed host.")
    file_id: str | None = Field(None, description="Not known here: this server keeps no files.")


class VideoCreate(BaseModel):
    """Fields of the dialect, and those of `GenerateRequest` that go beyond it (the client's `extra_body`).

    Not `kind` and `wait`: the dialect knows videos alone, and answers with one to watch.
    """

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"prompt": "A red disc moves to the left.", "seconds": "4"}]}
    )

    prompt: Annotated[str, Field(min_length=1, max_length=5000, description="What to show.")]
    model: Annotated[str, Field(max_length=200)] | None = Field(None, description=f"The served model's name, or '{ALIAS}'.")
    seconds: Annotated[str, Field(pattern=r"^[0-9]{1,3}(\.[0-9]{1,3})?$"), BeforeValidator(_plain_seconds)] | None = Field(
        None, description='Length, for example "4".'
    )
    size: str | None = Field(None, max_length=20, description="WIDTHxHEIGHT of the result.")
    input_reference: ImageReference | str | None = Field(
        None, description="Picture to begin with: a file, a data URL, or an object."
    )
    last_frame: str | None = Field(None, min_length=1, description="Picture to end with: a file, or a data URL.")
    seed: int | None = None
    negative_prompt: str = ""
    style: str | None = None
    steps: int | None = None
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    rewrite: bool = True
    refine: bool | None = None
    priority: Literal["low", "normal", "high"] = "normal"
    webhook_url: str | None = None


class VideoError(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class Video(BaseModel):
    """A job in the dialect. Times are whole seconds since 1970, progress is percent."""

    id: str = Field(pattern=ID_PATTERN)
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    error: VideoError | None
    remixed_from_video_id: None


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """Says that a video is gone."""

    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


def video_view(job: Job) -> dict[str, Any]:
    """A job as the dialect has it. It knows no cancelled ones: they failed, and the error says why."""
    resolved = job.resolved
    status = {"queued": "queued", "in_progress": "in_progress", "completed": "completed", "expired": "completed"}.get(
        job.state, "failed"
    )
    error = {"code": job.error_code, "message": job.error_message or ""} if job.error_code else None
    if job.state == "cancelled":
        error = {"code": "cancelled", "message": "The job was cancelled."}
    done = status == "completed"
    return {
        "id": job.id,
        "object": "video",
        "model": resolved.get("checkpoint") or ALIAS,
        "status": status,
        "progress": 100 if done else int(job.progress * 100),
        "created_at": int(job.created_at),
        "completed_at": int(job.finished_at) if done and job.finished_at is not None else None,
        "expires_at": int(job.expires_at) if job.expires_at is not None else None,
        "prompt": str(job.request.get("prompt", "")),
        "seconds": f"{resolved.get('seconds', 0):g}",
        "size": f"{resolved.get('width_px', 0)}x{resolved.get('height_px', 0)}",
        "error": error,
        "remixed_from_video_id": None,
    }


EXAMPLE_VIDEO = {
    "id": EXAMPLE_ID,
    "object": "video",
    "model": "sft@9e5628b30479",
    "status": "in_progress",
    "progress": 27,
    "created_at": 1760000000,
    "completed_at": None,
    "expires_at": None,
    "seconds": "4",
    "size": "96x96",
    "prompt": "A red disc moves to the left.",
    "error": None,
    "remixed_from_video_id": None,
}
