"""The app of Ray Serve, built from pipelines.yaml and a few arguments.

serve run serving.app:build base=out/demo/training/run/t2v_192p_12fps/export
serve deploy docker/serve.yaml
"""

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
from serving.plan import check_ranks, checkpoints, facts
from serving.settings import Settings
from serving.store import JobStore
from waver_core.storage import make_folder

APP = "waver"
_STATUS_FOR_S = 1.0


def build(args: Arguments) -> Application:  # Serve looks at this annotation, so it must not be a string
    """The whole app. Raises `UserError` where the configuration or a checkpoint is not what it should be."""
    return application(settings_of(args))


def application(settings: Settings) -> Application:
    """The deployments, bound to one another."""
    known = facts(settings)
    base, refiner = checkpoints(settings)
    check_ranks(settings, base, refiner)
    make_folder(settings.storage.folder)
    JobStore(settings.database_url).close()  # an address that is wrong is told now, not by a replica
    parts, cascade = settings.deployments, settings.cascade

    def part(kind: type, name: str, ongoing: int, *arguments: Any, drain_s: float = 5.0) -> Application:
        options = options_of(getattr(parts, name), name=name, ongoing=ongoing, drain_s=drain_s)
        return serve.deployment(kind).options(**options).bind(*arguments)

    drain_s = settings.queue.max_run_s  # a replica that scaling takes away finishes its job first

    handles = [
        part(RewriterDeployment, "rewriter", 16, settings),
        part(TextDeployment, "text", 4, base, parts.text),
        part(NetworkDeployment, "base", 1, "base", base, cascade, parts.base, drain_s=drain_s),
        part(NetworkDeployment, "refiner", 1, "refine", refiner, cascade, parts.refiner, drain_s=drain_s) if refiner else None,
        part(AutoencoderDeployment, "autoencoder", 4, base, cascade, parts.autoencoder, drain_s=drain_s),
    ]
    dispatcher = part(DispatcherDeployment, "dispatcher", 16, settings, job_view, *handles)
    return part(HttpDeployment, "http", 1000, settings, known, _readiness, dispatcher)


def _readiness() -> Readiness:
    """Asks Serve's controller for the deployments' states, at most once a second."""
    kept: tuple[float, dict[str, str]] = (-_STATUS_FOR_S, {})

    async def states() -> dict[str, str]:
        nonlocal kept
        if time.monotonic() - kept[0] > _STATUS_FOR_S:
            name = serve.get_replica_context().app_name  # `serve run` may have given it another
            status = (await asyncio.to_thread(serve.status)).applications.get(name)
            found = status.deployments.items() if status else []
            told = {name: "ready" if d.status == "HEALTHY" else f"{d.status}: {d.message}".lower() for name, d in found}
            kept = time.monotonic(), told
        return kept[1]

    return states
