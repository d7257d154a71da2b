"""Conversations: what is sent, what is made of an answer, and an endpoint that errs in every usual way."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import httpx2
import numpy as np
import pytest

from waver_core.backends.contracts import Captioner, ClipView
from waver_core.backends.pretrained._chat import ask, image_part, json_object, repair_messages, text_part, wire
from waver_core.backends.pretrained._chat_engines import OpenAIChat, isolated
from waver_core.backends.pretrained._frames import sample, span_of
from waver_core.errors import BackendUnavailable, ConfigError
from waver_core.registry import create

pytestmark = pytest.mark.models
Reply = tuple[int, dict[str, str], Any]
KEY = "OPENWAVER_TEST_KEY"
GOOD = {
    "caption": "A ball rolls across the floor.",
    "short_caption": "A ball rolls.",
    "sub_actions": [{"text": "the ball rolls", "start_s": 0.0, "end_s": 1.5}],
    "camera": "static",
    "style": "real",
    "spatial_relations": ["The ball is to the left of the box."],
}


def content(text: str) -> Reply:
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Endpoint:
    """An OpenAI-compatible server on this machine; `reply` makes an answer of each request's body and number."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda body, k: content(json.dumps(GOOD))
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    endpoint.requests.append(body)
                    endpoint.keys.append(self.headers.get("authorization"))
                    k = len(endpoint.requests) - 1
                status, headers, answer = endpoint.reply(body, k)
                if status == 0:  # hang up in the middle
                    self.close_connection = True
                    return
                data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.close()


@pytest.fixture
def chat(endpoint: Endpoint) -> OpenAIChat:
    return OpenAIChat(httpx2, base_url=endpoint.url, model="m", attempts=4, pause_s=0.02, timeout_s=10.0)


def captioner(endpoint: Endpoint, **options: Any) -> Any:
    return create("captioner", "qwen2_5_vl", engine="openai", base_url=endpoint.url, model="m", **options)


def grey_clip(level: int, frames: int = 3) -> ClipView:
    rgb = np.full((frames, 32, 48, 3), level, np.uint8)
    return ClipView(rgb, 5.0 + np.arange(frames) / 2, {"kind": "video", "start_s": 5.0, "end_s": 5.0 + frames / 2})


def picture_of(part: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def level_of(body: dict[str, Any]) -> int:
    return round(float(picture_of(body["messages"][0]["content"][1]).mean()))


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_pictures_travel_as_jpeg_in_rgb_and_texts_as_they_are() -> None:
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[..., 0] = 200
    sent = wire([{"role": "user", "content": [text_part("look"), image_part(frame)]}, {"role": "user", "content": "plain"}])
    assert json.loads(json.dumps(sent)) == sent
    assert sent[0]["content"][0] == {"type": "text", "text": "look"}
    assert sent[1] == {"role": "user", "content": "plain"}
    assert np.abs(picture_of(sent[0]["content"][1]).mean(axis=(0, 1)) - (200, 0, 0)).max() < 4


def test_json_is_found_past_a_fence_and_a_sentence() -> None:
    assert json_object('Here it is:\n```json\n{"a": {"b": 1}}\n``` and so on') == {"a": {"b": 1}}
    with pytest.raises(ValueError, match="no JSON object"):
        json_object("I cannot tell.")
    for broken in ('{"a": 1,', '{"a": ' + "[" * 100_000):
        with pytest.raises(ValueError, match="not valid JSON"):
            json_object(broken)


def test_frames_are_taken_at_the_rate_asked_for_and_spread_where_that_is_too_many() -> None:
    times = 7.0 + np.arange(24) / 12
    view = ClipView(np.zeros((24, 40, 60, 3), np.uint8), times, {"kind": "video", "start_s": 7.0, "end_s": 9.0})
    seen = sample(view, frames=10, fps=2.0, short_side_px=20)
    assert seen.rgb.shape == (4, 20, 30, 3)
    assert seen.times_s == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert seen.duration_s == 2.0
    assert sample(view, frames=3, fps=2.0).times_s == pytest.approx([0.0, 1.0, 23 / 12], abs=0.05)
    assert sample(view, frames=99, short_side_px=4000).rgb.shape == (24, 40, 60, 3)
    assert span_of(view._replace(row={})) == pytest.approx((7.0, 2.0))
    assert sample(ClipView(view.rgb[:1], times[:1], {"kind": "image"}), 8, 2.0).duration_s == 0.0
    with pytest.raises(ValueError, match="0 frames"):
        sample(ClipView(view.rgb[:0], times[:0], {}), 4)


def test_one_bad_item_costs_only_itself() -> None:
    def run(items: Any) -> list[int]:
        if 0 in items:
            raise ValueError("zero")
        return [10 // k for k in items]

    results = isolated(run, [1, 0, 5])
    assert [results[0], results[2]] == [10, 2]
    assert str(results[1]) == "zero"


def test_answers_are_asked_for_with_model_key_and_schema(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    backend = captioner(endpoint, api_key_env=KEY, max_tokens=77)
    assert isinstance(backend, Captioner)
    assert backend.checkpoints() == ()
    assert backend.packages == ("httpx2",)
    (caption,) = backend.caption([grey_clip(90)])
    assert caption.text == GOOD["caption"]
    assert caption.sub_actions == (("the ball rolls", 0.0, 1.5),)
    (body,) = endpoint.requests
    assert endpoint.keys == ["Bearer secret"]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 77, 0)
    assert body["response_format"]["json_schema"]["schema"] == json.loads(json.dumps(backend.json_schema))
    assert body["messages"] == backend.messages(grey_clip(90))


def test_a_key_that_is_not_set_is_told_of(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(BackendUnavailable, match=KEY):
        captioner(endpoint, api_key_env=KEY).caption([grey_clip(90)])


def test_captions_come_back_to_their_clips_whatever_the_order_of_answers(endpoint: Endpoint) -> None:
    last_in = threading.Event()
    levels = [20, 60, 100, 140, 180, 220]

    def reply(body: dict[str, Any], k: int) -> Reply:
        level = level_of(body)
        if level > levels[-1] - 10:
            last_in.set()
        last_in.wait(10)
        time.sleep((240 - level) / 1000)  # the last clip is answered first
        return content(json.dumps({**GOOD, "caption": f"grey {level}"}))

    endpoint.reply = reply
    captions = captioner(endpoint, concurrency=6).caption([grey_clip(level) for level in levels])
    assert [abs(int(c.text.split()[1]) - level) <= 2 for c, level in zip(captions, levels, strict=True)] == [True] * 6


def test_a_broken_answer_is_repaired_once_and_then_an_error_on_its_row_only(endpoint: Endpoint) -> None:
    def reply(body: dict[str, Any], k: int) -> Reply:
        level, repaired = level_of(body), len(body["messages"]) > 1
        if level > 180 or (level > 90 and not repaired):
            return content('{"caption": "half an ans')
        return content(json.dumps({**GOOD, "caption": f"level {level}"}))

    endpoint.reply = reply
    first, second, third, fourth = captioner(endpoint).caption([grey_clip(v) for v in (50, 200, 120, 60)])
    assert (first.text, third.text, fourth.text) == ("level 50", "level 120", "level 60")
    assert isinstance(second, ValueError)
    assert "not valid JSON" in str(second)
    repairs = [r["messages"] for r in endpoint.requests if len(r["messages"]) > 1]
    assert len(endpoint.requests) == 6
    assert len(repairs) == 2
    for messages in repairs:
        assert messages[1]["content"][0]["text"] == '{"caption": "half an ans'
        assert "not valid JSON" in messages[2]["content"][0]["text"]


def test_repair_keeps_the_conversation_and_says_what_was_wrong() -> None:
    said = repair_messages(asked("why?"), "", "nothing came")
    assert [m["role"] for m in said] == ["user", "assistant", "user"]
    assert "nothing came" in said[2]["content"][0]["text"]


def test_an_engine_that_fails_is_not_asked_to_repair() -> None:
    class Broken:
        calls = 0

        def complete(self, conversations: Any, max_tokens: int, json_schema: Any = None) -> list[str | Exception]:
            self.calls += 1
            return [RuntimeError("down")] * len(conversations)

    engine = Broken()
    (result,) = ask(engine, [asked("a")], lambda k, text: text, 5)
    assert str(result) == "down"
    assert engine.calls == 1


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(endpoint: Endpoint, as_date: bool) -> None:
    wait = format_datetime(datetime.now(UTC) + timedelta(seconds=2)) if as_date else "0.3"
    endpoint.reply = lambda body, k: content("yes") if k else (429, {"retry-after": wait}, {"error": "slow down"})
    started = time.monotonic()
    chat = OpenAIChat(httpx2, base_url=endpoint.url, model="m", pause_s=30.0)
    assert chat.complete([asked("a")], 5) == ["yes"]
    assert 0.28 <= time.monotonic() - started < 20.0  # the pause of its own would be 22 s at least


def test_failures_of_the_server_are_tried_again_and_told_of_in_the_end(endpoint: Endpoint, chat: OpenAIChat) -> None:
    def reply(body: dict[str, Any], k: int) -> Reply:
        text = body["messages"][0]["content"]
        tries = sum(r["messages"][0]["content"] == text for r in endpoint.requests)
        if text == "recovers":
            return content("fine") if tries == 3 else ((500, {}, "oops") if tries == 1 else (0, {}, ""))
        return {"down": (503, {}, "gone"), "wrong": (400, {}, "too long"), "odd": (200, {}, {"choices": []})}[text]

    endpoint.reply = reply
    fine, down, wrong, odd = chat.complete([asked(t) for t in ("recovers", "down", "wrong", "odd")], 5)
    assert fine == "fine"
    assert "503" in str(down)
    assert "too long" in str(wrong)
    assert "no answer" in str(odd)
    tries = [r["messages"][0]["content"] for r in endpoint.requests]
    assert [tries.count(t) for t in ("recovers", "down", "wrong", "odd")] == [3, 4, 1, 1]


def test_nobody_listening_is_an_error_on_the_row() -> None:
    chat = OpenAIChat(httpx2, base_url="http://127.0.0.1:9/v1", model="m", attempts=2, pause_s=0.01)
    (error,) = chat.complete([asked("a")], 5)
    assert "ConnectError" in str(error)


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_or_address_ends_the_run(endpoint: Endpoint, chat: OpenAIChat, status: int) -> None:
    endpoint.reply = lambda body, k: (status, {}, "no")
    with pytest.raises(BackendUnavailable, match=str(status)):
        chat.complete([asked("a")], 5)


def test_options_are_checked_when_the_backend_is_built() -> None:
    with pytest.raises(ConfigError, match="base_url and model"):
        create("captioner", "qwen2_5_vl", engine="openai")
    with pytest.raises(ConfigError, match="engine must be one of"):
        create("captioner", "qwen2_5_vl", engine="tgi")
    with pytest.raises(ConfigError, match="qwen2_5_vl"):
        create("captioner", "qwen2_5_vl", frame=3)
    with pytest.raises(ConfigError, match="executor"):
        create("captioner", "qwen2_5_vl", engine="vllm").caption([grey_clip(3)])


def test_an_endpoint_needs_neither_torch_nor_transformers(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body, k: content('{"level1": "none", "level2": "none"}')
    script = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "torchvision")))
from waver_core.registry import create
labeler = create("action_labeler", "qwen2_5", engine="openai", base_url="{endpoint.url}", model="m")
print(labeler.fingerprint, create("quality_judge", "videollama3").fingerprint, labeler.label(["a wall"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "ActionLabel(level1='none'" in done.stdout
