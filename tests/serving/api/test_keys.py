"""Who is let in: keys, their limits and what belongs to whom; without keys, this machine's own pages and programs alone."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.requests import Request

from serving.api import keys
from serving.api.errors import ApiError
from serving.api.keys import LOOK_S, Gate, read_keys
from tests.serving.api.conftest import Start, written
from waver_core.errors import ConfigError


def _sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _file(folder: Path, *entries: dict[str, Any]) -> str:
    path = folder / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": list(entries)}))
    return str(path)


def _request(client: str | None = "127.0.0.1", http_version: str = "1.1", **headers: str) -> Request:
    given = {"host": "localhost:8000", **{k.replace("_", "-"): v for k, v in headers.items()}}
    raw = [(k.encode(), v.encode()) for k, v in given.items() if v]
    client_address = (client, 1) if client else None
    return Request({"type": "http", "http_version": http_version, "headers": raw, "client": client_address})


LOCAL = [
    {},
    {"host": "127.0.0.1"},
    {"host": "127.8.9.1:80"},
    {"host": "[::1]:8000"},
    {"host": "LOCALHOST:8000", "client": "::1"},
    {"client": "::ffff:127.0.0.1"},
    {"origin": "http://localhost:8000", "sec_fetch_site": "same-origin"},
    {"sec_fetch_site": "none"},
]
FOREIGN = [
    ({"client": "10.0.0.7"}, "not_local"),
    ({"client": "::ffff:10.0.0.7"}, "not_local"),
    ({"client": "testclient"}, "not_local"),
    ({"client": None}, "not_local"),
    ({"host": "evil.example"}, "not_local"),  # DNS rebinding
    ({"host": "localhost.evil.example"}, "not_local"),
    ({"host": "127.0.0.1.nip.io:8000"}, "not_local"),
    ({"host": "0.0.0.0"}, "not_local"),
    ({"host": ""}, "not_local"),
    ({"x_forwarded_for": "1.2.3.4"}, "not_local"),
    ({"forwarded": "for=1.2.3.4"}, "not_local"),
    *(({header: "x"}, "not_local") for header in ("via", "x_real_ip", "x_client_ip", "true_client_ip", "cf_connecting_ip")),
    *(({f"x_forwarded_{part}": "x"}, "not_local") for part in ("host", "port", "proto", "server")),
    ({"http_version": "1.0"}, "not_local"),  # nginx, where `proxy_http_version` is not set
    ({"origin": "https://evil.example"}, "cross_site"),
    ({"origin": "http://localhost:3000"}, "cross_site"),  # another server of this machine
    ({"origin": "null"}, "cross_site"),
    ({"origin": "http://["}, "cross_site"),
    ({"sec_fetch_site": "cross-site"}, "cross_site"),
    ({"sec_fetch_site": "same-site"}, "cross_site"),
]


@pytest.mark.parametrize("asked", LOCAL, ids=str)
def test_without_keys_this_machine_is_let_in(asked: dict[str, Any]) -> None:
    assert Gate(None).admit(_request(**asked)).name == "local"


@pytest.mark.parametrize(("asked", "code"), FOREIGN, ids=str)
def test_without_keys_all_others_are_not(asked: dict[str, Any], code: str) -> None:
    with pytest.raises(ApiError, match=r"http\.api_keys") as refused:
        Gate(None).admit(_request(**asked))
    assert (refused.value.status, refused.value.code) == (403, code)


def test_a_page_of_another_site_cannot_post(start: Start) -> None:
    client = start(paint=False)
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}):
        refused = client.post("/generate", data={"prompt": "x"}, files={"image": b""}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error"), headers
    assert written(client.service) == (0, [])
    assert client.get("/healthz", headers={"Host": "10.0.0.7:8000"}).status_code == 200  # a cluster's probe


def test_a_key_is_asked_for_and_jobs_are_their_owners(start: Start, tmp_path: Path) -> None:
    keys = _file(tmp_path, {"name": "ann", "sha256": _sha("a")}, {"name": "bob", "sha256": _sha("b"), "priority_max": "normal"})
    client = start(paint=False, http={"api_keys": keys})
    ann, bob = {"Authorization": "Bearer a"}, {"Authorization": "bearer  b"}
    for headers in (
        {},
        {"Authorization": "Bearer c"},
        {"Authorization": "Basic a"},
        {"Authorization": "a"},
        {"Authorization": "Bearer"},
    ):
        refused = client.post("/generate", json={"prompt": "x"}, headers=headers)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer"), headers
    job = client.post("/generate", json={"prompt": "x"}, headers=ann | {"Idempotency-Key": "k"}).json()
    assert client.get(f"/jobs/{job['id']}", headers=ann).status_code == 200
    for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/video"), ("GET", "/preview"), ("GET", "/events")]:
        assert client.request(method, f"/jobs/{job['id']}{path}", headers=bob).status_code == 404, path
    for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/cancel")]:
        assert client.request(method, f"/v1/videos/{job['id']}{path}", headers=bob).status_code == 404, path
    assert client.get("/jobs", headers=bob).json()["data"] == []
    assert client.get(f"/jobs?after={job['id']}", headers=bob).status_code == 400
    gone = client.post("/generate", json={"prompt": "x"}, headers=ann).json()["id"]
    assert [client.delete(f"/jobs/{gone}", headers=ann).status_code for _ in range(2)] == [202, 204]
    for path in ("/jobs", "/v1/videos"):
        after = {who: client.get(f"{path}?after={gone}", headers=key) for who, key in (("ann", ann), ("bob", bob))}
        assert after["bob"].status_code == 400, "deleted ones are nobody else's business either"
        assert [one["id"] for one in after["ann"].json()["data"]] == [job["id"]]
    other = client.post("/generate", json={"prompt": "y"}, headers=bob | {"Idempotency-Key": "k"})
    assert other.status_code == 202 and other.json()["id"] != job["id"]
    high = client.post("/generate", json={"prompt": "y", "priority": "high"}, headers=bob)
    assert (high.status_code, high.json()["error"]["code"]) == (403, "priority_not_allowed")
    assert client.get("/capabilities", headers=bob).json()["limits"]["max_priority"] == "normal"
    assert [client.get(path).status_code for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics")] == [
        *(200, 200, 200, 200, 200, 401)
    ]


def test_limits_of_a_key(start: Start, tmp_path: Path) -> None:
    keys = _file(tmp_path, {"name": "ann", "sha256": _sha("a"), "max_queued": 1, "requests_per_minute": 4})
    client = start(paint=False, http={"api_keys": keys})
    ann = {"Authorization": "Bearer a"}
    answers = [client.post("/generate", json={"prompt": "x"}, headers=ann) for _ in range(5)]
    assert [a.status_code for a in answers] == [202, 429, 429, 429, 429]
    assert [a.json()["error"]["code"] for a in answers[1:]] == ["queue_full"] * 3 + ["rate_limited"]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 61


def test_keys_come_and_go_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, ann, bob = 0.0, {"name": "ann", "sha256": _sha("a")}, {"name": "bob", "sha256": _sha("b")}
    gate, told = Gate(_file(tmp_path, ann), clock=lambda: now), list[str]()
    monkeypatch.setattr(keys.log, "error", lambda message, *values: told.append(message % values))

    def names() -> list[str]:
        found = []
        for key in ("a", "b"):
            with contextlib.suppress(ApiError):
                found.append(gate.admit(_request(authorization=f"Bearer {key}")).name)
        return found

    assert names() == ["ann"]
    _file(tmp_path, ann, bob)
    assert names() == ["ann"], "not looked at for every request"
    now += LOOK_S
    assert names() == ["ann", "bob"]
    for wrong in ("keys: [", None):
        path = tmp_path / "keys.yaml"
        path.write_text(wrong) if wrong is not None else path.unlink()
        now += LOOK_S
        assert names() == ["ann", "bob"], "a slip of an editor locks nobody out"
    assert len(told) == 2 and all("the keys of before stay in force" in line for line in told)
    (tmp_path / "new.yaml").write_text(Path(_file(tmp_path, bob)).read_text())
    (tmp_path / "new.yaml").replace(tmp_path / "keys.yaml")
    now += LOOK_S
    assert names() == ["bob"]


def test_the_window_slides(tmp_path: Path) -> None:
    now = 1000.0
    gate = Gate(_file(tmp_path, {"name": "ann", "sha256": _sha("a"), "requests_per_minute": 2}), clock=lambda: now)
    request = _request(authorization="Bearer a")
    gate.admit(request)
    now += 40
    gate.admit(request)
    with pytest.raises(ApiError) as refused:
        gate.admit(request)
    assert refused.value.headers["Retry-After"] == "21"
    now += 20.5
    gate.admit(request)
    with pytest.raises(ApiError):
        gate.admit(request)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys: []", "at least 1"),
        ("keys: [{name: a}]", "sha256"),
        ("keys: [{name: a, sha256: secret}]", "sha256"),
        (f"keys: [{{name: a, sha256: {'a' * 64}, colour: red}}]", "unknown key"),
        (f"keys: [{{name: a, sha256: {'a' * 64}}}, {{name: a, sha256: {'b' * 64}}}]", "name a stands there twice"),
        (f"keys: [{{name: a, sha256: {'a' * 64}}}, {{name: b, sha256: {'a' * 64}}}]", "sha256 a+ stands there twice"),
        ("keys: [", "cannot be read"),
        ("", "http.api_keys"),
    ],
)
def test_a_key_file_that_is_wrong_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_keys(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(str(tmp_path / "none.yaml"))
