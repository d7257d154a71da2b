"""`/v1/videos` driven by the official OpenAI client over loopback."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from typing import Any

import av
import pytest
from PIL import Image

from tests.serving.api.conftest import Client, Start, picture, wait_for, written

openai = pytest.importorskip("openai")


@pytest.fixture
def videos(start: Start) -> Iterator[tuple[Any, Client]]:
    client = start()
    with warnings.catch_warnings(), openai.OpenAI(api_key="none", base_url=f"{client.base_url}/v1", max_retries=0) as remote:
        warnings.simplefilter("ignore", DeprecationWarning)
        yield remote.videos, client


def test_create_poll_download_and_delete(videos: tuple[Any, Client]) -> None:
    remote, client = videos
    video = remote.create_and_poll(prompt="A red disc", seconds="2", size="144x240", extra_body={"seed": 5, "steps": 2})
    assert (video.object, video.status, video.progress, video.error) == ("video", "completed", 100, None)
    assert (video.size, video.prompt, video.model) == ("144x240", "A red disc", "t2v_480p@9e5628b30479")
    assert 1 <= float(video.seconds) <= 2.5 and video.expires_at > video.completed_at >= video.created_at
    data = remote.download_content(video.id).read()
    with av.open(io.BytesIO(data)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (144, 240)
    thumbnail = Image.open(io.BytesIO(remote.download_content(video.id, variant="thumbnail").read()))
    assert (thumbnail.format, thumbnail.size) == ("PNG", (144, 240))
    with pytest.raises(openai.BadRequestError, match="video and thumbnail"):
        remote.download_content(video.id, variant="spritesheet")
    deleted = remote.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        remote.retrieve(video.id)
    assert written(client.service) == (0, [])


def test_a_picture_to_begin_with(videos: tuple[Any, Client]) -> None:
    remote, client = videos
    reference = ("frame.png", picture(), "image/png")
    video = remote.create(prompt="It moves", model="waver", input_reference=reference, extra_body={"steps": 1})
    stored = client.service.store.get(video.id).request
    assert stored["first_frame"] == f"jobs/{video.id}/first.png" and stored["steps"] == 1
    assert wait_for(client, video.id)["state"] == "completed"


def test_a_picture_by_data_url_in_json_and_in_a_form(start: Start) -> None:
    """The dialect allows both; version 3 of the Python client sends files only."""
    client = start(paint=False)
    url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    form = {"prompt": (None, "It moves"), "input_reference[image_url]": (None, url)}
    answers = [
        client.post("/v1/videos", json={"prompt": "It moves", "input_reference": {"image_url": url}}),
        client.post("/v1/videos", json={"prompt": "It moves", "input_reference": url}),
        client.post("/v1/videos", files=form),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        video = answer.json()["id"]
        assert client.service.store.get(video).request["first_frame"] == f"jobs/{video}/first.png"
    by_id = client.post("/v1/videos", json={"prompt": "It moves", "input_reference": {"file_id": "file-1"}})
    assert (by_id.status_code, by_id.json()["error"]["param"]) == (400, "input_reference")


def test_a_picture_to_end_with(videos: tuple[Any, Client]) -> None:
    remote, client = videos
    url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    made = [
        remote.create(prompt="It moves", extra_body={"last_frame": url}).id,
        remote.create(prompt="It moves", input_reference=("a.png", picture(), "image/png"), extra_body={"last_frame": url}).id,
        client.post("/v1/videos", data={"prompt": "It moves"}, files={"last_frame": ("l.png", picture())}).json()["id"],
    ]
    for video, begins in zip(made, (False, True, False), strict=True):
        stored = client.service.store.get(video).request
        assert (stored["last_frame"], bool(stored["first_frame"])) == (f"jobs/{video}/last.png", begins)
    twice = client.post("/v1/videos", data={"prompt": "x", "last_frame": url}, files={"last_frame": ("l.png", picture())})
    assert (twice.status_code, twice.json()["error"]["code"]) == (422, "duplicate_field")
    for left_out in ("kind", "wait", "first_frame"):
        assert client.post("/v1/videos", json={"prompt": "x", left_out: "video"}).json()["error"]["code"] == "unknown_field"


def test_a_list_can_be_gone_through_while_its_videos_are_deleted(videos: tuple[Any, Client]) -> None:
    remote, client = videos
    made = [remote.create(prompt=str(k), extra_body={"steps": 1, "refine": False}).id for k in range(5)]
    for video in made:
        wait_for(client, video)
    deleted = []
    for video in remote.list(limit=2):
        remote.delete(video.id)
        deleted.append(video.id)
    assert deleted == made[::-1]
    assert written(client.service) == (0, [])


def test_lists_go_on_by_themselves_and_leave_images_out(videos: tuple[Any, Client]) -> None:
    remote, client = videos
    made = []
    for k in range(5):
        made.append(remote.create(prompt=str(k), extra_body={"steps": 1, "refine": False}).id)
        image = client.post("/generate", json={"prompt": "x", "kind": "image"}).json()["id"]
    assert [video.id for video in remote.list(limit=2, order="asc")] == made
    page = remote.list(limit=2)
    assert ([video.id for video in page.data], page.has_more) == (made[:2:-1], True)
    assert [video.id for video in remote.list(limit=3, after=made[3])] == made[2::-1]
    with pytest.raises(openai.NotFoundError):
        remote.retrieve(image)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"seconds": "12"}, "seconds"),
        ({"size": "1792x1024"}, "size"),
        ({"model": "sora-2"}, "model"),
        ({"input_reference": ("a.png", picture() + b"PK\x03\x04")}, "first_frame"),
    ],
)
def test_what_the_model_lacks_is_a_bad_request_that_says_what_it_has(
    videos: tuple[Any, Client], asked: dict[str, Any], param: str
) -> None:
    remote, client = videos
    with pytest.raises(openai.BadRequestError) as refused:
        remote.create(prompt="A disc", **asked)
    assert (refused.value.body["type"], refused.value.body["param"]) == ("invalid_request_error", param)
    assert written(client.service) == (0, [])


def test_errors_arrive_as_the_clients_own(videos: tuple[Any, Client]) -> None:
    remote, _ = videos
    failed = remote.create_and_poll(prompt="fail", extra_body={"steps": 1})
    assert (failed.status, failed.error.code) == ("failed", "out_of_memory")
    with pytest.raises(openai.UnprocessableEntityError):
        remote.create(prompt="")
    with pytest.raises(openai.UnprocessableEntityError, match="did you mean"):
        remote.create(prompt="x", extra_body={"sead": 1})
    with pytest.raises(openai.ConflictError):
        remote.download_content(failed.id)


def test_cancel(start: Start) -> None:
    client = start(paint=False)
    video = client.post("/v1/videos", json={"prompt": "x", "seconds": 2}).json()
    assert (video["status"], video["seconds"], client.delete(f"/v1/videos/{video['id']}").status_code) == ("queued", "1.625", 409)
    ended = client.post(f"/v1/videos/{video['id']}/cancel").json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")
    assert client.delete(f"/v1/videos/{video['id']}").json()["deleted"] is True
