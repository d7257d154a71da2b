"""Qwen2.5 as labeler: two steps down the taxonomy, names checked, and the true architecture in small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.waver_core.backends_pretrained.tiny_chat import save_qwen_text
from waver_core.backends.contracts import NO_ACTION, ActionLabel, ActionLabeler
from waver_core.registry import create

pytestmark = pytest.mark.models
TAXONOMY = """
Sports:
  Ball Games: [kicking a ball, throwing a ball, dribbling]
  Water Sports: [swimming, diving]
Food & Drink:
  Cooking: [frying an egg, stirring soup]
"""


class Scripted:
    """An engine that answers by the last message and counts its conversations."""

    def __init__(self, answer: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.answer, self.schemas, self.asked = answer, [], 0

    def complete(self, conversations: Any, max_tokens: int, json_schema: Any = None) -> list[str | Exception]:
        self.schemas.append(json_schema)
        self.asked += len(conversations)
        answers = [self.answer(c) for c in conversations]
        return [a if isinstance(a, str | Exception) else json.dumps(a) for a in answers]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_qwen_text(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def labeler(tmp_path: Path, checkpoint: str) -> Any:
    path = tmp_path / "taxonomy.yaml"
    path.write_text(TAXONOMY)
    return create("action_labeler", "qwen2_5", checkpoint=checkpoint, taxonomy_path=str(path), max_tokens=12, batch_size=3)


def scripted(labeler: Any, answer: Callable[[list[dict[str, Any]]], Any]) -> Scripted:
    engine = Scripted(answer)
    labeler.engine = engine
    return engine


def test_labels_go_down_the_taxonomy_and_back_to_their_captions(labeler: Any) -> None:
    assert isinstance(labeler, ActionLabeler)

    def answer(conversation: list[dict[str, Any]]) -> Any:
        text = conversation[0]["content"]
        caption = text.rsplit("Caption: ", 1)[1]
        if "level3" in text:
            return {"level3": {"a swimmer": "swimming", "a cook": "none"}[caption]}
        return {
            "a swimmer": {"level1": "Sports", "level2": "Water Sports"},
            "a wall": {"level1": "none", "level2": "none"},
            "a cook": {"level1": "Sports", "level2": "cooking"},
            "a game": {"level1": "Sports", "level2": "none"},
            "a fault": RuntimeError("down"),
        }[caption]

    engine = scripted(labeler, answer)
    swimmer, blank, wall, cook, game, fault = labeler.label(["a swimmer", " ", "a wall", "a cook", "a game", "a fault"])
    assert swimmer == ActionLabel("Sports", "Water Sports", "swimming")
    assert blank == wall == NO_ACTION
    assert cook == ActionLabel("Food & Drink", "Cooking", "none")  # level 2 decides over level 1
    assert game == ActionLabel("Sports", "none", "none")
    assert str(fault) == "down"
    assert engine.asked == 5 + 2
    assert engine.schemas[0]["properties"]["level2"]["enum"] == ["Ball Games", "Water Sports", "Cooking", "none"]


def test_a_name_that_is_not_there_is_asked_for_again_and_then_an_error(labeler: Any) -> None:
    def answer(conversation: list[dict[str, Any]]) -> Any:
        text = conversation[0]["content"]
        if "level3" in text:
            return {"level3": "knitting"}
        if len(conversation) > 1:
            assert "'Gardening' is not one of the names" in conversation[2]["content"][0]["text"]
            return {"level1": "Sports", "level2": "Ball Games"}
        return {"level1": "Sports", "level2": "Gardening"}

    engine = scripted(labeler, answer)
    (result,) = labeler.label(["a gardener"])
    assert isinstance(result, ValueError)
    assert "knitting" in str(result)
    assert engine.asked == 4


def test_slips_of_the_pen_are_forgiven_and_guesses_are_not(labeler: Any) -> None:
    ball = ActionLabel("Sports", "Ball Games", "none")

    def third(name: str) -> str:
        return labeler.parse(json.dumps({"level3": name}), "", ball).level3

    assert third("Kicking a ball.") == "kicking a ball"
    assert third("driblling") == "dribbling"
    assert third("NONE") == "none"
    for name in ("passing a ball", "ball", "swimming"):
        with pytest.raises(ValueError, match="is not one of the names given for 'level3'"):
            third(name)
    assert labeler.parse('{"level1": "food and drink", "level2": "none"}', "") == ActionLabel("Food & Drink", "none", "none")
    with pytest.raises(ValueError, match="'level2' must be text"):
        labeler.parse('{"level1": "Sports"}', "")


def test_prompts_hold_the_names_and_end_with_the_caption(labeler: Any) -> None:
    (first,) = labeler.messages("a man runs for $5")
    assert "Sports: Ball Games; Water Sports" in first["content"]
    assert first["content"].endswith("Caption: a man runs for $5")
    (second,) = labeler.messages("a man runs", ActionLabel("Sports", "Ball Games", "none"))
    assert "kicking a ball\nthrowing a ball\ndribbling" in second["content"]
    assert "swimming" not in second["content"]


def test_a_batch_answers_as_each_caption_alone_and_as_the_model_itself(labeler: Any, checkpoint: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    conversations = [labeler.messages(c) for c in ("a dog", "a man swims in the wide sea", "yes", "it is a very long story")]
    answers = labeler.engine.complete(conversations, 12)
    assert answers == [labeler.engine.complete([c], 12)[0] for c in conversations]
    words = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    for conversation, answer in zip(conversations, answers, strict=True):
        inputs = words.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert words.decode(tokens, skip_special_tokens=True) == answer
    repaired = labeler.repair_messages(conversations[0], "{", "not valid JSON")
    assert isinstance(labeler.engine.complete([repaired], 4)[0], str)


def test_the_fingerprint_tells_of_prompts_and_taxonomy(labeler: Any, checkpoint: str, tmp_path: Path) -> None:
    own, other = tmp_path / "own.txt", tmp_path / "other.yaml"
    own.write_text("$classes $caption")
    other.write_text(TAXONOMY.replace("dribbling", "juggling"))
    path = str(tmp_path / "taxonomy.yaml")
    prints = {
        create(
            "action_labeler", "qwen2_5", **{"checkpoint": checkpoint, "taxonomy_path": path, "max_tokens": 12, **v}
        ).fingerprint
        for v in ({}, {"prompt_level2": str(own)}, {"taxonomy_path": str(other)}, {"max_tokens": 13})
    }
    assert labeler.fingerprint in prints
    assert len(prints) == 4


def test_without_checkpoint_or_package(check_missing: Any, tmp_path: Path) -> None:
    path = tmp_path / "taxonomy.yaml"
    path.write_text(TAXONOMY)
    backend = create("action_labeler", "qwen2_5", taxonomy_path=str(path))
    check_missing(backend, lambda: create("action_labeler", "qwen2_5", taxonomy_path=str(path)).label(["a dog"]))
