"""A checked request becomes a job. Until everything is known to be right, nothing is written."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from serving.api.body import Fields, require_storable
from serving.api.errors import ApiError, from_validation
from serving.api.fetching import fetch
from serving.api.keys import Caller
from serving.api.pictures import decode_base64, to_png
from serving.api.service import Service
from serving.api.views import PICTURES
from serving.generate_request import MAX_SEED, GenerateRequest
from serving.jobs import PRIORITIES, IdempotencyConflict, Job, QueueFull
from serving.webhooks import check_webhook_url
from waver_core.errors import UserError
from waver_core.storage import write_atomic

M = TypeVar("M", bound=BaseModel)
_FILES = {"first_frame": "first.png", "last_frame": "last.png"}
_FILE = "(file)"
"""Stands in a request for a picture that came as a file of its own."""
_WORDS = {
    "size": r"\bsize\b|\bpixels\b|\bpx\b",
    "seconds": r"\bseconds\b|\bframes\b",
    "steps": r"\bsteps\b",
    "guidance_scale": r"\bguidance scale\b",
    "style": r"\bstyle\b",
    "refine": r"\brefiner?\b",
    "kind": r"\bkind\b",
}
"""How the sentences of `serving.plan` name the fields."""


@dataclass(frozen=True)
class Order:
    """What one client wants, before the pictures have been looked at."""

    request: GenerateRequest
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Pictures that came as files, by field."""
    idempotency_key: str | None = None


def validated(model: type[M], fields: Fields) -> M:
    """The fields of a body as a model; raises `ApiError` 422. In multipart, empty text is a field left out."""
    known = {name: field.description or "" for name, field in model.model_fields.items()}
    values = {k: v for k, v in fields.values.items() if not (fields.multipart and v == "" and k != "prompt")}
    require_storable(values, known)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_input=False, include_context=False), known) from None


def generate_order(fields: Fields, idempotency_key: str | None) -> Order:
    """The body of `POST /generate`; raises `ApiError`."""
    files = {("first_frame" if name == "image" else name): data for name, data in fields.files.items()}
    if len(files) < len(fields.files):
        raise ApiError(422, "duplicate_field", "'image' and 'first_frame' are the same: send one of them.", param="image")
    return order(GenerateRequest, Fields(fields.values, files, fields.multipart), idempotency_key)


def order(model: type[GenerateRequest], fields: Fields, idempotency_key: str | None) -> Order:
    """Join values and files into a request; raises `ApiError` 422."""
    for name in fields.files:
        if name not in PICTURES:
            raise ApiError(
                422,
                "unknown_field",
                f"'{name[:64]}' is no file of this request: send first_frame or last_frame.",
                param=name[:64],
            )
        if name in fields.values:
            raise ApiError(422, "duplicate_field", f"'{name}' stands there twice: send it once.", param=name)
    values = {**fields.values, **dict.fromkeys(fields.files, _FILE)}
    return Order(validated(model, Fields(values, {}, fields.multipart)), fields.files, idempotency_key)


def idempotency_key(headers: Mapping[str, str]) -> str | None:
    """The header `Idempotency-Key`; raises `ApiError` 422."""
    key = headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[\x20-\x7e]{1,200}", key):
        message = "Idempotency-Key must be 1 to 200 printable ASCII characters: take a UUID."
        raise ApiError(422, "invalid_idempotency_key", message, param="Idempotency-Key")
    return key


def submit(service: Service, caller: Caller, order: Order) -> tuple[Job, bool]:
    """Check everything, write the pictures, make the job: (job, whether it is new). Raises `ApiError`.

    Blocks (pictures are decoded, URLs fetched): call it in a thread.
    """
    request = order.request
    _require_allowed(service, caller, request)
    _require_no_frames_of_images(service, request)
    drawn = secrets.randbelow(MAX_SEED + 1)
    try:
        resolved = service.plan(
            request, service.facts, service.settings, drawn if request.seed is None else request.seed
        ).to_json()
    except UserError as error:
        raise impossible(error) from None
    given = {name: _bytes_of(service, order, name) for name in PICTURES if getattr(request, name) is not None}
    http = service.settings.http
    pictures = {
        name: to_png(data, name, max_bytes=int(http.max_image_mb * 1e6), max_px=http.max_image_px) for name, data in given.items()
    }
    return _write(service, caller, order, resolved, given, pictures)


def impossible(error: UserError) -> ApiError:
    """What the models cannot do, as a 400 that names the field."""
    param = next((name for name, words in _WORDS.items() if re.search(words, str(error))), None)
    return ApiError(400, f"invalid_{param or 'request'}", str(error), param=param)


def _require_allowed(service: Service, caller: Caller, request: GenerateRequest) -> None:
    if PRIORITIES[request.priority] > caller.priority_max:
        most = next(name for name, value in PRIORITIES.items() if value == caller.priority_max)
        message = f"The key '{caller.name}' may not ask for priority {request.priority}: at most {most}."
        raise ApiError(403, "priority_not_allowed", message, param="priority")
    if request.webhook_url is not None:
        try:
            check_webhook_url(request.webhook_url, service.settings.http.webhook_hosts)
        except UserError as error:
            raise ApiError(400, "invalid_webhook_url", str(error), param="webhook_url") from None


def _require_no_frames_of_images(service: Service, request: GenerateRequest) -> None:
    """The plan refuses them in one breath with `seconds`, which may not have been sent."""
    given = next((name for name in PICTURES if getattr(request, name) is not None), None)
    if request.kind == "image" and given is not None:
        other = ", or set kind to video" if "video" in service.facts.kinds else ""
        raise ApiError(400, "invalid_request", f"An image takes no given frames: leave {given} out{other}.", param=given)


def _bytes_of(service: Service, order: Order, name: str) -> bytes:
    if name in order.files:
        return order.files[name]
    text: str = getattr(order.request, name)
    http = service.settings.http
    if re.match(r"https?://", text, re.IGNORECASE):
        if not http.url_hosts:
            message = f"{name} is a URL, and this server fetches none: send the picture itself (base64, or as a file)."
            raise ApiError(403, "url_not_allowed", message, param=name)
        return fetch(text, http.url_hosts, name, max_bytes=int(http.max_image_mb * 1e6))
    return decode_base64(text, name, int(http.max_image_mb * 1e6))


def _digest(request: GenerateRequest, given: Mapping[str, bytes]) -> str:
    """Equal for requests that ask for the same; `wait` is only how the answer should come."""
    asked = {
        **request.model_dump(mode="json", exclude={"wait", *PICTURES}),
        **{name: hashlib.sha256(data).hexdigest() for name, data in given.items()},
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _write(
    service: Service,
    caller: Caller,
    order: Order,
    resolved: dict[str, Any],
    given: Mapping[str, bytes],
    pictures: Mapping[str, bytes],
) -> tuple[Job, bool]:
    """Pictures first, for the job may be begun the moment it is in the store; they go again where no job came of it.

    Where the store breaks off nobody knows whether it has the job, so they stay; `serving.housekeeping` finds those of none.
    """
    request, job_id = order.request, f"job_{secrets.token_hex(12)}"
    stored = request.model_dump(mode="json", exclude={"wait"})
    folder = service.folder / "jobs" / job_id
    keep = False
    try:
        for name, png in pictures.items():
            stored[name] = f"jobs/{job_id}/{_FILES[name]}"
            write_atomic(str(folder / _FILES[name]), png)
        keep = True
        job, created = service.store.submit(
            job_id,
            caller.name,
            stored,
            priority=PRIORITIES[request.priority],
            resolved=resolved,
            idempotency_key=order.idempotency_key,
            request_digest=_digest(request, given),
            webhook_url=request.webhook_url,
            max_queued=service.settings.queue.max_queued,
            max_queued_of_owner=caller.max_queued,
        )
        keep = created
    except QueueFull as full:
        keep = False
        raise ApiError(429, "queue_full", str(full), headers={"Retry-After": str(full.retry_after_s)}) from None
    except IdempotencyConflict as conflict:
        keep = False
        raise ApiError(409, "idempotency_conflict", str(conflict), param="Idempotency-Key") from None
    finally:
        if pictures and not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if created:
        service.wake()
    return job, created
