"""What the embedded captioner says of rendered shots whose truth is known, and of real files, for a person to check.

Rendered: single shots of one or two shapes, every colour, shape, direction (rest included), camera and background in turn,
encoded, decoded and sampled as the second pass does it. A fact that is not stated counts as wrong; shapes at rest are counted
apart. Tiny: clips of few frames as a small generator makes them (design §6), measured from bare frames with an empty row.
Thresholds were tuned on other seeds than the default ones.

    python benchmarks/captions.py --verbose
    python benchmarks/captions.py --videos DIR
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter, defaultdict
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
from curation.stage import ClipMedia
from curation.stages import caption
from waver_core.backends.contracts import ClipView
from waver_core.captions.comparing import compare, share_agreeing
from waver_core.captions.facts import ObjectFacts, SceneFacts
from waver_core.captions.parsing import parse
from waver_core.captions.sentences import full_text
from waver_core.config import load_config
from waver_core.registry import create
from waver_core.synthetic import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    SHAPE_KINDS,
    Background,
    Camera,
    Shape,
    Shot,
    Video,
    render,
)
from waver_core.synthetic.casting import MOVING, centred, palettes_for
from waver_core.video import VIDEO_SUFFIXES, open_video

_SIZES = ((320, 180), (640, 360))
_FPS = (24, 25, 30)
_TINY = ((64, 9, 8), (96, 17, 12), (64, 9, 16))  # side in px, frames, frames a second
app = common.new_app()


class Result(NamedTuple):
    """What was said of one clip, and how long it took."""

    facts: SceneFacts
    text: str
    ms: float


def scenes(n: int, seed: int) -> list[Video]:
    """Single shots; every fourth has two shapes of different colours. All that moves is slowed until it stays in sight."""
    out = []
    for k in range(n):
        rng = np.random.default_rng([seed, k])
        colours = [list(COLOURS)[(k + seed) % len(COLOURS)]]
        if k % 4 == 3:
            fitting = [c for c in COLOURS if c != colours[0] and set(palettes_for(c)) & set(palettes_for(colours[0]))]
            colours.append(str(rng.choice(fitting)))
        palettes = sorted(set.intersection(*(set(palettes_for(c)) for c in colours)))
        camera, duration_s = CAMERAS[(k // 3 + seed) % len(CAMERAS)], float(rng.uniform(2.0, 3.5))
        # Over a plain ground a camera's move cannot be seen.
        kinds = [b for b in BACKGROUNDS if camera == "static" or b != "plain"]
        background = Background(str(rng.choice(kinds)), str(rng.choice(palettes)))
        size_px = _SIZES[k % 2]
        actors = [
            Shape(
                colour,
                SHAPE_KINDS[(k * 3 + number + seed) % len(SHAPE_KINDS)],
                direction := list(DIRECTIONS)[(k + number * 4 + seed // 7) % len(DIRECTIONS)],
                float(rng.uniform(0.2, 0.34)) / (1 if len(colours) == 1 else 1.25),
                0.0 if direction == "rest" else float(rng.uniform(0.15, 0.36)),
            )
            for number, colour in enumerate(colours)
        ]
        move = Camera(camera, float(rng.uniform(0.05, 0.12)), float(rng.uniform(1.04, 1.1)))
        actors, move = _kept_in_sight(actors, move, duration_s, size_px, rng)
        shot = Shot(duration_s, background, tuple(actors), move, seed=seed * 1000 + k)
        name, fps = f"caption_{seed}_{k}", Fraction(_FPS[k % 3])
        out.append(Video(name, (shot,), width_px=size_px[0], height_px=size_px[1], fps=fps, seed=seed * 1000 + k))
    return out


def _kept_in_sight(
    actors: list[Shape], move: Camera, duration_s: float, size_px: tuple[int, int], rng: np.random.Generator
) -> tuple[list[Shape], Camera]:
    """Shapes and camera slowed by one factor until the shapes stay in the picture, each in a column of its own."""
    room = np.array(size_px) / min(size_px)
    if move.kind.startswith("zoom"):
        room = room / move.zoom_factor_per_s**duration_s
    toward = {"pan_left": "left", "pan_right": "right", "tilt_up": "up", "tilt_down": "down"}.get(move.kind, "rest")
    pan = np.array(DIRECTIONS[toward]) * move.rate_short_sides_per_s
    drifts = [(np.array(DIRECTIONS[a.direction]) * a.speed_short_sides_per_s - pan) * duration_s for a in actors]
    free = [np.maximum(room - a.size_short_sides - 0.04, 0.05) for a in actors]
    scale = min(1.0, *(float((f / np.maximum(np.abs(d), 1e-6)).min()) for f, d in zip(free, drifts, strict=True)))
    move = replace(move, rate_short_sides_per_s=move.rate_short_sides_per_s * scale)
    placed = []
    for number, (actor, drift) in enumerate(zip(actors, drifts, strict=True)):
        slowed = replace(actor, speed_short_sides_per_s=actor.speed_short_sides_per_s * scale)
        spare = np.maximum((room - actor.size_short_sides - 0.04 - np.abs(drift) * scale) / 2, 0)
        column = 0.0 if len(actors) == 1 else 2 * number / (len(actors) - 1) - 1
        at = spare * (rng.uniform(-0.5, 0.5, size=2) if len(actors) == 1 else (column, rng.uniform(-1, 1)))
        placed.append(centred(slowed, move, duration_s, (float(at[0]), float(at[1]))))
    return placed, move


def tiny_scenes(n: int, seed: int) -> list[Video]:
    """One moving shape under a still camera, on plain grounds for the most part, in few frames of few pixels."""
    out = []
    for k in range(n):
        rng = np.random.default_rng([seed, 3, k])
        side_px, frames, fps = _TINY[k % len(_TINY)]
        colour, kind = list(COLOURS)[k % len(COLOURS)], SHAPE_KINDS[k // 2 % len(SHAPE_KINDS)] if k % 2 else "disc"
        background = Background("plain" if k % 3 else str(rng.choice(BACKGROUNDS)), str(rng.choice(palettes_for(colour))))
        duration_s = frames / fps
        speed, size = float(rng.uniform(0.25, 0.5)) / duration_s, float(rng.uniform(0.24, 0.36))
        actor = centred(Shape(colour, kind, MOVING[k * 3 % len(MOVING)], size, speed), Camera(), duration_s)
        shot = Shot(duration_s, background, (actor,), seed=seed + k)
        out.append(Video(f"tiny_{k}", (shot,), width_px=side_px, height_px=side_px, fps=Fraction(fps), seed=seed + k))
    return out


def view_of(path: str, start_s: float = 0.0, end_s: float | None = None) -> ClipView | None:
    """A span of a file (all of it by default) as the caption stage sees it; None where no frame falls into it."""
    requests = list(caption.Stage(caption.Options()).requests())
    with open_video(path) as video:
        end_s = end_s or video.info.duration_s or 0.0
    row = {"kind": "video", "start_s": start_s, "end_s": end_s, "duration_s": end_s - start_s}
    with open_video(path, skip_nonref=True) as video:
        media: ClipMedia | None = next(sample_clips(video, [row], requests), None)
    if media is None:
        return None
    dense, large = (media.frames[r] for r in requests)
    return ClipView(dense.rgb, dense.times_s, row, large.rgb)


def said_of(view: ClipView, captioner: Any) -> Result:
    """Facts and caption of one clip, timed."""
    started = time.perf_counter()
    facts = captioner.facts(view)
    text = full_text(facts)
    return Result(facts, text, (time.perf_counter() - started) * 1e3)


def measured(item: tuple[Video, str]) -> Result:
    """The captioner's word on the file of a scene, or on bare frames where there is none."""
    cv2.setNumThreads(1)
    video, path = item
    captioner = create("captioner", "attributes")
    view = view_of(path) if path else None
    if view is None:
        frames = np.stack(list(render(video)))
        view = ClipView(frames, np.arange(len(frames)) / float(video.fps), {})
    return said_of(view, captioner)


def judge(videos: Sequence[Video], results: Sequence[Result]) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Accuracy of every kind of fact, and what went wrong."""
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    ratios, round_trips, prompts = [], [], []
    wrong: list[tuple[str, ...]] = []
    by_colour: defaultdict[str, list[bool]] = defaultdict(list)
    for video, result in zip(videos, results, strict=True):
        shot, errors = video.shots[0], []
        right = {"camera": result.facts.camera == shot.camera.kind, "objects": len(result.facts.objects) == len(shot.shapes)}
        for fact, ok in right.items():
            hits[fact].append(ok)
            errors += [] if ok else [fact]
        for shape in shot.shapes:
            seen = next((o for o in result.facts.objects if o.colour == shape.colour), ObjectFacts())
            prefix = "rest_" if shape.direction == "rest" else ""
            moves = seen.motion == shape.direction
            checks = {"colour": seen.colour is not None, "direction": moves, "shape": seen.shape == shape.kind}
            for fact, ok in checks.items():
                hits[prefix + fact].append(ok)
                errors += [] if ok else [f"{fact} of {shape.colour} {shape.kind}"]
            by_colour[shape.colour].append(all(checks.values()))
            if moves and seen.phases and seen.phases[0].speed:
                ratios.append(seen.phases[0].speed / shape.speed_short_sides_per_s)
        round_trips.append(parse(result.text) == result.facts)
        prompts.append(share_agreeing(compare(parse(prompt_of(shot)), result.facts)) or 0.0)
        if errors:
            where = f"{shot.camera.kind} {shot.background.kind}/{shot.background.palette}"
            wrong.append((video.name, where, "; ".join(errors), result.text))
    figures: dict[str, Any] = {
        "clips": len(videos),
        "accuracy": {fact: float(np.mean(ok)) for fact, ok in sorted(hits.items())},
        "counted": {fact: len(ok) for fact, ok in sorted(hits.items())},
        "all_facts_right_by_colour": {c: float(np.mean(ok)) for c, ok in by_colour.items()},
        "speed_over_truth": dict(zip(("p5", "median", "p95"), np.percentile(ratios or [0.0], (5, 50, 95)).tolist(), strict=True)),
        "caption_reads_back": float(np.mean(round_trips)),
        "facts_of_a_prompt_found": float(np.mean(prompts)),
        "ms_per_clip": dict(zip(("median", "p95"), np.percentile([r.ms for r in results], (50, 95)).tolist(), strict=True)),
    }
    return figures, wrong


def prompt_of(shot: Shot) -> str:
    """A scene in the words of a user."""
    way = {"rest": "stays still"} | {d: "moves " + d.replace("_", " and to the ") for d in MOVING}
    things = " and ".join(f"a {s.colour} {s.kind} {way[s.direction]}" for s in shot.shapes)
    kind, _, side = shot.camera.kind.partition("_")
    camera = {"static": "the camera is static", "shake": "the camera shakes"}.get(kind, f"the camera {kind}s {side}")
    return f"{things} while {camera}"


def captions_of(folder: Path, work: Path) -> list[dict[str, Any]]:
    """Rows of the clips that the funnel finds in the files of a folder, captioned, none rejected."""
    files = sorted(p for p in folder.iterdir() if p.suffix in VIDEO_SUFFIXES)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as out:
        path = common.config_file(Path(out) / "open.yaml", tiers=common.OPEN_TIERS)
        config = load_config(path)
        listed = common.input_list(Path(out) / "list.csv", files)
        rows: list[dict[str, Any]] = run_funnel(
            config, str(listed), f"{out}/run", Serial(), Console(quiet=True)
        ).clips.to_pylist()
    return sorted(rows, key=lambda row: (row["source_uri"], row["start_s"]))


@app.command()
def main(
    clips: Annotated[int, typer.Option(min=1, help="Rendered scenes.")] = 200,
    tiny: Annotated[int, typer.Option(min=1, help="Tiny scenes.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Another one is another collection.")] = 900,
    videos: Annotated[Path | None, typer.Option(help="Print captions of the files in this folder instead.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every error.")] = False,
    jobs: common.Jobs = common.JOBS_DEFAULT,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """Captions against the truth of rendered scenes, or of real files for a person to check."""
    if videos is not None:
        for row in captions_of(videos, work):
            said = row["caption"] or row["caption_error"]
            common.console().print(f"{Path(row['source_uri']).name} {row['start_s']:.1f}-{row['end_s']:.1f} s: {said}")
        return
    before = common.machine()
    figures: dict[str, Any] = {"clips": clips, "tiny_clips": tiny, "seed": seed}
    collections = {"rendered": scenes(clips, seed), "tiny": tiny_scenes(tiny, seed)}
    for name, made in collections.items():
        paths = [str(p) for p in common.rendered(made, work, jobs)] if name == "rendered" else [""] * len(made)
        results = common.in_parallel(measured, list(zip(made, paths, strict=True)), jobs)
        figures[name], wrong = judge(made, results)
        accuracy = figures[name]["accuracy"]
        rows = [(fact, accuracy[fact], figures[name]["counted"][fact]) for fact in accuracy]
        common.print_table(f"{name}: share right", ("fact", "right", "of"), rows)
        rest = [(k, v) for k, v in figures[name].items() if k not in ("accuracy", "counted")]
        common.print_table(name, ("figure", "value"), [(k, str(common.rounded(v))) for k, v in rest])
        if verbose and wrong:
            common.print_table("Wrong", ("clip", "camera, background", "wrong", "caption"), wrong, left=(0, 1, 2, 3))
            common.print_table("Errors", ("fact", "clips"), Counter(w[2].split(" of ")[0] for w in wrong).most_common())
    common.finish("captions", figures, save, before)


if __name__ == "__main__":
    app()
