"""A store that does not answer for a while: who waits goes on waiting, and who cannot is told where the job is."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from serving.api import submit, watching
from tests.serving.api.conftest import Client, Start, picture, written

AWAY = [
    OperationalError("select 1", {}, Exception("server closed the connection")),
    InterfaceError("select 1", {}, Exception("connection already closed")),
    NoConnectionFree("QueuePool limit of size 8 overflow 24 reached"),
]


def _away_from(client: Client, monkeypatch: pytest.MonkeyPatch, first: int, last: float) -> None:
    """`get` fails from its call number `first` to its call number `last`, each time in another way."""
    store, calls, errors = client.service.store, itertools.count(1), itertools.cycle(AWAY)
    get = store.get

    def away(*arguments: Any) -> Any:
        if first <= next(calls) <= last:
            raise next(errors)
        return get(*arguments)

    monkeypatch.setattr(store, "get", away)
    monkeypatch.setattr(watching, "AWAY_S", (0.001, 0.002))


def test_a_waiting_client_outlasts_a_store_that_comes_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start()
    _away_from(client, monkeypatch, 1, 6)
    answer = client.post("/generate", json={"prompt": "A disc", "steps": 2, "wait": True})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")


def test_a_listener_outlasts_a_store_that_comes_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(paint=False)
    job_id = client.post("/generate", json={"prompt": "A disc"}).json()["id"]
    _away_from(client, monkeypatch, 2, 7)
    states = []
    with client.stream("GET", f"/jobs/{job_id}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                states.append(json.loads(line[5:])["state"])
                client.service.store.cancel(job_id)
    assert states == ["queued", "cancelled"]


def test_a_waiting_client_that_is_sent_off_is_told_where_its_job_is(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(paint=False)
    monkeypatch.setattr(watching, "PATIENCE_S", 0.0)
    _away_from(client, monkeypatch, 1, float("inf"))
    answer = client.post("/generate", json={"prompt": "A disc", "wait": True})
    (job,) = client.service.store.list()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert (answer.headers["location"], answer.headers["x-waver-job"]) == (f"/jobs/{job.id}", job.id)
    assert job.id in answer.json()["error"]["message"] and "retry-after" in answer.headers
    assert job.state == "queued", "it goes on"


def test_a_waiting_client_whose_job_fails_is_told_which_it_was(start: Start) -> None:
    client = start()
    answer = client.post("/generate", json={"prompt": "fail", "wait": True})
    (job,) = client.service.store.list()
    assert (answer.status_code, answer.headers["x-waver-job"]) == (500, job.id)


def test_pictures_of_a_job_that_the_store_has_but_could_not_confirm_stay(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(paint=False)
    accept = client.service.store.submit

    def lost(*arguments: Any, **options: Any) -> Any:
        accept(*arguments, **options)
        raise AWAY[0]  # the connection broke after COMMIT

    monkeypatch.setattr(client.service.store, "submit", lost)
    answer = client.post("/generate", data={"prompt": "It moves"}, files={"first_frame": picture()})
    (job,) = client.service.store.list()
    assert answer.status_code == 503
    assert written(client.service) == (1, [job.id, f"{job.id}/first.png"])


def test_pictures_that_could_not_all_be_written_go_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(paint=False)
    write = submit.write_atomic

    def full(path: str, data: bytes) -> None:
        if path.endswith("last.png"):
            raise OSError("no space left on device")
        write(path, data)

    monkeypatch.setattr(submit, "write_atomic", full)
    answer = client.post("/generate", data={"prompt": "It moves"}, files={"first_frame": picture(), "last_frame": picture()})
    assert (answer.status_code, written(client.service)) == (500, (0, []))
