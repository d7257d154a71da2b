"""The store's database: what is refused, what survives, which indexes are used."""

from __future__ import annotations

import math
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event

from serving.store import JobStore
from serving.tables import JOBS
from tests.serving.jobs_to_test import begin, finish, submit
from waver_core.errors import BackendUnavailable, ConfigError


def test_nan_is_not_written(store: JobStore) -> None:
    with pytest.raises((ValueError, sqlalchemy.exc.StatementError), match="JSON"):
        submit(store, request={"guidance_scale": math.nan})
    assert store.counts()["queued"] == 0


def test_everything_is_there_after_a_restart(store: JobStore, store_url: str, clock: Any) -> None:
    ended, running, waiting = finish(store, begin(store)), begin(store), submit(store, idempotency_key="k")
    store.close()
    again = JobStore(store_url, clock=clock)
    assert {job.id: job for job in again.list()} == {job.id: job for job in (ended, running, waiting)}
    assert finish(again, running).state == "completed"
    again.ping()
    again.close()


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_connections_that_the_server_has_dropped_are_replaced(store: JobStore, postgres: str) -> None:
    job = submit(store)
    engine = sqlalchemy.create_engine(postgres)
    with engine.begin() as connection:
        dropped = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'openwaver'"
        assert connection.exec_driver_sql(dropped).all()
    engine.dispose()
    assert store.get(job.id) == job
    assert finish(store, store.claim("w") or job).state == "completed"


def test_another_schema_version_is_refused(store: JobStore, store_url: str) -> None:
    with store.write() as connection:
        connection.exec_driver_sql("UPDATE waver_meta SET value = '0'")
    with pytest.raises(ConfigError, match=r"schema version 0.*serving\.storage\.database"):
        JobStore(store_url)


def test_progress_does_not_wait_for_the_disk_and_all_else_does(store: JobStore, store_url: str) -> None:
    question = "PRAGMA synchronous" if store_url.startswith("sqlite") else "SHOW synchronous_commit"
    kept, loose = (2, 1) if store_url.startswith("sqlite") else ("on", "off")
    for durable in (True, False, True):
        with store.write(durable=durable) as connection:
            assert connection.exec_driver_sql(question).scalar() == (kept if durable else loose)


def test_an_error_in_a_transaction_takes_all_of_it_back(store: JobStore) -> None:
    job = submit(store)
    with pytest.raises(RuntimeError, match="midst"), store.write() as connection:
        connection.execute(sqlalchemy.update(JOBS).values(state="failed"))
        raise RuntimeError("in the midst")
    assert store.get(job.id) == job


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("sqlite:///file:x?mode=memory&uri=true", "name a file"),
        ("mysql://root@host/x", "sqlite:///"),
        ("no url", "sqlite:///"),
        ("oracle9://x", "sqlite:///"),
        ("postgresql+psycopg://user:secret@127.0.0.1:9/x", "cannot be opened"),
    ],
)
def test_a_database_of_no_use_is_refused_with_one_line(url: str, said: str) -> None:
    with pytest.raises((ConfigError, BackendUnavailable)) as caught:
        JobStore(url)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_text("not a database" * 100)
    with pytest.raises(ConfigError, match=r"not a database.*serving\.storage\.database"):
        JobStore(f"sqlite:///{tmp_path}/jobs.sqlite")


def test_frequent_questions_use_their_indexes(tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite", clock=lambda: 1.0)
    job = submit(store)
    plans: dict[str, str] = {}
    plain = sqlite3.connect(tmp_path / "jobs.sqlite")

    @event.listens_for(store._engine, "before_cursor_execute")
    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.lstrip().startswith(("SELECT", "UPDATE", "DELETE")):
            rows = plain.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans[statement] = "; ".join(row[3] for row in rows)

    def plan_of(call: Any) -> str:
        plans.clear()
        call()
        assert plans
        return "; ".join(plans.values())

    expected = {
        "waver_jobs_queue": [
            lambda: store.claim("w"),
            lambda: store.ahead(job),
            lambda: submit(store, max_queued_of_owner=9),
            lambda: store.time_out_waiting(9),
        ],
        "waver_jobs_running": [lambda: store.heartbeat("w"), lambda: store.reclaim(5, 3)],
        "waver_jobs_expiring": [lambda: store.expire(1.0)],
        "waver_jobs_made": [lambda: store.recent_stage_seconds(9)],
        "waver_jobs_finished": [lambda: store.forget(1.0)],
        "waver_jobs_of_owner": [lambda: store.list("local", after=job.id)],
        "waver_jobs_by_time": [lambda: store.list(after=job.id)],
        "waver_jobs_ended": [lambda: store.counts()],
        "waver_events_due": [lambda: store.due_events(1.0, 9, "w")],
    }
    for index, calls in expected.items():
        for call in calls:
            plan = plan_of(call)
            assert index in plan, plan
            assert not re.search(r"SCAN waver_(jobs|events)(;|$)", plan), plan
            # Only those few that wait too long are sorted.
            assert ("TEMP B-TREE" in plan) == (call.__code__.co_names[-1] == "time_out_waiting"), plan
    plain.close()
    store.close()
