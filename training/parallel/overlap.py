"""Whether copies to and from the host hide behind computation, read from a profiler's trace (Waver §5, Fig. 24)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Interval = tuple[float, float]
"""Start and end, in microseconds."""


class Overlap(NamedTuple):
    """Time that copies between device and host take in a trace, and how much of it kernels run beside them."""

    to_host_ms: float
    to_device_ms: float
    hidden_ms: float
    """Of both together"""

    @property
    def hidden_share(self) -> float | None:
        """Part of the copies' time that kernels cover; None where nothing was copied."""
        copies_ms = self.to_host_ms + self.to_device_ms
        return self.hidden_ms / copies_ms if copies_ms else None


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace as `torch.profiler` exports it, gzipped or not."""
    raw = path.read_bytes()
    events: list[dict[str, Any]] = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)["traceEvents"]
    return events


def overlap(events: Iterable[dict[str, Any]]) -> Overlap:
    """How far copies to pinned host memory and back, on any stream, run at the same time as kernels.

    Two copies at once, one each way, count twice, in their time and in what is hidden of it.
    """
    kernels: list[Interval] = []
    copies: dict[str, list[Interval]] = {"DtoH": [], "HtoD": []}
    for event in events:
        category, name = event.get("cat"), event.get("name", "")
        if category not in ("kernel", "gpu_memcpy"):
            continue
        span = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        if category == "kernel":
            kernels.append(span)
        elif "Pageable" not in name:  # such copies are the batch's own small ones; those of offloading are pinned
            for way in copies:
                if way in name:
                    copies[way].append(span)
    busy = _union(kernels)
    spans = {way: _union(found) for way, found in copies.items()}
    hidden_us = sum(_common(found, busy) for found in spans.values())
    return Overlap(_length(spans["DtoH"]) / 1e3, _length(spans["HtoD"]) / 1e3, hidden_us / 1e3)


def _union(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _common(a: list[Interval], b: list[Interval]) -> float:
    """Time in both of two sorted lists of disjoint intervals."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return total
