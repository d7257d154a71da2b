"""`waver` and its client: against the real HTTP side, and against servers that break off, restart, refuse and lie."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from serving import client as client_module
from serving import waver as waver_module
from serving.client import Client, Refused
from tests.serving.running import Running
from waver_core.errors import RunFailed, UserError
from waver_core.video import probe, read_image

ID = "job_0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]
START = "from serving.waver import main; main()"  # what the console script does
Answer = Callable[[httpx2.Request], httpx2.Response]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("waver"), step_s=0.01) as running:
        yield running


@pytest.fixture()
def waver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WAVER_API_KEY", raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["waver", *words])
        with pytest.raises(SystemExit) as end:
            waver_module.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def test_from_a_prompt_to_files(waver: Callable[..., tuple[int, str, str]], server: Running, tmp_path: Path) -> None:
    words = ["-o", "boat.mp4", "--preview", "small.mp4", "--seed", "7", "--seconds", "2", "--server", server.url]
    code, out, err = waver("generate", "A boat on a lake", *words)
    assert code == 0, err
    assert out.startswith("boat.mp4  (240x144, 13 frames, seed 7, ")
    assert "rewritten: A boat on a lake In plain colours" in out
    result, small = probe("boat.mp4"), probe("small.mp4")
    assert (result.width_px, result.height_px) == (240, 144)
    assert (small.width_px, small.height_px) == (160, 96)
    assert [line.split("%")[1].split() for line in err.splitlines() if "%" in line][-1] == ["completed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boat.mp4", "small.mp4"], "nothing half-written stays"


def test_every_option_reaches_the_server(waver: Callable[..., tuple[int, str, str]], server: Running, tmp_path: Path) -> None:
    Image.new("RGB", (160, 96), (10, 200, 30)).save(tmp_path / "first.png")
    Image.new("RGB", (160, 96), (10, 20, 30)).save(tmp_path / "last.jpg")
    code, _, err = waver(
        "generate", "@prompt", "-o", "out.mp4", "--server", server.url, "--image", "first.png", "--last-image", "last.jpg",
        "--size", "160x96", "--style", "pixel", "--no-rewrite", "--no-refine", "--steps", "3", "--guidance", "2.5",
        "--negative", "fog", "--priority", "low", "--seed", "0",
    )  # fmt: skip
    assert code == 0, err
    job = server.service.store.list(limit=1)[0]
    names = {"rewrite": False, "refine": False, "steps": 3, "guidance_scale": 2.5, "negative_prompt": "fog", "priority": "low"}
    assert {name: job.request[name] for name in names} == names
    assert (job.request["prompt"], job.request["style"], job.request["seed"]) == ("@prompt", "pixel", 0)
    assert read_image(str(server.service.folder / job.request["first_frame"]))[0, 0].tolist() == [10, 200, 30]
    assert job.request["last_frame"]


def test_an_image_is_a_png(waver: Callable[..., tuple[int, str, str]], server: Running, tmp_path: Path) -> None:
    code, out, err = waver("generate", "A boat", "--kind", "image", "--server", server.url)
    assert code == 0, err
    (made,) = tmp_path.iterdir()
    assert made.name == f"{server.service.store.list(limit=1)[0].id}.png"
    assert out.startswith(made.name)
    assert made.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "x", "-o", "x.mov"], "name that ends in .mp4"),
        (["generate", "x", "-o", "x.mp4", "--kind", "image"], "name that ends in .png"),
        (["generate", "x", "-o", "no/where.mp4"], "no folder no; make it first"),
        (["generate", "x", "--image", "missing.png"], "missing.png: cannot be read"),
        (["generate", "x", "--size", "99x64"], "take 96x64"),
        (["generate", "x", "--style", "pixle"], "did you mean 'pixel'"),
        (["generate", "x", "--guidance", "nan"], "finite number"),
        (["generate", "x", "--server", "127.0.0.1:80"], "give a URL such as"),
        (["generate", "x", "--server", "http://[::1"], "--server http://[::1: give a URL such as"),
        (["generate", "x", "--server", "http://127.0.0.1:99999"], "--server http://127.0.0.1:99999: give a URL such as"),
        (["generate", "x", "--server", "http://127.0.0.1:1"], "http://127.0.0.1:1 (Connection refused): start it"),
        (["cancel", "../../etc"], "is no job id"),
        (["cancel", ID], "There is no such job"),
        (["download", ID], "There is no such job"),
    ],
)
def test_errors_are_one_line_and_code_2(
    waver: Callable[..., tuple[int, str, str]], server: Running, words: list[str], said: str
) -> None:
    before = len(server.service.store.list(limit=100))
    code, out, err = waver(*words, *([] if "--server" in words else ["--server", server.url]))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert said in err
    assert len(server.service.store.list(limit=100)) == before, "nothing was made"


def test_a_failed_job_is_code_3_and_says_why(waver: Callable[..., tuple[int, str, str]], server: Running, tmp_path: Path) -> None:
    code, _, err = waver("generate", "it will fail", "-o", "out.mp4", "--server", server.url)
    assert code == 3
    assert err.splitlines()[-1].endswith("failed (out_of_memory): The model ran out of memory: ask for a smaller size.")
    assert list(tmp_path.iterdir()) == []


def test_jobs_cancel_and_download(waver: Callable[..., tuple[int, str, str]], server: Running, tmp_path: Path) -> None:
    with Client(server.url) as client:
        done = client.follow(client.submit({"prompt": "one\x1b[31m red\nline"})["id"], lambda _: None)
        slow = client.submit({"prompt": "slow two"})
    code, out, _ = waver("jobs", "--server", server.url, "--limit", "2")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["job", slow["id"], done["id"]]
    assert "\x1b" not in out
    assert "one [31m red line" in out
    code, out, _ = waver("jobs", "--server", server.url, "--state", "completed", "--json", "--limit", "1")
    assert json.loads(out)["id"] == done["id"]

    code, out, _ = waver("cancel", slow["id"], "--server", server.url)
    assert (code, out.split()[0]) == (0, slow["id"])
    code, _, err = waver("cancel", done["id"], "--server", server.url)
    assert (code, "completed already" in err) == (2, True)
    code, out, err = waver("download", done["id"], "-o", "again.mp4", "--server", server.url)
    assert code == 0, err
    assert (tmp_path / "again.mp4").read_bytes() == (server.service.folder / f"jobs/{done['id']}/result-1.mp4").read_bytes()
    code, _, err = waver("download", done["id"], "-o", "base.mp4", "--preview", "--server", server.url)
    assert code == 0, err
    assert probe("base.mp4").width_px == 160


def test_ctrl_c_cancels_the_job(server: Running, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-c",
        START,
        "generate",
        "slow one",
        "--steps",
        "100",
        "-o",
        str(tmp_path / "out.mp4"),
        "--server",
        server.url,
    ]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    ) as process:
        assert process.stderr is not None
        job = process.stderr.readline().split(",")[0]
        for line in process.stderr:
            if "base" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out.startswith(f"{job} is ")
    assert "cancelled" in out
    assert "Traceback" not in err
    until = time.monotonic() + 5
    while (now := server.service.store.get(job)) is not None and now.state != "cancelled" and time.monotonic() < until:
        time.sleep(0.05)
    assert now is not None
    assert now.state == "cancelled"
    assert list(tmp_path.iterdir()) == []


def test_a_restart_in_mid_job_is_lived_through(tmp_path: Path) -> None:
    with Running(tmp_path, step_s=0.012) as running:
        seen: list[str] = []
        begun = threading.Event()

        def told(job: dict[str, Any]) -> None:
            seen.append(str(job["stage"]))
            if job["stage"] == "base":
                begun.set()

        def follow() -> None:
            with Client(running.url, timeout_s=30) as client:
                ends.append(client.follow(client.submit({"prompt": "slow restart"})["id"], told))

        ends: list[dict[str, Any]] = []
        thread = threading.Thread(target=follow)
        thread.start()
        assert begun.wait(10)
        running.stop()
        running.start()
        thread.join(25)
    assert [job["state"] for job in ends] == ["completed"]
    assert "refine" in seen, "events go on after the restart"


def client_of(answer: Answer, **options: Any) -> Client:
    return Client("http://127.0.0.1:9", transport=httpx2.MockTransport(answer), **options)


@pytest.fixture()
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that were made, none of them in truth."""
    pauses: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", pauses.append)
    return pauses


def view(state: str = "in_progress", **facts: Any) -> dict[str, Any]:
    links = {"self": "", "events": "", "video": None, "preview": None}
    return {"id": ID, "state": state, "progress": 0.5, "attempt": 1, "links": links, **facts}


def refusal(status: int, code: str, message: str, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"code": code, "message": message}}, headers=headers)


def test_a_lost_answer_is_asked_for_again_with_the_same_key(slept: list[float]) -> None:
    keys: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        keys.append(request.headers["idempotency-key"])
        if len(keys) == 1:
            raise httpx2.ReadError("broken off", request=request)
        return httpx2.Response(503) if len(keys) == 2 else httpx2.Response(202, json=view("queued"))

    with client_of(answer) as client:
        assert client.submit({"prompt": "x"})["id"] == ID
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert slept == [0.25, 0.5]
    with client_of(answer) as client:
        client.submit({"prompt": "x"})
    assert len(set(keys)) == 2, "another submission is another job"


def test_a_full_queue_is_waited_for_as_long_as_it_says(slept: list[float]) -> None:
    answers = iter(
        [refusal(429, "queue_full", "8 jobs wait.", **{"Retry-After": "7"}), httpx2.Response(202, json=view("queued"))]
    )
    said: list[str] = []
    with client_of(lambda _: next(answers), say=said.append) as client:
        client.submit({"prompt": "x"})
    assert (slept, said) == ([7], ["8 jobs wait. Trying again in 7 s."])
    busy = refusal(429, "queue_full", "8 jobs wait.", **{"Retry-After": "99"})
    with client_of(lambda _: busy, timeout_s=50) as client, pytest.raises(RunFailed, match=r"8 jobs wait. \(--timeout is over"):
        client.submit({"prompt": "x"})


def test_broken_streams_are_taken_up_where_they_ended_or_asked_instead(slept: list[float]) -> None:
    asked: list[tuple[str, str | None]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append((request.url.path.removeprefix(f"/jobs/{ID}"), request.headers.get("last-event-id")))
        stream = {"Content-Type": "text/event-stream"}
        done = len(asked) > 6
        if not request.url.path.endswith("events"):
            return httpx2.Response(200, json=view("completed" if done else "in_progress"))
        if len(asked) == 1:
            text = f": ping\n\nid: 4\nevent: job\ndata: {json.dumps(view())}\n\nid: 5\nevent: job\nda"
            return httpx2.Response(200, headers=stream, content=text.encode())
        if len(asked) == 3:
            raise httpx2.ReadTimeout("silence", request=request)
        return httpx2.Response(200, headers={"Content-Type": "text/html"}, content=b"a proxy's page")

    with client_of(answer) as client:
        assert client.follow(ID, lambda _: None)["state"] == "completed"
    assert asked[:4] == [("/events", None), ("", None), ("/events", "4"), ("", None)]
    assert len(asked) == 8


def test_a_deleted_job_and_an_unknown_one_end_the_waiting(slept: list[float]) -> None:
    gone = 'event: deleted\ndata: {"deleted": true}\n\n'
    answer = httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=gone.encode())
    with client_of(lambda _: answer) as client, pytest.raises(Refused, match="was deleted while it was followed"):
        client.follow(ID, lambda _: None)
    with (
        client_of(lambda _: refusal(404, "not_found", "There is no such job.")) as client,
        pytest.raises(Refused, match="no such"),
    ):
        client.follow(ID, lambda _: None)


def test_the_time_out_names_the_job_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = lambda request: httpx2.Response(204) if request.url.path.endswith("events") else httpx2.Response(200, json=view())  # noqa: E731
    with (
        client_of(answer, timeout_s=0.2) as client,
        pytest.raises(RunFailed, match=f"goes on; fetch it later with `waver download {ID}`"),
    ):
        client.follow(ID, lambda _: None)


def test_a_download_that_breaks_leaves_the_old_file(tmp_path: Path, slept: list[float]) -> None:
    class Broken(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"half"
            raise httpx2.ReadError("cut")

    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    with client_of(lambda _: httpx2.Response(200, stream=Broken()), timeout_s=0.7) as client, pytest.raises(RunFailed):
        client.download(f"/jobs/{ID}/video", target)
    assert (target.read_bytes(), list(tmp_path.iterdir())) == (b"old", [target])
    answers = iter([httpx2.Response(200, stream=Broken()), httpx2.Response(200, content=b"whole")])
    with client_of(lambda _: next(answers)) as client:
        assert client.download(f"/jobs/{ID}/video", target) == 5
    assert (target.read_bytes(), list(tmp_path.iterdir())) == (b"whole", [target])


def test_the_key_goes_with_every_request_and_its_refusal_names_the_variable() -> None:
    seen: list[str | None] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("authorization"))
        return refusal(401, "invalid_api_key", "No valid API key was given.")

    with client_of(answer, key="secret") as client, pytest.raises(Refused, match=r"was given. \(set WAVER_API_KEY\)"):
        client.jobs()
    assert seen == ["Bearer secret"]
    with pytest.raises(UserError, match="WAVER_API_KEY holds characters"):
        Client("http://127.0.0.1:9", "no\nkey")


def test_what_a_server_says_does_not_steer_the_terminal() -> None:
    answer = refusal(400, "bad", "red \x1b[31m\r\nand a second line")
    with client_of(lambda _: answer) as client, pytest.raises(Refused) as error:
        client.jobs()
    assert str(error.value) == "red [31m and a second line"
    with client_of(lambda _: httpx2.Response(200, content=b"<html>")) as client, pytest.raises(UserError, match="check --server"):
        client.jobs()
