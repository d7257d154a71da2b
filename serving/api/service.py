"""What the HTTP side is given to work with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from serving.generate_request import GenerateRequest
from serving.plan import Facts, Plan, plan
from serving.settings import Settings
from serving.store import JobStore


def do_nothing() -> None:
    """Stands for `wake` where the dispatcher finds new jobs by looking."""


async def no_deployments() -> dict[str, str]:
    """Stands for `readiness` where there is nothing to wait for."""
    return {"server": "ready"}


@dataclass
class Service:
    """Everything a route needs; made by whoever starts the server, one in each replica."""

    settings: Settings
    facts: Facts
    """What the served checkpoints can do."""
    store: JobStore
    readiness: Callable[[], Awaitable[dict[str, str]]] = no_deployments
    """deployment -> "ready", or why it is not."""
    wake: Callable[[], None] = do_nothing
    """Tells the dispatcher that there is something new to look at."""

    plan: Callable[[GenerateRequest, Facts, Settings, int], Plan] = plan
    """Settles a request's numbers, or raises `UserError`."""

    @property
    def folder(self) -> Path:
        """Where the files of jobs lie; rows hold paths relative to it."""
        return Path(self.settings.storage.folder)
