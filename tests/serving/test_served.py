"""The real app on Ray Serve, over HTTP: what users do to it, and what must not break it."""

from __future__ import annotations

import io
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import httpx2
import openai
import pytest
from PIL import Image

from serving.store import JobStore
from tests.serving.exports import write_export
from tests.serving.served import LONG, Counters, Server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

DISC = "red disc moving left"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    write_export(folder / "base", "t2v_192p_12fps")
    write_export(folder / "refiner", "refine_1080p", seed=1)
    return folder


@pytest.fixture(scope="module")
def server(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(exports, tmp_path_factory.mktemp("jobs"), "serving.queue.max_queued=8")
    made.start()
    try:
        yield made
    finally:
        code = made.stop()
    assert code == 0, "SIGTERM ends it cleanly"


@pytest.fixture(scope="module")
def counters(server: Server) -> Iterator[Counters]:
    made = Counters(server)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def settled(server: Server) -> Iterator[None]:
    """No test leaves work to the next."""
    yield
    for job in server.client.get("/jobs", params={"limit": 100}).json()["data"]:
        if job["state"] in ("queued", "in_progress"):
            server.client.delete(f"/jobs/{job['id']}")
            server.until(job["id"], states=("cancelled", "completed", "failed"))


def test_waiting_for_the_file_and_the_same_bytes_again(server: Server) -> None:
    first, again = (server.post(prompt=DISC, seed=3, wait=True, steps=4) for _ in range(2))
    assert first.status_code == 200 and first.headers["content-type"] == "video/mp4" and first.headers["x-waver-seed"] == "3"
    assert first.content == again.content
    with av.open(io.BytesIO(first.content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.width, stream.codec_context.height, stream.average_rate) == (96, 96, 4)
        assert "Generated" in container.metadata["comment"]
    job = server.job(first.headers["x-waver-job"])
    assert job["state"] == "completed" and job["progress"] == 1.0
    assert job["resolved"]["prompt"] == "A medium-sized red disc moves to the left over a white background."
    assert list(job["stage_seconds"]) == ["rewrite", "encode", "base", "upscale", "refine", "decode"]
    part = server.client.get(job["links"]["video"], headers={"Range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == b"ftyp"


def test_an_image(server: Server) -> None:
    answer = server.post(prompt=DISC, kind="image", seed=3, wait=True, steps=4)
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.size == (96, 96)


def test_a_job_its_events_and_its_preview(server: Server) -> None:
    answer = server.post(**{**LONG, "seconds": 4.0, "steps": 30})
    assert answer.status_code == 202 and answer.headers["location"] == f"/jobs/{answer.json()['id']}"
    events = []
    with server.client.stream("GET", f"/jobs/{answer.json()['id']}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                events.append(httpx2.Response(200, content=line[5:].encode()).json())
    progress = [e["progress"] for e in events]
    assert progress == sorted(progress) and events[-1]["state"] == "completed" and progress[-1] == 1.0
    stages = [e["stage"] for e in events if e["stage"]]
    assert {"base", "refine"} <= set(stages)
    steps = [e["step"] for e in events if e["stage"] == "base" and e["steps"] == 30]
    assert steps == sorted(steps) and len(steps) >= 2
    before_the_end = next(e for e in events if e["links"]["preview"])
    assert before_the_end["state"] == "in_progress", "the base result is there while the refiner works"
    preview = server.client.get(before_the_end["links"]["preview"])
    assert preview.status_code == 200 and preview.headers["content-type"] == "video/mp4"


def test_the_official_openai_client(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    picture = io.BytesIO()
    Image.new("RGB", (80, 60), (220, 40, 40)).save(picture, "PNG")
    picture.seek(0)
    video = client.videos.create_and_poll(prompt=DISC, input_reference=("frame.png", picture, "image/png"), poll_interval_ms=200)
    assert video.status == "completed" and video.progress == 100
    assert client.videos.retrieve(video.id).id == video.id
    assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
    assert video.id in [v.id for v in client.videos.list(limit=5)]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


@pytest.mark.parametrize(("stage", "step"), [("base", 3), ("refine", 3)])  # the others: test_dispatcher.py, they are too quick
def test_cancelling_at_a_stage_stops_the_steps(server: Server, counters: Counters, stage: str, step: int) -> None:
    before = counters.read()
    job_id = server.post(**LONG).json()["id"]
    server.until(job_id, stage=stage, step=step)
    assert server.client.delete(f"/jobs/{job_id}").status_code == 202
    server.until(job_id, states=("cancelled",), within_s=20)
    then = counters.at_rest()
    if stage == "base":
        assert 3 <= then["base"] - before["base"] < 100 and then["refiner"] == before["refiner"]
    if stage == "refine":
        assert then["base"] - before["base"] == 100 and 3 <= then["refiner"] - before["refiner"] < 50
    assert not list((server.jobs / "jobs" / job_id).glob("result*"))


def test_cancelling_while_it_waits(server: Server) -> None:
    running = [server.post(**LONG).json()["id"] for _ in range(2)]
    waiting = server.post(prompt=DISC).json()["id"]
    assert server.client.delete(f"/jobs/{waiting}").json()["state"] == "cancelled"
    assert server.job(waiting)["attempt"] == 0
    assert all(server.job(job_id)["state"] in ("queued", "in_progress") for job_id in running)


def test_fifty_clients_and_a_queue_of_eight(server: Server) -> None:
    def ask(number: int) -> tuple[int, str]:
        answer = httpx2.post(
            f"{server.url}/generate", json={"prompt": DISC, "seed": number, "steps": 8, "wait": True}, timeout=120
        )
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["code"] == "queue_full"
        return answer.status_code, answer.headers.get("x-waver-job", "")

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    counts = Counter(status for status, _ in answers)
    assert set(counts) == {200, 429} and counts[200] >= 8
    made = [job_id for status, job_id in answers if status == 200]
    assert len(set(made)) == len(made)
    assert all(server.job(job_id)["state"] == "completed" for job_id in made)
    assert not [
        j for j in server.client.get("/jobs", params={"limit": 100}).json()["data"] if j["state"] in ("queued", "in_progress")
    ]


def test_the_same_idempotency_key_twice_at_once(server: Server) -> None:
    key = {"Idempotency-Key": "once"}
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: server.post(headers=key, prompt=DISC, steps=4), range(2)))
    assert [a.status_code for a in answers] == [202, 202] and len({a.json()["id"] for a in answers}) == 1
    assert server.post(headers=key, prompt="another").status_code == 409


def test_a_client_that_hangs_up_frees_the_server(server: Server, counters: Counters) -> None:
    before = counters.read()
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{server.url}/generate", json={**LONG, "wait": True}, timeout=2.0)
    (job,) = server.client.get("/jobs", params={"limit": 1}).json()["data"]
    assert server.until(job["id"], states=("cancelled",), within_s=20)
    then = counters.at_rest()
    assert sum(then.values()) - sum(before.values()) < 100 + 50


@pytest.mark.parametrize("name", ["base", "autoencoder", "dispatcher", "http"])
def test_a_killed_replica_costs_nobody_a_job(server: Server, name: str) -> None:
    stage = {"autoencoder": "refine"}.get(name, "base")
    job_id = server.post(**LONG).json()["id"]
    server.until(job_id, stage=stage, step=2)
    killed = server.replica(name)
    os.kill(killed, signal.SIGKILL)
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        try:
            job = server.job(job_id)
            if job["state"] in ("completed", "failed"):
                break
        except (httpx2.TransportError, ValueError, KeyError):
            pass  # the front door itself was killed
        time.sleep(0.2)
    assert job["state"] == "completed", job
    # HTTP is no part of the work; the autoencoder may be back before it is needed.
    assert job["attempt"] in {"http": (1,), "autoencoder": (1, 2)}.get(name, (2,))
    assert server.client.get(job["links"]["video"]).content[4:8] == b"ftyp"
    while server.client.get("/readyz").status_code != 200:
        assert time.monotonic() < give_up
        time.sleep(0.3)


def test_a_killed_server_goes_on_where_it_was(exports: Path, tmp_path: Path, server: Server) -> None:
    other = Server(exports, tmp_path / "jobs", "serving.queue.running=1")
    other.start()
    try:
        done = other.post(prompt=DISC, steps=4, seed=3, wait=True)
        running = other.post(**LONG).json()["id"]
        waiting = other.post(headers={"Idempotency-Key": "k"}, prompt=DISC, seed=4, steps=4, priority="low").json()["id"]
        other.until(running, stage="base", step=3)
        other.kill()
        other.start()
        assert other.client.get(f"/jobs/{done.headers['x-waver-job']}/video").content == done.content
        assert other.post(headers={"Idempotency-Key": "k"}, prompt=DISC, seed=4, steps=4, priority="low").json()["id"] == waiting
        for job_id in (running, waiting):
            assert other.until(job_id, states=("completed", "failed"))["state"] == "completed"
        assert other.job(running)["attempt"] == 2 and other.job(waiting)["attempt"] == 1
        assert len(other.client.get("/jobs", params={"limit": 100}).json()["data"]) == 3
    finally:
        other.stop()


def test_a_stopped_server_gives_its_jobs_back_and_the_command_line_of_serve_starts_it(exports: Path, tmp_path: Path) -> None:
    """SIGTERM in mid-job; then `serve run` with a file on the same folder, under another name."""
    other = Server(exports, tmp_path / "jobs", "serving.queue.lease_s=600")
    other.start()
    try:
        ids = [other.post(**LONG).json()["id"] for _ in range(5)]
        other.until(ids[0], stage="base", step=3)
        other.process.terminate()
        assert other.process.wait(60) == 0
        other.kill()
        counts = JobStore(f"sqlite:///{tmp_path}/jobs/jobs.sqlite").counts()
        assert counts["queued"] >= 1 and counts["in_progress"] == 0, counts  # the lease is longer than this test
        other.start(serve_run=True)
        assert {other.until(job_id, states=("completed", "failed"))["state"] for job_id in ids} == {"completed"}
    finally:
        other.stop()


def test_metrics_tell_of_all_of_it(server: Server) -> None:
    server.post(prompt=DISC, steps=4, wait=True)
    text = server.client.get("/metrics").text
    for name in ('waver_jobs{state="completed"}', 'waver_stage_seconds_count{stage="base"}', "waver_http_requests_total"):
        assert name in text
    assert 'waver_denoising_steps_total{stage="base"}' in text
