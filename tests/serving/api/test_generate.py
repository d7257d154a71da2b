"""`POST /generate`: JSON and multipart, waiting, idempotency, a full queue, clients that go away."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import httpx2
import pytest
from PIL import Image

from tests.serving.api.conftest import Client, Start, picture, wait_for, written

DISC = {"prompt": "A red disc moves to the left.", "seed": 7, "steps": 3}


def test_a_job_is_accepted_made_and_fetched(start: Start) -> None:
    client = start()
    answer = client.post("/generate", json=DISC)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["object"], job["state"], job["resolved"]["seed"]) == ("job", "queued", 7)
    done = wait_for(client, job["id"])
    assert (done["state"], done["progress"], done["error"]) == ("completed", 1.0, None)
    assert done["resolved"]["prompt"].startswith("A red disc moves to the left. In plain colours")
    video = client.get(done["links"]["video"])
    assert video.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(video.content)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (done["resolved"]["width_px"], done["resolved"]["height_px"])
    assert client.get(done["links"]["preview"]).headers["content-type"] == "video/mp4"


def test_a_seed_is_drawn_and_echoed_where_none_is_given(start: Start) -> None:
    client = start(paint=False)
    seeds = {client.post("/generate", json={"prompt": "x"}).json()["resolved"]["seed"] for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed < 2**31 for seed in seeds)


def test_waiting_answers_with_the_file(start: Start) -> None:
    client = start()
    video = client.post("/generate", json=DISC | {"wait": True})
    assert (video.status_code, video.headers["content-type"], video.headers["x-waver-seed"]) == (200, "video/mp4", "7")
    job = client.get(f"/jobs/{video.headers['x-waver-job']}").json()
    assert job["state"] == "completed" and "wait" not in job["request"]
    assert video.content == client.get(job["links"]["video"]).content
    image = client.post("/generate", json={"prompt": "A disc", "kind": "image", "wait": True})
    assert image.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(image.content)).size == (144, 144)


def test_waiting_tells_how_a_job_failed(start: Start) -> None:
    answer = start().post("/generate", json={"prompt": "fail", "wait": True})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "code": "out_of_memory",
        "message": "The model ran out of memory: ask for a smaller size.",
        "type": "server_error",
        "param": None,
    }


def test_waiting_ends_with_the_servers_patience_and_with_a_cancellation(start: Start) -> None:
    client = start(paint=False, http={"max_wait_s": 0.3})
    answer = client.post("/generate", json=DISC | {"wait": True})
    assert (answer.status_code, answer.json()["state"]) == (202, "queued")
    client.service.settings = client.service.settings.model_copy(
        update={"http": client.service.settings.http.model_copy(update={"max_wait_s": 20.0})}
    )
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.post, "/generate", json=DISC | {"wait": True})
        while len(jobs := client.get("/jobs").json()["data"]) < 2:
            time.sleep(0.02)
        client.delete(f"/jobs/{jobs[0]['id']}")
        refused = waiting.result(10)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "cancelled")


def test_multipart_takes_the_same_fields_and_files(start: Start, tmp_path: Path) -> None:
    client = start(paint=False)
    fields = {"prompt": "It begins to move.", "seed": "7", "guidance_scale": "2.5", "rewrite": "false", "style": "", "size": ""}
    files = {"image": ("../../first.png", picture(), "image/png"), "last_frame": ("l.jpg", picture(kind="JPEG"), "image/jpeg")}
    answer = client.post("/generate", data=fields, files=files)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["request"] | {"prompt": "", "seed": 0} == {
        "prompt": "",
        "seed": 0,
        "guidance_scale": 2.5,
        "rewrite": False,
        "style": None,
        "size": None,
        "kind": "video",
        "first_frame": True,
        "last_frame": True,
        "negative_prompt": "",
        "seconds": None,
        "refine": None,
        "steps": None,
        "priority": "normal",
        "webhook_url": None,
    }
    rows, found = written(client.service)
    assert (rows, found) == (1, [job["id"], f"{job['id']}/first.png", f"{job['id']}/last.png"])
    stored = client.service.store.get(job["id"]).request
    assert stored["first_frame"] == f"jobs/{job['id']}/first.png"
    first = Image.open(client.service.folder / stored["first_frame"])
    assert (first.format, first.mode, first.size, first.getpixel((5, 5))) == ("PNG", "RGB", (64, 48), (220, 30, 30))


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}", "data:;base64,{}"])
def test_pictures_in_json_are_base64_or_data_urls(start: Start, form: str) -> None:
    client = start(paint=False)
    given = form.format(base64.b64encode(picture()).decode())
    answer = client.post("/generate", json=DISC | {"first_frame": given})
    assert answer.status_code == 202, answer.text
    assert answer.json()["request"]["first_frame"] is True


def test_the_same_key_is_the_same_job(start: Start) -> None:
    client = start()
    headers = {"Idempotency-Key": "one"}
    first = client.post("/generate", json=DISC, headers=headers)
    again = client.post("/generate", json=DISC, headers=headers)
    assert again.json()["id"] == first.json()["id"] and "idempotent-replay" not in first.headers
    assert (again.status_code, again.headers["idempotent-replay"]) == (202, "true")
    waited = client.post("/generate", json=DISC | {"wait": True}, headers=headers)  # only the form of the answer differs
    assert (waited.status_code, waited.headers["x-waver-job"]) == (200, first.json()["id"])
    other = client.post("/generate", json=DISC | {"seed": 8}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert client.post("/generate", json=DISC, headers={"Idempotency-Key": "x" * 201}).status_code == 422


def test_a_key_posted_eight_times_at_once_makes_one_job_and_one_set_of_files(start: Start) -> None:
    client = start(paint=False)
    given = base64.b64encode(picture()).decode()

    def post(_: int) -> httpx2.Response:
        return client.post("/generate", json=DISC | {"first_frame": given}, headers={"Idempotency-Key": "k"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(8)))
    ids = {answer.json()["id"] for answer in answers}
    assert [answer.status_code for answer in answers] == [202] * 8 and len(ids) == 1
    job_id = ids.pop()
    assert written(client.service) == (1, [job_id, f"{job_id}/first.png"])
    other = client.post(
        "/generate", json=DISC | {"first_frame": base64.b64encode(picture(48, 48)).decode()}, headers={"Idempotency-Key": "k"}
    )
    assert other.status_code == 409
    assert written(client.service)[0] == 1


def test_a_full_queue_says_when_to_come_again_and_keeps_nothing(start: Start) -> None:
    client = start(paint=False, queue={"max_queued": 2})
    for _ in range(2):
        assert client.post("/generate", json=DISC).status_code == 202
    before = written(client.service)
    answer = client.post("/generate", json=DISC | {"first_frame": base64.b64encode(picture()).decode()})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert written(client.service) == before


def _post_and_leave(client: Client, body: dict[str, object], headers: str = "") -> str:
    """Send a waiting request, leave once the job is begun, and say which job it was."""
    data = json.dumps(body).encode()
    url = client.base_url
    with socket.create_connection((url.host, url.port)) as raw:
        head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n{headers}\r\n"
        raw.sendall(b"POST /generate HTTP/1.1\r\n" + head.encode() + data)
        while not (jobs := client.get("/jobs").json()["data"]):
            time.sleep(0.02)
    return str(jobs[0]["id"])


def test_a_waiting_client_that_leaves_takes_its_job_along(start: Start) -> None:
    client = start(step_s=0.05)
    job = wait_for(client, _post_and_leave(client, DISC | {"steps": 100, "wait": True}))
    assert (job["state"], job["cancel_requested"]) == ("cancelled", True)


def test_a_job_that_can_be_found_again_outlives_its_client(start: Start) -> None:
    client = start(step_s=0.01)
    job_id = _post_and_leave(client, DISC | {"wait": True}, "Idempotency-Key: mine\r\n")
    assert wait_for(client, job_id)["state"] == "completed"
    again = client.post("/generate", json=DISC | {"wait": True}, headers={"Idempotency-Key": "mine"})
    assert (again.status_code, again.headers["x-waver-job"]) == (200, job_id)


def test_webhooks_only_to_listed_hosts_and_never_shown_in_full(start: Start) -> None:
    client = start(paint=False, http={"webhook_hosts": ["hooks.example"]})
    url = "https://hooks.example/services/T0/SECRET?token=SECRET"
    answer = client.post("/generate", json=DISC | {"webhook_url": url})
    assert answer.json()["request"]["webhook_url"] == "https://hooks.example/" and "SECRET" not in answer.text
    assert client.service.store.get(answer.json()["id"]).webhook_url == url
    for bad in (
        "https://other.example/",
        "https://hooks.example.evil/",
        "file:///etc/passwd",
        "https://u@hooks.example/",
        "http://[",
    ):
        refused = client.post("/generate", json=DISC | {"webhook_url": bad})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "webhook_url"), bad
    assert written(client.service)[0] == 1


def test_fifty_clients_at_a_queue_of_eight_all_get_an_answer(start: Start) -> None:
    client = start(queue={"max_queued": 8})
    answers: list[int] = []
    lock = threading.Lock()

    def one(seed: int) -> None:
        with httpx2.Client(base_url=client.base_url, timeout=30) as own:
            status = own.post("/generate", json={"prompt": "A disc", "kind": "image", "seed": seed, "wait": True}).status_code
        with lock:
            answers.append(status)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(one, range(50)))
    assert len(answers) == 50 and set(answers) <= {200, 429} and answers.count(200) >= 8
    rows, _ = written(client.service)
    assert rows == answers.count(200)
