"""The demo collection: a small mixed bag of files that gives every part of a curation funnel something to do."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from waver_core.synthetic.casting import (
    CALM_CAMERAS,
    centred,
    random_background,
    random_shot,
    random_video,
    single_shot,
)
from waver_core.synthetic.scenes import (
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
)

_SIZE_PX = (640, 360)
_SLIDES = (
    (
        "Annual Report",
        "Revenue grew by twelve percent",
        "Three new offices opened",
        "Costs stayed level",
        "Outlook is stable",
    ),
    (
        "Key Figures",
        "Customers served: 48,210",
        "Average response: 2.4 days",
        "Returned parcels: 1.9 percent",
        "Staff: 316",
    ),
    (
        "Next Steps",
        "Collect feedback by Friday",
        "Publish the schedule",
        "Plan the second phase",
        "Thank you for watching",
    ),
)
_SUBTITLES = (
    "Every shape sets out on its own.",
    "Some of them take the long way round,",
    "",
    "others cross the picture at once.",
    "None of them ever looks back.",
)


def demo_collection(seed: int = 0) -> list[Video]:
    """About three minutes in 19 files: mostly clean videos, and one file or so for each thing a funnel must catch."""
    return [*_clean(seed), *_overlaid(seed), *_defective(seed), *_odd_files(seed)]


def _shots_with(seed: int, duration_s: float, defects: tuple[str | Defect, ...], cameras: tuple[str, ...]) -> Video:
    """One good shot per defect, each then spoilt by it; a camera each, in turn."""
    rng = np.random.default_rng([seed, 23])
    shots: list[Shot] = []
    for number, entry in enumerate(defects):
        defect = entry if isinstance(entry, Defect) else Defect(entry)
        shot = random_shot(
            rng,
            camera=cameras[number % len(cameras)],
            background=random_background(rng, shots[-1].background if shots else None),
            duration_s=duration_s,
            size_px=_SIZE_PX,
        )
        shots.append(replace(shot, defects=(defect,)))
    return Video("", tuple(shots), seed=seed)


def _clean(seed: int) -> list[Video]:
    base = seed * 1000
    mixed = random_video(base + 1, n_shots=5, durations_s=(3.0, 4.5), name="clean_mixed_24fps")
    cameras = random_video(base + 2, n_shots=7, fps=25, durations_s=(2.2, 3.2), transitions=("cut",), name="clean_cameras_25fps")
    quick = replace(cameras.shots[3], duration_s=1.2)  # too short for a clip
    cameras = replace(cameras, shots=(*cameras.shots[:3], quick, *cameras.shots[4:]))
    dissolves = random_video(
        base + 3, n_shots=4, fps=30, durations_s=(2.4, 3.6), transitions=("dissolve",), name="clean_dissolves_30fps"
    )
    fades = random_video(
        base + 4,
        n_shots=4,
        fps=Fraction(30000, 1001),
        durations_s=(2.4, 3.6),
        transitions=("fade", "fade_white"),
        name="clean_fades_2997fps",
    )
    portrait = random_video(base + 5, n_shots=3, width_px=360, height_px=640, durations_s=(2.5, 3.6), name="clean_portrait")
    large = random_video(base + 6, n_shots=3, width_px=1280, height_px=720, durations_s=(2.5, 3.4), name="clean_720p")
    return [
        mixed,
        cameras,
        dissolves,
        replace(fades, fade_in_frames=18, fade_out_frames=24),
        portrait,
        large,
        _long(base + 7),
    ]


def _long(seed: int) -> Video:
    """One take of more than 12 s with shapes that bounce, then one with text that belongs to the scene."""
    rolling = Shape("orange", "disc", "down_right", 0.26, 0.30, (-0.4, -0.1), at_edge="bounce")
    sliding = Shape("blue", "square", "left", 0.22, 0.22, (0.5, 0.28), at_edge="bounce")
    long_take = Shot(13.0, Background("terrain", "mint"), (rolling, sliding), Camera("static"), seed=seed)
    camera = Camera("pan_right", 0.09)
    sign = centred(Shape("red", "hexagon", "right", 0.34, 0.16, text="STOP"), camera, 3.5, (0.0, 0.14))
    street = Shot(3.5, Background("brick", "desert", text="MARKET"), (sign,), camera, seed=seed + 1)
    return Video("clean_long_take_25fps", (long_take, street), (Transition("dissolve", 17),), fps=Fraction(25), seed=seed)


def _overlaid(seed: int) -> list[Video]:
    base = seed * 1000 + 100
    slides = tuple(
        Shot(2.6, Background("plain", palette), overlays=(Overlay("slide", lines, height_short_sides=0.07),), seed=number)
        for number, (lines, palette) in enumerate(zip(_SLIDES, ("ocean", "rose", "slate"), strict=True))
    )
    deck = Video("text_slides", slides, seed=base)
    marked = random_video(base + 1, n_shots=3, durations_s=(2.4, 3.2), name="watermarked")
    marks = (
        Overlay("watermark", ("SAMPLE CLIPS",), "bottom_right", 0.065, 0.55),
        Overlay("logo", (), "top_left", 0.13, 0.7),
    )
    told = random_video(base + 2, n_shots=3, fps=25, durations_s=(2.6, 3.4), name="subtitled")
    title = Overlay("title", ("A Walk Among Shapes",), "top", 0.11)
    told = replace(told, shots=(replace(told.shots[0], overlays=(title,)), *told.shots[1:]))
    boxed = random_video(base + 3, n_shots=2, durations_s=(2.6, 3.4), name="letterboxed")
    return [
        deck,
        replace(marked, overlays=marks),
        replace(told, overlays=(Overlay("subtitle", _SUBTITLES, height_short_sides=0.065),)),
        replace(boxed, border=Border(top_px=46, bottom_px=46)),
    ]


def _defective(seed: int) -> list[Video]:
    base = seed * 1000 + 200
    looks = ("overexposed", "blur", "dark", "color_imbalance", "noise")
    tempo = ("slow_motion", Defect("slow_motion_blend", 3), "image_animation", "fast_motion", "still")
    hand = ("unstable_motion", "unstable_motion", "stutter", "perspective_change", "subject_cutoff")
    poor = _shots_with(base + 1, 2.2, looks, CALM_CAMERAS)
    timed = _shots_with(base + 2, 2.6, tempo, ("static", "pan_left", "zoom_in", "static", "static"))
    # At four times its speed a shape would be gone at once: it bounces instead.
    fast = timed.shots[3]
    fast = replace(fast, shapes=tuple(replace(shape, at_edge="bounce") for shape in fast.shapes))
    timed = replace(timed, shots=(*timed.shots[:3], fast, *timed.shots[4:]))
    shaky = _shots_with(base + 3, 2.4, hand, ("static", "pan_right", "static", "static", "static"))
    shake = replace(shaky.shots[0], defects=(), camera=Camera("shake"))
    # A subject that is cut off must not slide back into the picture: it moves along the edge.
    cut_off = shaky.shots[-1]
    actor = centred(replace(cut_off.shapes[0], direction="down", size_short_sides=0.4), cut_off.camera, 2.4)
    shots = (shake, *shaky.shots[1:-1], replace(cut_off, shapes=(actor,)))
    return [
        replace(poor, name="poor_picture"),
        replace(timed, name="odd_tempo"),
        replace(shaky, name="unsteady", shots=shots),
    ]


def _odd_files(seed: int) -> list[Video]:
    original = _clean(seed)[4]
    again = _clean(seed)[2]
    base = seed * 1000 + 300
    picture = single_shot(base + 1, colour="magenta", shape="star", direction="rest", duration_s=0.01, name="still_picture")
    tiny = single_shot(base + 2, colour="cyan", shape="ring", duration_s=0.5, name="half_a_second")
    broken = single_shot(base + 3, colour="purple", shape="cross", duration_s=2.0, name="broken")
    small = File(crf=30, near_duplicate_of=original.name)
    return [
        replace(original, name="near_duplicate", width_px=270, height_px=480, file=small),
        replace(again, name="exact_copy", file=File(copy_of=again.name)),
        replace(picture, width_px=960, height_px=540, file=File(".png")),
        replace(broken, file=File(broken=True)),
        tiny,
    ]
