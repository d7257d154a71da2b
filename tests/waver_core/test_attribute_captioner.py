"""The embedded captioner says what a rendered scene shows, keeps its contract on odd clips, and stays silent where it must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from waver_core.backends.contracts import Caption, ClipView
from waver_core.camera import LABELS
from waver_core.captions.parsing import parse
from waver_core.registry import create
from waver_core.synthetic import Background, Camera, Overlay, Shape, Shot, Video, render, single_shot
from waver_core.synthetic.casting import centred

CAPTIONER: Any = create("captioner", "attributes")


def view(video: Video, fps: float = 6.0, **row: Any) -> ClipView:
    """A rendered video as the caption stage samples it."""
    frames = list(render(video))
    times = np.arange(0, len(frames) / float(video.fps), 1 / fps)
    rgb = np.stack([frames[round(t * float(video.fps))] for t in times])
    size = round(rgb.shape[2] * 192 / min(rgb.shape[1:3])), round(rgb.shape[1] * 192 / min(rgb.shape[1:3]))
    small = np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in rgb])
    return ClipView(small, times, {"kind": "video", "start_s": 0.0, "end_s": len(frames) / float(video.fps), **row})


def scene(**options: Any) -> Video:
    return single_shot(3, width_px=320, height_px=180, **options)


def caption_of(clip: ClipView) -> Caption:
    found = CAPTIONER.caption([clip])[0]
    assert isinstance(found, Caption), found
    return found


@pytest.mark.parametrize(
    ("colour", "shape", "direction", "camera"),
    [
        ("red", "disc", "right", "static"),
        ("blue", "star", "up_left", "pan_right"),
        ("yellow", "ring", "down", "zoom_in"),
        ("magenta", "hexagon", "rest", "tilt_up"),
        ("black", "cross", "left", "shake"),
    ],
)
def test_captions_of_rendered_scenes(colour: str, shape: str, direction: str, camera: str) -> None:
    clip = view(scene(colour=colour, shape=shape, direction=direction, camera=camera))
    facts = CAPTIONER.facts(clip)
    (thing,) = facts.objects
    assert (thing.colour, thing.shape, thing.motion, facts.camera) == (colour, shape, direction, camera)
    if direction != "rest":
        assert thing.phases[0].speed == pytest.approx(0.25, rel=0.15)
    found = caption_of(clip)
    assert parse(found.text) == facts
    assert found.camera == camera and found.style == ""
    assert found.sub_actions[0].text.startswith(f"the {colour} {shape} ")
    assert (found.sub_actions[0].start_s, found.sub_actions[0].end_s) == (0.0, 2.0)
    assert found == caption_of(clip)


def test_a_bounce_is_two_phases_and_two_things_have_places() -> None:
    ball = Shape("orange", "disc", "right", 0.3, 0.5, (0.35, 0.0), "bounce")
    star = Shape("blue", "star", "rest", 0.3, 0.0, (-0.6, -0.3))
    shot = Shot(3.0, Background("terrain", "slate"), (ball, star), seed=2)
    clip = view(Video("bounce", (shot,), width_px=320, height_px=180))
    found = caption_of(clip)
    moves = [a for a in found.sub_actions if "orange" in a.text]
    assert ["right" in a.text for a in moves] == [True, False] and "left" in moves[1].text
    assert moves[0].end_s == pytest.approx(0.78, abs=0.3) and moves[1].end_s == 3.0
    assert "the blue star is to the left of the orange disc" in [*found.spatial, *_turned(found.spatial)]
    assert "stays still" in found.text


def _turned(sentences: tuple[str, ...]) -> list[str]:
    """The same relations told from the other side."""
    words = [s.split(" is to the right of ") for s in sentences if " is to the right of " in s]
    return [f"{b} is to the left of {a}" for a, b in words]


@pytest.mark.parametrize("k", range(8))
def test_tiny_generated_clips(k: int) -> None:
    colour = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")[k]
    direction = ("left", "right", "up", "down", "up_left", "up_right", "down_left", "down_right")[k]
    actor = centred(Shape(colour, "disc", direction, 0.3, 0.4), Camera(), 9 / 8)
    shot = Shot(9 / 8, Background("plain", ("autumn", "slate")[k % 2]), (actor,), seed=k)
    frames = np.stack(list(render(Video("tiny", (shot,), width_px=64, height_px=64, fps=8))))
    assert frames.shape == (9, 64, 64, 3)
    facts = CAPTIONER.facts(ClipView(frames, np.arange(9) / 8, {}))
    assert [(o.colour, o.shape, o.motion) for o in facts.objects] == [(colour, "disc", direction)]
    assert facts.camera == "static"


def test_a_still_has_no_motion() -> None:
    clip = view(scene(), kind="image", style="real")
    for still in (clip, ClipView(clip.rgb[:1], clip.times_s[:1], {})):
        found = caption_of(still)
        assert "red disc" in found.text and "moves" not in found.text and "camera" not in found.text
        assert found.sub_actions == () and found.camera in LABELS
        assert found.style == str(still.row.get("style") or "")


def test_what_two_measurements_disagree_on_is_left_out() -> None:
    clip = view(scene(camera="pan_left"), motion_camera="zoom_in")
    found = caption_of(clip)
    assert "camera" not in found.text
    assert found.camera == "zoom_in"  # the column repeats the motion stage


def odd_clips() -> list[np.ndarray]:
    noise = np.random.default_rng(0).integers(0, 256, (4, 48, 80, 3)).astype(np.uint8)
    black = np.zeros((5, 96, 64, 3), np.uint8)
    return [noise, black, np.full_like(black, 255), noise[:2], np.zeros((3, 16, 16, 3), np.uint8), noise[:1]]


def test_odd_clips_get_modest_captions() -> None:
    clips = [ClipView(rgb, np.arange(len(rgb)) / 6, {}) for rgb in odd_clips()]
    clips.append(ClipView(odd_clips()[0], np.zeros(4), {}))  # a source that ran out repeats its last frame
    for found in CAPTIONER.caption(clips):
        assert isinstance(found, Caption), found
        assert found.text and found.camera in LABELS and "disc" not in found.text
        assert parse(found.text).objects == ()


def test_a_clip_that_fails_costs_no_other_its_caption() -> None:
    good = view(scene())
    first, second = CAPTIONER.caption([ClipView(np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0), {}), good])
    assert isinstance(first, Exception) and isinstance(second, Caption)
    assert CAPTIONER.caption([]) == []
    assert CAPTIONER.fingerprint == create("captioner", "attributes").fingerprint
    assert CAPTIONER.fingerprint != create("captioner", "attributes", read_text=True).fingerprint


def test_text_is_read_where_the_row_says_that_there_is_some() -> None:
    base = scene()
    shot = replace(base.shots[0], overlays=(Overlay("title", ("Walking Home",), "top", 0.16),))
    video = replace(base, shots=(shot,), width_px=640, height_px=360)
    clip = view(video)
    assert "text" not in caption_of(clip).text
    large = np.stack(list(render(video))[::16])
    found = caption_of(clip._replace(large=large, row={**clip.row, "overlay_text_area_ratio": 0.05}))
    assert 'The text reads "Walking Home".' in found.text
