"""SmolVLM2 as judge and captioner: the true architecture in small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.waver_core.backends_pretrained.tiny_chat import clip, save_smolvlm
from waver_core.backends.contracts import Caption, Captioner, QualityJudge
from waver_core.backends.pretrained._frames import sample
from waver_core.registry import create

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_smolvlm(tmp_path_factory.mktemp("smolvlm"))


def test_probabilities_equal_whole_forward_passes_and_do_not_depend_on_the_batch(checkpoint: str) -> None:
    import torch
    from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor

    judge = create("quality_judge", "smolvlm2", checkpoint=checkpoint, frames=3, device="cpu")
    assert isinstance(judge, QualityJudge)
    clips = [clip(0), clip(1), clip(2, frames=2)]
    found = [[*q.issues.values(), q.high_quality] for q in judge.judge(clips)]
    model = SmolVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = SmolVLMProcessor.from_pretrained(checkpoint)
    words = processor.tokenizer
    for view, probabilities in zip(clips, found, strict=True):
        seen = sample(view, 3)
        times = [round(t * 1000) for t in seen.times_s]
        metadata = {"total_num_frames": 2000, "fps": 1000, "frames_indices": times, "duration": seen.duration_s}
        for question, probability in zip(judge.questions, probabilities, strict=True):
            said = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
            prompt = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
            inputs = processor(
                text=[prompt], videos=[[seen.rgb]], video_metadata=[[metadata]], do_sample_frames=False, return_tensors="pt"
            )
            with torch.no_grad():
                chances = model(**inputs).logits[0, -1].softmax(dim=-1)
            yes, no = (
                sum(chances[words.encode(s + w)[0]] for s in ("", " ") for w in (a, a.title(), a.upper())) for a in ("yes", "no")
            )
            assert probability == pytest.approx(float(yes / (yes + no)), abs=1e-4)
    assert np.std([found[0], found[1]], axis=0).min() > 1e-4


def test_the_captioner_takes_a_paragraph_and_the_measured_camera(checkpoint: str) -> None:
    captioner = create("captioner", "smolvlm2", checkpoint=checkpoint, frames=3, max_tokens=8, batch_size=2, device="cpu")
    assert isinstance(captioner, Captioner)
    assert captioner.json_schema is None
    clips = [clip(k, frames=2 + k % 2, motion_camera="zoom_in") for k in range(3)]
    conversations = [captioner.conversation(view) for view in clips]
    answers = captioner.engine.complete(conversations, 8)
    assert answers == [captioner.engine.complete([c], 8)[0] for c in conversations]
    for caption, answer in zip(captioner.caption(clips), answers, strict=True):
        assert isinstance(caption, Caption)
        assert (caption.text, caption.camera) == (" ".join(answer.split()), "zoom_in")


def test_half_precision_answers_too(checkpoint: str) -> None:
    options = {"checkpoint": checkpoint, "device": "cpu", "dtype": "bfloat16", "frames": 2}
    assert 0 < create("quality_judge", "smolvlm2", **options).judge([clip(0)])[0].high_quality < 1
    captioner = create("captioner", "smolvlm2", **options)
    assert isinstance(captioner.engine.complete([captioner.conversation(clip(0))], 3)[0], str)


def test_a_paragraph_is_cut_after_its_first_sentence(checkpoint: str) -> None:
    captioner = create("captioner", "smolvlm2", checkpoint=checkpoint)
    view = clip(0, motion_camera="static")
    caption = captioner.parse(" A dog runs.\nIt barks! Then rests. ", view)
    assert caption == Caption("A dog runs. It barks! Then rests.", "A dog runs.", (), "static", "", ())
    assert captioner.parse("A dog.", clip(0, frames=1, kind="image")).camera == "static"
    for text, seen, complaint in (("  ", view, "empty"), ("A dog.", clip(0), "motion_camera")):
        with pytest.raises(ValueError, match=complaint):
            captioner.parse(text, seen)


def test_a_frame_is_one_picture_not_many_pieces(checkpoint: str) -> None:
    captioner = create("captioner", "smolvlm2", checkpoint=checkpoint, frames=2)
    processor = captioner.engine._processor
    (conversation,) = [captioner.conversation(clip(0, frames=2))]
    images = [part["image"] for part in conversation[0]["content"] if part["type"] == "image"]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    tokens = processor(text=[prompt], images=[images], return_tensors="pt", **captioner.media_options)["input_ids"][0]
    assert int((tokens == processor.image_token_id).sum()) == 2 * 4


def test_without_checkpoint_or_package(check_missing: Any) -> None:
    check_missing(create("quality_judge", "smolvlm2"), lambda: create("quality_judge", "smolvlm2").judge([clip(0)]))
    check_missing(create("captioner", "smolvlm2"), lambda: create("captioner", "smolvlm2").caption([clip(0)]))
