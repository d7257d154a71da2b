"""The app of Ray Serve, built from pipelines.yaml and a few arguments.

serve run serving.app:build base=out/demo/training/run/t2v_192p_12fps/export
serve deploy docker/serve.yaml
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray import serve
from ray.serve import Application

from serving.api.views import job_view
from serving.arguments import Arguments, settings_of
from serving.deployments import (
    AutoencoderDeployment,
    DispatcherDeployment,
    HttpDeployment,
    NetworkDeployment,
    Readiness,
    RewriterDeployment,
    TextDeployment,
    options_of,
)
from serving.plan import checkpoints, facts
from serving.settings import Settings
from serving.store import JobStore
from waver_core.storage import make_folder

APP = "waver"
_STATUS_FOR_S = 1.0


def build(args: Arguments) -> Application:
    """The whole app. Raises `UserError` where the configuration or a checkpoint is not what it should be."""
    return application(settings_of(args))


def application(settings: Settings) -> Application:
    """The deployments, bound to one another."""
    known = facts(settings)
    base, refiner = checkpoints(settings)
    make_folder(settings.storage.folder)
    JobStore(settings.database_url).close()  # an address that is wrong is told now, not by a replica
    parts, cascade = settings.deployments, settings.cascade

    def part(kind: type, name: str, ongoing: int, *arguments: Any) -> Application:
        options = getattr(parts, name)
        return serve.deployment(kind).options(**options_of(options, name=name, ongoing=ongoing)).bind(*arguments)

    handles = [
        part(RewriterDeployment, "rewriter", 16, settings),
        part(TextDeployment, "text", 4, base, parts.text),
        part(NetworkDeployment, "base", 1, "base", base, cascade, parts.base),
        part(NetworkDeployment, "refiner", 1, "refine", refiner, cascade, parts.refiner) if refiner else None,
        part(AutoencoderDeployment, "autoencoder", 1, base, cascade, parts.autoencoder),
    ]
    dispatcher = part(DispatcherDeployment, "dispatcher", 16, settings, job_view, *handles)
    return part(HttpDeployment, "http", 1000, settings, known, _readiness, dispatcher)


def _readiness() -> Readiness:
    """Asks Serve's controller for the deployments' states, at most once a second."""
    kept: tuple[float, dict[str, str]] = (-_STATUS_FOR_S, {})

    async def states() -> dict[str, str]:
        nonlocal kept
        if time.monotonic() - kept[0] > _STATUS_FOR_S:
            status = (await asyncio.to_thread(serve.status)).applications.get(APP)
            found = status.deployments.items() if status else []
            told = {name: "ready" if d.status == "HEALTHY" else f"{d.status}: {d.message}".lower() for name, d in found}
            kept = time.monotonic(), told
        return kept[1]

    return states
