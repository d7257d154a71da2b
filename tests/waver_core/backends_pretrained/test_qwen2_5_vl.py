"""Qwen2.5-VL as captioner: the true architecture in small, and what is made of its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.waver_core.backends_pretrained.tiny_chat import clip, save_qwen_vl
from waver_core.backends.contracts import Caption, Captioner, ClipView, SubAction
from waver_core.errors import ConfigError
from waver_core.registry import create

pytestmark = pytest.mark.models
GOOD: dict[str, Any] = {
    "caption": "A man  lifts a cup\nand drinks.",
    "short_caption": "A man drinks.",
    "sub_actions": [
        {"text": "he lifts the cup", "start_s": 0, "end_s": 1.2},
        {"text": "he drinks", "start_s": 1.2, "end_s": 2.3},
    ],
    "camera": "pan_left",
    "style": "real",
    "spatial_relations": ["The cup is to the right of the plate."],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_qwen_vl(tmp_path_factory.mktemp("qwen_vl"))


@pytest.fixture(scope="module")
def backend(checkpoint: str) -> Any:
    return create("captioner", "qwen2_5_vl", checkpoint=checkpoint, frames=3, max_tokens=10, batch_size=3, device="cpu")


def answer(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def test_a_batch_answers_as_each_clip_alone_and_as_the_model_itself(backend: Any, checkpoint: str) -> None:
    from PIL import Image
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    clips = [clip(0), clip(1, frames=2), clip(2), clip(3)]
    conversations = [backend.conversation(view) for view in clips]
    answers = backend.engine.complete(conversations, 10)
    assert answers == [backend.engine.complete([conversation], 10)[0] for conversation in conversations]
    assert len(set(answers)) >= 3  # a random model may answer two clips alike
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = Qwen2_5_VLProcessor.from_pretrained(checkpoint)
    for conversation, text in zip(conversations, answers, strict=True):
        images = [Image.fromarray(p["image"]) for p in conversation[0]["content"] if p["type"] == "image"]
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[prompt], images=images, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(tokens, skip_special_tokens=True) == text


def test_half_precision_answers_too(checkpoint: str) -> None:
    half = create("captioner", "qwen2_5_vl", checkpoint=checkpoint, device="cpu", dtype="bfloat16")
    assert isinstance(half.engine.complete([half.conversation(clip(0))], 3)[0], str)


def test_a_clip_that_cannot_be_shown_and_answers_that_are_no_json_are_errors_on_their_rows(backend: Any) -> None:
    assert isinstance(backend, Captioner)
    empty = clip(0)
    results = backend.caption([clip(1), ClipView(empty.rgb[:0], empty.times_s[:0], empty.row), clip(2)])
    assert [type(r) for r in results] == [ValueError] * 3
    assert "0 frames" in str(results[1])
    assert "JSON" in str(results[0])
    assert backend.caption([]) == []


def test_the_model_is_told_the_times_the_length_and_the_camera_labels(backend: Any) -> None:
    (message,) = backend.messages(clip(0, frames=3, start_s=40.0))
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert texts[:3] == ["Frame at 0.0 s:", "Frame at 0.5 s:", "Frame at 1.0 s:"]
    assert "lasts 1.5 seconds" in texts[3]
    assert "zoom_out" in texts[3]
    assert "$" not in texts[3]
    assert [part["type"] for part in message["content"][:2]] == ["text", "image_url"]


def test_an_answer_becomes_a_caption_with_small_overshoots_cut_off(backend: Any) -> None:
    assert backend.parse(f"```json\n{answer()}\n```", clip(0)) == Caption(
        text="A man lifts a cup and drinks.",
        short="A man drinks.",
        sub_actions=(SubAction("he lifts the cup", 0.0, 1.2), SubAction("he drinks", 1.2, 2.0)),
        camera="pan_left",
        style="real",
        spatial=("The cup is to the right of the plate.",),
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"caption": " "}, "'caption' must be text"),
        ({"short_caption": None}, "'short_caption' must be text"),
        ({"camera": "dolly"}, "'camera' must be one of static"),
        ({"style": ""}, "'style' must be text"),
        ({"spatial_relations": "left"}, "'spatial_relations' must be a list"),
        ({"spatial_relations": [3]}, "'spatial_relations' must be text"),
        ({"sub_actions": ["he runs"]}, "every entry of 'sub_actions'"),
        ({"sub_actions": [{"text": "he runs", "start_s": "0", "end_s": 1}]}, "must be numbers"),
        ({"sub_actions": [{"text": "he runs", "start_s": 1, "end_s": 1}]}, "lasts from 1 to 1 s"),
        ({"sub_actions": [{"text": "he runs", "start_s": 0, "end_s": 4}]}, "the clip from 0 to 2.0 s"),
        ({"sub_actions": [{"text": "he runs", "start_s": -2, "end_s": 1}]}, "lasts from -2 to 1 s"),
        ({"sub_actions": [{"text": "he runs", "start_s": 0, "end_s": float("nan")}]}, "lasts from 0 to nan s"),
    ],
)
def test_what_is_wrong_is_said(backend: Any, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        backend.parse(answer(**changes), clip(0))


def test_every_answer_that_the_schema_allows_has_its_keys_read(backend: Any) -> None:
    schema = backend.json_schema
    assert set(schema["required"]) == set(schema["properties"]) == set(GOOD)
    for key in GOOD:
        with pytest.raises(ValueError, match=f"'{key}'"):
            backend.parse(json.dumps({k: v for k, v in GOOD.items() if k != key}), clip(0))


def test_an_image_is_asked_about_as_one_and_has_no_sub_actions(backend: Any) -> None:
    image = clip(0, frames=1, kind="image")
    (message,) = backend.messages(image)
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert "Describe this image" in message["content"][1]["text"]
    assert backend.parse(answer(sub_actions=[]), image).sub_actions == ()
    with pytest.raises(ValueError, match=r"0 to 0\.0 s"):
        backend.parse(answer(), image)


def test_the_fingerprint_tells_of_all_that_changes_answers(checkpoint: str, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("Describe it. $frames $duration $camera_labels")
    variants: list[dict[str, Any]] = [
        {},
        {"prompt": str(own)},
        {"image_prompt": str(own)},
        {"frames": 7},
        {"fps": 1.0},
        {"short_side_px": 100},
        {"max_tokens": 9},
        {"revision": "abc"},
        {"engine": "openai", "base_url": "http://127.0.0.1:9", "model": "big"},
    ]
    prints = [create("captioner", "qwen2_5_vl", **{"checkpoint": checkpoint, **v}).fingerprint for v in variants]
    assert len(set(prints)) == len(variants)
    assert "captioner.v1" in prints[0]
    own.write_text("Describe it well.")
    from waver_core.prompts import load_prompt

    load_prompt.cache_clear()
    assert create("captioner", "qwen2_5_vl", checkpoint=checkpoint, prompt=str(own)).fingerprint != prints[1]
    vllm = create("captioner", "qwen2_5_vl", checkpoint=checkpoint, engine="vllm", concurrency=3)
    assert vllm.fingerprint == prints[0]


def test_a_prompt_with_an_unknown_placeholder_is_told_of(checkpoint: str, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("Describe $it")
    with pytest.raises(ConfigError, match=r"not one of \$frames"):
        create("captioner", "qwen2_5_vl", checkpoint=checkpoint, prompt=str(own)).messages(clip(0))


def test_without_checkpoint_or_package(check_missing: Any) -> None:
    check_missing(create("captioner", "qwen2_5_vl"), lambda: create("captioner", "qwen2_5_vl").caption([clip(0)]))
