"""A client of the server's HTTP, for `waver` and scripts: patient with restarts, never making a job twice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx2

from serving.jobs import ENDED
from waver_core.errors import RunFailed, UserError

Job = dict[str, Any]
"""A job as `GET /jobs/{id}` shows it."""
_JOB_ID = re.compile(r"job_[0-9a-f]{24}")
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_SILENCE_S = 40.0
"""The server sends at least a comment every 15 s while events are awaited."""
_LONGEST_PAUSE_S = 4.0
_CONNECT_S = 10.0
_AWAY = {502, 503, 504}
"""What a server, or the proxy before it, answers while it restarts."""


class Refused(UserError):
    """The server says no. `status`, `code`: as it says."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Client:
    """Speaks to one server. `timeout_s` bounds everything that is done with it; `say` is told, in a line, why it waits."""

    def __init__(
        self,
        server: str,
        key: str = "",
        *,
        timeout_s: float = 3600.0,
        say: Callable[[str], None] = lambda _: None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        scheme, host = _address(server)
        if not (key.isascii() and key.isprintable()):
            raise UserError("WAVER_API_KEY holds characters that no key has: set it anew")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A proxy of the environment knows nothing of servers on this machine; its certificates hold here, too.
        self._http = httpx2.Client(
            base_url=server,
            headers=headers,
            timeout=httpx2.Timeout(30.0, connect=_CONNECT_S),
            trust_env=host not in _LOOPBACK,
            verify=_certificates(scheme),
            transport=transport,
        )
        self._server, self._say = server, say
        self._timeout_s, self._until = timeout_s, time.monotonic() + timeout_s
        self._heard = False

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def submit(self, fields: Mapping[str, Any], files: Mapping[str, tuple[str, bytes]] | None = None) -> Job:
        """`POST /generate`. Asked again with the same key where the answer got lost, or after a pause where the queue is full."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        if not files:
            return self._json("POST", "/generate", headers=headers, json=dict(fields))
        texts = {name: json.dumps(value) if isinstance(value, bool) else str(value) for name, value in fields.items()}
        return self._json("POST", "/generate", headers=headers, data=texts, files=dict(files))

    def job(self, job_id: str) -> Job:
        """A job as it is now."""
        return self._json("GET", f"/jobs/{checked(job_id)}")

    def jobs(self, limit: int = 20, state: str | None = None) -> list[Job]:
        """The newest jobs of this key."""
        asked = {"limit": limit, **({"state": state} if state else {})}
        data: list[Job] = self._json("GET", "/jobs", params=asked)["data"]
        return data

    def cancel(self, job_id: str) -> Job:
        """End a job that has not ended. (`DELETE` would delete one that was completed just before.)"""
        return self._json("POST", f"/jobs/{checked(job_id)}/cancel")

    def follow(self, job_id: str, told: Callable[[Job], None]) -> Job:
        """`told` of every change until the job has ended; by events, and by asking where no events come."""
        path, last, failures = f"/jobs/{checked(job_id)}/events", "", 0
        while True:
            with contextlib.suppress(httpx2.TransportError):
                for seen, job in self._events(path, last):
                    last, failures = seen, 0
                    told(job)
                    if job["state"] in ENDED:
                        return job
            job = self.job(job_id)
            told(job)
            if job["state"] in ENDED:
                return job
            self._pause(failures, f"{job_id} has not ended and goes on; fetch it later with `waver download {job_id}`")
            failures += 1

    def download(self, path: str, target: Path) -> int:
        """A file of a job into `target`, which is there whole or not at all: its bytes. Raises `Refused`, `RunFailed`."""
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        failures = 0
        try:
            while True:
                with contextlib.suppress(httpx2.TransportError), self._http.stream("GET", path) as response:
                    if response.status_code == 200:
                        with part.open("wb") as file:
                            for chunk in response.iter_bytes():
                                file.write(chunk)
                        os.replace(part, target)
                        return target.stat().st_size
                    self._refuse(response)
                self._pause(failures, f"the file could not be fetched from {self._server}")
                failures += 1
        except OSError as error:
            raise UserError(f"{target}: cannot be written ({error.strerror}); give another file with -o") from None
        finally:
            part.unlink(missing_ok=True)

    def _events(self, path: str, last: str) -> Iterator[tuple[str, Job]]:
        """(id, job) of each event after `last`; ends with the stream."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
        timeout = httpx2.Timeout(10.0, read=min(_SILENCE_S, max(0.1, self._left_s())))
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                return self._refuse(response)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                return None
            event, data = "message", ""
            for line in response.iter_lines():
                if self._left_s() <= 0:
                    return None
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if name == "event":
                    event = value
                elif name == "id":
                    last = value
                elif name == "data":
                    data += value
                elif not line:
                    if event == "deleted":
                        raise Refused(404, "deleted", "the job was deleted while it was followed")
                    if event == "job" and data:
                        yield last, json.loads(data)
                    event, data = "message", ""

    def _json(self, method: str, path: str, **options: Any) -> Any:
        failures = 0
        while True:
            try:
                response = self._http.request(method, path, **options)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if not self._heard:
                    raise UserError(_unreachable(self._server, error)) from None
            except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
                raise UserError(f"--server {self._server}: {error}") from None
            except httpx2.TransportError:
                self._heard = True  # it was there, if only to break off: what was sent may have arrived
            else:
                self._heard = True
                if response.status_code < 400:
                    return _decoded(response, self._server)
                self._refuse(response)
                if response.status_code == 429:
                    self._wait(response)
                    continue
            self._pause(failures, f"{self._server} does not answer")
            failures += 1

    def _refuse(self, response: httpx2.Response) -> None:
        """Raise what an error says, unless it will pass."""
        self._heard = True
        status = response.status_code
        if status < 400 or status == 429 or status in _AWAY:
            return
        response.read()
        try:
            error = response.json()["error"]
            code, message = str(error["code"]), clean(str(error["message"]))
        except (ValueError, KeyError, TypeError):
            code, message = "unknown", f"{self._server} answered with status {status}: is it an OpenWaver server?"
        if status >= 500:
            raise RunFailed(message)
        raise Refused(status, code, message + (" (set WAVER_API_KEY)" if status == 401 else ""))

    def _wait(self, response: httpx2.Response) -> None:
        text = response.headers.get("retry-after", "")
        seconds = min(int(text), 600) if text.isdecimal() else 5
        try:
            reason = clean(str(response.json()["error"]["message"]))
        except (ValueError, KeyError, TypeError):
            reason = "the server is busy"
        if seconds > self._left_s():
            raise RunFailed(f"{reason} (--timeout is over before that)")
        self._say(f"{reason} Trying again in {seconds} s.")
        time.sleep(max(1, seconds))

    def _pause(self, failures: int, what: str) -> None:
        """Before trying again; raises `RunFailed` where the time is over."""
        pause = min(0.25 * 2**failures, _LONGEST_PAUSE_S)
        if pause > self._left_s():
            raise RunFailed(f"{what} (waited {self._timeout_s:g} s; --timeout allows for more)")
        if failures == 3:
            self._say(f"{self._server} is silent; trying again")
        time.sleep(pause)

    def _left_s(self) -> float:
        return self._until - time.monotonic()


def checked(job_id: str) -> str:
    """A job id that may stand in a path; raises `UserError`."""
    if not _JOB_ID.fullmatch(job_id):
        raise UserError(
            f"'{clean(job_id)[:60]}' is no job id: they look like job_0123456789abcdef01234567; `waver jobs` lists them"
        )
    return job_id


def clean(text: str) -> str:
    """One line without control characters: texts of others must not steer the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _address(server: str) -> tuple[str, str]:
    """Scheme and host of a server's URL; raises `UserError` where it is none."""
    try:
        parts = urlsplit(server)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        httpx2.URL(server)
    except (ValueError, httpx2.InvalidURL):
        good = False
    if not good:
        raise UserError(f"--server {clean(server)}: give a URL such as http://127.0.0.1:8000")
    return parts.scheme, str(parts.hostname)


def _certificates(scheme: str) -> ssl.SSLContext:
    """The authorities that are trusted: those of SSL_CERT_FILE, or the system's."""
    try:
        context: ssl.SSLContext = httpx2.create_ssl_context(trust_env=scheme == "https")
    except OSError as error:
        raise UserError(f"SSL_CERT_FILE or SSL_CERT_DIR cannot be used ({error}): name a file of certificates") from None
    return context


def _unreachable(server: str, error: BaseException) -> str:
    """Why a server that was never heard cannot be reached, and what to do about it."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in reversed(causes):  # the innermost knows best
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {server} is not trusted ({cause.verify_message}): set SSL_CERT_FILE to its authority's file"
            )
        if isinstance(cause, ssl.SSLError):
            return f"there is no TLS at {server} ({cause.reason or 'it broke off'}): a plain server's address begins with http://"
        if isinstance(cause, socket.gaierror):
            return f"the name in {server} does not resolve ({cause.strerror}): check --server"
    last = causes[-1]
    reason = f"no answer within {_CONNECT_S:g} s" if isinstance(error, httpx2.ConnectTimeout) else getattr(last, "strerror", None)
    hint = "start it with `make serve`, or name another with --server"
    return f"no server answers at {server} ({reason or clean(str(last))}): {hint}"


def _decoded(response: httpx2.Response, server: str) -> Any:
    try:
        return response.json()
    except ValueError:
        raise UserError(f"{server} answers, but not as an OpenWaver server: check --server") from None
