"""What holds for all routes: health, metrics, pages, headers, and errors that are nobody's fault but ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message

from serving.api import create_app, health
from serving.api.service import Service
from tests.serving.api.conftest import Client, Start, wait_for


def test_health_is_the_stores_and_readiness_the_deployments(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(paint=False)
    states = {"base": "ready", "refiner": "loading"}

    async def readiness() -> dict[str, str]:
        return states

    client.service.readiness = readiness
    assert client.get("/healthz").json() == {"status": "ok"}
    waiting = client.get("/readyz")
    assert (waiting.status_code, waiting.json()["deployments"]) == (503, states)
    assert waiting.json()["error"]["message"] == "Not ready yet: refiner (loading)." and "retry-after" in waiting.headers
    states["refiner"] = "ready"
    assert (client.get("/readyz").status_code, client.get("/readyz").json()["status"]) == (200, "ready")
    states.clear()
    assert client.get("/readyz").status_code == 503

    async def never() -> dict[str, str]:
        await asyncio.sleep(60)
        return {}

    monkeypatch.setattr(health, "READINESS_TIMEOUT_S", 0.05)
    client.service.readiness = never
    assert "no answer" in client.get("/readyz").json()["error"]["message"]


def test_metrics_of_the_store_and_of_http(start: Start) -> None:
    client = start()
    job = client.post("/generate", json={"prompt": "A disc", "steps": 4}).json()
    wait_for(client, job["id"])
    client.get("/jobs/nothing")
    client.get("/no/such/page")
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(answer.text)
        for s in family.samples
    }
    assert samples["waver_jobs", ("state", "completed")] == 1 and samples["waver_jobs", ("state", "queued")] == 0
    assert samples["waver_queue_depth",] == 0
    assert samples["waver_denoising_steps_total", ("stage", "base")] == 4
    assert samples["waver_denoising_steps_total", ("stage", "refine")] == 2
    assert samples["waver_stage_seconds_count", ("stage", "decode")] == 1
    assert samples["waver_stage_seconds_bucket", ("le", "+Inf"), ("stage", "base")] == 1
    assert samples["waver_webhook_events", ("state", "pending")] == 0
    route = ("method", "GET"), ("route", "/jobs/{job_id}"), ("status", "404")
    assert samples["waver_http_requests_total", *route] == 1
    assert samples["waver_http_requests_total", ("method", "GET"), ("route", "none"), ("status", "404")] == 1
    assert samples["waver_http_request_seconds_count", ("method", "POST"), ("route", "/generate")] == 1
    assert any(name == "waver_build_info" for name, *_ in samples)


def test_the_page_its_files_and_the_docs(start: Start) -> None:
    client = start(paint=False)
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<title>" in page.text
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'" and policy["default-src"] == "'none'"
    script = client.get("/ui/app.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert client.get("/ui/app.js", headers={"If-None-Match": script.headers["etag"]}).status_code == 304
    assert client.head("/").status_code == 200 and client.get("/ui/none.js").status_code == 404
    docs = client.get("/docs").text
    assert "POST /generate" in docs and "<script" not in docs and "//cdn" not in docs
    assert client.get("/openapi.json").json()["info"]["title"] == "Waver"


def test_headers_that_keep_browsers_safe(start: Start) -> None:
    client = start(paint=False)
    for path in ("/", "/docs", "/jobs", "/capabilities", "/nowhere", "/jobs/x", "/metrics"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer", path
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert "access-control-allow-origin" not in headers, path
    assert client.get("/jobs").headers["cache-control"] == "no-store"


def test_wrong_addresses_and_methods(start: Start) -> None:
    client = start(paint=False)
    missing = client.get("/nowhere")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = client.put("/generate")
    assert (wrong.status_code, wrong.json()["error"]["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert client.options("/generate").status_code == 405  # no CORS
    home = "/jobs/job_0123456789abcdef01234567"
    allowed = {
        home: "DELETE, GET",
        f"{home}/video": "GET, HEAD",
        "/v1/videos": "GET, POST",
        "/healthz": "GET, HEAD",
        "/": "GET, HEAD",
    }
    for path, methods in allowed.items():
        refused = client.put(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, methods), path
        assert f"only {methods}." in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/videos/{}/content", "/v1/videos/{}/content?variant=thumbnail"])
def test_head_answers_like_get_without_the_body(start: Start, path: str) -> None:
    client = start()
    path = path.format(wait_for(client, client.post("/generate", json={"prompt": "A disc", "steps": 1}).json()["id"])["id"])
    whole, head = client.get(path), client.head(path)
    assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
    told = ("content-type", "content-length", "cache-control", "etag", "content-disposition")
    assert [head.headers.get(name) for name in told] == [whole.headers.get(name) for name in told]


def test_what_breaks_is_logged_under_a_reference_and_told_without_details(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(paint=False)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("waver.http").addHandler(handler)
    monkeypatch.setattr(client.service.store, "list", broken)
    answer = client.get("/jobs")
    logging.getLogger("waver.http").removeHandler(handler)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text and "ZeroDivision" not in answer.text
    reference = answer.json()["error"]["message"].rstrip(".").split()[-1]
    assert len(records) == 1 and reference in records[0].getMessage() and records[0].exc_info
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "error",
    [OperationalError("select 1", {}, Exception("connection refused")), NoConnectionFree("QueuePool limit, select 1")],
    ids=["away", "busy"],
)
def test_a_store_that_does_not_answer_is_503(start: Start, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    client = start(paint=False)

    def away(*_: object, **__: object) -> None:
        raise error

    for name in ("ping", "get", "submit"):
        monkeypatch.setattr(client.service.store, name, away)
    for answer in (
        client.get("/healthz"),
        client.get("/jobs/job_0123456789abcdef01234567"),
        client.post("/generate", json={"prompt": "x"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (
            503,
            "store_unavailable",
            "5",
        )
        assert "select" not in answer.text


def test_two_replicas_over_one_store_are_one_server(start: Start) -> None:
    client = start(paint=False)
    settings = client.service.settings
    second = Service(settings, client.service.facts, type(client.service.store)(settings.database_url))

    async def look(job_id: str) -> tuple[int, int]:
        transport = httpx2.ASGITransport(create_app(second))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as other:
            return (await other.get(f"/jobs/{job_id}")).status_code, (await other.delete(f"/jobs/{job_id}")).status_code

    job = client.post("/generate", json={"prompt": "x"}).json()
    assert asyncio.run(look(job["id"])) == (200, 202)
    second.store.close()
    assert client.get(f"/jobs/{job['id']}").json()["state"] == "cancelled"


def test_capabilities_are_the_models_and_the_servers(start: Start) -> None:
    client: Client = start(paint=False, http={"max_image_mb": 2.5, "url_hosts": ["a.example"]})
    told = client.get("/capabilities").json()
    assert told["model"] == client.service.facts.to_json() and told["model"]["default_size"] == "240x144"
    assert (told["limits"]["max_image_bytes"], told["limits"]["url_hosts"]) == (2_500_000, ["a.example"])


@pytest.mark.parametrize(
    "after", [b"", b'{"prompt": "A di', b'{"prompt": "A disc", "wait": true}'], ids=["nothing", "half", "waiting"]
)
def test_a_client_that_hangs_up_is_no_failure_of_ours_however_serve_tells_it(start: Start, after: bytes) -> None:
    """Ray Serve may raise from `receive` when a client goes: that ends the request, and the job of a client that waited."""
    client = start(paint=False)
    app = create_app(client.service)
    whole = after.endswith(b"}")
    messages = [{"type": "http.request", "body": after, "more_body": not whole}] if after else []

    async def receive() -> Message:
        if messages:
            return messages.pop()
        if whole:  # it goes once its job is there
            while client.get("/jobs").json()["data"] == []:
                await asyncio.sleep(0.01)
        raise ValueError("Task was cancelled")

    async def send(message: Message) -> None:
        raise AssertionError(f"nobody listens to {message}")

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    asked = {"method": "POST", "path": "/generate", "raw_path": b"/generate", "query_string": b"", "headers": headers}
    with contextlib.suppress(ClientDisconnect):
        asyncio.run(app({"type": "http", "http_version": "1.1", "client": ("127.0.0.1", 1), **asked}, receive, send))
    counted = re.findall(r'waver_http_requests_total\{method="POST",.*status="(\d+)"', _metrics_of(app))
    assert counted == ["499"]
    assert [job["state"] for job in client.get("/jobs").json()["data"]] == (["cancelled"] if whole else [])


def _metrics_of(app: ASGIApp) -> str:
    async def asked() -> str:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as other:
            return (await other.get("/metrics")).text

    return asyncio.run(asked())
