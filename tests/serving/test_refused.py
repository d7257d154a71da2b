"""What the real app on Ray Serve must refuse: a clear 4xx in the one form of errors, no row, no file, and never a 5xx."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.serving.api.test_refused import PICTURES
from tests.serving.api.test_schema import _fuzz as fuzz
from tests.serving.exports import write_export
from tests.serving.served import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = "a red disc moves to the left"
CANARY = "the canary is alive"
KNOWN = "job_0123456789abcdef01234567"
TINY = (  # every job that a fuzzer manages to make is done in a blink
    "serving.queue.max_queued=8",
    "serving.cascade.steps=1",
    "serving.cascade.max_steps=2",
    "serving.cascade.max_seconds=2",
    "serving.http.max_body_mb=12",
    "serving.http.max_wait_s=1",
    "serving.http.url_hosts=[localhost, 127.0.0.1]",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("refused")
    write_export(folder / "base", "t2v_192p_12fps")
    write_export(folder / "refiner", "refine_1080p", seed=1)
    made = Server(folder, folder / "jobs", *TINY)
    made.start()
    (made.jobs / "canary.txt").write_text(CANARY)
    try:
        yield made
    finally:
        made.stop()


def written(server: Server) -> tuple[list[str], list[str]]:
    """(ids of all jobs, files beside the database): what a refused request must leave as it was."""
    jobs = server.client.get("/jobs", params={"limit": 100}).json()
    assert not jobs["has_more"]
    files = [str(p.relative_to(server.jobs)) for p in server.jobs.rglob("*") if not p.name.startswith("jobs.sqlite")]
    return sorted(job["id"] for job in jobs["data"]), sorted(files)


@pytest.fixture
def untouched(server: Server) -> Iterator[None]:
    """Fails where anything was written, or a file went."""
    before = written(server)
    yield
    assert written(server) == before
    assert (server.jobs / "canary.txt").read_text() == CANARY


def assert_told(answer: httpx2.Response, *expected: tuple[int, str]) -> None:
    """The answer is one of these refusals, in the one form."""
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) in expected, answer.text
    assert set(error) == {"code", "message", "type", "param"}
    assert error["message"].endswith((".", "?", "!")) and len(error["message"]) <= 600 and "Traceback" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def raw(server: Server, head: str | bytes, body: bytes = b"", *, read: bool = True) -> bytes:
    """Send bytes as they are, which a client library would tidy; what comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall((head.encode() if isinstance(head, str) else head) + body)
        return b"".join(iter(lambda: connection.recv(65536), b"")) if read else b""


def _parsed(answer: bytes) -> httpx2.Response:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines[1:]]
    return httpx2.Response(int(lines[0].split()[1]), headers=headers, content=body)


def _get(server: Server, path: str, method: str = "GET", *headers: str) -> httpx2.Response:
    lines = [f"{method} {path} HTTP/1.1", *headers, "Connection: close"]
    if not any(line.lower().startswith("host:") for line in headers):
        lines.insert(1, f"Host: 127.0.0.1:{server.port}")
    return _parsed(raw(server, "\r\n".join(lines) + "\r\n\r\n"))


IDS = [
    *("..%2f..%2fcanary.txt", "%2e%2e%2f%2e%2e%2fcanary.txt", "..%5c..%5ccanary.txt", "../../canary.txt", "../canary.txt"),
    *("%2e%2e", "..", ".", "..;", "%2fetc%2fpasswd", "//etc/passwd", "%252e%252e%252fcanary.txt", "..%c0%af..%c0%afcanary.txt"),
    *(f"{KNOWN}%00", f"{KNOWN}%00.mp4", f"{KNOWN}%0a", f"{KNOWN}%2f..%2f..%2fcanary.txt", f"{KNOWN}%20", KNOWN.upper(), KNOWN),
    *("%00", "%ff%fe", "job_%d9%a0", "x" * 5000, "jobs.sqlite", "%27%20or%201=1--", "*", "%"),
]


def _routes(server: Server) -> list[tuple[str, str]]:
    paths = server.client.get("/openapi.json").json()["paths"]
    found = [(method.upper(), path) for path, methods in paths.items() if "{job_id}" in path for method in methods]
    return [*found, ("HEAD", "/jobs/{job_id}/video"), ("GET", "/ui/{job_id}"), ("GET", "/{job_id}"), ("GET", "/docs/{job_id}")]


def test_no_id_leads_out_of_its_place_on_any_route(server: Server, untouched: None) -> None:
    routes = _routes(server)
    assert len(routes) == 10 + 4
    for method, path in routes:
        for job_id in IDS:
            answer = _get(server, path.format(job_id=job_id), method)
            assert CANARY.encode() not in answer.content and b"SQLite" not in answer.content
            if method == "HEAD":
                assert answer.status_code in (404, 405) and not answer.content
            else:
                assert_told(answer, (404, "not_found"), (405, "method_not_allowed"))


def test_what_is_no_http_ends_at_the_door(server: Server, untouched: None) -> None:
    """Null bytes and double lengths never reach the app: the HTTP parser answers, in a word."""
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    post = f"POST /generate HTTP/1.1\r\n{host}Content-Type: application/json\r\n"
    for head in (
        f"GET /jobs/{KNOWN}\0 HTTP/1.1\r\n{host}\r\n",
        f"{post}Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        f"{post}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        f"{post}Content-Length: -5\r\n\r\n",
        f"{post}Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        "GARBAGE\r\n\r\n",
    ):
        assert raw(server, head).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 4")), head


def test_only_this_machine_by_its_own_name(server: Server, untouched: None) -> None:
    """Behind Serve's proxy, too, the app sees who asks and by what name."""
    assert _get(server, "/jobs").status_code == 200
    for header in (
        "Host: evil.example",
        "Host: 127.0.0.1.evil.example",
        "X-Forwarded-For: 10.0.0.1",
        "X-Forwarded-For: 127.0.0.1",
        "X-Real-IP: 127.0.0.1",
        "Forwarded: for=127.0.0.1",
    ):
        assert_told(_get(server, "/jobs", "GET", header), (403, "not_local"))
    for header in ("Origin: http://evil.example", "Origin: null", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site"):
        assert_told(_get(server, "/jobs", "GET", header), (403, "cross_site"))
    asked = _get(server, "/generate", "OPTIONS", "Origin: http://evil.example", "Access-Control-Request-Method: POST")
    assert_told(asked, (405, "method_not_allowed"))
    assert not [name for name in asked.headers if name.startswith("access-control")]
    assert_told(_get(server, "/generate", "PUT"), (405, "method_not_allowed"))
    assert _get(server, "/generate", "PUT").headers["allow"] == "POST"
    assert_told(_get(server, f"/jobs/{KNOWN}/events", "GET", "Content-Length: 1"), (413, "body_too_large"))


def _json(server: Server, body: Any) -> httpx2.Response:
    headers = {"Content-Type": "application/json"}
    return server.client.post("/generate", content=body if isinstance(body, bytes) else json.dumps(body), headers=headers)


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"size": "1000000x1000000"}, 422, "invalid_size"),
        ({"size": "99999x99999"}, 400, "invalid_size"),
        ({"size": "97x97"}, 400, "invalid_size"),
        ({"size": "-96x96"}, 422, "invalid_size"),
        ({"size": "１６x１６"}, 422, "invalid_size"),
        ({"size": "96x96\n"}, 422, "invalid_size"),
        ({"size": [96, 96]}, 422, "invalid_size"),
        ({"seconds": 60}, 400, "invalid_seconds"),
        ({"seconds": 1e308}, 422, "invalid_seconds"),
        ({"steps": 1000}, 400, "invalid_steps"),
        ({"steps": 10**29}, 422, "invalid_steps"),
        ({"steps": 1.5}, 422, "invalid_steps"),
        ({"guidance_scale": 99}, 400, "invalid_guidance_scale"),
        ({"guidance_scale": "nan"}, 422, "invalid_guidance_scale"),
        ({"guidance_scale": "Infinity"}, 422, "invalid_guidance_scale"),
        ({"seed": -1}, 422, "invalid_seed"),
        ({"seed": 2**31}, 422, "invalid_seed"),
        ({"seed": 2**63}, 422, "invalid_seed"),
        ({"style": "../../etc/passwd"}, 400, "invalid_style"),
        ({"prompt": ""}, 422, "invalid_prompt"),
        ({"prompt": "x" * 10_000_000}, 422, "invalid_prompt"),
        ({"negative_prompt": "x" * 10_000_000}, 422, "invalid_negative_prompt"),
        ({"prompt": "a\0b"}, 422, "invalid_characters"),
        ({"prompt": "\ud800"}, 422, "invalid_characters"),
        ({"prompt": {"a": 1}}, 422, "invalid_prompt"),
        ({"output": "/etc/cron.d/x"}, 422, "unknown_field"),
        ({"x" * 100_000: 1}, 422, "unknown_field"),
        ({"webhook_url": "http://169.254.169.254/"}, 400, "invalid_webhook_url"),
        ({"webhook_url": "file:///etc/passwd"}, 400, "invalid_webhook_url"),
        ({"first_frame": "../../canary.txt"}, 400, "bad_image"),
        ({"first_frame": "file:///etc/passwd"}, 400, "bad_image"),
        ({"first_frame": "https://example.com/a.png"}, 403, "url_not_allowed"),
        ({"first_frame": "https://localhost/a.png"}, 403, "url_not_allowed"),  # listed, and yet not public
        ({"first_frame": "https://127.0.0.1/a.png"}, 403, "url_not_allowed"),
        ({"first_frame": "https://2130706433/a.png"}, 403, "url_not_allowed"),
        ({"first_frame": "https://0x7f.1/a.png"}, 403, "url_not_allowed"),
        ({"first_frame": "https://0.0.0.0/a.png"}, 403, "url_not_allowed"),
        ({"first_frame": "https://[::1]/a.png"}, 403, "url_not_allowed"),
        ({"first_frame": "https://[fe80::1%25lo]/a.png"}, 403, "url_not_allowed"),
        ({"first_frame": "https://ⓛocalhost/a.png"}, 400, "invalid_url"),
        ({"first_frame": "https://localhost@10.0.0.1/a.png"}, 400, "invalid_url"),
        ({"first_frame": "https://localhost:22/a.png"}, 400, "invalid_url"),
        ({"last_frame": "http://localhost/a.png"}, 400, "invalid_url"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_fields_that_cannot_be(server: Server, untouched: None, fields: dict[str, Any], status: int, code: str) -> None:
    assert_told(_json(server, {"prompt": PROMPT} | fields), (status, code))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"prompt": "x", "guidance_scale": NaN}', "invalid_json"),
        (b'{"prompt": "x", "guidance_scale": -Infinity}', "invalid_json"),
        (b'{"prompt": "x", "guidance_scale": 1e999}', "invalid_json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 50_000 + b"}", "invalid_json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5_000_000 + b"}", "invalid_json"),
        (b"[" * 5_000_000, "invalid_json"),
        (b'{"a":' * 30_000 + b"1" + b"}" * 30_000, "invalid_json"),
        (b"[" * 30_000 + b"]" * 30_000, "invalid_json"),
        (b'{"a":[' + b"{}," * 3_000_000 + b"1]}", "invalid_json"),
        (b'{"prompt": "' + b'\\"' * 4_000_000, "invalid_json"),
        (b'{"prompt": "x", "prompt": "y"}', "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b"", "invalid_json"),
        (b"null", "invalid_json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies_that_are_no_request(server: Server, untouched: None, body: bytes, code: str) -> None:
    began = time.monotonic()
    assert_told(_json(server, body), (422, code))
    assert time.monotonic() - began < 5, "bodies are looked at before they are unpacked"


def test_wrong_kinds_of_bodies(server: Server, untouched: None) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/xml", "image/png", ""):
        answer = server.client.post("/generate", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        assert_told(answer, (415, "unsupported_media_type"))
    for path in ("/generate", "/v1/videos"):
        packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        assert_told(server.client.post(path, content=b"\x1f\x8b", headers=packed), (415, "unsupported_encoding"))
        head = {"Content-Type": "multipart/form-data"}
        assert_told(server.client.post(path, content=b"x", headers=head), (422, "invalid_multipart"))


def test_forms_of_ten_megabytes_many_parts_and_torn_ones(server: Server, untouched: None) -> None:
    def form(**parts: Any) -> httpx2.Response:
        return server.client.post("/generate", files={name: (None, value) for name, value in parts.items()})

    assert_told(form(prompt="x" * 10_000_000), (422, "invalid_prompt"))
    assert_told(form(prompt=PROMPT, **{f"f{k}": "x" for k in range(100)}), (422, "too_many_parts"))
    assert_told(form(prompt=PROMPT, guidance_scale="NaN"), (422, "invalid_guidance_scale"))
    assert_told(form(prompt=PROMPT, seed="-1"), (422, "invalid_seed"))
    assert_told(form(prompt=PROMPT, size="99999x99999"), (400, "invalid_size"))
    assert_told(server.client.post("/v1/videos", files={"prompt": (None, "x" * 10_000_000)}), (422, "invalid_prompt"))
    named = server.client.post("/generate", files={"../../canary.txt": ("../../canary.txt", b"x"), "prompt": (None, PROMPT)})
    assert_told(named, (422, "unknown_field"))
    head = {"Content-Type": "multipart/form-data; boundary=b"}
    torn = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nA disc'
    assert_told(server.client.post("/generate", content=torn, headers=head), (422, "invalid_multipart"))


def test_bodies_that_are_too_large_with_and_without_a_length(server: Server, untouched: None) -> None:
    assert_told(_json(server, {"prompt": "x" * 13_000_000}), (413, "body_too_large"))
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    announced = _parsed(raw(server, f"{head}Content-Length: 99999999999\r\n\r\n{{"))
    assert_told(announced, (413, "body_too_large"))
    assert announced.headers["connection"] == "close"

    def pieces(n: int) -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(n):
            yield b"x" * 500_000
        yield b'"}'

    kind = {"Content-Type": "application/json"}
    assert_told(server.client.post("/generate", content=pieces(20), headers=kind), (422, "invalid_prompt"))  # 10 MB
    with contextlib.suppress(httpx2.TransportError):  # the server may hang up before all is sent
        assert_told(server.client.post("/generate", content=pieces(40), headers=kind), (413, "body_too_large"))


def test_half_bodies_of_clients_that_go(server: Server, untouched: None) -> None:
    whole = json.dumps({"prompt": PROMPT, "steps": 1}).encode()
    for kind in ("application/json", "multipart/form-data; boundary=b"):
        for half in (b"", whole[:9], whole[:-1]):
            head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: {kind}\r\n"
            raw(server, f"{head}Content-Length: {len(whole)}\r\n\r\n", half, read=False)
            raw(server, f"{head}Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s" % (len(whole), half), read=False)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    for connection in slow:  # and those that stay and say nothing more
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
    began = time.monotonic()
    assert server.client.get("/healthz").status_code == 200 and time.monotonic() - began < 2
    for connection in slow:
        connection.close()


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _pictures() -> dict[str, tuple[bytes, str]]:
    """Those of the HTTP side's own tests, and a few that are slow to make."""
    progressive = _saved(Image.new("L", (3200, 3200)), "JPEG", progressive=True)
    scan = progressive[progressive.rfind(b"\xff\xda") : -2]
    return {
        **{name: (data, code) for name, (data, code) in PICTURES.items() if code},
        "40 megapixels, JPEG": (_saved(Image.new("L", (8000, 5000)), "JPEG"), "image_too_large"),
        "40 megapixels, WebP": (_saved(Image.new("RGB", (8000, 5000)), "WEBP", quality=1, method=0), "image_too_large"),
        "a bomb of scans": (progressive[:-2] + scan * 4000 + b"\xff\xd9", "bad_image"),
    }


def test_pictures_that_are_bombs_giants_or_two_things(server: Server, untouched: None) -> None:
    for name, (data, code) in _pictures().items():
        assert len(data) < 12_000_000, name
        began = time.monotonic()
        files = {"prompt": (None, PROMPT), "first_frame": ("a.png", data, "image/png")}
        assert_told(server.client.post("/generate", files=files), (400, code))
        text = base64.b64encode(data).decode() or "data:image/png;base64,"
        assert_told(_json(server, {"prompt": PROMPT, "last_frame": text}), (400, code))
        dialect = {"prompt": (None, PROMPT), "input_reference": ("a.png", data, "image/png")}
        assert_told(server.client.post("/v1/videos", files=dialect), (400, code))
        assert time.monotonic() - began < 6, name


def test_nothing_in_the_schema_breaks_the_server(server: Server) -> None:
    """Property-based, over HTTP, every operation, data that the schema allows and data that it does not."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: dict[str, Counter[int]] = {}
    for result in api.get_all_operations():
        operation = result.ok()
        seen = statuses.setdefault(operation.label, Counter())
        for mode in schemathesis.GenerationMode:
            seen += fuzz(operation.as_strategy(generation_mode=mode), checks, 40 if operation.body else 12)
            if "{job_id}" in operation.path:  # ids drawn at random never exist: the same again with one that does
                known = {"job_id": _a_job(server)}
                seen += fuzz(operation.as_strategy(generation_mode=mode, path_parameters=known), checks, 5)
    assert len(statuses) == 18
    for label, seen in statuses.items():  # the fuzz went through the front door, too
        assert any(200 <= status < 300 for status in seen), (label, seen)
    assert sum(seen.total() for seen in statuses.values()) > 300
    _clear(server)
    ids, files = written(server)
    assert not ids and not [name for name in files if "job_" in name]


def _a_job(server: Server) -> str:
    """A job that is done already."""
    give_up = time.monotonic() + 60
    while (made := server.post(prompt=PROMPT, seed=1, kind="video")).status_code == 429:
        assert time.monotonic() < give_up
        time.sleep(0.2)
    job_id: str = made.json()["id"]
    assert server.until(job_id, states=("completed", "failed"))["state"] == "completed"
    return job_id


def _clear(server: Server) -> None:
    """End and delete all jobs."""
    give_up = time.monotonic() + 60
    while jobs := server.client.get("/jobs", params={"limit": 100}).json()["data"]:
        for job in jobs:
            server.client.delete(f"/jobs/{job['id']}")
        assert time.monotonic() < give_up, jobs
        time.sleep(0.05)


def test_after_all_that_no_answer_was_a_5xx(server: Server) -> None:
    """By the server's own count; only /readyz has ever said 503, while the models were loaded."""
    counted = re.findall(
        r'waver_http_requests_total\{method="(\w+)",route="([^"]+)",status="(\d+)"\}', server.client.get("/metrics").text
    )
    assert len({route for _, route, _ in counted}) > 10
    assert {(route, status) for _, route, status in counted if status.startswith("5")} <= {("/readyz", "503")}, server.failures()
    assert server.post(prompt=PROMPT, seed=1, steps=1, kind="image", wait=True).status_code in (200, 202)
    _clear(server)
