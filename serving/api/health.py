"""What the server can do and how it is: `/capabilities`, `/healthz`, `/readyz`."""

from __future__ import annotations

from typing import Any, Literal

import anyio
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from serving.api.access import CallerOf, ServiceOf, in_thread
from serving.api.body import MAX_PARTS
from serving.api.errors import GUARDED, ErrorDetail, documented, error_body
from serving.api.pictures import MAX_SIDE_PX, MIN_SIDE_PX
from serving.api.views import json_example
from serving.generate_request import MAX_PROMPT_CHARS, MAX_SEED
from waver_core import __version__

router = APIRouter(tags=["server"])
READINESS_TIMEOUT_S = 5.0
MAX_REASON_CHARS = 160


class Limits(BaseModel):
    """What is refused."""

    max_prompt_chars: int
    max_seed: int
    max_body_bytes: int
    max_image_bytes: int
    max_image_px: int
    min_image_side_px: int
    max_image_side_px: int
    max_parts: int
    max_queued: int = Field(description="Waiting jobs of all together.")
    max_queued_of_key: int | None = Field(description="Waiting jobs of this key; null where only the server's own limit holds.")
    max_priority: Literal["low", "normal", "high"]
    max_wait_s: float = Field(description="How long `wait` is waited for.")
    keep_hours: float = Field(description="How long results are kept.")
    image_formats: list[str]
    url_hosts: list[str] = Field(description="Hosts that pictures may be fetched from.")
    webhooks: bool = Field(description="Whether any host may be called when a job ends.")


class Capabilities(BaseModel):
    """What may be asked for; sizes are WIDTHxHEIGHT of the result."""

    model: dict[str, Any] = Field(description="Checkpoints, sizes, lengths, steps, styles.")
    limits: Limits
    version: str


class Health(BaseModel):
    """The process lives and its store answers."""

    status: Literal["ok"]


class Ready(BaseModel):
    """Every part is ready."""

    status: Literal["ready"]
    deployments: dict[str, str]


class NotReady(BaseModel):
    """Some part is not ready yet, and why."""

    status: Literal["not_ready"]
    deployments: dict[str, str]
    error: ErrorDetail


_EXAMPLE_MODEL = {"base": "sft@9e5628b30479", "default_size": "96x96", "fps": 8.0, "steps": 30, "styles": ["animation"]}


_EXAMPLE_LIMITS = {
    "max_prompt_chars": MAX_PROMPT_CHARS,
    "max_seed": MAX_SEED,
    "max_body_bytes": 32_000_000,
    "max_image_bytes": 16_000_000,
    "max_image_px": 16_000_000,
    "min_image_side_px": MIN_SIDE_PX,
    "max_image_side_px": MAX_SIDE_PX,
    "max_parts": MAX_PARTS,
    "max_queued": 64,
    "max_queued_of_key": None,
    "max_priority": "high",
    "max_wait_s": 1800.0,
    "keep_hours": 24.0,
    "image_formats": ["PNG", "JPEG", "WebP"],
    "url_hosts": [],
    "webhooks": False,
}
_EXAMPLE = {"model": _EXAMPLE_MODEL, "limits": _EXAMPLE_LIMITS, "version": __version__}


@router.get(
    "/capabilities",
    summary="What may be asked for",
    response_model=Capabilities,
    responses={
        200: json_example(_EXAMPLE, "The model's and the server's limits."),
        **documented(*GUARDED),
    },
)
async def capabilities(caller: CallerOf, service: ServiceOf) -> Response:
    """What the served checkpoints can make, and what this server lets in."""
    settings = service.settings
    http = settings.http
    limits = {
        "max_prompt_chars": MAX_PROMPT_CHARS,
        "max_seed": MAX_SEED,
        "max_body_bytes": int(http.max_body_mb * 1e6),
        "max_image_bytes": int(http.max_image_mb * 1e6),
        "max_image_px": http.max_image_px,
        "min_image_side_px": MIN_SIDE_PX,
        "max_image_side_px": MAX_SIDE_PX,
        "max_parts": MAX_PARTS,
        "max_queued": settings.queue.max_queued,
        "max_queued_of_key": caller.max_queued,
        "max_priority": ("low", "normal", "high")[caller.priority_max],
        "max_wait_s": http.max_wait_s,
        "keep_hours": settings.storage.keep_hours,
        "image_formats": ["PNG", "JPEG", "WebP"],
        "url_hosts": list(http.url_hosts),
        "webhooks": bool(http.webhook_hosts),
    }
    return JSONResponse({"model": service.facts.to_json(), "limits": limits, "version": __version__})


@router.head("/healthz", include_in_schema=False)
@router.get(
    "/healthz",
    summary="Liveness",
    response_model=Health,
    responses={200: json_example({"status": "ok"}, "The process lives and its store answers."), **documented(500, 503)},
)
async def healthz(service: ServiceOf) -> Response:
    """200 while the process lives and the job store answers, also while models load. Asks for no key."""
    await in_thread(service.store.ping)
    return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Readiness",
    response_model=Ready,
    responses={
        200: json_example({"status": "ready", "deployments": {"base": "ready"}}, "Every deployment is ready."),
        503: {
            "model": NotReady,
            **json_example(
                {
                    "status": "not_ready",
                    "deployments": {"base": "loading"},
                    **error_body(503, "not_ready", "Not ready yet: base (loading)."),
                },
                "Some deployment is not ready, and why.",
            ),
        },
        **documented(500),
    },
)
async def readyz(service: ServiceOf) -> Response:
    """200 when every deployment is ready; jobs are taken before, too, and wait. Asks for no key."""
    try:
        with anyio.fail_after(READINESS_TIMEOUT_S):
            deployments = await service.readiness()
    except TimeoutError:
        deployments = {"server": f"no answer within {READINESS_TIMEOUT_S:g} s"}
    # Whoever asks here has shown no key: what a deployment died of, with its traceback, is for the log.
    deployments = {name: (why.splitlines() or ["unknown"])[0][:MAX_REASON_CHARS] for name, why in deployments.items()}
    if not deployments:
        deployments = {"server": "nothing is deployed yet"}
    waiting = {name: why for name, why in deployments.items() if why != "ready"}
    headers = {"Cache-Control": "no-store"}
    if not waiting:
        return JSONResponse({"status": "ready", "deployments": deployments}, headers=headers)
    said = "Not ready yet: " + ", ".join(f"{name} ({why})" for name, why in waiting.items()) + "."
    body = {"status": "not_ready", "deployments": deployments, **error_body(503, "not_ready", said)}
    return JSONResponse(body, 503, {**headers, "Retry-After": "2"})
