"""Passes in this very process, without Ray: for tests, profiling and steps too small to be worth a pool of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from waver_core.config import Pass

Row = dict[str, Any]


def run_serial(
    factory: Callable[..., Callable[[list[Row]], list[Row]]], args: tuple[Any, ...], items: list[Row], resources: Pass
) -> Iterator[Row]:
    """Run a pass over items unit by unit; yields summaries in order."""
    if not items:
        return
    worker = factory(*args)
    for start in range(0, len(items), resources.sources_per_task):
        yield from worker(items[start : start + resources.sources_per_task])
