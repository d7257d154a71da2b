"""What must be refused with a clear 4xx, and leave neither a row nor a file behind."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from serving.api import fetching, submit
from serving.api.errors import ApiError
from serving.api.pictures import to_png
from tests.serving.api.conftest import Client, picture, serving, written
from tests.serving.api.fake_dispatcher import make_service

PROMPT = "A red disc"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder: Path = tmp_path_factory.mktemp("refused")
    service = make_service(folder, http={"url_hosts": ["pictures.example", "localhost", "127.0.0.1"], "max_body_mb": 12.0})
    with serving(service) as address, Client(base_url=address, timeout=20) as client:
        client.service = service
        yield client
        assert written(service) == (0, [])


def assert_refused(client: Client, status: int, code: str, answer: httpx2.Response, param: str | None = None) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    assert error["message"].endswith((".", "?", "!")) and len(error["message"]) <= 600 and "Traceback" not in answer.text
    if param is not None:
        assert error["param"] == param
    assert written(client.service) == (0, [])


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("evil.txt", "evil")
    return file.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, pixels: bytes, *chunks: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _in_jpeg(payload: bytes) -> bytes:
    plain = picture(kind="JPEG")
    return plain[:2] + b"\xff\xfe" + struct.pack(">H", len(payload) + 2) + payload + plain[2:]


def _gif() -> bytes:
    file = io.BytesIO()
    Image.new("P", (32, 32)).save(file, "GIF")
    return file.getvalue()


def _moving(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), (40 * k, 0, 0)) for k in range(3)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


PICTURES = {
    "PNG and ZIP": (picture() + _zip(), "bad_image"),
    "PNG with a ZIP in a chunk": (_png(32, 32, zlib.compress(bytes(97 * 32)), _chunk(b"zIPp", _zip())), "bad_image"),
    "PNG and HTML": (picture() + b"<html><script>alert(1)</script>", "bad_image"),
    "PNG with HTML in its text": (
        _png(32, 32, zlib.compress(bytes(97 * 32)), _chunk(b"tEXt", b"Comment\0<script>alert(1)</script>")),
        "bad_image",
    ),
    "JPEG and PHP": (picture(kind="JPEG") + b"<?php system($_GET['c']); ?>", "bad_image"),
    "JPEG with PHP in a comment": (_in_jpeg(b"<?php system($_GET['c']); ?>"), "bad_image"),
    "two JPEGs": (picture(kind="JPEG") * 2, "bad_image"),
    "WebP and ZIP": (picture(kind="WEBP") + _zip(), "bad_image"),
    "40 megapixels": (picture(8000, 5000, optimize=False), "image_too_large"),
    "40 megapixels in the header": (_png(8000, 5000, b""), "image_too_large"),
    "a gigapixel in the header": (_png(2**31 - 1, 2**31 - 1, b""), "image_too_large"),
    "a line of pixels": (_png(20_000, 16, b""), "image_too_large"),
    "a bomb of pixels": (_png(64, 64, zlib.compress(bytes(50_000_000), 9)), None),
    "a bomb in its text": (
        _png(32, 32, zlib.compress(bytes(97 * 32)), _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000), 9))),
        None,
    ),
    "no pixels": (_png(32, 32, b""), "bad_image"),
    "no size": (_png(0, 0, b""), "bad_image"),
    "a pixel": (picture(1, 1), "bad_image"),
    "truncated PNG": (picture()[:-20], "bad_image"),
    "truncated JPEG": (picture(kind="JPEG")[:-20], "bad_image"),
    "truncated WebP": (picture(kind="WEBP")[:-20], "bad_image"),
    "damaged PNG": (picture()[:50] + b"?" + picture()[51:], "bad_image"),
    "moving WebP": (_moving("WEBP"), "bad_image"),
    "moving PNG": (_moving("PNG"), "bad_image"),
    "GIF": (_gif(), "bad_image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "bad_image"),
    "XML": (b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>', "bad_image"),
    "HTML": (b"<html></html>", "bad_image"),
    "PDF": (b"%PDF-1.7\n", "bad_image"),
    "ZIP": (_zip(), "bad_image"),
    "BMP": (picture(kind="BMP"), "bad_image"),
    "TIFF": (picture(kind="TIFF"), "bad_image"),
    "nothing": (b"", "bad_image"),
}


@pytest.mark.parametrize("name", [name for name, (_, code) in PICTURES.items() if code])
def test_pictures_that_are_none_or_more_than_one_thing(client: Client, name: str) -> None:
    data, code = PICTURES[name]
    answer = client.post("/generate", data={"prompt": PROMPT}, files={"first_frame": ("a.png", data, "image/png")})
    assert code is not None
    assert_refused(client, 400, code, answer, "first_frame")


@pytest.mark.parametrize("name", [name for name, (_, code) in PICTURES.items() if code is None])
def test_bombs_are_never_unpacked(tmp_path: Path, name: str) -> None:
    """More data than the header tells of is left packed: the picture passes, or is refused, and no memory is spent on it."""
    data = PICTURES[name][0]
    assert len(data) < 100_000
    tracemalloc.start()
    with contextlib.suppress(ApiError):
        assert Image.open(io.BytesIO(to_png(data, "first_frame", max_bytes=10**7, max_px=10**6))).size in ((64, 64), (32, 32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        ("not base64 at all!", 400, "bad_image"),
        ("data:text/html;base64,PGI+", 400, "bad_image"),
        ("data:image/png,raw", 400, "bad_image"),
        ("../../etc/passwd", 400, "bad_image"),
        ("/etc/passwd", 400, "bad_image"),
        ("file:///etc/passwd", 400, "bad_image"),
        ("ftp://pictures.example/a.png", 400, "bad_image"),
        ("http://pictures.example/a.png", 400, "invalid_url"),
        ("https://pictures.example:8443/a.png", 400, "invalid_url"),
        ("https://user@pictures.example/a.png", 400, "invalid_url"),
        ("https://[::1/a.png", 400, "invalid_url"),
        ("https://other.example/a.png", 403, "url_not_allowed"),
        ("https://169.254.169.254/latest/meta-data", 403, "url_not_allowed"),
        ("https://10.0.0.1/a.png", 403, "url_not_allowed"),
        ("https://[::ffff:10.0.0.1]/a.png", 403, "url_not_allowed"),
        ("https://localhost/a.png", 403, "url_not_allowed"),  # listed, and yet not public
        ("https://127.0.0.1/a.png", 403, "url_not_allowed"),
        ("https://pictures.example@10.0.0.1/a.png", 400, "invalid_url"),
    ],
)
def test_pictures_from_places_that_are_not_for_clients(client: Client, given: str, status: int, code: str) -> None:
    assert_refused(client, status, code, client.post("/generate", json={"prompt": PROMPT, "first_frame": given}), "first_frame")


@pytest.mark.parametrize(
    "address", ["10.1.2.3", "169.254.169.254", "::1", "fe80::1", "::ffff:192.168.0.1", "64:ff9b::a00:1", "0.0.0.0"]
)
def test_a_listed_name_that_leads_inside(client: Client, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_dial(*_: Any) -> socket.socket:
        raise AssertionError("a connection was made")

    def fetch(url: str, hosts: Any, param: str, *, max_bytes: int) -> bytes:
        """With a name server of our own: one address of the name is public, the other is not."""
        resolve = {"pictures.example": ["93.184.215.14", address]}
        return fetching.fetch(url, hosts, param, max_bytes=max_bytes, resolve=lambda host, _: resolve[host], dial=no_dial)

    monkeypatch.setattr(submit, "fetch", fetch)
    answer = client.post("/generate", json={"prompt": PROMPT, "first_frame": "https://pictures.example/a.png"})
    assert_refused(client, 403, "url_not_allowed", answer, "first_frame")


def test_no_url_at_all_where_no_host_is_listed(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    with serving(service) as address, Client(base_url=address) as client:
        client.service = service
        answer = client.post("/generate", json={"prompt": PROMPT, "last_frame": "https://example.com/a.png"})
        assert_refused(client, 403, "url_not_allowed", answer, "last_frame")


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"size": "1000000x1000000"}, 422, "invalid_size", "size"),
        ({"size": "99999x99999"}, 400, "invalid_size", "size"),
        ({"size": "241x144"}, 400, "invalid_size", "size"),
        ({"size": "0x0"}, 422, "invalid_size", "size"),
        ({"size": "-240x144"}, 422, "invalid_size", "size"),
        ({"size": "８０x８０"}, 422, "invalid_size", "size"),
        ({"seconds": 60}, 400, "invalid_seconds", "seconds"),
        ({"seconds": 1e308}, 422, "invalid_seconds", "seconds"),
        ({"seconds": -1}, 422, "invalid_seconds", "seconds"),
        ({"steps": 1000}, 400, "invalid_steps", "steps"),
        ({"guidance_scale": 99}, 400, "invalid_guidance_scale", "guidance_scale"),
        ({"guidance_scale": "nan"}, 422, "invalid_guidance_scale", "guidance_scale"),
        ({"style": "no such"}, 400, "invalid_style", "style"),
        ({"kind": "image", "seconds": 2}, 400, "invalid_seconds", "seconds"),
        ({"kind": "image", "first_frame": "iVBORw0KGgo="}, 400, "invalid_request", "first_frame"),
        ({"kind": "image", "last_frame": "iVBORw0KGgo="}, 400, "invalid_request", "last_frame"),
        ({"kind": "song"}, 422, "invalid_kind", "kind"),
        ({"seed": 2**31}, 422, "invalid_seed", "seed"),
        ({"seed": 10**25}, 422, "invalid_seed", "seed"),
        ({"prompt": ""}, 422, "invalid_prompt", "prompt"),
        ({"prompt": "   "}, 422, "invalid_prompt", "prompt"),
        ({"prompt": "x" * 10_000_000}, 422, "invalid_prompt", "prompt"),
        ({"prompt": "nul \0 byte"}, 422, "invalid_characters", "prompt"),
        ({"prompt": None}, 422, "invalid_prompt", "prompt"),
        ({"negative_prompt": "half a pair \ud800"}, 422, "invalid_characters", "negative_prompt"),
        ({"promt": "x"}, 422, "unknown_field", "promt"),
        ({"output": "/etc/cron.d/x"}, 422, "unknown_field", "output"),
        ({"webhook_url": "http://169.254.169.254/"}, 400, "invalid_webhook_url", "webhook_url"),
    ],
)
def test_what_the_model_cannot_do_and_nobody_may_ask(
    client: Client, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    body = json.dumps({"prompt": PROMPT} | fields)
    answer = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert_refused(client, status, code, answer, param)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"prompt": "x", "guidance_scale": NaN}', 422, "invalid_json"),
        (b'{"prompt": "x", "guidance_scale": Infinity}', 422, "invalid_json"),
        (b'{"prompt": "x", "guidance_scale": 1e999}', 422, "invalid_json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 422, "invalid_json"),
        (b'{"prompt": "x", "prompt": "y"}', 422, "invalid_json"),
        (b'{"prompt": "x"', 422, "invalid_json"),
        (b'{"prompt": "\xff"}', 422, "invalid_json"),
        ('{"prompt": "x"}'.encode("utf-16"), 422, "invalid_json"),
        (b"[" * 100_000 + b"]" * 100_000, 422, "invalid_json"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 422, "invalid_json"),
        (b"[]", 422, "invalid_json"),
        (b"null", 422, "invalid_json"),
        (b"", 422, "invalid_json"),
        (b'{"prompt": "' + b"x" * 13_000_000 + b'"}', 413, "body_too_large"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bodies_that_are_no_json(client: Client, body: bytes, status: int, code: str) -> None:
    assert_refused(client, status, code, client.post("/generate", content=body, headers={"Content-Type": "application/json"}))


def test_a_body_without_a_length_is_counted_while_it_comes(client: Client) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(26):
            yield b"x" * 500_000

    with contextlib.suppress(httpx2.TransportError):  # the server may hang up before all is sent
        answer = client.post("/generate", content=pieces(), headers={"Content-Type": "application/json"})
        assert_refused(client, 413, "body_too_large", answer)
    assert written(client.service) == (0, [])


def test_bodies_of_other_kinds(client: Client) -> None:
    assert_refused(client, 415, "unsupported_media_type", client.post("/generate", data={"prompt": PROMPT}))
    assert_refused(
        client, 415, "unsupported_media_type", client.post("/generate", content=b"{}", headers={"Content-Type": "text/plain"})
    )
    assert_refused(client, 415, "unsupported_media_type", client.post("/generate"))
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert_refused(client, 415, "unsupported_encoding", client.post("/generate", content=b"{}", headers=packed))


def test_forms_with_too_much_or_twice(client: Client) -> None:
    many = {f"field{k}": "x" for k in range(60)}
    assert_refused(
        client, 422, "too_many_parts", client.post("/generate", data={"prompt": PROMPT} | many, files={"image": picture()})
    )
    twice = [("first_frame", ("a.png", picture())), ("first_frame", ("b.png", picture()))]
    assert_refused(client, 422, "duplicate_field", client.post("/generate", data={"prompt": PROMPT}, files=twice))
    both = {"image": picture(), "first_frame": picture()}
    assert_refused(client, 422, "duplicate_field", client.post("/generate", data={"prompt": PROMPT}, files=both))
    other = client.post("/generate", data={"prompt": PROMPT}, files={"../../x": picture()})
    assert_refused(client, 422, "unknown_field", other)
    head = {"Content-Type": "multipart/form-data; boundary=b"}
    cut = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nA disc'
    assert_refused(client, 422, "invalid_multipart", client.post("/generate", content=cut, headers=head))
    text = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--b--\r\n'
    assert_refused(client, 422, "invalid_multipart", client.post("/generate", content=text, headers=head))
    bare = client.post("/generate", content=cut, headers={"Content-Type": "multipart/form-data"})
    assert_refused(client, 422, "invalid_multipart", bare)
    big = client.post("/generate", data={"prompt": PROMPT, "first_frame": base64.b64encode(bytes(12_500_000)).decode()})
    assert big.status_code in (413, 415)


@pytest.mark.parametrize(
    "path",
    [
        "/jobs/..%2f..%2fetc%2fpasswd",
        "/jobs/../../etc/passwd",
        "/jobs/job_0123456789abcdef0123456g",
        "/jobs/job_0123456789abcdef01234567%00",
        "/jobs/job_0123456789abcdef01234567%0a",
        "/jobs/JOB_0123456789abcdef01234567",
        "/jobs/%2e%2e/video",
        "/jobs/..%5c..%5cx/video",
        "/jobs/job_0123456789abcdef01234567%2f..%2f..%2fjobs.sqlite/video",
        "/ui/..%2fsettings.py",
        "/ui/../settings.py",
        "/ui/%2e%2e%2fsettings.py",
        "/ui//etc/passwd",
    ],
)
def test_paths_that_lead_elsewhere(client: Client, path: str) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:  # a client library would tidy the path
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 ") and b'"not_found"' in answer
