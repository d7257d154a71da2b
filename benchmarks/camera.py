"""What the motion and overlay stages say of rendered shots whose truth is known: camera, foreground, watermark, text, bars.

Camera: one shot per case, every camera times none, one or two shapes, with slow to fast moves at 24, 25 and 30 fps,
landscape and portrait. Each is decoded and sampled as the second pass does it and scored by the motion stage itself. The
project wants 95 % of the labels right. Three checks go with it: a camera that moves over a still must leave no foreground
motion, under a static camera the foreground's speed must be the shape's own, and shapes must still be found when the
camera moves as well.

Overlays: videos of three shots with a watermark, logo, subtitles, title, slide, scene text, black bars or nothing, put
through the whole funnel in this process with gates that reject nothing; flags are compared clip by clip at the thresholds
of the 480p tier.

    python benchmarks/camera.py --verbose
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from curation.funnel import run_funnel
from curation.scores_pass import sample_clips
from curation.serial import Serial
from curation.stage import load_stages
from waver_core.camera import LABELS
from waver_core.config import Config, load_config
from waver_core.synthetic import CAMERAS, Background, Border, Camera, Overlay, Shape, Shot, Video, random_video, truth
from waver_core.synthetic.casting import MOVING, TEXTURED, centred, palettes_for
from waver_core.video import open_video

_RATES = {"slow": 0.05, "medium": 0.12, "fast": 0.25}  # short sides a second
_ZOOMS = {"slow": 1.04, "medium": 1.1, "fast": 1.25}  # times a second
_SHAKES = {"slow": 0.008, "medium": 0.012, "fast": 0.02}  # rms, short sides
_SIZES = {"landscape": (640, 360), "portrait": (360, 640)}
_FPS = (24, 25, 30)
_LINES = ("Some of them take the long way round,", "", "others cross the picture at once.", "None of them looks back.")
Row = tuple[Any, ...]
app = common.new_app()


class Case(NamedTuple):
    """A single shot and what varies from one to the next."""

    video: Video
    camera: str
    shapes: int
    speed: str
    shape_of_frame: str
    fps: int
    background: str


def cases(n_seeds: int, seed: int) -> list[Case]:
    """Every camera times 0, 1 and 2 shapes times seeds; speed, rate, orientation and background rotate through the rest."""
    out = []
    for repeat in range(n_seeds):
        for number, (camera, n_shapes) in enumerate((c, n) for c in CAMERAS for n in range(3)):
            rng = np.random.default_rng([seed + repeat, number])
            speed = list(_RATES)[(repeat + number) % 3]
            frame = list(_SIZES)[(repeat + number // 3) % 2]
            fps = _FPS[(repeat + number // 2) % 3]
            move = Camera(camera, _RATES[speed], _ZOOMS[speed], _SHAKES[speed])
            colours = ["red", "yellow"][:n_shapes]
            background = Background(str(rng.choice(TEXTURED)), str(rng.choice(palettes_for("red"))))
            actors = []
            for side, colour in zip((-1, 1), colours, strict=False):
                direction, size, speed_s = str(rng.choice(MOVING)), float(rng.uniform(0.2, 0.32)), float(rng.uniform(0.12, 0.3))
                actor = Shape(colour, "disc", direction, size, speed_s)
                column = 0.0 if n_shapes == 1 else 0.3 * side
                at = (column, float(rng.uniform(-0.15, 0.15)))
                actors.append(centred(actor, move, 2.5, at if frame == "landscape" else at[::-1]))
            shot = Shot(2.5, background, tuple(actors), move, seed=seed + repeat)
            width, height = _SIZES[frame]
            name = f"{camera}_{n_shapes}shapes_{speed}_{frame}_{fps}fps_{background.kind}_{seed + repeat}"
            video = Video(name, (shot,), width_px=width, height_px=height, fps=Fraction(fps), seed=seed + repeat)
            out.append(Case(video, camera, n_shapes, speed, frame, fps, background.kind))
    return out


def motion_of(item: tuple[str, Config]) -> dict[str, Any]:
    """The motion columns of a file that is one clip, by the product's own sampling and stage."""
    path, config = item
    cv2.setNumThreads(1)
    stage = load_stages(config).named("motion")
    with open_video(path) as video:
        duration_s = video.info.duration_s or 0.0
    row = {"kind": "video", "start_s": 0.0, "end_s": duration_s, "duration_s": duration_s}
    with open_video(path, skip_nonref=config.funnel.score_reference_frames_only) as video:
        media = next(sample_clips(video, [row], list(stage.requests())))
    scores: dict[str, Any] = stage.score(media)
    return scores


def expected_foreground_px(video: Video, short_side_px: int, steps_per_s: float) -> float:
    """Mean speed of the shapes in the world in the stage's unit: px at its size per step at its rate."""
    speeds = [s["world_speed_px_per_frame"] for s in truth(video)["shots"][0]["shapes"]]
    return float(np.mean(speeds)) * float(video.fps) / steps_per_s * short_side_px / video.short_side_px


def judge_camera(all_cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, confusion and strata, and how foreground and background come out."""
    pairs = list(zip(all_cases, rows, strict=True))
    right = [case.camera == row["motion_camera"] for case, row in pairs]
    strata: dict[str, dict[str, float]] = {}
    for name in ("camera", "shapes", "speed", "shape_of_frame", "fps", "background"):
        values = sorted({getattr(case, name) for case in all_cases}, key=str)
        strata[name] = {
            str(v): float(np.mean([ok for ok, case in zip(right, all_cases, strict=True) if getattr(case, name) == v]))
            for v in values
        }
    # A camera over a still: what is left over as foreground, beside what the camera itself moves.
    still = [(case, row) for case, row in pairs if not case.shapes and case.camera != "static"]
    left_over = [row["motion_foreground_px"] for _, row in still]
    gate = load_config().tiers["480p"]["motion"].min or 0.0
    moving = [(case, row) for case, row in pairs if case.shapes == 1 and case.camera == "static"]
    size_px, rate = rows[0]["motion_short_side_px"], rows[0]["motion_fps"]
    ratio = [row["motion_foreground_px"] / expected_foreground_px(case.video, size_px, rate) for case, row in moving]
    both = [(case, row) for case, row in pairs if case.shapes and case.camera != "static"]
    under_way = [row["motion_foreground_px"] / expected_foreground_px(case.video, size_px, rate) for case, row in both]
    contrast = [row["motion_foreground_px"] / max(row["motion_background_px"], 1e-3) for _, row in moving]
    confusion = Counter((case.camera, row["motion_camera"]) for case, row in pairs)
    return {
        "clips": len(pairs),
        "accuracy": float(np.mean(right)),
        "accuracy_by": strata,
        "confusion": {a: {b: confusion[a, b] for b in LABELS if confusion[a, b]} for a in CAMERAS},
        "camera_over_still": {
            "clips": len(still),
            "foreground_px_mean": float(np.mean(left_over)),
            "foreground_px_median": float(np.median(left_over)),
            "foreground_px_max": float(np.max(left_over)),
            "background_px_mean": float(np.mean([row["motion_background_px"] for _, row in still])),
            "pass_the_480p_motion_gate": float(np.mean(np.array(left_over) >= gate)),
            **{
                f"foreground_px_mean_{kind}": float(np.mean([r["motion_foreground_px"] for c, r in still if c.camera == kind]))
                for kind in CAMERAS
                if any(c.camera == kind for c, _ in still)
            },
        },
        "static_camera_moving_shape": {
            "clips": len(moving),
            "foreground_over_truth_median": float(np.median(ratio)),
            "foreground_over_background_median": float(np.median(contrast)),
            "foreground_over_background_min": float(np.min(contrast)),
        },
        "moving_camera_moving_shapes": {
            "clips": len(both),
            "foreground_over_truth_median": float(np.median(under_way)) if both else None,
            "pass_the_480p_motion_gate": sum(row["motion_foreground_px"] >= gate for _, row in both) / max(1, len(both)),
        },
    }


def overlay_videos(n_seeds: int, seed: int) -> list[tuple[Video, set[str]]]:
    """Videos of three shots and what is to be found on all their clips: watermark, text, burned_in, border."""
    mark = Overlay("watermark", ("SAMPLE CLIPS",), "bottom_right", 0.065, 0.6)
    logo = Overlay("logo", (), "top_left", 0.13, 0.7)
    subtitle = Overlay("subtitle", _LINES, height_short_sides=0.065, period_s=0.9)
    out = []
    for repeat in range(n_seeds):
        for number, name in enumerate(
            ("nothing", "watermark", "logo", "subtitle", "title", "scene_text", "letterbox", "pillarbox", "logo_and_subtitle")
        ):
            at = seed + repeat * 100 + number
            video = random_video(at, n_shots=3, durations_s=(2.2, 3.0), transitions=("cut",), fps=_FPS[repeat % 3])
            flags: set[str] = set()
            if name in ("watermark", "logo"):
                video, flags = replace(video, overlays=(mark if name == "watermark" else logo,)), {"watermark"}
                flags |= {"text", "burned_in"} if name == "watermark" else set()
            elif name == "subtitle":
                video, flags = replace(video, overlays=(subtitle,)), {"text", "burned_in"}
            elif name == "title":  # another one on each shot, for what stays over all shots is a watermark by definition
                titles = zip(video.shots, (("A Walk", "top"), ("Among Shapes", "bottom"), ("The End", "centre")), strict=True)
                titled = (replace(s, overlays=(Overlay("title", (words,), place, 0.11),)) for s, (words, place) in titles)
                video, flags = replace(video, shots=tuple(titled)), {"text", "burned_in"}
            elif name == "logo_and_subtitle":
                video, flags = replace(video, overlays=(logo, subtitle)), {"watermark", "text", "burned_in"}
            elif name == "scene_text":
                signs = (replace(s, background=replace(s.background, text="MARKET STREET")) for s in video.shots)
                video, flags = replace(video, shots=tuple(signs)), {"text"}
            elif name.endswith("box"):
                sides = {"top_px": 40, "bottom_px": 40} if name == "letterbox" else {"left_px": 60, "right_px": 60}
                video, flags = replace(video, border=Border(**sides)), {"border"}
            out.append((replace(video, name=f"overlay_{name}_{at}"), flags))
    return out


def judge_overlays(videos: Sequence[tuple[Video, set[str]]], work: Path, jobs: int) -> tuple[dict[str, Any], list[Row]]:
    """Precision and recall of every flag over the clips of the videos, and the wrong clips."""
    paths = common.rendered([video for video, _ in videos], work, jobs)
    gates = load_config().tiers["480p"]
    # A fresh output each time: the funnel would take up stored scores again while their code is being changed.
    with tempfile.TemporaryDirectory(dir=work) as folder:
        config = load_config(common.config_file(Path(folder) / "open.yaml", tiers=common.OPEN_TIERS))
        listed = common.input_list(Path(folder) / "list.csv", paths)
        clips = run_funnel(config, str(listed), f"{folder}/out", Serial(), Console(quiet=True)).clips.to_pylist()
    wanted = {str(path): (video, flags) for path, (video, flags) in zip(paths, videos, strict=True)}
    counts: Counter[tuple[str, bool, bool]] = Counter()
    wrong, border_errors = [], []
    for clip in clips:
        video, flags = wanted[clip["source_uri"]]
        said = {
            "watermark": (clip["overlay_watermark"] or 0.0) > (gates["watermark"].max or 0.7),
            "text": (clip["overlay_text_area_ratio"] or 0.0) > 0,
            "burned_in": clip["overlay_text_kind"] == "burned_in",
            "border": clip["technical_black_border_ratio"] > (gates["black_border"].max or 0.02),
        }
        inside = video.content_size_px[0] * video.content_size_px[1] / (video.width_px * video.height_px)
        border_errors.append(abs(clip["technical_black_border_ratio"] - (1 - inside)))
        for flag, value in said.items():
            counts[flag, flag in flags, value] += 1
            if value != (flag in flags):
                area, mark = clip["overlay_text_area_ratio"], clip["overlay_watermark"]
                frames = f"{clip['start_frame']}-{clip['end_frame']}"
                wrong.append((video.name, frames, "false" if value else "missed", flag, area, mark, clip["motion_camera"]))
    figures: dict[str, Any] = {"clips": len(clips), "border_ratio_error_max": float(max(border_errors))}
    for flag in ("watermark", "text", "burned_in", "border"):
        hit, missed, false = counts[flag, True, True], counts[flag, True, False], counts[flag, False, True]
        figures[flag] = common.scores(hit + missed, hit, false)
    return figures, wrong


def report(figures: dict[str, Any]) -> None:
    """Confusion, strata, checks and flags as tables."""
    camera = figures["camera"]
    seen = [label for label in LABELS if any(label in row for row in camera["confusion"].values())]
    rows = [(a, *(row.get(b, "") for b in seen)) for a, row in camera["confusion"].items()]
    common.print_table(f"Camera: {camera['accuracy']:.1%} of {camera['clips']} labels right; row: truth", ("", *seen), rows)
    by = [(name, ", ".join(f"{k} {v:.1%}" for k, v in values.items())) for name, values in camera["accuracy_by"].items()]
    common.print_table("Share right", ("by", ""), by)
    names = ("camera_over_still", "static_camera_moving_shape", "moving_camera_moving_shapes")
    checks = [(check, name, value) for check in names for name, value in camera[check].items()]
    common.print_table("Motion (px a step at the stage's size)", ("check", "figure", "value"), checks)
    overlays = figures["overlays"]
    keys = ("true", "found", "false", "precision", "recall")
    rows = [(flag, *(overlays[flag][k] for k in keys)) for flag in ("watermark", "text", "burned_in", "border")]
    title = f"Overlays on {overlays['clips']} clips; largest error of a border's share {overlays['border_ratio_error_max']:.3f}"
    common.print_table(title, ("flag", *keys), rows)


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=1, help="Shots per camera and number of shapes.")] = 8,
    overlay_seeds: Annotated[int, typer.Option(min=1, help="Videos per kind of overlay.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="First seed; another one is another collection.")] = 500,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every error.")] = False,
    jobs: common.Jobs = common.JOBS_DEFAULT,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """Camera labels, foreground motion, watermark, text and border flags against the truth."""
    before = common.machine()
    all_cases = cases(seeds, seed)
    paths = common.rendered([case.video for case in all_cases], work, jobs)
    config = load_config()
    rows = common.in_parallel(motion_of, [(str(path), config) for path in paths], jobs)
    overlays, wrong = judge_overlays(overlay_videos(overlay_seeds, seed + 5000), work, jobs)
    figures = {"camera": judge_camera(all_cases, rows), "overlays": overlays}
    report(figures)
    if verbose:
        keys = ("motion_camera", "motion_foreground_px", "motion_background_px", "motion_foreground_ratio")
        gate = load_config().tiers["480p"]["motion"].min or 0.0
        columns = ("case", "label", "foreground px", "background px", "foreground share")
        lines = [(case, (case.video.name, *(row[k] for k in keys))) for case, row in zip(all_cases, rows, strict=True)]
        common.print_table("Wrong camera labels", columns, [line for case, line in lines if case.camera != line[1]])
        common.print_table("Foreground where there is none", columns, [line for c, line in lines if not c.shapes and line[2] > 0])
        common.print_table("No foreground where shapes move", columns, [line for c, line in lines if c.shapes and line[2] < gate])
        common.print_table("Wrong flags", ("video", "frames", "error", "flag", "text area", "watermark", "camera"), wrong)
    common.finish("camera", {"seeds": seeds, "overlay_seeds": overlay_seeds, "seed": seed, **figures}, save, before)


if __name__ == "__main__":
    app()
