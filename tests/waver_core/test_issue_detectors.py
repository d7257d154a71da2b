"""Each quality issue is found on a clip that was spoilt by it and not on its clean twin; odd clips get an answer as well."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest

from waver_core.backends.contracts import ISSUES, ClipView, Quality
from waver_core.backends.embedded.issue_looks import black_bars
from waver_core.registry import create
from waver_core.synthetic import Background, Border, Camera, Defect, Overlay, Video, quality_issues, single_shot
from waver_core.synthetic.render import render
from waver_core.tempo import COLUMNS, PREFIX, FrameSignals, SignalTracker, describe_signals, full_rate_columns, luma_rows

JUDGE: Any = create("quality_judge", "issue_detectors")
MOTION_ISSUES = ("slow_motion", "fast_motion", "perspective_change", "unstable_motion", "subject_cutoff", "image_animation")


@cache
def plain(camera: str = "static", seed: int = 3) -> Video:
    """The clean twin: two seconds of a disc over checks."""
    return single_shot(seed, camera=camera, width_px=320, height_px=180, duration_s=2.2, background=Background("checks", "slate"))


def spoilt(defect: Defect, camera: str = "static") -> Video:
    video = plain(camera)
    return replace(video, shots=(replace(video.shots[0], defects=(defect,)),))


def laid_over(overlay: Overlay, camera: str = "static") -> Video:
    return replace(plain(camera), overlays=(overlay,))


def logo_over_a_quick_pan() -> Video:
    """A logo shows by what it does not do: the rest must move enough."""
    background, camera = Background("terrain", "meadow"), Camera("pan_left", 0.2)
    video = single_shot(3, camera=camera, width_px=320, height_px=180, duration_s=3.2, background=background)
    return replace(video, overlays=(Overlay("logo", (), "top_left", 0.16),))


def view(video: Video, full_rate: bool = True, **row: Any) -> ClipView:
    """A rendered video as the stage shows it to the judge: six frames a second, and the columns of the full rate."""
    frames = list(render(video))
    rate = float(video.fps)
    at = [round(k * rate / 6) for k in range(int(len(frames) * 6 / rate))]
    height, width = frames[0].shape[:2]
    size = (round(width * 192 / min(height, width)), round(height * 192 / min(height, width)))
    small = np.stack([cv2.resize(frames[i], size, interpolation=cv2.INTER_LINEAR) for i in at])
    known = full_rate_columns(frames, rate) if full_rate else {}
    return ClipView(small, np.array(at) / rate, {"kind": "video", "overlay_text_area_ratio": 0.0, **known, **row})


def verdict(clip: ClipView) -> Quality:
    found = JUDGE.judge([clip])[0]
    assert isinstance(found, Quality), found
    return found


@cache
def clean_verdict(camera: str) -> Quality:
    return verdict(view(plain(camera)))


CASES: dict[str, tuple[Video, dict[str, Any]]] = {
    "noise": (spoilt(Defect("noise")), {}),
    "border": (replace(plain(), border=Border(top_px=20, bottom_px=20)), {}),
    "title": (
        laid_over(Overlay("title", ("A Walk",), "top", 0.12)),
        {
            "overlay_text_area_ratio": 0.06,
            "overlay_text_kind": "burned_in",
            "overlay_burned_in_area_ratio": 0.06,
            "motion_total_px": 1.0,
        },
    ),
    "watermark": (
        laid_over(Overlay("watermark", ("SAMPLE",), "bottom_right", 0.08)),
        {
            "overlay_text_area_ratio": 0.02,
            "overlay_text_kind": "burned_in",
            "overlay_burned_in_area_ratio": 0.02,
            "motion_total_px": 1.0,
        },
    ),
    "logo": (logo_over_a_quick_pan(), {}),
    "repeats": (spoilt(Defect("slow_motion", 4)), {}),
    "blends": (spoilt(Defect("slow_motion_blend", 4), "pan_right"), {}),
    "fast": (
        single_shot(
            3,
            width_px=320,
            height_px=180,
            duration_s=1.2,
            size_short_sides=0.3,
            speed_short_sides_per_s=1.3,
            background=Background("checks", "slate"),
        ),
        {},
    ),
    "jump": (spoilt(Defect("perspective_change")), {}),
    "shake": (spoilt(Defect("unstable_motion"), "pan_right"), {}),
    "shaken camera": (plain("shake"), {}),
    "stutter": (spoilt(Defect("stutter"), "pan_left"), {}),
    "cut off": (
        replace(
            single_shot(
                3,
                direction="down",
                width_px=320,
                height_px=180,
                duration_s=2.2,
                size_short_sides=0.4,
                background=Background("checks", "slate"),
            ),
            shots=(
                replace(
                    single_shot(
                        3, direction="down", duration_s=2.2, size_short_sides=0.4, background=Background("checks", "slate")
                    ).shots[0],
                    defects=(Defect("subject_cutoff"),),
                ),
            ),
        ),
        {},
    ),
    "overexposed": (spoilt(Defect("overexposed")), {}),
    "dark": (spoilt(Defect("dark")), {}),
    "blur": (spoilt(Defect("blur")), {}),
    "animated still": (spoilt(Defect("image_animation"), "zoom_in"), {}),
    "tint": (spoilt(Defect("color_imbalance", 0.7)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_issue_is_found_and_not_on_the_clean_twin(name: str) -> None:
    video, row = CASES[name]
    expected = quality_issues(video, 0) or ["fast_motion"]  # a fast disc is no defect of the renderer's
    found = verdict(view(video, **row))
    assert {issue for issue in ISSUES if found.issues[issue] >= 0.5} == set(expected)
    assert found.high_quality < 0.5
    camera = video.shots[0].camera.kind
    twin = clean_verdict("static" if camera == "shake" else camera)
    assert {issue for issue in ISSUES if twin.issues[issue] >= 0.5} == set()
    assert twin.high_quality > 0.5


def test_every_column_has_an_issue_to_serve() -> None:
    columns = full_rate_columns(render(plain()), 24.0)
    assert set(columns) == {f"{PREFIX}{name}" for name in COLUMNS}
    assert all(isinstance(value, float) and np.isfinite(value) for value in columns.values())
    assert (columns["quality_source_repeat_factor"], columns["quality_source_jumps"]) == (1.0, 0.0)


@pytest.mark.parametrize("factor", [3, 5])
def test_the_repeat_factor_is_the_number_of_times_a_frame_is_shown(factor: int) -> None:
    columns = full_rate_columns(render(spoilt(Defect("slow_motion", factor))), 24.0)
    assert columns["quality_source_repeat_factor"] == factor


def test_animation_on_twos_is_no_slow_motion() -> None:
    frames = [f for f in list(render(plain()))[:30] for _ in range(2)]
    assert full_rate_columns(frames, 24.0)["quality_source_repeat_factor"] == 1.0


def test_a_flash_is_no_jump() -> None:
    frames = [f.copy() for f in render(plain("pan_left"))]
    frames[20] = np.full_like(frames[20], 250)
    assert full_rate_columns(frames, 24.0)["quality_source_jumps"] == 0.0


def test_signals_of_a_slice_do_not_depend_on_what_came_before() -> None:
    frames = list(render(plain("pan_left")))
    whole, part = SignalTracker(), SignalTracker()
    for k, frame in enumerate(frames):
        rows = luma_rows(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))
        whole.add(frame, rows)
        if k >= 12:
            part.add(frame, rows)
    a, b = (describe_signals(s, 24.0) for s in (whole.signals(12), part.signals()))
    assert a == pytest.approx(b, rel=0.05, abs=1e-3)


@pytest.mark.parametrize("n", range(8))
def test_few_signals_give_finite_columns(n: int) -> None:
    found = describe_signals(np.array([FrameSignals()] * n, np.float32).reshape(n, -1) if n else SignalTracker().signals(), 24.0)
    assert set(found) == set(COLUMNS)
    assert all(np.isfinite(value) for value in found.values())


def test_frames_of_another_size_are_compared_with_nothing() -> None:
    tracker = SignalTracker()
    for size in ((72, 128), (72, 96), (72, 96)):
        tracker.add(np.full((*size, 3), 90, np.uint8), None)
    assert tracker.signals()[:, 0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(192, 341), (341, 192), (64, 64)])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_odd_clips_get_probabilities(shape: tuple[int, int], n: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    for frames in (
        np.full((n, *shape, 3), 128, np.uint8),
        np.zeros((n, *shape, 3), np.uint8),
        np.full((n, *shape, 3), 255, np.uint8),
        rng.integers(0, 256, (n, *shape, 3)).astype(np.uint8),
    ):
        found = verdict(ClipView(frames, np.arange(n) / 6, {"kind": kind}))
        assert set(found.issues) == set(ISSUES)
        assert all(0 <= p <= 1 for p in (*found.issues.values(), found.high_quality))
        if kind == "image":
            assert all(found.issues[issue] < 0.1 for issue in MOTION_ISSUES)


def test_repeated_times_are_no_motion() -> None:
    clip = view(plain("pan_left"))
    found = verdict(ClipView(clip.rgb, np.zeros(len(clip.rgb)), clip.row))
    assert found.issues["image_animation"] < 0.5


def test_an_empty_clip_fails_alone_in_its_batch() -> None:
    clip = view(plain())
    empty = ClipView(clip.rgb[:0], clip.times_s[:0], {})
    one, none, other = JUDGE.judge([clip, empty, clip])
    assert isinstance(none, ValueError)
    assert one == other == verdict(clip)


def test_text_is_looked_for_where_no_earlier_stage_has() -> None:
    video = laid_over(Overlay("title", ("A Walk Among",), "centre", 0.16))
    clip = view(video)
    bare = ClipView(clip.rgb, clip.times_s, {})
    assert verdict(bare).issues["text_overlay"] >= 0.5
    assert verdict(ClipView(clip.rgb, clip.times_s, {"overlay_text_area_ratio": 0.0})).issues["text_overlay"] < 0.1


def test_shake_shows_at_six_frames_a_second_too() -> None:
    strong = single_shot(3, camera=Camera("shake", shake_rms_short_sides=0.03), width_px=320, height_px=180, duration_s=2.2)
    assert verdict(view(strong, full_rate=False)).issues["unstable_motion"] >= 0.5


def test_bars_end_in_a_straight_edge() -> None:
    frames = np.full((2, 192, 341, 3), 120, np.uint8)
    frames[:, :20], frames[:, -24:] = 8, 8
    assert black_bars(frames) == (20, 24, 0, 0)
    night = np.broadcast_to(np.linspace(0, 90, 341).astype(np.uint8)[None, None, :, None], frames.shape)
    assert black_bars(np.ascontiguousarray(night)) == (0, 0, 0, 0)
    assert black_bars(np.zeros_like(frames)) == (0, 0, 0, 0)
