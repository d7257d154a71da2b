"""Who may ask: API keys with their limits, or, without keys, this machine alone."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, StringConstraints
from starlette.requests import Request

from serving.api.errors import ApiError
from serving.jobs import PRIORITIES
from waver_core.config import Strict, validate
from waver_core.errors import ConfigError

log = logging.getLogger("waver.http")
LOCAL = "local"
"""Owner of the jobs that come without a key."""
LOOK_S = 2.0
"""A change of the key file is seen after so long."""
_WINDOW_S = 60.0
_OF_PROXIES = (
    *("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto", "x-forwarded-server"),
    *("x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip"),
)
"""Headers that a proxy adds and no browser or program of this machine sends."""


class Key(Strict):
    """An entry of the key file. The key itself is nowhere: only its SHA-256, as `sha256sum` prints it."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Jobs belong to this name: a new key under an old name takes its jobs over."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: int = Field(600, ge=1)
    """Of any kind, counted by each HTTP replica for itself."""
    max_queued: int | None = Field(None, ge=1)
    """Waiting jobs of this key; None leaves it at the server's own limit."""
    priority_max: Literal["low", "normal", "high"] = "high"


class KeyFile(Strict):
    """`http.api_keys` names such a file."""

    keys: tuple[Key, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Caller:
    """Who asks, once that is known."""

    name: str
    max_queued: int | None = None
    priority_max: int = PRIORITIES["high"]


def read_keys(path: str) -> tuple[Key, ...]:
    """The keys of a file; raises `ConfigError` that names the file and the entry."""
    where = f"http.api_keys {path}"
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{where} cannot be read ({reason}): write `keys: [{{name: ..., sha256: ...}}]` into it") from error
    keys: tuple[Key, ...] = validate(KeyFile, raw, where).keys
    for what in ("name", "sha256"):
        values = [getattr(key, what) for key in keys]
        twice = sorted({v for v in values if values.count(v) > 1})
        if twice:
            raise ConfigError(f"{where}: {what} {twice[0]} stands there twice; each entry needs its own")
    return keys


class Gate:
    """Lets requests in. One in each replica; its counts are not shared.

    `key_file` is looked at again every few seconds, so keys come and go without a restart; one that has become wrong is told in
    the log, and the keys of before stay. Raises `ConfigError` where it is wrong at the start. None: this machine alone.
    """

    def __init__(self, key_file: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = key_file, clock
        self._stamp = _stamp(key_file) if key_file is not None else None
        self._keys = read_keys(key_file) if key_file is not None else ()
        self._looked_s = clock()
        self._asked: dict[str, deque[float]] = {}

    def admit(self, request: Request) -> Caller:
        """Who asks; raises `ApiError` 401, 403 or 429."""
        if self._file is None:
            _require_local(request)
            return Caller(LOCAL)
        if self._clock() - self._looked_s >= LOOK_S:
            self._look(self._file)
        key = self._key_of(request)
        self._count(key)
        return Caller(key.name, key.max_queued, PRIORITIES[key.priority_max])

    def _look(self, path: str) -> None:
        self._looked_s = self._clock()
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(path)
        except ConfigError as error:
            log.error("%s; the keys of before stay in force", error)
        else:
            log.warning("http.api_keys: read again, %d keys", len(self._keys))

    def _key_of(self, request: Request) -> Key:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "replace")).hexdigest()
        found = None
        for key in self._keys:  # all of them, so that the time says nothing
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None or scheme.lower() != "bearer":
            said = "This API key is not known" if token else "This server asks for an API key"
            message = f"{said}: send the header 'Authorization: Bearer <key>' with one from its operator."
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        return found

    def _count(self, key: Key) -> None:
        now = self._clock()
        asked = self._asked.setdefault(key.name, deque())
        while asked and asked[0] <= now - _WINDOW_S:
            asked.popleft()
        if len(asked) >= key.requests_per_minute:
            wait_s = max(1, int(asked[0] + _WINDOW_S - now) + 1)
            message = f"The key '{key.name}' may ask {key.requests_per_minute} times a minute: try again in {wait_s} s."
            raise ApiError(429, "rate_limited", message, headers={"Retry-After": str(wait_s)})
        asked.append(now)


def _stamp(path: str) -> tuple[int, int, int] | None:
    """Changes with the file, also where a link to it is laid anew, as for a mounted secret."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _require_local(request: Request) -> None:
    """Without keys: the client, the name it called us by, and the page that sent it must all be this machine's.

    The Host header stops DNS rebinding, Origin and Sec-Fetch-Site stop other web pages, and a forwarding header or HTTP/1.0,
    which nginx speaks to those behind it, tells of a proxy, behind which every client looks like this machine.
    """
    mend = "set http.api_keys to a key file to let others in"
    headers = request.headers
    if request.client is None or not _is_loopback(request.client.host):
        raise ApiError(403, "not_local", f"Without API keys only this machine itself may ask: {mend}.")
    told = next((name for name in _OF_PROXIES if name in headers), None)
    if told is None and request.scope.get("http_version") == "1.0":
        told = "HTTP/1.0"
    if told is not None:
        raise ApiError(403, "not_local", f"The request came through a proxy ({told}), so nobody knows from whom: {mend}.")
    host = headers.get("host", "")
    if not _is_loopback(_host_name(host)):
        raise ApiError(403, "not_local", f"The Host header must be localhost or a loopback address: call it so, or {mend}.")
    origin = headers.get("origin")
    if origin is not None and urlsplit_or_none(origin) != host:
        raise ApiError(403, "cross_site", f"Pages of other sites may not use this server: open its own page, or {mend}.")
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise ApiError(403, "cross_site", f"Pages of other sites may not use this server: open its own page, or {mend}.")


def urlsplit_or_none(origin: str) -> str | None:
    """host:port of an Origin header; None for "null" and for what is no address."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _host_name(host: str) -> str:
    """The Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _is_loopback(host: str) -> bool:
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
