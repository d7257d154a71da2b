"""Tell others that a job has ended: signed POSTs to hosts the operator has listed, tried again with growing pauses.

A receiver gets `{"id", "type", "created_at", "data"}`, `data` being the job as `GET /jobs/{id}` shows it. It answers 2xx within
ten seconds, checks `X-Waver-Signature` with `verify`, and drops an `id` it has seen: a call whose answer was lost is repeated.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import secrets
import ssl
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import httpx2

from serving.jobs import Job
from serving.settings import Http
from serving.store import JobStore
from serving.store_events import WebhookEvent
from waver_core.errors import ConfigError, UserError

TIMEOUT_S = 10.0
"""For one whole call, from the look-up of the name to the status line; the answer's body is not read."""
TOGETHER = 8
"""Calls under way at once. Well within the time that `due_events` lends them for."""
FIRST_PAUSE_S = 5.0
PAUSE_GROWTH = 4.0
"""Pauses of 5 s, 20 s, 80 s, 5 min and 21 min before the six tries of the default."""

_log = logging.getLogger(__name__)


class Webhooks:
    """Sends what `store` has due; `view` makes of a job what receivers may see.

    Raises `ConfigError` at once where hosts are listed but the secret is not set: an unsigned call could be anybody's.
    """

    def __init__(self, store: JobStore, http: Http, view: Callable[[Job], dict[str, Any]]) -> None:
        self._store = store
        self._http = http
        self._view = view
        self._worker = f"webhooks-{secrets.token_hex(4)}"
        self._secret = os.environ.get(http.webhook_secret_env, "").encode()
        if http.webhook_hosts and not self._secret:
            raise ConfigError(f"serving.http.webhook_hosts needs a secret to sign with: set {http.webhook_secret_env}")

    def send_due(self) -> int:
        """Make the calls that are due, some at once; returns how many were delivered. Blocks: not for an event loop's thread."""
        delivered = 0
        while events := self._store.due_events(self._store.clock(), TOGETHER, self._worker):
            delivered += asyncio.run(self._send_all(events))
        return delivered

    async def _send_all(self, events: Sequence[WebhookEvent]) -> int:
        # No environment proxies and no .netrc: the call goes to the listed host, with nothing that it was not given here.
        async with httpx2.AsyncClient(verify=self._tls, timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client:
            return sum(await asyncio.gather(*(self._send(client, event) for event in events)))

    async def _send(self, client: httpx2.AsyncClient, event: WebhookEvent) -> bool:
        """One try and its outcome in the store."""
        attempts = self._http.webhook_attempts
        job = self._store.get(event.job_id)
        if job is None or event.attempt > attempts:
            note = "the job is gone" if job is None else "its sender was lost in the last try"
            self._store.event_done(event.event_id, False, None, note)
            return False
        try:
            check_webhook_url(event.url, self._http.webhook_hosts)
        except UserError as error:
            self._store.event_done(event.event_id, False, None, str(error))
            return False
        try:
            note = await self._post(client, event, job)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            note = f"{type(error).__name__}: {error}"  # TimeoutError is an OSError
        except Exception as error:  # one event that cannot be made must not hold up those of other jobs
            _log.exception("webhook %s of %s could not be made", event.event_id, event.job_id)
            note = f"{type(error).__name__}: {error}"
        else:
            if note == "":
                self._store.event_done(event.event_id, True, None, "")
                return True
        next_at = self._store.clock() + pause_s(event.attempt) if event.attempt < attempts else None
        _log.warning("webhook %s of %s, try %d of %d: %s", event.event_id, event.job_id, event.attempt, attempts, note)
        self._store.event_done(event.event_id, False, next_at, note[:500])
        return False

    async def _post(self, client: httpx2.AsyncClient, event: WebhookEvent, job: Job) -> str:
        """Make the call; "" where it was taken, else what is wrong with the answer."""
        told = {"id": event.event_id, "type": event.type, "created_at": event.created_at, "data": self._view(job)}
        body = json.dumps(told, allow_nan=False).encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "openwaver",
            "X-Waver-Event": event.type,
            "X-Waver-Delivery": event.event_id,
            "X-Waver-Signature": sign(self._secret, body, int(self._store.clock())),
        }
        async with asyncio.timeout(TIMEOUT_S), client.stream("POST", event.url, content=body, headers=headers) as answer:
            return "" if answer.is_success else f"answered {answer.status_code}"

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx2.create_ssl_context(trust_env=False)


def pause_s(attempt: int) -> float:
    """Seconds after a failed try, the first being 1."""
    return float(FIRST_PAUSE_S * PAUSE_GROWTH ** (attempt - 1))


def check_webhook_url(url: str, hosts: Sequence[str]) -> None:
    """Raises `UserError` unless this is http(s) to a host of the list; an entry `name:port` is for that port alone.

    A listed name may be private, so its address is not looked at; that is the operator's choice, and the reason why a client
    cannot name a host of its own. The parser is the one that makes the call, so both see the same host.
    """
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise UserError(f"webhook_url is not a URL ({error}): use https://host/path") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise UserError("webhook_url must be https://host/path or http://host/path, without a user name")
    port = (443 if parsed.scheme == "https" else 80) if parsed.port is None else parsed.port
    if not 0 < port < 65536:
        raise UserError(f"webhook_url: {port} is no port")
    listed = {host.lower() for host in hosts}
    name = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
    if parsed.host.lower() not in listed and f"{name.lower()}:{port}" not in listed:
        raise UserError(f"webhook_url: the host '{parsed.host}' is not in serving.http.webhook_hosts")


def sign(secret: bytes, body: bytes, now: int) -> str:
    """The header `X-Waver-Signature`: when it was sent, and HMAC-SHA256 of that and the body."""
    return f"t={now},v1={_digest(secret, str(now), body)}"


def verify(secret: bytes, header: str, body: bytes, now: float, tolerance_s: float = 300) -> bool:
    """For receivers: whether a call is from the holder of the secret, whole, and not an old one sent again.

    `body` is the body as it came, before any parsing.
    """
    parts = dict(part.split("=", 1) for part in header.split(",") if "=" in part)
    sent_at, given = parts.get("t", ""), parts.get("v1", "")
    if not (sent_at.isascii() and sent_at.isdigit() and len(sent_at) <= 12 and given.isascii()):
        return False
    return hmac.compare_digest(_digest(secret, sent_at, body), given) and abs(now - int(sent_at)) <= tolerance_s


def _digest(secret: bytes, sent_at: str, body: bytes) -> str:
    return hmac.new(secret, f"{sent_at}.".encode() + body, hashlib.sha256).hexdigest()
