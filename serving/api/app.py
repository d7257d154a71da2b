"""`create_app`: every route put together, with what holds for all of them: errors, headers, counting."""

from __future__ import annotations

import time
from typing import Any

import anyio
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import errors, events, generate, health, jobs, metrics, openai_videos, pages
from serving.api.body import Held
from serving.api.keys import Gate
from serving.api.metrics import HttpMetrics
from serving.api.service import Service
from serving.api.views import NULL
from serving.api.watching import Watch
from waver_core import __version__

SUBMITTING = 4
"""Requests of one replica that are checked at once; each may hold a decoded picture of `max_image_px`."""
BODIES = 8
"""Bodies of the largest size, or more of smaller ones, that one replica holds at once."""
_CLOSED_REQUEST = 499
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_DESCRIPTION = (
    "Videos and images from prompts. POST /generate makes a job, or waits for the file; /jobs tells how it goes; "
    "/v1/videos is the same for the official OpenAI clients. Every error is a code and a sentence."
)


class Outermost:
    """Around all routes: security headers, one count for each answer, and no exception that leaves without an answer."""

    def __init__(self, app: ASGIApp, counts: HttpMetrics, held: Held) -> None:
        self._app, self._counts, self._held = app, counts, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        async def receive_or_gone() -> Message:
            try:
                return await receive()
            except Exception:  # Ray Serve tells so (TaskCancelledError), now and then, that the client has hung up
                return {"type": "http.disconnect"}

        try:
            await self._app(scope, receive_or_gone, send_with_headers)
        except ClientDisconnect:
            status = status or _CLOSED_REQUEST
        except anyio.get_cancelled_exc_class():
            status = status or _CLOSED_REQUEST
            raise
        except Exception as error:
            answer = errors.error_response(errors.unexpected(error, Request(scope)))
            if status:  # it has begun: only breaking off tells the client
                raise
            await answer(scope, receive, send_with_headers)
        finally:
            self._held.release(scope)
            self._counts.observe(scope, status or 500, began_s)


def create_app(service: Service) -> FastAPI:
    """The whole HTTP side over one store. Raises `ConfigError` where the key file is wrong. Call it in each replica."""
    app = FastAPI(
        title="Waver",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.state.service = service
    app.state.gate = Gate(service.settings.http.api_keys)
    app.state.metrics = HttpMetrics(service)
    app.state.submitting = anyio.CapacityLimiter(SUBMITTING)
    app.state.held = Held(int(BODIES * service.settings.http.max_body_mb * 1e6))
    app.state.watch = Watch(service)
    app.add_middleware(Outermost, counts=app.state.metrics, held=app.state.held)
    errors.install(app)
    for part in (generate, jobs, events, openai_videos, health, metrics):
        app.include_router(part.router)
    pages.install(app)
    made = app.openapi
    app.openapi = lambda: restore_nulls(made())  # type: ignore[method-assign]
    return app


def _operation_id(route: APIRoute) -> str:
    prefix = "videos_" if route.path.startswith("/v1/videos") else ""
    return f"{prefix}{route.name}"


def restore_nulls(value: Any) -> Any:
    """The inverse of `kept_nulls`, in place where it can be."""
    if isinstance(value, dict):
        value.update({name: restore_nulls(v) for name, v in value.items()})
    elif isinstance(value, list):
        value[:] = [restore_nulls(v) for v in value]
    return None if value == NULL else value
