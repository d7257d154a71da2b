"""Webhooks against a server on this machine: signed, tried again, never redirected, never to a host that is not listed."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import webhooks
from serving.jobs import Job
from serving.settings import Http
from serving.store import JobStore
from serving.webhooks import Webhooks, check_webhook_url, pause_s, sign, verify
from waver_core.errors import ConfigError, UserError

SECRET = b"a secret of the test"


@dataclass
class Receiver:
    """A server that keeps what it is sent and answers with the next of `answers`, 200 after them."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    calls: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    pause_s: float = 0.0

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.calls]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    kept = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.calls.append(({name.lower(): value for name, value in self.headers.items()}, body))
            time.sleep(kept.pause_s)
            status = kept.answers.pop(0) if kept.answers else 200
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", f"{kept.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            """Nothing: the test's output is not a log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    kept.url = f"http://127.0.0.1:{server.server_port}"
    yield kept
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def plain_store(tmp_path: Any, clock: Any) -> Iterator[JobStore]:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite", clock=clock)
    yield store
    store.close()


@pytest.fixture
def make(plain_store: JobStore, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Webhooks]:
    """Webhooks of the store for listed hosts."""
    monkeypatch.setenv("WAVER_WEBHOOK_SECRET", SECRET.decode())

    def made(*hosts: str, view: Callable[[Job], dict[str, Any]] = lambda job: {"id": job.id, "state": job.state}) -> Webhooks:
        return Webhooks(plain_store, Http(webhook_hosts=hosts, webhook_attempts=3), view)

    return made


def ended_job(store: JobStore, url: str, job_id: str = "job_1") -> str:
    """A job that is cancelled at once, and so owes a call."""
    options: dict[str, Any] = {"priority": 1, "resolved": {}, "request_digest": "d", "max_queued": 99}
    store.submit(job_id, "local", {}, webhook_url=url, **options)
    store.cancel(job_id)
    return job_id


def test_a_call_is_signed_and_made_once(receiver: Receiver, plain_store: JobStore, make: Any, clock: Any) -> None:
    job_id = ended_job(plain_store, f"{receiver.url}/hook?x=1")
    hooks = make("127.0.0.1")
    assert hooks.send_due() == 1
    assert hooks.send_due() == 0
    ((headers, body),) = receiver.calls
    told = json.loads(body)
    assert told["data"] == {"id": job_id, "state": "cancelled"}
    assert (told["type"], told["created_at"]) == ("job.cancelled", clock.now)
    assert headers["content-type"] == "application/json"
    assert (headers["x-waver-event"], headers["x-waver-delivery"]) == ("job.cancelled", told["id"])
    assert verify(SECRET, headers["x-waver-signature"], body, clock.now)
    assert plain_store.event_counts() == {"pending": 0, "delivered": 1, "failed": 0}


def test_a_failed_call_is_repeated_with_growing_pauses_under_one_id(
    receiver: Receiver, plain_store: JobStore, make: Any, clock: Any
) -> None:
    ended_job(plain_store, receiver.url)
    receiver.answers = [500, 404]
    hooks = make("127.0.0.1")
    assert hooks.send_due() == 0
    for attempt, delivered in ((1, 0), (2, 1)):
        clock.advance(pause_s(attempt) - 1)
        assert hooks.send_due() == 0
        assert len(receiver.calls) == attempt
        clock.advance(1)
        assert hooks.send_due() == delivered
    assert len({told["id"] for told in receiver.bodies()}) == 1
    signatures = {headers["x-waver-signature"] for headers, _ in receiver.calls}
    assert len(signatures) == len(receiver.calls) == 3  # each of its own time, or the last would be too old
    assert plain_store.event_counts()["delivered"] == 1


def test_after_the_last_try_it_is_kept_as_failed(receiver: Receiver, plain_store: JobStore, make: Any, clock: Any) -> None:
    job_id = ended_job(plain_store, receiver.url)
    receiver.answers = [503] * 9
    hooks = make("127.0.0.1")
    for _ in range(5):
        hooks.send_due()
        clock.advance(10_000)
    assert len(receiver.calls) == 3
    ((_, state, attempts, note),) = plain_store.events_of(job_id)
    assert (state, attempts, note) == ("failed", 3, "answered 503")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(receiver: Receiver, plain_store: JobStore, make: Any, status: int) -> None:
    job_id = ended_job(plain_store, receiver.url)
    receiver.answers = [status]
    assert make("127.0.0.1").send_due() == 0
    assert len(receiver.calls) == 1
    assert plain_store.events_of(job_id)[0][3] == f"answered {status}"


def test_a_host_that_is_not_listed_any_more_is_never_called(receiver: Receiver, plain_store: JobStore, make: Any) -> None:
    job_id = ended_job(plain_store, receiver.url)
    assert make("example.com").send_due() == 0
    assert receiver.calls == []
    ((_, state, _, note),) = plain_store.events_of(job_id)
    assert state == "failed"
    assert "webhook_hosts" in note


def test_the_environment_does_not_lead_calls_elsewhere(
    receiver: Receiver, plain_store: JobStore, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    ended_job(plain_store, receiver.url)
    assert make("127.0.0.1").send_due() == 1


def test_a_receiver_that_is_not_there_is_tried_again(plain_store: JobStore, make: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job_id = ended_job(plain_store, f"http://127.0.0.1:{port}/")
    assert make("127.0.0.1").send_due() == 0
    ((_, state, attempts, note),) = plain_store.events_of(job_id)
    assert (state, attempts) == ("pending", 1)
    assert note.startswith("ConnectError")


def test_a_slow_receiver_is_given_up_and_holds_up_nobody(
    receiver: Receiver, plain_store: JobStore, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.3)
    slow = [ended_job(plain_store, receiver.url, f"job_{number}") for number in range(6)]
    receiver.pause_s = 0.8
    start = time.monotonic()
    assert make("127.0.0.1").send_due() == 0
    assert time.monotonic() - start < 6 * 0.3
    for job_id in slow:
        ((_, state, _, note),) = plain_store.events_of(job_id)
        assert state == "pending"
        assert "Timeout" in note


def test_one_that_cannot_be_made_does_not_hold_up_others(receiver: Receiver, plain_store: JobStore, make: Any) -> None:
    ended_job(plain_store, receiver.url, "job_bad")
    ended_job(plain_store, receiver.url, "job_good")

    def view(job: Job) -> dict[str, Any]:
        return {"id": job.id, "progress": float("nan") if job.id == "job_bad" else 1.0}

    assert make("127.0.0.1", view=view).send_due() == 1
    assert [told["data"]["id"] for told in receiver.bodies()] == ["job_good"]
    assert plain_store.event_counts() == {"pending": 1, "delivered": 1, "failed": 0}


def test_an_event_whose_senders_died_ends_too(receiver: Receiver, plain_store: JobStore, make: Any, clock: Any) -> None:
    job_id = ended_job(plain_store, receiver.url)
    for _ in range(3):
        plain_store.due_events(clock.now, 1, "dies")
        clock.advance(61)
    assert make("127.0.0.1").send_due() == 0
    assert receiver.calls == []
    assert plain_store.events_of(job_id)[0][1] == "failed"


def test_more_events_than_go_at_once_all_go(receiver: Receiver, plain_store: JobStore, make: Any) -> None:
    for number in range(webhooks.TOGETHER + 3):
        ended_job(plain_store, receiver.url, f"job_{number}")
    assert make("127.0.0.1").send_due() == webhooks.TOGETHER + 3
    assert len({told["id"] for told in receiver.bodies()}) == webhooks.TOGETHER + 3


def test_hosts_without_a_secret_are_refused(plain_store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_SECRET", raising=False)
    with pytest.raises(ConfigError, match="MY_SECRET"):
        Webhooks(plain_store, Http(webhook_hosts=("h",), webhook_secret_env="MY_SECRET"), lambda job: {})
    assert Webhooks(plain_store, Http(webhook_secret_env="MY_SECRET"), lambda job: {}).send_due() == 0


@pytest.mark.parametrize(
    "url", ["https://Good.example/x", "http://good.example", "https://port.example:8443/", "http://[::1]:80/"]
)
def test_listed_hosts_may_be_called(url: str) -> None:
    check_webhook_url(url, ("GOOD.example", "port.example:8443", "::1"))


@pytest.mark.parametrize(
    "url",
    [
        "https://bad.example/",
        "https://good.example.bad.example/",
        "https://good.example@bad.example/",
        "https://bad.example/https://good.example",
        "https://bad.example\\@good.example/",
        "https://user:word@good.example/",
        "https://good.example./",
        "https://port.example/",
        "https://port.example:80/",
        "ftp://good.example/",
        "file:///etc/passwd",
        "//good.example/",
        "good.example",
        "",
        "http://",
        "http://good.example\0/",
        "http://good.example\r\nX: y/",
        "http://\ud800/",
        "http://2130706433/",
        "http://good.example:99999999/",
    ],
)
def test_others_may_not(url: str) -> None:
    with pytest.raises(UserError, match="webhook_url") as caught:
        check_webhook_url(url, ("good.example", "port.example:8443"))
    assert "\n" not in str(caught.value)


def test_a_signature_is_of_this_secret_this_body_and_this_hour() -> None:
    header = sign(SECRET, b"{}", 1000)
    assert verify(SECRET, header, b"{}", 1000)
    assert verify(SECRET, header, b"{}", 1300)
    assert verify(SECRET, header, b"{}", 700)
    assert not verify(SECRET, header, b"{}", 1300.1)
    assert not verify(SECRET, header, b"{}", 699)
    assert not verify(SECRET, header, b"{} ", 1000)
    assert not verify(b"another", header, b"{}", 1000)
    assert not verify(SECRET, header.replace("t=1000", "t=1001"), b"{}", 1000)
    # As openssl has it: printf '1.b' | openssl dgst -sha256 -hmac k
    assert sign(b"k", b"b", 1) == "t=1,v1=2946e37a45bb02a0bf1bf1a7d9219543801fedd301f9f485aebd72c928639bea"


@given(st.text())
def test_any_header_is_answered_without_an_error(header: str) -> None:
    assert verify(SECRET, header, b"{}", 0) is False
    assert verify(SECRET, f"t={header},v1={header}", b"{}", 0) is False
