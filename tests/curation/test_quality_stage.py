"""The quality stage: full-rate columns of every clip from the first decode, the judge's from the second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.shots_pass import small_frame
from curation.stage import ClipMedia, Frames, SourceFacts, StreamFrame
from curation.stages import motion, quality
from waver_core.backends.contracts import ISSUES, ClipView
from waver_core.synthetic import Defect, single_shot, write_video
from waver_core.tempo import COLUMNS, PREFIX
from waver_core.video import VideoInfo, open_video, quarter_turns

INFO = VideoInfo("h264", "mp4", "yuv420p", 128, 72, 1.0, 24.0, 10.0, 1000, False, 1, 0.0)


def stage(**options: Any) -> quality.Stage:
    return quality.Stage(quality.Options(**options))


def media(frames: np.ndarray, **row: Any) -> ClipMedia:
    request = stage().requests()[0]
    return ClipMedia(
        {"kind": "video", "overlay_text_area_ratio": 0.0, **row}, {request: Frames(frames, np.arange(len(frames)) / 6)}
    )


def test_columns_of_the_first_decode_come_from_each_clip_alone(tmp_path: Path) -> None:
    video = single_shot(4, camera="pan_left", width_px=256, height_px=144, duration_s=2.2)
    slow = replace(video.shots[0], defects=(Defect("slow_motion", 4),))
    write_video(replace(video, shots=(video.shots[0], slow)), tmp_path / "a.mp4")
    with open_video(str(tmp_path / "a.mp4"), fast=True) as opened:
        watcher = None
        for k, frame in enumerate(opened.frames()):
            watcher = watcher or stage().watch(SourceFacts(opened.info, "video", quarter_turns(frame.picture)))
            watcher.add(StreamFrame(k, frame.time_s, small_frame(frame.picture), frame.picture, None, frame.damaged))
    assert watcher is not None
    spans = [{"start_frame": a, "end_frame": b} for a, b in ((0, 53), (53, 106), (53, 53), (53, 55))]
    first, second, empty, short = watcher.describe(spans)
    assert set(first) == set(empty) == set(short) == {f"{PREFIX}{name}" for name in COLUMNS}
    assert (first["quality_source_repeat_factor"], second["quality_source_repeat_factor"]) == (1.0, 4.0)
    assert 0.05 < first["quality_source_camera_speed"] < 0.2  # 0.1 short sides a second


def test_an_image_has_no_tempo() -> None:
    watcher = stage().watch(SourceFacts(INFO, "image", 0))
    watcher.add(StreamFrame(0, 0.0, np.zeros((72, 128, 3), np.uint8), None, np.zeros((144, 256, 3), np.uint8), False))
    assert watcher.describe([{"start_frame": 0, "end_frame": 1}]) == [{}]


def test_every_issue_is_a_score_and_every_column_is_declared() -> None:
    declared = {column.name: column for column in quality.Stage.columns}
    found = stage().score(media(np.full((3, 192, 256, 3), 120, np.uint8)))
    assert set(found) == {f"quality_{issue}" for issue in ISSUES} | {"quality_high"}
    assert all(declared[name].score for name in found)
    assert {name for name in declared if name.startswith(PREFIX)} == {f"{PREFIX}{name}" for name in COLUMNS}
    assert all(declared[f"{PREFIX}{name}"].doc for name in COLUMNS)


def test_the_judge_sees_the_row_and_its_failure_is_the_clip_s(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage()
    seen: list[ClipView] = []

    class Judge:
        fingerprint = "judge"

        def judge(self, clips: list[ClipView]) -> list[Any]:
            seen.extend(clips)
            return [ValueError("no verdict") for _ in clips]

    monkeypatch.setattr(made, "_judge", Judge())
    with pytest.raises(ValueError, match="no verdict"):
        made.score(media(np.zeros((2, 96, 96, 3), np.uint8), quality_source_jumps=1.0))
    assert seen[0].row["quality_source_jumps"] == 1.0


def test_frames_are_those_of_motion() -> None:
    assert stage().requests() == motion.Stage(motion.Options()).requests()


def test_the_fingerprint_changes_with_options() -> None:
    assert stage().fingerprint() != stage(fps=8.0).fingerprint()
    assert stage().fingerprint() == stage().fingerprint()
