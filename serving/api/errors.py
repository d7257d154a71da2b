"""Errors as clients see them: one form for all, a code, a sentence that names the fix, and never a traceback."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match

from serving.api.views import kept_nulls
from waver_core.errors import did_you_mean

log = logging.getLogger("waver.http")
MAX_MESSAGE_CHARS = 600
STORE_AWAY = (OperationalError, InterfaceError, NoConnectionFree)
"""What the store raises while its database does not answer, or has no connection to spare."""
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_WHAT = {
    400: ("bad_image", "The picture is wrong, or the model cannot do what was asked.", "first_frame"),
    401: ("invalid_api_key", "No valid API key was given.", None),
    403: ("not_allowed", "This client, key or address is not allowed to do that.", None),
    404: ("not_found", "There is nothing of that id, or it is someone else's.", None),
    408: ("request_timeout", "The body did not come in time.", None),
    409: ("not_ready", "The job's state does not allow it.", None),
    410: ("expired", "The result was deleted.", None),
    413: ("body_too_large", "The body is larger than the server takes.", None),
    415: ("unsupported_media_type", "The body is neither JSON nor multipart/form-data.", None),
    416: ("invalid_range", "The file has no such bytes.", None),
    422: ("invalid_seed", "A field is missing, unknown, or of a wrong kind.", "seed"),
    429: ("queue_full", "Too many jobs wait, or this key asks too often; see Retry-After.", None),
    500: ("internal_error", "The server failed; its log knows more under the reference.", None),
    503: ("unavailable", "The server cannot do it right now; see Retry-After.", None),
    504: ("timeout", "The job took longer than the server allows.", None),
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="A word for programs; it stays the same when the sentence is bettered.")
    message: str = Field(description="A sentence for people; it names the fix.")
    type: Literal["invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"]
    param: str | None = Field(None, description="The field or parameter at fault.")


class ErrorBody(BaseModel):
    """The body of every answer of 400 and above."""

    error: ErrorDetail


class ApiError(Exception):
    """Becomes an answer. `message` is one sentence for the client."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})


def not_found(what: str = "job") -> ApiError:
    """404 for an id that does not exist, is malformed, or belongs to another key: which of these is nobody's business."""
    return ApiError(404, "not_found", f"There is no such {what}; GET /jobs lists those of this key.")


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    text = "".join(c if c.isprintable() else " " for c in message[:MAX_MESSAGE_CHARS])  # also what UTF-8 cannot carry
    first = text.partition(" ")[0]
    text = (text[:1].upper() if first.isalpha() else text[:1]) + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")
    return {"error": {"code": code, "message": text, "type": kind, "param": param}}


def error_response(error: ApiError) -> JSONResponse:
    """`error` as an answer."""
    body = error_body(error.status, error.code, str(error), error.param)
    return JSONResponse(body, error.status, {"Cache-Control": "no-store", **error.headers})


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route for OpenAPI: each status with the body's form and an example."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        code, message, param = _WHAT[status]
        example = error_body(status, code, message, param)
        found[status] = {
            "model": ErrorBody,
            "description": message,
            "content": {"application/json": {"example": kept_nulls(example)}},
        }
        if status in (429, 503):
            found[status]["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
    return found


GUARDED = (401, 403, 429, 500, 503)
"""Statuses that any route may answer with which asks who is there."""


def from_validation(errors: Sequence[Mapping[str, Any]], known: Mapping[str, str] = {}) -> ApiError:
    """The first of pydantic's complaints as a 422 with the field's name. Values are never repeated: they may be huge.

    `known`: field -> what it is, which says more than the pattern that it does not match.
    """
    first = errors[0]
    place = [str(p) for p in first["loc"] if p not in ("body", "query", "path", "header")]
    param = "".join(c for c in place[0] if c.isprintable())[:64] if place else None
    if param is None:
        return ApiError(422, "invalid_request", f"The request is wrong: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return ApiError(422, "unknown_field", f"'{param}' is no field of this request: {did_you_mean(param, known)}", param=param)
    if first["type"] == "missing":
        return ApiError(422, "missing_field", f"'{param}' is missing: send it", param=param)
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        message = "not of the right form"
    message = f"'{param}' is wrong: {message[:1].lower()}{message[1:]}" + (
        f" ({known[param].rstrip('.')})" if known.get(param) else ""
    )
    code = "invalid_" + "".join(c if c.isalnum() and c.isascii() else "_" for c in param.lower())
    return ApiError(422, code, message, param=param)


def unexpected(error: Exception, request: Request, mend: str = "try again") -> ApiError:
    """Anything that is nobody's fault but ours: logged in full under a reference that the client is given.

    `mend`: what the client should do where the store is away.
    """
    reference = secrets.token_hex(6)
    path = ascii(request.scope.get("path", ""))[:200]
    log.error("%s %s failed (reference %s)", request.scope.get("method"), path, reference, exc_info=error)
    if isinstance(error, STORE_AWAY):
        message = f"The job store does not answer: {mend}; the log has the reason under {reference}."
        return ApiError(503, "store_unavailable", message, headers={"Retry-After": "5"})
    return ApiError(500, "internal_error", f"The server failed: its log has the reason under the reference {reference}.")


def _allowed(app: FastAPI, request: Request) -> str:
    """The methods that an address takes. Each is asked for: a route knows its own alone, and several may share the address."""
    asked = {name: request.scope[name] for name in ("type", "path", "root_path", "headers") if name in request.scope}
    takes = (m for m in _METHODS if any(r.matches({**asked, "method": m})[0] is Match.FULL for r in app.routes))
    return ", ".join(takes)


def install(app: FastAPI) -> None:
    """Let every error of `app` leave in the one form."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(from_validation(error.errors()))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 404:
            return error_response(ApiError(404, "not_found", "There is no such page: GET /docs lists all.", headers=headers))
        if error.status_code == 405:
            allowed = _allowed(app, request)
            said = f"This address does not take that method, only {allowed}."
            return error_response(ApiError(405, "method_not_allowed", said, headers={**headers, "Allow": allowed}))
        return error_response(ApiError(error.status_code, "http_error", str(error.detail), headers=headers))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
