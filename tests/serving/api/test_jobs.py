"""`/jobs`: list, look, watch, fetch with Range, cancel, delete."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.errors import ApiError
from serving.api.files import parse_range
from tests.serving.api.conftest import Client, Start, wait_for, written


def _made(client: Client, **more: Any) -> dict[str, Any]:
    return wait_for(client, client.post("/generate", json={"prompt": "A disc", "seed": 1, "steps": 2} | more).json()["id"])


def test_lists_come_in_pages_in_both_orders_and_by_state(start: Start) -> None:
    client = start(paint=False)
    ids = [client.post("/generate", json={"prompt": str(k)}).json()["id"] for k in range(5)]
    client.delete(f"/jobs/{ids[1]}")
    pages, after = [], None
    while True:
        page = client.get("/jobs", params={"limit": 2, "order": "asc"} | ({"after": after} if after else {})).json()
        pages.append([job["id"] for job in page["data"]])
        assert (page["first_id"], page["last_id"]) == (pages[-1][0], pages[-1][-1])
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert pages == [ids[:2], ids[2:4], ids[4:]]
    assert [job["id"] for job in client.get("/jobs").json()["data"]] == ids[::-1]
    assert [job["id"] for job in client.get("/jobs?state=cancelled").json()["data"]] == [ids[1]]
    assert len(client.get("/jobs?state=cancelled&state=queued").json()["data"]) == 5
    assert client.get("/jobs?state=completed").json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "state=done", "after=x"):
        assert client.get(f"/jobs?{query}").status_code == 422, query
    unknown = client.get("/jobs?after=job_0123456789abcdef01234567")
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "after")


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_lists_go_on_behind_a_job_that_is_deleted_meanwhile(start: Start, order: str) -> None:
    client = start(paint=False)
    ids = [client.post("/generate", json={"prompt": str(k)}).json()["id"] for k in range(5)]
    for job_id in ids:
        client.delete(f"/jobs/{job_id}")
    expected, seen, after = (ids if order == "asc" else ids[::-1]), [], {}
    for _ in range(3):
        page = client.get("/jobs", params={"limit": 2, "order": order, **after}).json()
        seen.append([job["id"] for job in page["data"]])
        after = {"after": page["last_id"]}
        for job_id in seen[-1]:
            assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert seen == [expected[:2], expected[2:4], expected[4:]]
    assert written(client.service) == (0, [])


def test_the_place_in_the_queue_counts_down(start: Start) -> None:
    client = start(paint=False)
    ids = [client.post("/generate", json={"prompt": str(k)}).json()["id"] for k in range(3)]
    assert [client.get(f"/jobs/{i}").json()["queue_position"] for i in ids] == [0, 1, 2]
    first = client.post("/generate", json={"prompt": "now", "priority": "high"}).json()
    assert first["queue_position"] == 0
    client.delete(f"/jobs/{ids[0]}")
    assert client.get(f"/jobs/{ids[0]}").json()["queue_position"] is None
    assert client.get(f"/jobs/{ids[2]}").json()["queue_position"] == 2


def test_ranges_etags_and_head(start: Start) -> None:
    client = start()
    link = _made(client)["links"]["video"]
    whole = client.get(link)
    data, etag, modified = whole.content, whole.headers["etag"], whole.headers["last-modified"]
    assert whole.headers["accept-ranges"] == "bytes" and int(whole.headers["content-length"]) == len(data)
    assert whole.headers["content-disposition"].startswith("inline; filename=")
    assert client.get(f"{link}?download=1").headers["content-disposition"].startswith("attachment; filename=")

    def part(wanted: str, **headers: str) -> httpx2.Response:
        return client.get(link, headers={"Range": wanted} | {k.replace("_", "-"): v for k, v in headers.items()})

    n = len(data)
    for wanted, first, last in [
        ("bytes=0-0", 0, 0),
        ("bytes=5-", 5, n - 1),
        ("bytes=-7", n - 7, n - 1),
        (f"bytes=3-{n * 9}", 3, n - 1),
    ]:
        answer = part(wanted)
        assert (answer.status_code, answer.content) == (206, data[first : last + 1]), wanted
        assert answer.headers["content-range"] == f"bytes {first}-{last}/{n}"
        assert int(answer.headers["content-length"]) == last - first + 1
    for ignored in ("bytes=0-1,4-5", "bytes=9-3", "items=0-1", "bytes", "bytes=-", "bytes=a-b"):
        assert (part(ignored).status_code, part(ignored).content) == (200, data), ignored
    beyond = part(f"bytes={n}-")
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{n}")
    assert beyond.json()["error"]["code"] == "invalid_range"
    assert part("bytes=0-3", If_Range=etag).status_code == part("bytes=0-3", If_Range=modified).status_code == 206
    assert part("bytes=0-3", If_Range='"other"').status_code == part("bytes=0-3", If_Range=f"W/{etag}").status_code == 200
    for headers in ({"If-None-Match": etag}, {"If-None-Match": f'"x", W/{etag}'}, {"If-Modified-Since": modified}):
        same = client.get(link, headers=headers)
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag), headers
    assert client.get(link, headers={"If-None-Match": '"x"', "If-Modified-Since": modified}).status_code == 200
    head = client.head(link, headers={"Range": "bytes=0-9"})
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(n)), "ranges are for GET alone"
    assert "content-range" not in head.headers
    assert client.head(link, headers={"Range": f"bytes={n}-"}).status_code == 200


@given(st.text(max_size=30) | st.from_regex(r"bytes=[0-9]{0,20}-[0-9]{0,20}", fullmatch=True), st.integers(0, 1000))
def test_any_range_header_is_within_the_file_ignored_or_416(header: str, n_bytes: int) -> None:
    try:
        found = parse_range(header, n_bytes)
    except ApiError as error:
        assert error.status == 416
    else:
        assert found is None or 0 <= found[0] < found[1] <= n_bytes


def test_results_that_are_not_there(start: Start) -> None:
    client = start(paint=False)
    job = client.post("/generate", json={"prompt": "x"}).json()
    home = f"/jobs/{job['id']}"

    def code(path: str) -> tuple[int, str]:
        answer = client.get(path)
        return answer.status_code, answer.json()["error"]["code"]

    assert code(f"{home}/video") == code(f"{home}/preview") == (409, "not_ready")
    store = client.service.store
    store.claim("w")
    store.fail(job["id"], 1, "broken", "It broke.")
    assert code(f"{home}/video") == (409, "failed")
    assert client.get(home).json()["error"] == {"code": "broken", "message": "It broke."}
    assert code("/jobs/job_0123456789abcdef01234567/video") == (404, "not_found")


def test_results_expire_and_vanish(start: Start) -> None:
    client = start()
    job = _made(client)
    os.unlink(client.service.folder / f"jobs/{job['id']}/preview-1.mp4")
    gone = client.get(job["links"]["preview"])
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "gone")
    client.service.store.expire(time.time() + 10**6)
    expired = client.get(job["links"]["video"])
    assert (expired.status_code, expired.json()["error"]["code"]) == (410, "expired")
    assert client.get(f"/jobs/{job['id']}").json()["links"]["video"] is None


def test_a_row_that_names_a_file_elsewhere_gives_nothing_away(start: Start) -> None:
    client = start(paint=False)
    job = client.post("/generate", json={"prompt": "x"}).json()
    client.service.store.claim("w")
    client.service.store.complete(job["id"], 1, output="jobs.sqlite", stage_seconds={}, expires_at=time.time() + 99)
    answer = client.get(f"/jobs/{job['id']}/video")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "internal_error")
    assert "reference" in error["message"] and "sqlite" not in answer.text


def test_cancel_and_delete(start: Start) -> None:
    client = start(step_s=0.05)
    job = client.post("/generate", json={"prompt": "A disc", "steps": 90}).json()
    wait_for(client, job["id"], "in_progress")
    answer = client.delete(f"/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["cancel_requested"]) == (202, True)
    stopped = wait_for(client, job["id"])
    assert (stopped["state"], stopped["step"] < 90) == ("cancelled", True)
    assert client.delete(f"/jobs/{job['id']}").status_code == 204
    assert client.get(f"/jobs/{job['id']}").status_code == client.delete(f"/jobs/{job['id']}").status_code == 404
    made = _made(client, steps=1)
    assert written(client.service)[1] != []
    gone = client.delete(f"/jobs/{made['id']}")
    assert (gone.status_code, gone.content) == (204, b"")
    assert written(client.service) == (0, [])


def _events(client: Client, job_id: str, headers: dict[str, str] | None = None) -> list[tuple[str, str, dict[str, Any]]]:
    """(event, id, data) of a stream, to its end."""
    found = []
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers or {}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        for block in "".join(answer.iter_text()).split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
            if "data" in lines:
                found.append((lines["event"], lines.get("id", ""), json.loads(lines["data"])))
    return found


def test_events_tell_every_stage_and_end_with_the_job(start: Start) -> None:
    client = start(step_s=0.04)
    job = client.post("/generate", json={"prompt": "A disc", "steps": 10, "seconds": 1}).json()
    seen = _events(client, job["id"])
    assert {event for event, _, _ in seen} == {"job"}
    versions = [int(number) for _, number, _ in seen]
    assert versions == sorted(set(versions)) and len(versions) >= 5
    progress = [data["progress"] for _, _, data in seen]
    assert progress == sorted(progress) and seen[-1][2]["state"] == "completed" and progress[-1] == 1.0
    assert {"base", "refine"} <= {data["stage"] for _, _, data in seen}
    assert any(data["links"]["preview"] and data["state"] == "in_progress" for _, _, data in seen)
    last = seen[-1][1]
    assert client.get(f"/jobs/{job['id']}/events", headers={"Last-Event-ID": last}).status_code == 204
    assert [number for _, number, _ in _events(client, job["id"], {"Last-Event-ID": "1"})] == [last]


def test_events_end_when_the_job_is_deleted(start: Start) -> None:
    client = start(paint=False)
    job = client.post("/generate", json={"prompt": "x"}).json()
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(_events, client, job["id"])
        time.sleep(0.4)
        client.service.store.cancel(job["id"])
        client.service.store.delete(job["id"])
        seen = stream.result(10)
    assert seen[0][2]["state"] == "queued"
    assert seen[-1][0] == "deleted" or seen[-1][2]["state"] == "cancelled"


@pytest.mark.parametrize("path", ["", "/events", "/video", "/preview"])
def test_an_unknown_job_is_404_everywhere(start: Start, path: str) -> None:
    answer = start(paint=False).get(f"/jobs/job_0123456789abcdef01234567{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
