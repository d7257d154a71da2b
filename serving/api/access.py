"""What routes have in common: the service, who asks, the job that a path names, and work in threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import Depends, Path
from fastapi.security import HTTPBearer
from starlette.requests import Request

from serving.api.errors import not_found
from serving.api.keys import Caller
from serving.api.service import Service
from serving.api.views import EXAMPLE_ID, ID_PATTERN, job_view
from serving.jobs import Job

T = TypeVar("T")
_bearer = HTTPBearer(auto_error=False, description="An API key; needed where the server has a key file (http.api_keys).")


def service_of(request: Request) -> Service:
    """The service that the app was made with."""
    service: Service = request.app.state.service
    return service


async def _admit(request: Request, _: Annotated[Any, Depends(_bearer)]) -> Caller:
    caller: Caller = request.app.state.gate.admit(request)
    return caller


async def in_thread(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call something that blocks."""
    return await anyio.to_thread.run_sync(partial(function, *args, **options))


async def find_job(service: Service, job_id: str, owner: str) -> Job:
    """One of the caller's jobs; raises `ApiError` 404. Ids that are none never reach the store or a path."""
    job = await in_thread(service.store.get, job_id, owner) if re.fullmatch(ID_PATTERN, job_id) else None
    if job is None:
        raise not_found()
    return job


async def cancel_job(service: Service, job: Job) -> Job:
    """Ask for a job's end; the job as it is then."""
    after: Job | None = await in_thread(service.store.cancel, job.id)
    service.wake()
    return after or job


def _view(service: Service, job: Job) -> dict[str, Any]:
    return job_view(job, service.store.ahead(job) if job.state == "queued" else None)


async def view(service: Service, job: Job) -> dict[str, Any]:
    """`JobView` of a job, with its place in the queue."""
    return await in_thread(_view, service, job) if job.state == "queued" else job_view(job)


async def views(service: Service, jobs: list[Job]) -> list[dict[str, Any]]:
    """`JobView` of each job."""
    return await in_thread(lambda: [_view(service, job) for job in jobs])


CallerOf = Annotated[Caller, Depends(_admit)]
"""Parameter of a route that asks who is there."""
ServiceOf = Annotated[Service, Depends(service_of)]
JobId = Annotated[str, Path(description="Id of a job.", examples=[EXAMPLE_ID], json_schema_extra={"pattern": ID_PATTERN})]
"""Parameter of a path. Checked by `find_job`, so that a wrong one is 404 like an unknown one."""
