"""The judge of generated clips: prompts in the captions' words, right verdicts on what is known, and none given away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import adherence
from waver_core.captions.comparing import compare, share_agreeing
from waver_core.captions.facts import SceneFacts
from waver_core.captions.parsing import parse
from waver_core.registry import create
from waver_core.synthetic import TRAINING_COLOURS, TRAINING_DIRECTIONS, Video, training_collection


@pytest.fixture(scope="module")
def videos() -> list[Video]:
    return [v for v in training_collection(14, 21) if v.file.suffix == ".mp4"]


@pytest.fixture(scope="module")
def decoded(videos: list[Video]) -> list[np.ndarray]:
    codec: Any = create("video_autoencoder", "dct")
    return codec.decode(codec.encode([adherence.tiny_clip(v) for v in videos]))


def test_prompts_cover_every_pair_and_read_back_as_their_facts() -> None:
    prompts = adherence.prompts()
    assert [(p.colour, p.direction) for p in prompts] == [(c, d) for c in TRAINING_COLOURS for d in TRAINING_DIRECTIONS]
    for prompt in prompts:
        assert parse(prompt.text) == prompt.facts
        assert share_agreeing(compare(parse(prompt.short), prompt.facts)) == 1.0
    assert prompts == adherence.prompts() != adherence.prompts(1)


def test_the_judge_is_right_on_rendered_clips_and_after_the_codec(videos: list[Video], decoded: list[np.ndarray]) -> None:
    for video, after in zip(videos, decoded, strict=True):
        prompt = adherence.prompt_for(video)
        for frames in (adherence.tiny_clip(video), after):
            verdict = adherence.judge(frames, 4.0, prompt)
            assert verdict.colour_right and verdict.direction_right, (video.name, verdict.facts)


def test_the_judge_sees_another_colour_the_way_back_and_a_still(videos: list[Video], decoded: list[np.ndarray]) -> None:
    for video, frames in zip(videos[:4], decoded, strict=False):
        prompt = adherence.prompt_for(video)
        other = next(p for p in adherence.prompts() if p.colour != prompt.colour and p.direction == prompt.direction)
        assert adherence.judge(frames, 4.0, other)[:2] == (False, True)
        assert adherence.judge(frames[::-1], 4.0, prompt)[:2] == (True, False)
        assert adherence.judge(np.repeat(frames[4:5], 9, axis=0), 4.0, prompt).direction_right is False


def test_noise_and_emptiness_show_nothing() -> None:
    prompt = adherence.prompts()[0]
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    for frames in (noise, np.full((9, 64, 64, 3), 200, np.uint8)):
        assert adherence.judge(frames, 4.0, prompt)[:2] == (False, False)


def test_the_table_counts_colours_and_directions_apart() -> None:
    red_left, red_right = adherence.prompts()[:2]
    nothing = SceneFacts()
    results = [
        (red_left, adherence.Verdict(True, True, nothing)),
        (red_left, adherence.Verdict(True, False, nothing)),
        (red_right, adherence.Verdict(False, False, nothing)),
    ]
    rows = {row[0]: row[1:] for row in adherence.table(results)}
    assert rows["red"] == ("100% / 50%", "0% / 0%", "-", "-", "67% / 33%")
    assert rows["all"] == rows["red"] and set(rows["blue"]) == {"-"}
    assert adherence.shares(results) == pytest.approx({"colour": 2 / 3, "direction": 1 / 3, "both": 1 / 3})
    with pytest.raises(ValueError, match="no results"):
        adherence.shares([])


def test_the_contact_sheet_puts_clips_in_their_cells() -> None:
    clip = np.zeros((9, 32, 32, 3), np.uint8)
    clip[..., 0] = 255
    sheet = np.asarray(adherence.contact_sheet({("green", "right"): clip}, {("green", "right"): "yes"}))
    is_red = (sheet == (255, 0, 0)).all(axis=2)
    rows, columns = np.flatnonzero(is_red.any(axis=1)), np.flatnonzero(is_red.any(axis=0))
    assert is_red.sum() == 5 * 64 * 64
    assert rows[0] > sheet.shape[0] / 8 and rows[-1] < sheet.shape[0] / 2.5
    assert columns[0] > sheet.shape[1] / 4 and columns[-1] < 0.55 * sheet.shape[1]
    with pytest.raises(ValueError, match="at least one clip"):
        adherence.contact_sheet({}, {})
