"""What one client, or many, can make the server spend: memory, time, connections. All of it has an end."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from PIL import Image

from serving.api import body, watching
from serving.api.body import MAX_BETWEEN_BYTES, Held, parse_json
from serving.api.errors import ApiError
from serving.api.pictures import to_png
from tests.serving.api.conftest import Client, Start, picture, wait_for, written


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("inside", [b"[],", b"{},", b'{"":1},', b"1,", b'"x",', b'"",', b" ", b"[", b'{"a":'])
def test_json_of_many_values_is_never_unpacked(inside: bytes) -> None:
    data = b'{"prompt":[' + inside * (6_000_000 // len(inside)) + b"1]}"
    began = time.process_time()
    with pytest.raises(ApiError, match=r"flat object|valid JSON|nested"):
        parse_json(data)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("text", ["x" * 5_000_000, '"' * 2_000_000, "\\" * 2_000_000, "é\n" * 1_000_000, "[{" * 2_000_000])
def test_json_of_one_long_text_is_read(text: str) -> None:
    fields = {"prompt": text, "seed": 7, "first_frame": None}
    assert parse_json(json.dumps(fields, indent=4).encode()) == fields
    assert parse_json(json.dumps(fields, ensure_ascii=False).encode()) == fields


def test_texts_that_never_end_cost_no_more() -> None:
    for data in (b'{"a":"' + b'\\"' * 4_000_000, b'"' * 4_000_001, b'{"a":"' + b"\\" * 4_000_000):
        began = time.process_time()
        with pytest.raises(ApiError):
            parse_json(data)
        assert time.process_time() - began < 2.0
    assert parse_json(b'{"a":' + b" " * (MAX_BETWEEN_BYTES - 100) + b"1}") == {"a": 1}


def test_a_jpeg_of_a_thousand_scans() -> None:
    """Thirty bytes a scan, each of which costs the decoder a walk over all pixels."""
    plain = _saved(Image.new("L", (1600, 1600)), "JPEG", progressive=True)
    scan = plain[plain.rfind(b"\xff\xda") : -2]
    bomb = plain[:-2] + scan * 1000 + b"\xff\xd9"
    with pytest.raises(ApiError, match="scans"):
        to_png(bomb, "first_frame", max_bytes=10**7, max_px=10**7)
    with Image.open(io.BytesIO(to_png(plain, "first_frame", max_bytes=10**7, max_px=10**7))) as image:
        assert image.size == (1600, 1600)


def _exif(tag: bytes) -> bytes:
    """Orientation 6, and one more tag of twelve bytes as some cameras, and all fuzzers, write them."""
    entry = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
    return b"Exif\0\0II*\0\x08\x00\x00\x00\x02\x00" + entry + tag + b"\0\0\0\0"


@pytest.mark.parametrize(
    "tag",
    [
        b"\x0f\x01\x07\x00\x03\x00\x00\x00abc\0",  # the camera's make as bytes
        b"\x32\x01\x03\x00\x01\x00\x00\x00\x07\x00\x00\x00",  # a date that is a number
        b"\x1a\x01\x02\x00\x03\x00\x00\x00ab\0\0",  # a resolution that is text
        b"\x69\x87\x02\x00\x03\x00\x00\x00ab\0\0",  # text where another table should be
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_odd_camera_data_is_no_error_of_the_server(kind: str, tag: bytes) -> None:
    photo = _saved(Image.new("RGB", (64, 48)), kind, exif=_exif(tag))
    with Image.open(io.BytesIO(to_png(photo, "first_frame", max_bytes=10**6, max_px=10**6))) as image:
        assert image.size == (48, 64)


def test_every_orientation_is_undone() -> None:
    upright = Image.new("RGB", (64, 48), "white")
    upright.paste((200, 0, 0), (0, 0, 20, 10))
    undo = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM]
    undo += [Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270]
    for orientation, turn in enumerate(undo, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        given = _saved(upright if turn is None else upright.transpose(turn), "PNG", exif=exif)
        with Image.open(io.BytesIO(to_png(given, "first_frame", max_bytes=10**6, max_px=10**6))) as image:
            assert image.tobytes() == upright.tobytes(), orientation


def test_a_palette_picture_without_its_palette() -> None:
    data = picture(mode="P")
    at = data.index(b"PLTE") - 4
    without = data[:at] + data[at + 12 + int.from_bytes(data[at : at + 4]) :]
    with pytest.raises(ApiError) as refused:
        to_png(without, "first_frame", max_bytes=10**6, max_px=10**6)
    assert (refused.value.status, refused.value.code) == (400, "bad_image")


def test_bytes_of_bodies_are_counted_and_given_back() -> None:
    held, one, other = Held(100), {}, {}  # type: ignore[var-annotated]
    held.take(one, 60)
    held.take(other, 40)
    with pytest.raises(ApiError) as refused:
        held.take(other, 1)
    assert (refused.value.status, refused.value.code, refused.value.headers["Retry-After"]) == (503, "busy", "2")
    held.release(one)
    held.release(one)
    held.take(other, 60)
    held.release(other)
    assert held.n_bytes == 0


def test_many_large_bodies_at_once(start: Start) -> None:
    """Those that do not fit are told to come again, those that do are served, and nothing stays held."""
    client = start(http={"max_body_mb": 2.0}, paint=False, queue={"max_queued": 100})
    host, port = client.base_url.host, client.base_url.port
    whole = json.dumps({"prompt": "A disc", "first_frame": base64.b64encode(bytes(1_400_000)).decode()}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n".encode()
    head += f"Content-Length: {len(whole)}\r\n\r\n".encode()
    open_ones = [socket.create_connection((host, port)) for _ in range(12)]
    for connection in open_ones:
        connection.sendall(head + whole[:-1])
    time.sleep(0.5)
    refused = 0
    for connection in open_ones:
        connection.settimeout(0.2)
        try:
            refused += connection.recv(4096).startswith(b"HTTP/1.1 503 ")
        except TimeoutError:
            continue
    assert refused == 12 - int(8 * 2e6 / len(whole))
    assert client.get("/healthz").status_code == 200
    for connection in open_ones:
        connection.close()
    give_up = time.monotonic() + 10
    while (answer := client.post("/generate", json={"prompt": "A disc"})).status_code == 503 and time.monotonic() < give_up:
        time.sleep(0.05)
    assert answer.status_code == 202
    assert written(client.service)[0] == 1


def test_a_body_that_drips(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "WHOLE_S", 0.5)

    def drops() -> Iterator[bytes]:
        for _ in range(30):
            yield b"{"
            time.sleep(0.1)

    client = start()
    try:
        answer = client.post("/generate", content=drops(), headers={"Content-Type": "application/json"})
    except httpx2.TransportError:
        return  # hung up on while it dripped on
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "request_timeout"


def test_a_hundred_listeners_cost_one_reader(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MAX_STREAMS", 30)
    client = start(paint=False)
    job_id = client.post("/generate", json={"prompt": "A disc"}).json()["id"]
    store, asked = client.service.store, 0
    get = store.get

    def counted(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        return get(*arguments)

    def listen(_: int) -> list[str]:
        with httpx2.Client(base_url=client.base_url, timeout=20) as mine, mine.stream("GET", f"/jobs/{job_id}/events") as answer:
            return [json.loads(line[5:])["state"] for line in answer.iter_lines() if line.startswith("data:")]

    with ThreadPoolExecutor(30) as pool:
        streams = [pool.submit(listen, k) for k in range(30)]
        time.sleep(1.5)
        too_many = client.get(f"/jobs/{job_id}/events")
        monkeypatch.setattr(store, "get", counted)
        time.sleep(1.0)
        seen = asked
        client.delete(f"/jobs/{job_id}")
        told = [stream.result(10) for stream in streams]
    assert seen <= 25, "once in 0.05 s for all of them together"
    assert too_many.status_code == 429 and too_many.json()["error"]["code"] == "too_many_streams"
    assert all(states == ["queued", "cancelled"] for states in told)
    assert client.get(f"/jobs/{job_id}/events").status_code == 200, "closed ones do not count"


def test_waiting_requests_count_like_streams(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MAX_STREAMS", 2)
    client = start(paint=False)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.post, "/generate", json={"prompt": "A disc", "wait": True}) for _ in range(2)]
        while written(client.service)[0] < 2:
            time.sleep(0.01)
        job_id = client.get("/jobs").json()["data"][0]["id"]
        refused = [
            client.post("/generate", json={"prompt": "A disc", "wait": True}),
            client.get(f"/jobs/{job_id}/events"),
        ]
        assert client.post("/generate", json={"prompt": "A disc"}).status_code == 202, "one that does not wait"
        for job in client.get("/jobs").json()["data"]:
            client.delete(f"/jobs/{job['id']}")
        assert [one.result(10).status_code for one in waiting] == [409, 409]
    assert [(one.status_code, one.json()["error"]["code"]) for one in refused] == [(429, "too_many_streams")] * 2
    assert written(client.service)[0] == 3, "the one that was refused made no job"
    assert client.get(f"/jobs/{job_id}/events").status_code == 200, "ended ones do not count"


def test_a_waiting_client_and_a_listener_see_the_same_job(start: Start) -> None:
    client = start(step_s=0.01)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/generate", json={"prompt": "slow disc", "wait": True, "steps": 5, "seconds": 1})
        job_id = ""
        while not job_id:
            job_id = next((job["id"] for job in client.get("/jobs").json()["data"]), "")
        with client.stream("GET", f"/jobs/{job_id}/events") as answer:
            versions = [json.loads(line[5:])["version"] for line in answer.iter_lines() if line.startswith("data:")]
        assert waiting.result(20).status_code == 200
    assert versions == sorted(set(versions))
    assert wait_for(client, job_id)["version"] == versions[-1]


def test_events_take_no_body(start: Start) -> None:
    client: Client = start(paint=False)
    job_id = client.post("/generate", json={"prompt": "A disc"}).json()["id"]
    answer = client.request("GET", f"/jobs/{job_id}/events", content=b"x")
    assert answer.status_code == 413 and answer.headers["connection"] == "close"


def test_readyz_keeps_tracebacks_to_itself(start: Start) -> None:
    client = start()

    async def broken() -> dict[str, str]:
        return {"base": "deploy_failed: it broke\nTraceback (most recent call last):\n  File /home/secret.py", "text": ""}

    client.service.readiness = broken
    answer = client.get("/readyz")
    assert answer.status_code == 503 and "it broke" in answer.text
    assert "Traceback" not in answer.text and "secret" not in answer.text
