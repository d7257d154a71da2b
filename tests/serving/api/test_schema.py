"""The OpenAPI schema: true to the routes, with examples everywhere, and fuzzed as a whole."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from serving.api import create_app
from serving.api.keys import Caller
from serving.api.service import Service
from serving.api.submit import Order, submit
from serving.generate_request import GenerateRequest
from tests.serving.api.fake_dispatcher import FakeDispatcher, make_service


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    service = make_service(tmp_path, queue={"max_queued": 6}, http={"max_wait_s": 1.0})
    yield create_app(service)
    service.store.close()


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_every_route_has_a_summary_an_example_and_its_errors(app: FastAPI) -> None:
    schema = app.openapi()
    assert len(dict(_operations(schema))) == 18
    for name, operation in _operations(schema):
        assert operation["summary"] and operation["description"], name
        good = [r for status, r in operation["responses"].items() if status.startswith("2") and "content" in r]
        contents = [c for r in good for c in r["content"].values()]
        binary = any(c.get("schema", {}).get("format") == "binary" for c in contents)
        assert binary or any("example" in c for c in contents), name
        assert "500" in operation["responses"], name
        if "/health" not in name and "/ready" not in name:
            assert {"401", "403", "429", "503"} <= operation["responses"].keys(), name
            assert operation["security"] == [{"HTTPBearer": []}], name
        for content in operation.get("requestBody", {}).get("content", {}).values():
            assert "example" in content or "examples" in content, name


def test_examples_are_what_their_schemas_say(app: FastAPI) -> None:
    schema = json.loads(json.dumps(app.openapi()))
    checked = 0

    def check(content: dict[str, Any], name: str) -> None:
        nonlocal checked
        for example in (
            [content["example"]] if "example" in content else [e["value"] for e in content.get("examples", {}).values()]
        ):
            whole = {"$ref": "#/s", "s": content["schema"], "components": schema["components"]}
            jsonschema.Draft202012Validator(whole).validate(example)
            checked += 1

    for name, operation in _operations(schema):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            check(content, name)
        for answer in operation["responses"].values():
            for content in answer.get("content", {}).values():
                check(content, name)
    assert checked > 100


def _fuzz(strategy: Any, checks: list[Any], max_examples: int) -> Counter[int]:
    """Send what the strategy draws and check each answer; how often each status came."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def run(case: Any) -> None:
        answer = case.call(timeout=20)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=checks)

    with contextlib.suppress(Unsatisfiable):  # nothing to get wrong in a request without parameters
        run()
    return statuses


@pytest.mark.slow
def test_nothing_that_the_schema_allows_or_forbids_breaks_the_server(tmp_path: Path) -> None:
    """Property-based, over every operation: statuses, content types and bodies are as documented, and none is a server error."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        *(not_a_server_error, status_code_conformance, content_type_conformance),
        *(response_schema_conformance, response_headers_conformance),
    ]
    service = make_service(tmp_path, queue={"max_queued": 6}, http={"max_wait_s": 0.5})
    app = create_app(service)

    async def from_here(scope: Any, receive: Any, send: Any) -> None:
        """The in-process client has neither an address nor a name of this machine."""
        if scope["type"] == "http":
            scope["client"] = ("127.0.0.1", 1)
            scope["headers"] = [(k, b"127.0.0.1" if k == b"host" else v) for k, v in scope["headers"]]
        await app(scope, receive, send)

    api = schemathesis.openapi.from_asgi("/openapi.json", from_here)
    statuses: dict[str, Counter[int]] = {}
    with FakeDispatcher(service):
        for result in api.get_all_operations():
            operation = result.ok()
            seen = statuses.setdefault(operation.label, Counter())
            for mode in schemathesis.GenerationMode:
                seen += _fuzz(operation.as_strategy(generation_mode=mode), checks, 60 if operation.body else 25)
                if "{job_id}" in operation.path:  # ids drawn at random never exist: the same again with one that does
                    known = {"job_id": _a_job(service)}
                    seen += _fuzz(operation.as_strategy(generation_mode=mode, path_parameters=known), checks, 15)
    service.store.close()
    assert len(statuses) == 18
    for label, seen in statuses.items():  # the fuzz went through the front door, too
        assert any(200 <= status < 300 for status in seen), (label, seen)
    assert sum(seen.total() for seen in statuses.values()) > 700


def _a_job(service: Service) -> str:
    """A job that is made already."""
    job = submit(service, Caller("local"), Order(GenerateRequest(prompt="A disc", steps=1, seed=1, seconds=1)))[0]
    while not job.ended:
        time.sleep(0.02)
        job = service.store.get(job.id) or job
    return job.id
