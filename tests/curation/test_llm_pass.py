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
from waver_core.backends.pretrained.qwen2_5_vl import Qwen25VLCaptioner
from waver_core.config import Llm
from waver_core.errors import BackendUnavailable, ConfigError, RunFailed, UserError
from waver_core.taxonomy import load_taxonomy

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

    def require(self, model: Llm) -> None:
        """It has one."""

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
    # Another run asks again for what has failed, and for nothing else.
    second = Answering(lambda *_: {"__inference_error__": "the prompt is too long"})
    assert curate(collection, tmp_path, *CAPTION, execute=second).clips.to_pylist() == rows
    assert sum(second.asked.values()) == len(failed)


def test_an_answer_that_stays_bad_is_an_error_on_its_row(collection: Path, tmp_path: Path, curate: Any) -> None:
    model = Answering(lambda messages, number: "no" if number == 0 else json.dumps(caption_of(pictures(messages))))
    rows = curate(collection, tmp_path, *CAPTION, execute=model).clips.to_pylist()
    assert any("no JSON object" in (r["caption_error"] or "") for r in rows) and any(r["caption"] for r in rows)


def class_told(text: str) -> str:
    """A class of the taxonomy that depends on the caption."""
    classes = {"left": "Basketball", "right": "Soccer", "up": "Volleyball"}
    return next((v for k, v in classes.items() if k in text), "Tennis")


def test_labels_take_two_steps_and_come_back_to_their_captions(collection: Path, tmp_path: Path, curate: Any) -> None:
    first = {path.level2: path.level3 for path in reversed(list(load_taxonomy()))}

    def reply(messages: list[dict[str, Any]], number: int) -> str:
        text = str(messages[0]["content"])
        told = class_told(text[text.index("A ", text.rindex("aption")) :])
        whole = "Ball Sports: " in text  # the first step shows the classes, the second the labels of one
        return json.dumps({"level1": "Ball Sports", "level2": told} if whole else {"level3": first[told]})

    model = Answering(reply)
    rows = curate(collection, tmp_path, LABEL, "funnel.passes.label={llm: {model: tiny}}", execute=model).clips.to_pylist()
    captioned = [r for r in rows if r["caption"]]
    for row in captioned:
        told = class_told(row["caption"])
        assert (row["label_2"], row["label_3"], row["label_error"]) == (told, first[told], None)
    assert len({r["label_2"] for r in captioned}) >= 2 and sum(model.asked.values()) == 2 * len(captioned)


def test_another_model_asks_anew_and_so_does_a_run_after_a_failure(collection: Path, tmp_path: Path, curate: Any) -> None:
    def down(messages: list[dict[str, Any]], number: int) -> Any:
        return {"__inference_error__": "down"}

    def up(messages: list[dict[str, Any]], number: int) -> Any:
        return json.dumps(caption_of(pictures(messages)))

    with pytest.raises(RunFailed, match="captioned"):
        curate(collection, tmp_path, *CAPTION, execute=Answering(down))
    rows = curate(collection, tmp_path, *CAPTION, execute=Answering(up)).clips.to_pylist()
    done = [r for r in rows if r["caption"]]
    assert len(done) >= 6 and not any(r["caption_error"] for r in rows)
    other = Answering(up)
    curate(collection, tmp_path, CAPTION[0], "funnel.passes.caption={llm: {model: larger}}", execute=other)
    assert other.asked[1] == len(done)


def test_an_answer_that_breaks_the_parser_costs_one_clip(
    collection: Path, tmp_path: Path, curate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Qwen25VLCaptioner.parse

    def touchy(self: Any, text: str, view: Any) -> Any:
        if "BREAK" in text:
            raise TypeError("a bug")
        return real(self, text, view)

    monkeypatch.setattr(Qwen25VLCaptioner, "parse", touchy)

    def reply(messages: list[dict[str, Any]], number: int) -> str:
        said = caption_of(pictures(messages))
        odd = {0: "BREAK", 1: "half a pair: \ud800"}
        return json.dumps({**said, "caption": odd.get(number, said["caption"])})

    rows = curate(collection, tmp_path, *CAPTION, execute=Answering(reply)).clips.to_pylist()
    assert {r["caption_error"] for r in rows} == {None, "TypeError: a bug"}
    assert any((r["caption"] or "") == "half a pair: ?" for r in rows)


def test_it_needs_ray_and_a_stage_that_asks(collection: Path, tmp_path: Path, curate: Any) -> None:
    with pytest.raises(UserError, match="run without --serial"):
        curate(collection, tmp_path / "a", *CAPTION)
    for extra in (CAPTION[1], "funnel.passes.label={llm: {model: tiny}}"):
        with pytest.raises(ConfigError, match="asks no language model of the run"):
            curate(collection, tmp_path / "b", extra, execute=Answering(lambda *_: ""))
    with pytest.raises(ConfigError, match=r"funnel\.passes\.caption\.llm=\{model"):
        curate(collection, tmp_path / "b", CAPTION[0])
    with pytest.raises(ConfigError, match="works in no pass after the first"):
        curate(collection, tmp_path / "b", "funnel.passes.segment={gpus: 1}")
    with pytest.raises(ConfigError, match="asks no language model"):
        passes = [f"funnel.passes.{name}={{}}" for name in ("quality", "caption")]
        model = Answering(lambda *_: "")
        curate(collection, tmp_path / "b", "funnel.passes.motion={llm: {model: tiny}}", *passes, execute=model)


def test_without_vllm_the_error_names_the_extra() -> None:
    with pytest.raises(BackendUnavailable, match=r"pip install -e '\.\[vllm\]'"):
        OnRay().require(Llm(model="tiny"))


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
    monkeypatch.setattr(OnRay, "require", lambda *_: None)
    rows = curate(collection, tmp_path, *CAPTION, execute=OnRay()).clips.to_pylist()
    assert {r["caption"] for r in rows} == {"A caption.", None} and not any(r["caption_error"] for r in rows)
    assert MAX_ROUNDS >= 2
