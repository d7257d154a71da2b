"""Results over HTTP: whole or in part (Range, If-Range, ETag, HEAD), read piece by piece from the disk."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.api.errors import ApiError
from serving.api.service import Service
from serving.jobs import Job

CHUNK_BYTES = 256 * 1024
MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png"}
_CSP = "default-src 'none'; media-src 'self'; img-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""A browser shows a film in a page of its own making, which needs these."""


@dataclass(frozen=True)
class OpenFile:
    """A result, opened: it can be read to its end even if it is deleted meanwhile."""

    file: BinaryIO
    n_bytes: int
    modified_s: float
    etag: str
    media_type: str
    name: str


def open_result(service: Service, job: Job, relative: str | None) -> OpenFile:
    """Open a file of a job; raises `ApiError` 409, 410 while or because there is none. Blocks."""
    if job.state == "expired":
        raise ApiError(410, "expired", "The result was deleted when its time was over: generate it again with the same seed.")
    if relative is None:
        if not job.ended:
            raise ApiError(409, "not_ready", f"The job is {job.state.replace('_', ' ')}: ask again when its link is set.")
        if job.state == "completed":
            raise ApiError(409, "no_preview", "The job made no preview, for it needed no refiner: take its video.")
        raise ApiError(409, job.state, f"The job was {job.state} and has no result: GET /jobs/{job.id} says why.")
    root = (service.folder / "jobs" / job.id).resolve()
    path = (service.folder / relative).resolve()
    if path.parent != root or path.suffix not in MEDIA_TYPES:
        raise RuntimeError(f"{job.id} names a file outside its folder: {relative}")
    return open_file(path, job.id)


def open_file(path: Path, job_id: str) -> OpenFile:
    """Open a file for sending; `ApiError` 410 where it is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise ApiError(410, "gone", "The result's file is no longer there: generate it again with the same seed.") from None
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode):
        file.close()
        raise RuntimeError(f"{path.name} of {job_id} is no plain file")
    etag = f'"{job_id[4:]}-{path.stem}-{about.st_size:x}-{about.st_mtime_ns:x}"'
    name = f"waver-{job_id}{'-preview' if 'preview' in path.stem else ''}{path.suffix}"
    return OpenFile(file, about.st_size, about.st_mtime, etag, MEDIA_TYPES[path.suffix], name)


def respond(request: Request, opened: OpenFile, *, download: bool = False, headers: dict[str, str] | None = None) -> Response:
    """200, 206 or 304 for a file that was opened; raises `ApiError` 416. The response closes the file."""
    common = {
        "Accept-Ranges": "bytes",
        "ETag": opened.etag,
        "Last-Modified": formatdate(opened.modified_s, usegmt=True),
        "Cache-Control": "private, no-cache",
        "Content-Security-Policy": _CSP,
        **(headers or {}),
    }
    reads = request.method in ("GET", "HEAD")
    if reads and _unchanged(request, opened):
        opened.file.close()
        return Response(status_code=304, headers=common)
    common["Content-Disposition"] = f'{"attachment" if download else "inline"}; filename="{opened.name}"'
    start, end = 0, opened.n_bytes
    wanted = request.headers.get("range") if request.method == "GET" and _range_applies(request, opened) else None
    if wanted is not None:
        try:
            found = parse_range(wanted, opened.n_bytes)
        except ApiError:
            opened.file.close()
            raise
        if found is not None:
            start, end = found
            common["Content-Range"] = f"bytes {start}-{end - 1}/{opened.n_bytes}"
    status = 206 if "Content-Range" in common else 200
    return FileSlice(opened, start, end, status, common)


def parse_range(header: str, n_bytes: int) -> tuple[int, int] | None:
    """[start, end) of a single range; None where the header is to be ignored (several ranges, other units, nonsense).

    Raises `ApiError` 416 where the file has none of the bytes asked for.
    """
    match = re.fullmatch(r"\s*bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})\s*", header, re.IGNORECASE)
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, end = max(0, n_bytes - int(match[2])), n_bytes
    else:
        start, end = int(match[1]), min(n_bytes, int(match[2]) + 1) if match[2] else n_bytes
        if match[2] and int(match[2]) < start:
            return None
    if start >= end:
        message = f"The file has {n_bytes} bytes: ask for a range inside."
        raise ApiError(416, "invalid_range", message, param="Range", headers={"Content-Range": f"bytes */{n_bytes}"})
    return start, end


def _unchanged(request: Request, opened: OpenFile) -> bool:
    """If-None-Match, or else If-Modified-Since."""
    tags = request.headers.get("if-none-match")
    if tags is not None:
        return tags.strip() == "*" or opened.etag in {t.strip().removeprefix("W/") for t in tags.split(",")}
    since = _date(request.headers.get("if-modified-since"))
    return since is not None and int(opened.modified_s) <= since


def _range_applies(request: Request, opened: OpenFile) -> bool:
    """If-Range: the part is of use only while the whole is still the same."""
    header = request.headers.get("if-range")
    if header is None or header == opened.etag:
        return True
    return _date(header) == int(opened.modified_s)


def _date(text: str | None) -> int | None:
    try:
        return int(parsedate_to_datetime(text).timestamp()) if text else None
    except (ValueError, TypeError, OverflowError):
        return None


class FileSlice(Response):
    """Bytes [start, end) of a file, a piece at a time; the body is left out for HEAD."""

    def __init__(self, opened: OpenFile, start: int, end: int, status: int, headers: dict[str, str]) -> None:
        self._opened, self._start, self._end = opened, start, end
        self.status_code, self.media_type, self.background = status, opened.media_type, None
        self.body = b""
        self.init_headers({**headers, "Content-Length": str(end - start)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the file is closed whatever happens."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
            else:
                await self._send_body(send)
        finally:
            self._opened.file.close()

    async def _send_body(self, send: Send) -> None:
        fd, at = self._opened.file.fileno(), self._start
        while at < self._end:
            data = await anyio.to_thread.run_sync(partial(os.pread, fd, min(CHUNK_BYTES, self._end - at), at))
            if not data:
                raise RuntimeError(f"{self._opened.name} became shorter while it was sent")
            at += len(data)
            await send({"type": "http.response.body", "body": data, "more_body": at < self._end})
        if self._start == self._end:
            await send({"type": "http.response.body", "body": b""})
