"""What a job is: its states, what is known of it, and what the store refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
STATES: tuple[State, ...] = ("queued", "in_progress", "completed", "failed", "cancelled", "expired")
ENDED: tuple[State, ...] = ("completed", "failed", "cancelled", "expired")
PRIORITIES = {"low": 0, "normal": 1, "high": 2}


@dataclass(frozen=True)
class Job:
    """One row of the store. Times are seconds since 1970, UTC; paths are relative to the storage folder."""

    id: str
    owner: str
    """Name of the API key it came with; "local" without keys."""
    state: State
    priority: int
    request: Mapping[str, Any]
    """`GenerateRequest` as JSON; pictures replaced by paths of their checked copies."""
    created_at: float
    idempotency_key: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None
    """When the result is deleted."""
    attempt: int = 0
    """Counts how often it was begun; what an earlier attempt reports is not believed."""
    stage: str | None = None
    """rewrite, encode, base, upscale, refine or decode."""
    step: int = 0
    steps: int = 0
    progress: float = 0.0
    """Share of the whole work that is done, weighted by cost; 1.0 when completed and only then."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    cancel_requested: bool = False
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """Everything needed to make it again: seed, sizes, prompt as rewritten, checkpoints, sampling."""
    preview: str | None = None
    """The base model's result, while the refiner still works and afterwards."""
    output: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    webhook_url: str | None = None
    version: int = 0
    """Grows with every change."""

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it but its expiry."""
        return self.state in ENDED


class QueueFull(Exception):
    """As many jobs wait as may. `retry_after_s`: when to ask again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class IdempotencyConflict(Exception):
    """The key was used before, for another request."""
