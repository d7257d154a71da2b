"""The job store under several threads and processes at once, and under kills, on SQLite and on PostgreSQL."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.jobs import QueueFull
from serving.store import JobStore

FORK = multiprocessing.get_context("fork")
PROCESSES, THREADS = 3, 4


def new_id() -> str:
    return f"job_{secrets.token_hex(12)}"


def submit(store: JobStore, **options: Any) -> tuple[str, bool]:
    """Accept a plain job: its id, and whether it is new."""
    settings: dict[str, Any] = {"priority": 1, "resolved": {}, "request_digest": "d", "max_queued": 1000}
    job, created = store.submit(new_id(), "local", {"prompt": "a red disc"}, **settings | options)
    return job.id, created


def everywhere_at_once(store: JobStore, work: Callable[[JobStore], Any]) -> list[Any]:
    """What `work` returns in each of 3 processes x 4 threads that start it at one moment, each process with its own store."""
    store.close()
    together = FORK.Barrier(PROCESSES * THREADS)
    answers = FORK.SimpleQueue()

    def thread(own: JobStore) -> None:
        try:
            together.wait(30)
            answers.put(work(own))
        except BaseException as error:
            answers.put(error)

    def process() -> None:
        own = JobStore(store._url.render_as_string(hide_password=False))
        threads = [threading.Thread(target=thread, args=(own,)) for _ in range(THREADS)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        own.close()

    processes = [FORK.Process(target=process) for _ in range(PROCESSES)]
    for one in processes:
        one.start()
    found = [answers.get() for _ in range(PROCESSES * THREADS)]
    for one in processes:
        one.join(30)
        assert one.exitcode == 0
    assert [answer for answer in found if isinstance(answer, BaseException)] == []
    return found


def test_processes_that_start_at_once_make_one_schema(store_url: str) -> None:
    together = FORK.Barrier(6)

    def process() -> None:
        together.wait(30)
        JobStore(store_url).close()

    processes = [FORK.Process(target=process) for _ in range(6)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(30)
    assert [one.exitcode for one in processes] == [0] * 6


def test_the_bound_holds(store: JobStore) -> None:
    def work(store: JobStore) -> int:
        accepted = 0
        for _ in range(4):
            try:
                accepted += submit(store, max_queued=17)[1]
            except QueueFull as full:
                assert 1 <= full.retry_after_s <= 120
        return accepted

    assert sum(everywhere_at_once(store, work)) == 17
    assert store.counts()["queued"] == 17


def test_one_key_makes_one_job(store: JobStore) -> None:
    answers = everywhere_at_once(store, lambda store: submit(store, idempotency_key="k"))
    assert len({job_id for job_id, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    assert store.counts()["queued"] == 1


def test_no_job_is_begun_twice_and_ended_twice(store: JobStore) -> None:
    ids = {submit(store, webhook_url="https://h")[0] for _ in range(40)}

    def work(store: JobStore) -> list[str]:
        mine = []
        while job := store.claim(f"{os.getpid()}-{threading.get_ident()}"):
            assert job.attempt == 1
            mine.append(job.id)
            assert store.report(job.id, 1, stage="base", step=1, steps=1, progress=0.5)
            assert store.complete(job.id, 1, output="x", stage_seconds={}, expires_at=time.time() + 99)
        return mine

    begun = Counter(job_id for answer in everywhere_at_once(store, work) for job_id in answer)
    assert begun == dict.fromkeys(ids, 1)
    assert store.counts()["completed"] == store.event_counts()["pending"] == 40


def test_one_of_many_ends_wins(store: JobStore) -> None:
    job_id, _ = submit(store, webhook_url="https://h")
    store.claim("w")
    store.cancel(job_id)

    def work(store: JobStore) -> list[str]:
        """Every way to end it, in an order that differs from thread to thread."""
        ways: dict[str, Callable[[], Any]] = {
            "completed": lambda: store.complete(job_id, 1, output="x", stage_seconds={}, expires_at=0),
            "failed": lambda: store.fail(job_id, 1, "error", "!"),
            "cancelled": lambda: store.cancelled(job_id, 1),
            "reclaimed": lambda: bool(store.reclaim(-1, 9)),
        }
        order = sorted(ways, key=lambda _: secrets.token_hex(4))
        return [way for way in order if ways[way]()]

    won = [way for answer in everywhere_at_once(store, work) for way in answer]
    job = store.get(job_id)
    assert job is not None
    assert len(won) == 1
    assert job.state == {"reclaimed": "cancelled"}.get(won[0], won[0])
    assert store.event_counts()["pending"] == 1


def test_events_go_to_one_sender_each(store: JobStore) -> None:
    for _ in range(30):
        store.cancel(submit(store, webhook_url="https://h")[0])

    def work(store: JobStore) -> list[str]:
        mine = []
        while events := store.due_events(time.time(), 2, str(threading.get_ident())):
            mine += [event.event_id for event in events]
        return mine

    taken = [event_id for answer in everywhere_at_once(store, work) for event_id in answer]
    assert len(taken) == len(set(taken)) == 30


def test_sums_are_exact(store: JobStore) -> None:
    def work(store: JobStore) -> None:
        for _ in range(3):
            store.add_steps("base", 7)
            store.add_stage_seconds("base", 0.5)

    everywhere_at_once(store, work)
    n = 3 * PROCESSES * THREADS
    assert store.step_counts() == {"base": 7 * n}
    assert (store.stage_histogram()["base"].sum, store.stage_histogram()["base"].count) == (n / 2, n)


def in_a_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child, or the text of its error."""
    answers = FORK.SimpleQueue()

    def child() -> None:
        try:
            answers.put(work())
        except Exception as error:
            answers.put(f"{type(error).__name__}: {error}")

    process = FORK.Process(target=child)
    process.start()
    answer = answers.get()
    process.join(30)
    assert process.exitcode == 0
    return answer


def test_a_forked_child_uses_connections_of_its_own_or_is_refused(store: JobStore, store_url: str) -> None:
    first, _ = submit(store)
    with store.write() as connection:  # the parent is in a transaction, with its locks held, at the moment of the fork
        connection.exec_driver_sql("UPDATE waver_jobs SET priority = 2")
        seen = in_a_fork(lambda: [job.id for job in store.list()])
        anew = in_a_fork(lambda: [job.id for job in JobStore(store_url).list()]) if store_url.startswith("sqlite") else seen
    if store_url.startswith("sqlite"):
        assert seen.startswith("RuntimeError")
        assert "spawn" in seen
        assert anew == seen
    else:
        assert seen == [first]
    store.close()
    second, created = in_a_fork(lambda: submit(store))
    assert created
    assert {job.id: job.priority for job in store.list()} == {first: 2, second: 1}


def test_a_reader_is_not_held_up_by_a_writer(store: JobStore) -> None:
    job_id, _ = submit(store)
    with store.write() as connection:
        connection.exec_driver_sql("UPDATE waver_jobs SET priority = 2")
        before = store.get(job_id)
    after = store.get(job_id)
    assert before is not None
    assert after is not None
    assert (before.priority, after.priority) == (1, 2)


def work_for_ever(url: str, log: Path, name: str) -> None:
    """Submit, begin and end jobs, and say in `log` what the store has confirmed."""
    store, said = JobStore(url), os.open(log, os.O_WRONLY | os.O_APPEND)

    def say(*words: object) -> None:
        os.write(said, (" ".join(map(str, words)) + "\n").encode())

    while True:
        job_id, _ = submit(store, max_queued=10**6, webhook_url="https://h")
        say("accepted", job_id)
        job = store.claim(name)
        if job is None:
            continue
        say("begun", job.id, job.attempt)
        store.report(job.id, job.attempt, stage="base", step=1, steps=2, progress=0.5)
        output = f"{name}-{job.attempt}"
        if store.complete(job.id, job.attempt, output=output, stage_seconds={}, expires_at=time.time() + 1e6):
            say("completed", job.id, output)
        store.reclaim(0.5, 10**6)
        store.heartbeat(name)


def test_kills_lose_no_accepted_job_and_end_none_twice(store_url: str, tmp_path: Path) -> None:
    log = tmp_path / "said"
    log.touch()
    kills = 6
    processes = [FORK.Process(target=work_for_ever, args=(store_url, log, f"w{number}")) for number in range(kills)]
    for process in processes[:3]:
        process.start()
    for number, process in enumerate(processes):  # three work at once; one after another is killed, at no special moment
        lines = len(log.read_text().splitlines())
        while len(log.read_text().splitlines()) < lines + 40 and process.is_alive():
            time.sleep(0.003 + 0.001 * number)
        assert process.is_alive(), "the child ended by itself"
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(10)
        if number + 3 < kills:
            processes[number + 3].start()
    said: dict[str, list[list[str]]] = {"accepted": [], "begun": [], "completed": []}
    for line in log.read_text().splitlines():
        word, *rest = line.split()
        said.setdefault(word, []).append(rest)
    assert len(said["completed"]) > 20

    store = JobStore(store_url)
    jobs = {job.id: job for job in store.list(limit=10**6)}
    assert {job_id for (job_id,) in said["accepted"]} <= set(jobs)
    assert max(Counter(job_id for job_id, _ in said["completed"]).values()) == 1
    for job_id, output in said["completed"]:
        assert (jobs[job_id].state, jobs[job_id].output) == ("completed", output)
    assert max(Counter(tuple(begun) for begun in said["begun"]).values()) == 1
    assert {job.state for job in jobs.values()} <= {"queued", "in_progress", "completed"}
    completed = [job for job in jobs.values() if job.state == "completed"]
    assert len(completed) - len(said["completed"]) <= kills  # done, but killed before it could say so
    assert store.event_counts()["pending"] == len(completed)
    for job in jobs.values():
        assert (job.state == "completed") == (job.output is not None) == (job.progress == 1.0)

    # What the dead had in hand comes back, and everything can be brought to its end.
    store.reclaim(-1, 10**6)
    while job := store.claim("survivor"):
        assert store.complete(job.id, job.attempt, output="x", stage_seconds={}, expires_at=0)
    assert store.counts()["completed"] == len(jobs)
    store.close()
    if store_url.startswith("sqlite"):
        with sqlite3.connect(store_url.removeprefix("sqlite:///")) as plain:
            assert plain.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("durable", [True, False])
def test_a_kill_in_the_midst_of_a_transaction_takes_it_back(store: JobStore, durable: bool) -> None:
    job_id, _ = submit(store)
    inside = FORK.Event()

    def child() -> None:
        with store.write(durable=durable, exclusive=True) as connection:
            connection.exec_driver_sql("UPDATE waver_jobs SET state = 'failed'")
            inside.set()
            time.sleep(60)

    store.close()
    process = FORK.Process(target=child)
    process.start()
    assert inside.wait(30)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(30)
    job = store.get(job_id)
    assert job is not None
    assert job.state == "queued"
    submit(store)  # its locks are gone with it
