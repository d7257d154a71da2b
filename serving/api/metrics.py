"""`/metrics` in Prometheus' text form: what this replica answered, and what the store knows of all jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from serving.api.access import CallerOf, in_thread
from serving.api.errors import GUARDED, documented
from serving.api.service import Service
from waver_core import __version__

router = APIRouter(tags=["server"])
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset(("GET", "HEAD", "POST", "DELETE"))
_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_EXAMPLE = 'waver_jobs{state="queued"} 3.0\nwaver_queue_depth 3.0\nwaver_denoising_steps_total{stage="base"} 4200.0\n'


class StoreCollector(Collector):
    """Asks the store at each scrape, so that the numbers are those of all replicas and outlive a restart."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Any]:
        """Nothing: the registry must not ask the store when it is made."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield every family."""
        store, facts = self._service.store, self._service.facts
        info = InfoMetricFamily("waver_build", "Version and checkpoints that are served.")
        info.add_metric([], {"version": __version__, "base": facts.base, "refiner": facts.refiner or ""})
        yield info
        counts = store.counts()
        jobs = GaugeMetricFamily("waver_jobs", "Jobs in the store.", labels=["state"])
        for state, n in counts.items():
            jobs.add_metric([state], n)
        yield jobs
        yield GaugeMetricFamily("waver_queue_depth", "Jobs that wait.", value=counts["queued"])
        yield GaugeMetricFamily("waver_queue_limit", "Jobs that may wait.", value=self._service.settings.queue.max_queued)
        seconds = HistogramMetricFamily("waver_stage_seconds", "Duration of each stage of the cascade.", labels=["stage"])
        for stage, found in store.stage_histogram().items():
            buckets = [("+Inf" if bound == float("inf") else str(bound), count) for bound, count in found.buckets]
            seconds.add_metric([stage], buckets, found.sum)
        yield seconds
        steps = CounterMetricFamily("waver_denoising_steps", "Denoising steps made.", labels=["stage"])
        for stage, n in store.step_counts().items():
            steps.add_metric([stage], n)
        yield steps
        events = GaugeMetricFamily("waver_webhook_events", "Calls to webhooks.", labels=["state"])
        for outcome, n in store.event_counts().items():
            events.add_metric([outcome], n)
        yield events


class HttpMetrics:
    """Counts and times answers by route, never by path: paths are made by strangers."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(StoreCollector(service))
        labels = ["route", "method", "status"]
        self._requests = Counter("waver_http_requests", "Answers sent.", labels, registry=self.registry)
        self._seconds = Histogram(
            "waver_http_request_seconds", "Time to the end of an answer.", labels[:2], buckets=_BOUNDS_S, registry=self.registry
        )

    def observe(self, scope: Scope, status: int, began_s: float) -> None:
        """Count one answer; `began_s` is of `time.perf_counter`."""
        route = getattr(scope.get("route"), "path", None) or "none"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route, method).observe(time.perf_counter() - began_s)


@router.get(
    "/metrics",
    summary="Metrics",
    response_model=None,
    responses={
        200: {
            "description": "Prometheus' text form.",
            "model": None,
            "content": {"text/plain": {"schema": {"type": "string"}, "example": _EXAMPLE}},
        },
        **documented(*GUARDED),
    },
)
async def metrics(request: Request, caller: CallerOf) -> Response:
    """Requests of this replica; jobs, stages and webhooks of the whole server. Asks for a key like any other."""
    text = await in_thread(generate_latest, request.app.state.metrics.registry)
    return Response(text, headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})
