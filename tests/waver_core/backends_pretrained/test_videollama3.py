"""VideoLLaMA3 as quality judge: probabilities by the true architecture in small, against whole forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.waver_core.backends_pretrained.tiny_chat import clip, save_videollama3
from waver_core.backends.contracts import ISSUES, ClipView, Quality, QualityJudge
from waver_core.backends.pretrained._frames import sample
from waver_core.errors import ConfigError
from waver_core.prompts import load_prompt
from waver_core.registry import create

pytestmark = pytest.mark.models
FRAMES = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_videollama3(tmp_path_factory.mktemp("videollama3"))


@pytest.fixture(scope="module")
def judge(checkpoint: str) -> Any:
    return create("quality_judge", "videollama3", checkpoint=checkpoint, frames=FRAMES, batch_size=3, device="cpu")


def row(quality: Quality) -> list[float]:
    assert list(quality.issues) == list(ISSUES)
    return [*quality.issues.values(), quality.high_quality]


def reference(checkpoint: str, view: ClipView, questions: list[str]) -> list[float]:
    """One whole forward pass per question, logits at the last position, softmax over all tokens."""
    import torch
    from transformers import VideoLlama3ForConditionalGeneration, VideoLlama3Processor

    model = VideoLlama3ForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = VideoLlama3Processor.from_pretrained(checkpoint)
    seen = sample(view, FRAMES)
    metadata = {"total_num_frames": 20, "fps": 10.0, "frames_indices": [round(t * 10) for t in seen.times_s]}
    probabilities = []
    for question in questions:
        said = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=[prompt], videos=[seen.rgb], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
        )
        with torch.no_grad():
            chances = model(**inputs).logits[0, -1].softmax(dim=-1)
        sums = []
        for word in ("yes", "no"):
            texts = [space + w for w in (word, word.title(), word.upper()) for space in ("", " ")]
            sums.append(
                sum(chances[processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.tokenize(t)[0])] for t in texts)
            )
        probabilities.append(float(sums[0] / (sums[0] + sums[1])))
    return probabilities


def test_probabilities_equal_whole_forward_passes(judge: Any, checkpoint: str) -> None:
    assert isinstance(judge, QualityJudge)
    clips = [clip(0), clip(1)]
    found = np.array([row(q) for q in judge.judge(clips)])
    wanted = np.array([reference(checkpoint, view, judge.questions) for view in clips])
    assert np.abs(found - wanted).max() < 1e-4
    assert found.std(axis=0).min() > 1e-3  # the clips matter,
    assert found.std(axis=1).min() > 1e-2  # and so do the questions


def test_batches_do_not_matter_nor_do_clips_of_unlike_length_and_size(judge: Any) -> None:
    tall = clip(7)
    tall = tall._replace(rgb=np.ascontiguousarray(tall.rgb.transpose(0, 2, 1, 3)))
    still = clip(8)._replace(rgb=np.repeat(clip(8).rgb[:1], 4, axis=0))  # compressed to far fewer tokens
    clips = [clip(0), clip(1, frames=2), tall, still, clip(4), clip(5, frames=1, kind="image")]
    together = np.array([row(q) for q in judge.judge(clips)])
    alone = np.array([row(judge.judge([view])[0]) for view in clips])
    assert together.shape == (6, 14)
    assert np.abs(together - alone).max() < 1e-4
    assert ((together > 0) & (together < 1)).all()


def test_half_precision_gives_about_the_same(judge: Any, checkpoint: str) -> None:
    half = create("quality_judge", "videollama3", checkpoint=checkpoint, frames=FRAMES, device="cpu", dtype="bfloat16")
    assert row(half.judge([clip(0)])[0]) == pytest.approx(row(judge.judge([clip(0)])[0]), abs=0.1)


def test_a_clip_without_frames_is_an_error_on_its_row(judge: Any) -> None:
    first, empty, last = judge.judge([clip(0), ClipView(np.zeros((0, 9, 9, 3), np.uint8), np.zeros(0), {}), clip(1)])
    assert isinstance(empty, ValueError)
    assert row(first) != row(last)
    assert judge.judge([]) == []


def test_a_clip_that_the_processor_refuses_does_not_take_its_batch_along(judge: Any) -> None:
    sliver = clip(3)._replace(rgb=np.zeros((4, 1, 900, 3), np.uint8))
    good, bad = judge.judge([clip(0), sliver])
    assert isinstance(bad, ValueError)
    assert row(good) == pytest.approx(row(judge.judge([clip(0)])[0]), abs=1e-4)


def test_every_issue_has_its_question(judge: Any) -> None:
    assert len(judge.questions) == len(set(judge.questions)) == len(ISSUES) + 1
    assert "watermark" in judge.questions[ISSUES.index("watermark")]
    assert "of high quality" in judge.questions[-1]


def test_the_fingerprint_tells_of_all_that_changes_probabilities(checkpoint: str, tmp_path: Path) -> None:
    prompt, table = tmp_path / "prompt.txt", tmp_path / "table.txt"
    prompt.write_text("$statement?")
    table.write_text(load_prompt("quality_statements.v1").text + "# mine\n")
    variants: list[dict[str, Any]] = [
        {},
        {"prompt": str(prompt)},
        {"statements": str(table)},
        {"frames": 3},
        {"short_side_px": 99},
        {"dtype": "bfloat16"},
        {"revision": "abc"},
    ]
    prints = [create("quality_judge", "videollama3", **{"checkpoint": checkpoint, **v}).fingerprint for v in variants]
    assert len(set(prints)) == len(variants)


def test_statements_and_prompt_are_checked(checkpoint: str, tmp_path: Path) -> None:
    table, prompt = tmp_path / "table.txt", tmp_path / "prompt.txt"
    table.write_text("watermark: A logo.\nwatermarks: Logos.\n")
    with pytest.raises(ConfigError, match=r"black_border.*watermarks"):
        create("quality_judge", "videollama3", checkpoint=checkpoint, statements=str(table))
    prompt.write_text("Is it good?")
    with pytest.raises(ConfigError, match=r"needs \$statement"):
        create("quality_judge", "videollama3", checkpoint=checkpoint, prompt=str(prompt))


def test_without_checkpoint_or_package(check_missing: Any) -> None:
    check_missing(create("quality_judge", "videollama3"), lambda: create("quality_judge", "videollama3").judge([clip(0)]))
