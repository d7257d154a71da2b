"""The training collection: dealt evenly, in sight, moving far enough, and right in the eyes of the funnel's captioner."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from waver_core.backends.contracts import ClipView
from waver_core.registry import create
from waver_core.synthetic import (
    DIRECTIONS,
    TRAINING_COLOURS,
    TRAINING_DIRECTIONS,
    Video,
    __main__,
    render,
    shape_path_px,
    training_collection,
)


def is_image(video: Video) -> bool:
    return video.file.suffix == ".png"


def test_colours_and_directions_are_dealt_evenly() -> None:
    videos = training_collection(560, 3)
    moving = [v for v in videos if not is_image(v)]
    assert len(moving) == 480 and len({v.name for v in videos}) == 560
    pairs = Counter((v.shots[0].shapes[0].colour, v.shots[0].shapes[0].direction) for v in moving)
    assert pairs == {(c, d): 20 for c in TRAINING_COLOURS for d in TRAINING_DIRECTIONS}
    still = Counter(v.shots[0].shapes[0].colour for v in videos if is_image(v))
    assert set(still) == set(TRAINING_COLOURS) and max(still.values()) - min(still.values()) <= 1


def test_a_longer_collection_begins_with_the_shorter_one_and_another_seed_differs() -> None:
    assert training_collection(40, 1)[:25] == training_collection(25, 1)
    assert training_collection(5, 1) != training_collection(5, 2)


@pytest.mark.parametrize("n", [0, -3])
def test_a_collection_without_files_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        training_collection(n)


def test_shapes_stay_in_sight_and_go_a_third_of_the_picture_within_nine_frames_at_four_a_second() -> None:
    for video in training_collection(300, 5):
        side, shape = video.width_px, video.shots[0].shapes[0]
        path = shape_path_px(video, 0, 0) / side
        assert video.width_px == video.height_px
        assert (np.abs(path - 0.5) + shape.size_short_sides / 2).max() < 0.46
        if is_image(video):
            continue
        way = (path[round(2 * float(video.fps))] - path[0]) @ np.array(DIRECTIONS[shape.direction])
        assert 0.33 < way < 0.6
        assert 2.25 <= video.shots[0].duration_s <= 2.6 and len(path) >= 2.25 * float(video.fps)


def test_the_captioner_finds_colour_shape_and_direction() -> None:
    captioner = create("captioner", "attributes")
    for video in training_collection(28, 11):
        frames = np.stack(list(render(video)))
        kept = frames[:: int(video.fps) // 4]
        row = {"kind": "image" if is_image(video) else "video"}
        facts = captioner.facts(ClipView(kept, np.arange(len(kept)) / 4, row))
        truth = video.shots[0].shapes[0]
        (thing,) = facts.objects
        assert (thing.colour, thing.shape) == (truth.colour, truth.kind), video.name
        assert thing.motion == (None if is_image(video) else truth.direction), video.name


def test_the_command_line_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main(["--training", "7", "--seed", "2", "--output", str(tmp_path)])
    names = [video.name + video.file.suffix for video in training_collection(7, 2)]
    assert sorted(names) == sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".mp4", ".png"))
    assert capsys.readouterr().out.startswith("7 small clips and pictures in ")  # one line, however many there are


@pytest.mark.parametrize("options", [["--training", "0"], ["--training", "2", "--random", "2"]])
def test_the_command_line_refuses_nonsense(tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main([*options, "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
