"""The caption stage: what it asks for, what it writes, and what it does with a clip that cannot be captioned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.stage import ClipMedia, FrameRequest, Frames
from curation.stages import caption
from waver_core.captions.parsing import parse
from waver_core.config import validate
from waver_core.errors import ConfigError
from waver_core.registry import create
from waver_core.synthetic import render, single_shot


@pytest.fixture(scope="module")
def stage() -> caption.Stage:
    return caption.Stage(caption.Options())


def media(stage: caption.Stage, frames: Frames, **row: Any) -> ClipMedia:
    return ClipMedia({"kind": "video", **row}, dict.fromkeys(stage.requests(), frames))


def test_it_asks_for_frames_that_other_stages_sample_as_well(stage: caption.Stage) -> None:
    assert stage.requests() == (FrameRequest(192, fps=6.0), FrameRequest(360, count=3))


def test_its_columns_hold_what_was_measured(stage: caption.Stage) -> None:
    video = single_shot(3, width_px=342, height_px=192, colour="red", fps=6)
    rgb = np.stack(list(render(video)))
    row = stage.score(media(stage, Frames(rgb, np.arange(12) / 6 + 5.0), start_s=5.0, end_s=7.0))
    assert set(row) == {c.name for c in stage.columns} and all(c.name.startswith("caption") for c in stage.columns)
    (thing,) = parse(row["caption"]).objects
    assert (thing.colour, thing.shape, thing.motion) == ("red", "disc", "right")
    assert row["caption_actions"][0]["start_s"] == 0.0 and row["caption_actions"][0]["end_s"] == 2.0
    assert row["caption_camera"] == "static" and row["caption_style"] == "" and row["caption_short"].startswith("A ")
    table = pa.table({c.name: pa.array([row[c.name]], c.type) for c in stage.columns})
    assert table.to_pylist() == [row]


def test_a_clip_that_cannot_be_captioned_is_an_error(stage: caption.Stage) -> None:
    with pytest.raises(ValueError, match="no frames"):
        stage.score(media(stage, Frames(np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0))))


def test_fingerprint_and_options(stage: caption.Stage) -> None:
    assert create("captioner", "attributes").fingerprint in str(stage.fingerprint())
    assert stage.fingerprint() != caption.Stage(caption.Options(fps=4.0)).fingerprint()
    with pytest.raises(ConfigError):
        validate(caption.Options, {"fpss": 6}, where="funnel.stages.caption")
