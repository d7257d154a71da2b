"""The synthetic videos must show what their truth says: everything here is measured on the pixels."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from waver_core.synthetic import (
    BACKGROUNDS,
    CAMERAS,
    DEFECTS,
    DIRECTIONS,
    PALETTES,
    Background,
    Border,
    Camera,
    Defect,
    File,
    Overlay,
    Shape,
    Shot,
    Transition,
    Video,
    background_path_px,
    demo_collection,
    random_video,
    render,
    shape_path_px,
    single_shot,
    truth,
    write_collection,
    write_video,
)
from waver_core.synthetic.__main__ import main

SLATE = Background("terrain", "slate")


def frames_of(video: Video) -> list[np.ndarray]:
    return list(render(video))


def one_shot(shot: Shot, **kwargs: Any) -> Video:
    settings: dict = {"width_px": 320, "height_px": 180, "fps": Fraction(24), "seed": 5} | kwargs
    return Video("test", (shot,), **settings)


def red_centre(frame: np.ndarray) -> np.ndarray:
    """Centroid x, y of what is red on a grey background."""
    red = frame.astype(np.float64)
    weight = np.clip(red[..., 0] - red[..., 1:].max(axis=2) - 60, 0, 40)
    ys, xs = np.indices(weight.shape)
    return np.array([(xs * weight).sum(), (ys * weight).sum()]) / weight.sum()


def shift_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far the content moved from a to b (x, y in px), by phase correlation."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in (a, b)]
    window = cv2.createHanningWindow(grey[0].shape[::-1], cv2.CV_32F)
    return np.array(cv2.phaseCorrelate(grey[0], grey[1], window)[0])


def motion_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Similarity [2, 3] that takes the content of a to b, from tracked corners."""
    first, second = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (a, b))
    points = cv2.goodFeaturesToTrack(first, 200, 0.01, 6)
    moved, found, _ = cv2.calcOpticalFlowPyrLK(first, second, points, np.empty_like(points))
    good = found.ravel() == 1
    return cv2.estimateAffinePartial2D(points[good], moved[good])[0]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(cv2.absdiff(a, b).mean())


def digest(video: Video) -> str:
    return hashlib.sha256(b"".join(frame.tobytes() for frame in render(video))).hexdigest()


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    kwargs: dict = {
        "n_shots": 3,
        "width_px": 128,
        "height_px": 72,
        "fps": 8,
        "cameras": CAMERAS,
        "durations_s": (1.0, 1.5),
    }
    assert digest(random_video(3, **kwargs)) == digest(random_video(3, **kwargs))
    assert digest(random_video(3, **kwargs)) != digest(random_video(4, **kwargs))


@pytest.mark.parametrize(
    ("width_px", "height_px", "fps"),
    [(160, 90, Fraction(24)), (90, 160, Fraction(30000, 1001)), (128, 128, Fraction(25, 2))],
)
def test_size_and_frame_count(width_px: int, height_px: int, fps: Fraction) -> None:
    video = replace(
        random_video(1, n_shots=2, width_px=width_px, height_px=height_px, fps=fps, durations_s=(1.0, 1.3)),
        transitions=(Transition("dissolve", 5),),
        fade_in_frames=3,
        fade_out_frames=2,
    )
    frames = frames_of(video)
    known = truth(video)
    assert len(frames) == known["n_frames"] == sum(round(shot.duration_s * fps) for shot in video.shots) + 10
    assert all(frame.shape == (height_px, width_px, 3) and frame.dtype == np.uint8 for frame in frames)
    assert known["duration_s"] == pytest.approx(len(frames) / fps)
    json.dumps(known)


def still_pair(transition: Transition, **kwargs: Any) -> Video:
    shots = (Shot(0.5, Background("checks", "ocean"), seed=1), Shot(0.5, Background("brick", "desert"), seed=2))
    return replace(one_shot(shots[0]), shots=shots, transitions=(transition,), **kwargs)


def test_cut_is_at_the_stated_frame() -> None:
    video = random_video(2, n_shots=4, width_px=160, height_px=90, transitions=("cut",), durations_s=(1.0, 2.0))
    frames = frames_of(video)
    steps = [difference(a, b) for a, b in pairwise(frames)]
    cuts = [transition["start_frame"] for transition in truth(video)["transitions"]]
    assert sorted(1 + i for i in np.argsort(steps)[-3:]) == cuts
    assert min(steps[cut - 1] for cut in cuts) > 2 * max(step for i, step in enumerate(steps) if i + 1 not in cuts)


def test_dissolve_frames_are_linear_blends_and_no_others_are() -> None:
    video = still_pair(Transition("dissolve", 7))
    frames = frames_of(video)
    (span,) = truth(video)["transitions"]
    start, end = span["start_frame"], span["end_frame"]
    assert (start, end) == (12, 19)
    a, b = frames[0].astype(float), frames[-1].astype(float)
    assert all(np.array_equal(frame, frames[0]) for frame in frames[:start])
    assert all(np.array_equal(frame, frames[-1]) for frame in frames[end:])
    for step, frame in enumerate(frames[start:end], 1):
        np.testing.assert_allclose(frame, a + (b - a) * step / 8, atol=1)


@pytest.mark.parametrize(("kind", "level"), [("fade", 0), ("fade_white", 255)])
def test_fade_goes_through_black_or_white(kind: str, level: int) -> None:
    video = still_pair(Transition(kind, 9))
    frames = frames_of(video)
    (span,) = truth(video)["transitions"]
    blends = frames[span["start_frame"] : span["end_frame"]]
    assert np.all(blends[4] == level)
    distance = [abs(float(frame.mean()) - level) for frame in blends]
    assert distance[:5] == sorted(distance[:5], reverse=True)
    assert distance[4:] == sorted(distance[4:])
    assert difference(blends[0], frames[0]) > 1
    assert difference(blends[-1], frames[-1]) > 1


def test_fade_in_and_out_at_the_ends() -> None:
    video = still_pair(Transition(), fade_in_frames=6, fade_out_frames=4)
    frames = frames_of(video)
    spans = {span["kind"]: (span["start_frame"], span["end_frame"]) for span in truth(video)["transitions"]}
    assert spans == {"fade_in": (0, 6), "cut": (18, 18), "fade_out": (30, 34)}
    assert frames[0].mean() < frames[3].mean() < frames[6].mean()
    assert frames[29].mean() > frames[31].mean() > frames[33].mean() > 0
    assert truth(video)["shots"][0]["start_frame"] == 6


@pytest.mark.parametrize(
    ("camera", "sign"),
    [("static", (0, 0)), ("pan_left", (1, 0)), ("pan_right", (-1, 0)), ("tilt_up", (0, 1)), ("tilt_down", (0, -1))],
)
def test_background_moves_against_the_camera(camera: str, sign: tuple[int, int]) -> None:
    video = one_shot(Shot(0.5, SLATE, camera=Camera(camera, rate_short_sides_per_s=0.2)))
    frames = frames_of(video)
    stated = np.array(truth(video)["shots"][0]["background_velocity_px_per_frame"])
    np.testing.assert_allclose(stated, np.array(sign) * 0.2 * 180 / 24, atol=1e-4)
    np.testing.assert_allclose(shift_between(frames[0], frames[8]), stated * 8, atol=0.2)


@pytest.mark.parametrize("camera", ["zoom_in", "zoom_out"])
def test_zoom_factor(camera: str) -> None:
    video = one_shot(Shot(0.5, SLATE, camera=Camera(camera, zoom_factor_per_s=1.2)))
    frames = frames_of(video)
    matrix = motion_between(frames[0], frames[10])
    stated = truth(video)["shots"][0]["zoom_per_frame"]
    assert (stated > 1) == (camera == "zoom_in")
    assert np.hypot(matrix[0, 0], matrix[1, 0]) == pytest.approx(stated**10, abs=0.003)


def test_shake_follows_its_path_and_has_zero_mean() -> None:
    video = one_shot(Shot(3.0, SLATE, camera=Camera("shake", shake_rms_short_sides=0.012)))
    path = background_path_px(video, 0)
    frames = frames_of(video)
    rolls = []
    for number in (5, 20, 50):
        matrix = motion_between(frames[0], frames[number])
        np.testing.assert_allclose(matrix @ (159.5, 89.5, 1.0), path[number], atol=0.15)
        rolls.append(matrix[0, 1])
    assert max(abs(roll) for roll in rolls) > 0.002
    deviation = path.std(axis=0) / 180
    assert np.all((deviation > 0.006) & (deviation < 0.024))
    middle = np.array([159.5, 89.5])
    start = path - path[0] + middle  # path of the first middle; the mean of the shake is the true middle
    assert np.all(np.abs(start.mean(axis=0) - middle) < 0.03 * 180)
    assert "unstable_motion" in truth(video)["shots"][0]["quality_issues"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shape_moves_as_stated(direction: str) -> None:
    video = single_shot(
        4,
        direction=direction,
        duration_s=0.5,
        width_px=320,
        height_px=180,
        speed_short_sides_per_s=0.4,
        background=SLATE,
    )
    frames = frames_of(video)
    (shape,) = truth(video)["shots"][0]["shapes"]
    speed = 0.0 if direction == "rest" else 0.4 * 180 / 24
    stated = np.array(shape["image_velocity_px_per_frame"])
    np.testing.assert_allclose(stated, np.array(DIRECTIONS[direction]) * speed, atol=1e-3)
    assert shape["world_speed_px_per_frame"] == shape["image_speed_px_per_frame"] == pytest.approx(speed, abs=1e-3)
    measured = (red_centre(frames[-1]) - red_centre(frames[0])) / (len(frames) - 1)
    np.testing.assert_allclose(measured, stated, atol=0.06)
    np.testing.assert_allclose(red_centre(frames[3]), shape_path_px(video, 0, 0)[3], atol=1.5)


@pytest.mark.parametrize("camera", ["pan_right", "tilt_up", "zoom_in", "zoom_out"])
def test_shape_speed_on_screen_includes_the_camera(camera: str) -> None:
    move = Camera(camera, rate_short_sides_per_s=0.2, zoom_factor_per_s=1.3)
    video = single_shot(4, camera=move, direction="down_right", duration_s=1.0, width_px=320, height_px=180, background=SLATE)
    frames = frames_of(video)
    (shape,) = truth(video)["shots"][0]["shapes"]
    measured = (red_centre(frames[-1]) - red_centre(frames[0])) / (len(frames) - 1)
    np.testing.assert_allclose(measured, shape["image_velocity_px_per_frame"], atol=0.08)
    assert np.linalg.norm(np.subtract(shape["world_velocity_px_per_frame"], measured)) > 0.1
    if camera == "pan_right":
        np.testing.assert_allclose(np.subtract(shape["world_velocity_px_per_frame"], (0.2 * 180 / 24, 0)), measured, atol=0.08)


def test_bounce_and_wrap_at_the_edge_of_the_picture() -> None:
    actor = Shape("red", "disc", "right", 0.3, 1.0, (0.3, 0.2), at_edge="bounce")
    path = shape_path_px(one_shot(Shot(4.0, SLATE, (actor,))), 0, 0)
    radius_px = 0.15 * 180
    assert path[1, 0] - path[0, 0] == pytest.approx(180 / 24)
    np.testing.assert_allclose(path[0], (159.5 + 0.3 * 180, 89.5 + 0.2 * 180))
    assert path[:, 0].min() >= radius_px - 1
    assert path[:, 0].max() <= 320 - radius_px
    assert np.ptp(path[:, 0]) == pytest.approx(320 - 2 * radius_px, abs=8)
    wrapped = shape_path_px(one_shot(Shot(4.0, SLATE, (replace(actor, at_edge="wrap"),))), 0, 0)
    steps = np.diff(wrapped[:, 0])
    assert np.sum(steps < 0) >= 1
    assert steps[steps < 0] == pytest.approx(180 / 24 - 320 - 2 * radius_px)


def moving(*defects: Defect, camera: str = "static", duration_s: float = 1.0) -> Video:
    video = single_shot(6, camera=camera, duration_s=duration_s, width_px=320, height_px=180, background=SLATE)
    return replace(video, shots=(replace(video.shots[0], defects=defects),))


def test_slow_motion_repeats_frames_and_states_the_slower_speed() -> None:
    plain, slow = frames_of(moving()), frames_of(moving(Defect("slow_motion", 4)))
    assert len(plain) == len(slow)
    assert all(np.array_equal(slow[i], plain[i // 4]) for i in range(24))
    (shape,) = truth(moving(Defect("slow_motion", 4)))["shots"][0]["shapes"]
    assert shape["world_speed_px_per_frame"] == pytest.approx(0.25 * 180 / 24 / 4, abs=1e-3)


def test_slow_motion_by_blending_lies_between_its_neighbours() -> None:
    plain, slow = frames_of(moving()), frames_of(moving(Defect("slow_motion_blend", 2)))
    assert np.array_equal(slow[2], plain[1])
    assert np.array_equal(slow[4], plain[2])
    np.testing.assert_allclose(slow[3], (plain[1].astype(float) + plain[2]) / 2, atol=1)


def test_fast_still_and_stutter() -> None:
    plain = frames_of(moving())
    fast = frames_of(moving(Defect("fast_motion", 3)))
    assert all(np.array_equal(fast[i], plain[3 * i]) for i in range(8))
    still = frames_of(moving(Defect("still"), Defect("noise"), camera="pan_left"))
    assert all(np.array_equal(frame, still[0]) for frame in still)
    stutter = frames_of(moving(Defect("stutter", 5)))
    assert sum(np.array_equal(a, b) for a, b in pairwise(stutter)) == 10
    assert any(np.array_equal(stutter[i], plain[i]) for i in range(12, 24))


def test_image_animation_moves_everything_as_one_picture() -> None:
    video = moving(Defect("image_animation"), camera="pan_right")
    frames = frames_of(video)
    stated = truth(video)["shots"][0]
    assert stated["shapes"][0]["world_speed_px_per_frame"] == 0
    assert stated["background_speed_px_per_frame"] == pytest.approx(0.1 * 180 / 24, abs=1e-3)
    np.testing.assert_allclose(
        red_centre(frames[12]) - red_centre(frames[0]),
        np.array(stated["background_velocity_px_per_frame"]) * 12,
        atol=0.3,
    )


def test_perspective_change_jumps_once_and_keeps_the_colours() -> None:
    frames = frames_of(moving(Defect("perspective_change", 0.5)))
    steps = [difference(a, b) for a, b in pairwise(frames)]
    assert np.argmax(steps) == 11
    assert steps[11] > 4 * np.sort(steps)[-2]
    assert np.abs(frames[11].mean(axis=(0, 1)) - frames[12].mean(axis=(0, 1))).max() < 15


def test_subject_cutoff_leaves_half_the_shape_outside() -> None:
    whole = moving()
    resting = replace(whole.shots[0].shapes[0], direction="rest", speed_short_sides_per_s=0.0)
    whole = replace(whole, shots=(replace(whole.shots[0], shapes=(resting,)),))
    cut = replace(whole, shots=(replace(whole.shots[0], defects=(Defect("subject_cutoff", 0.5),)),))
    areas = [
        (frame[..., 0].astype(int) - frame[..., 1:].max(axis=2) > 60).sum() for v in (whole, cut) for frame in [next(render(v))]
    ]
    assert areas[1] / areas[0] == pytest.approx(0.5, abs=0.05)
    assert shape_path_px(cut, 0, 0)[12, 0] == pytest.approx(319.5)


def test_looks_change_as_named() -> None:
    def look(kind: str) -> np.ndarray:
        return next(render(moving(Defect(kind))))

    plain = next(render(moving()))
    assert (look("overexposed") == 255).mean() > (plain == 255).mean() + 0.15
    assert look("dark").mean() < 0.25 * plain.mean()
    sharpness = [cv2.Laplacian(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var() for f in (plain, look("blur"))]
    assert sharpness[1] < 0.1 * sharpness[0]
    residue = look("noise").astype(float) - plain
    inner = residue[(plain > 80) & (plain < 175)]  # away from the clipping at both ends
    assert inner.std() == pytest.approx(24, rel=0.05)
    means = look("color_imbalance").mean(axis=(0, 1))
    assert np.ptp(means / plain.mean(axis=(0, 1))) > 0.3


def test_watermark_is_the_same_on_every_frame_and_only_in_its_box() -> None:
    plain = still_pair(Transition("dissolve", 5))
    marked = replace(
        plain,
        overlays=(Overlay("watermark", ("SAMPLE",), "top_left", 0.1, 0.5), Overlay("logo", (), "bottom_right", 0.2)),
    )
    known = truth(marked)
    inside = np.zeros((180, 320), bool)
    for overlay in known["overlays"]:
        x0, y0, x1, y1 = overlay["box_px"]
        inside[y0:y1, x0:x1] = True
        assert overlay["area_fraction"] == pytest.approx((x1 - x0) * (y1 - y0) / (320 * 180))
    for a, b in zip(render(plain), render(marked), strict=True):
        changed = np.any(a != b, axis=2)
        assert not changed[~inside].any()
        assert changed[inside].mean() > 0.3
    assert all(shot["quality_issues"] == ["watermark"] and not shot["clean"] for shot in known["shots"])


def test_subtitles_change_and_scene_text_is_not_an_overlay() -> None:
    subtitle = Overlay("subtitle", ("one line", "", "another"), period_s=0.25)
    plain = one_shot(Shot(0.75, SLATE))
    frames = frames_of(replace(plain, overlays=(subtitle,)))
    bare = frames_of(plain)
    assert [np.array_equal(a, b) for a, b in zip(frames, bare, strict=True)] == [False] * 6 + [True] * 6 + [False] * 6
    assert difference(frames[0], frames[12]) > 0
    assert np.array_equal(frames[0], frames[5])
    sign = Shape("red", "square", "rest", 0.5, text="STOP")
    scene = one_shot(Shot(0.5, Background("brick", "slate", text="MARKET"), (sign,), Camera("pan_right", 0.3)))
    unlettered = one_shot(Shot(0.5, Background("brick", "slate"), (replace(sign, text=""),), Camera("pan_right", 0.3)))
    spots = [
        np.nonzero(cv2.absdiff(a, b).max(axis=2) > 40)[1].mean() for a, b in zip(render(scene), render(unlettered), strict=True)
    ]
    np.testing.assert_allclose(spots[8] - spots[0], -8 * 0.3 * 180 / 24, atol=1.0)
    (known,) = truth(scene)["shots"]
    assert known["scene_text"] == ["MARKET", "STOP"]
    assert known["clean"]


def test_black_border_frames_the_picture() -> None:
    video = one_shot(Shot(0.2, SLATE, (Shape("red", size_short_sides=0.5),)), border=Border(20, 16, 4, 0))
    frame = next(render(video))
    assert not frame[:20].any()
    assert not frame[-16:].any()
    assert not frame[:, :4].any()
    assert frame[20:-16, 4:].max(axis=2).min() > 0
    np.testing.assert_allclose(red_centre(frame), truth(video)["shots"][0]["shapes"][0]["first_centre_px"], atol=1.0)
    assert truth(video)["shots"][0]["quality_issues"] == ["black_border"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shape(colour="teal"),
        lambda: Shape(direction="left"),
        lambda: Camera("pan_up"),
        lambda: Transition("cut", 3),
        lambda: Transition("dissolve", 0),
        lambda: Overlay("title"),
        lambda: Defect("slow_motion", 2.5),
        lambda: Shot(defects=(Defect("subject_cutoff"),)),
        lambda: Video("odd", (Shot(),), width_px=321),
        lambda: Video("none", ()),
        lambda: Video("many", (Shot(), Shot()), (Transition(), Transition())),
    ],
)
def test_impossible_descriptions_are_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_random_videos_have_distinct_neighbours_and_keep_shapes_in_sight() -> None:
    cameras = set()
    for seed in range(12):
        video = random_video(seed, n_shots=6, width_px=640, height_px=360)
        cameras |= {shot.camera.kind for shot in video.shots}
        for before, after in pairwise(video.shots):
            tones = [np.mean(PALETTES[shot.background.palette], axis=0) for shot in (before, after)]
            assert before.background.kind != after.background.kind
            assert np.linalg.norm(tones[0] - tones[1]) > 28
        for index, shot in enumerate(video.shots):
            assert 2 <= shot.duration_s <= 6
            for number in range(len(shot.shapes)):
                path = shape_path_px(video, index, number)
                assert np.all(path > 0)
                assert np.all(path < (640, 360))
        assert all(shot["clean"] for shot in truth(video)["shots"])
        assert all(shape["world_speed_px_per_frame"] > 0.5 for shot in truth(video)["shots"] for shape in shot["shapes"])
    assert cameras == set(CAMERAS) - {"shake"}


def test_demo_collection_covers_the_funnel() -> None:
    videos = demo_collection()
    known = [truth(video) for video in videos]
    assert 150 <= sum(entry["duration_s"] for entry in known) <= 210
    shots = [shot for video in videos for shot in video.shots]
    assert {defect.kind for shot in shots for defect in shot.defects} == set(DEFECTS)
    assert {shot.camera.kind for shot in shots} == set(CAMERAS)
    assert {shot.background.kind for shot in shots} == set(BACKGROUNDS)
    assert {t["kind"] for entry in known for t in entry["transitions"]} == {
        "cut", "dissolve", "fade", "fade_white", "fade_in", "fade_out"
    }  # fmt: skip
    issues = {issue for entry in known for shot in entry["shots"] for issue in shot["quality_issues"]}
    assert len(issues) == 13  # every one of Waver 3.2
    assert max(shot.duration_s for shot in shots) > 12
    assert min(shot.duration_s for shot in shots) < 2
    assert {entry["fps_fraction"] for entry in known} >= {"24", "25", "30", "30000/1001"}
    assert any(entry["height_px"] > entry["width_px"] for entry in known)
    assert any(entry["width_px"] == 1280 for entry in known)
    clean_s = sum(
        shot["end_s"] - shot["start_s"] for entry in known for shot in entry["shots"] if shot["clean"] and entry["readable"]
    )
    assert clean_s > 90
    assert [video.name for video in demo_collection(1)] == [video.name for video in videos]
    assert demo_collection(1) != videos


def test_written_collection(tmp_path: Path) -> None:
    small: dict = {"width_px": 160, "height_px": 90}
    first = random_video(1, n_shots=2, durations_s=(0.5, 0.8), transitions=("dissolve",), name="first", **small)
    picture = single_shot(2, direction="rest", duration_s=0.01, name="picture", **small)
    videos = [
        replace(first, fps=Fraction(30000, 1001)),
        replace(first, name="small", width_px=128, height_px=72, file=File(crf=30, near_duplicate_of="first")),
        replace(first, name="copy", fps=Fraction(30000, 1001), file=File(copy_of="first")),
        replace(picture, file=File(".png")),
        replace(single_shot(3, duration_s=1.0, name="broken", **small), file=File(broken=True)),
    ]
    assert write_collection(videos, tmp_path / "out") == tmp_path / "out"
    out = tmp_path / "out"
    assert (out / "copy.mp4").read_bytes() == (out / "first.mp4").read_bytes()
    picture_pixels = cv2.imread(str(out / "picture.png"))
    assert picture_pixels is not None
    assert picture_pixels.shape == (90, 160, 3)
    assert (out / "broken.mp4").stat().st_size > 1000
    with pytest.raises(av.error.InvalidDataError):
        av.open(str(out / "broken.mp4"))

    known = [json.loads(line) for line in (out / "truth.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in known] == ["first", "small", "copy", "picture", "broken"]
    assert [entry["kind"] for entry in known] == ["video", "video", "video", "image", "video"]
    with av.open(str(out / "first.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (Fraction(30000, 1001), 160, 90)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == known[0]["n_frames"]
    assert max(difference(a, b) for a, b in zip(decoded, render(videos[0]), strict=True)) < 8

    rows = pq.read_table(out / "truth.parquet").to_pylist()
    of_first = [row for row in rows if row["name"] == "first"]
    assert [row["row"] for row in of_first] == ["shot", "transition", "shot"]
    assert [row["end_frame"] for row in of_first[:-1]] == [row["start_frame"] for row in of_first[1:]]
    assert of_first[1]["transition"] == "dissolve"
    assert of_first[0]["colour"] == first.shots[0].shapes[0].colour
    assert {row["name"] for row in rows if not row["readable"]} == {"broken"}
    assert {row["exact_duplicate_of"] for row in rows if row["name"] == "copy"} == {"first"}


def test_writing_refuses_what_cannot_be(tmp_path: Path) -> None:
    video = single_shot(1, duration_s=0.2, width_px=64, height_px=64)
    with pytest.raises(ValueError, match="one frame"):
        write_video(replace(video, file=File(".png")), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\.mp4"):
        write_video(video, tmp_path / "a.webm")
    with pytest.raises(ValueError, match="does not come before"):
        write_collection([replace(video, file=File(copy_of="later"))], tmp_path)
    with pytest.raises(ValueError, match="differ"):
        write_collection([video, video], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_command_line_prints_a_line_per_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--output", str(tmp_path), "--random", "1", "--shots", "1", "--seed", "9"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(str(tmp_path / "random_9.mp4"))
    assert "640x360" in line
    assert (tmp_path / "truth.parquet").exists()
