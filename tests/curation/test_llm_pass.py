"""A pass whose model is served by `ray.data.llm`: questions out, answers back in rounds, every one to its own clip."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

import curation.executor
from curation.executor import OnRay, answer, question
from curation.llm_pass import MAX_ROUNDS, NotYet, Replay
from curation.serial import Serial
from waver_core.config import Llm
from waver_core.errors import BackendUnavailable, UserError

CAPTION = (
    "funnel.stages.caption={backend: qwen2_5_vl, backend_options: {engine: vllm}}",
    "funnel.passes.caption={llm: {model: tiny}}",
)
LABEL = "funnel.stages.label={backend: qwen2_5, backend_options: {engine: vllm}}"


def pictures(messages: list[dict[str, Any]]) -> list[np.ndarray]:
    """The frames of a question, decoded from their data URLs."""
    urls = [p["image_url"]["url"] for m in messages for p in m["content"] if isinstance(p, dict) and p["type"] == "image_url"]
    return [cv2.imdecode(np.frombuffer(base64.b64decode(u.split(",")[1]), np.uint8), 1)[..., ::-1] for u in urls]


def caption_of(frames: Sequence[np.ndarray]) -> dict[str, Any]:
    """A caption that says what was seen: the mean colour of the first frame."""
    text = " ".join(f"{v:.0f}" for v in frames[0].mean(axis=(0, 1)))
    return {
        "caption": text,
        "short_caption": "s",
        "sub_actions": [],
        "camera": "static",
        "style": "real",
        "spatial_relations": [],
    }


class Answering(Serial):
    """Rounds in this process, with a model that one can script."""

    def __init__(self, reply: Callable[[list[dict[str, Any]], int], Any]) -> None:
        self.reply, self.asked = reply, Counter[int]()

    def converse(self, asker: Any, answerer: Any, args: Any, units: Sequence[pa.Table], resources: Any) -> Iterator[Any]:
        first, second = asker(*args), answerer(*args)
        for unit in units:
            rows = []
            for number, asked in enumerate(first(unit.to_pylist())):
                given = question(asked)
                self.asked[len(given["messages"])] += 1
                said = self.reply(given["messages"], number)
                rows.append({**asked, **(said if isinstance(said, dict) else answer({**asked, "generated_text": said}))})
            yield from second(rows[::-1])


def test_replay_knows_earlier_answers_and_stops_at_the_first_question_without_one() -> None:
    replay = Replay()
    replay.begin(["one", {"error": "too long"}])
    said, failed, open_ = replay.complete([[{"role": "user", "content": t}] for t in "abc"], 9, {"type": "object"})
    assert said == "one" and str(failed) == "too long" and isinstance(failed, RuntimeError)
    assert isinstance(open_, NotYet) and open_.conversation[0]["content"] == "c" and open_.max_tokens == 9


def test_captions_come_back_to_their_clips_repaired_or_with_an_error(
    collection: Path, tmp_path: Path, curate: Any, pictures_of: Any
) -> None:
    def reply(messages: list[dict[str, Any]], number: int) -> Any:
        seen = caption_of(pictures(messages))
        if number % 4 == 1 and len(messages) == 1:
            return "Sure! Here is the caption."  # repaired in the second round
        if number % 4 == 2:
            return {"__inference_error__": "the prompt is too long"}
        return json.dumps(seen)

    model = Answering(reply)
    rows = curate(collection, tmp_path, *CAPTION, execute=model).clips.to_pylist()
    done = [r for r in rows if r["caption"] is not None]
    failed = [r for r in rows if r["caption_error"]]
    assert len(done) >= 4 and model.asked[3] >= 1 and set(model.asked) == {1, 3}
    assert {r["caption_error"] for r in failed} == {"RuntimeError: the prompt is too long"}
    for row in done:
        said = np.array([float(v) for v in row["caption"].split()])
        assert np.abs(said - pictures_of(row)[0].mean(axis=(0, 1))).max() < 3, "a caption of another clip"
    assert all(r["label_1"] is not None for r in done) and all(r["label_1"] is None for r in failed)
    # Another run asks nothing again.
    assert curate(collection, tmp_path, *CAPTION, execute=Answering(lambda *_: 1 / 0)).clips.to_pylist() == rows


def test_an_answer_that_stays_bad_is_an_error_on_its_row(collection: Path, tmp_path: Path, curate: Any) -> None:
    model = Answering(lambda messages, number: "no" if number == 0 else json.dumps(caption_of(pictures(messages))))
    rows = curate(collection, tmp_path, *CAPTION, execute=model).clips.to_pylist()
    assert any("no JSON object" in (r["caption_error"] or "") for r in rows) and any(r["caption"] for r in rows)


def test_labels_take_two_steps(collection: Path, tmp_path: Path, curate: Any) -> None:
    def reply(messages: list[dict[str, Any]], number: int) -> str:
        within = "dribbling a basketball" in str(messages[0]["content"])
        return json.dumps({"level3": "dribbling a basketball"} if within else {"level1": "Ball Sports", "level2": "Basketball"})

    model = Answering(reply)
    rows = curate(collection, tmp_path, LABEL, "funnel.passes.label={llm: {model: tiny}}", execute=model).clips.to_pylist()
    captioned = [r for r in rows if r["caption"]]
    assert {r["label_3"] for r in captioned} == {"dribbling a basketball"}
    assert sum(model.asked.values()) == 2 * len(captioned)


def test_it_needs_ray_and_a_stage_that_asks(collection: Path, tmp_path: Path, curate: Any) -> None:
    with pytest.raises(UserError, match="run without --serial"):
        curate(collection, tmp_path / "a", *CAPTION)
    with pytest.raises(UserError, match="asks no language model"):
        passes = [f"funnel.passes.{name}={{}}" for name in ("quality", "caption")]
        model = Answering(lambda *_: "")
        curate(collection, tmp_path / "b", "funnel.passes.motion={llm: {model: tiny}}", *passes, execute=model)


def test_without_vllm_the_error_names_the_extra() -> None:
    with pytest.raises(BackendUnavailable, match=r"pip install -e '\.\[vllm\]'"):
        curation.executor.language_model(Llm(model="tiny"))


@pytest.mark.ray
def test_the_rounds_run_on_ray_data(collection: Path, tmp_path: Path, curate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but vLLM itself: a stand-in answers between the two pools of actors."""

    def stand_in(settings: Llm) -> Callable[[Any], Any]:
        def say(row: dict[str, Any]) -> dict[str, Any]:
            import json as codec

            again = len(codec.loads(row["messages"])) > 1
            said = {"caption": "A caption.", "short_caption": "s", "camera": "static", "style": "real"}
            text = codec.dumps({**said, "sub_actions": [], "spatial_relations": []})
            kept = {name: row[name] for name in ("clip_id", "bytes", "answers", "context")}
            return {**kept, "generated_text": text if again else "not yet"}

        return lambda dataset: dataset.map(say)

    monkeypatch.setattr(curation.executor, "language_model", stand_in)
    rows = curate(collection, tmp_path, *CAPTION, execute=OnRay()).clips.to_pylist()
    assert {r["caption"] for r in rows} == {"A caption.", None} and not any(r["caption_error"] for r in rows)
    assert MAX_ROUNDS >= 2
