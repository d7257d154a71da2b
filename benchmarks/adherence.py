"""Whether generated clips show what their prompts ask for: the end of the closed loop (design §6; Waver §4.5 judges by people).

24 prompts, six colours times four directions, in the words that the funnel finds for the training collection. A clip of a few
frames is measured by the funnel's own captioner and compared with its prompt. Before any model is judged, the judge is: as a
script this counts how often it is right on rendered clips, as they are and through the codec whose pictures a model makes.

    python benchmarks/adherence.py --verbose
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from waver_core.backends.contracts import ClipView, FlowEstimator, VideoAutoencoder
from waver_core.captions.colours import CHROMATIC
from waver_core.captions.facts import ObjectFacts, Phase, SceneFacts
from waver_core.captions.measure import Limits, coloured_tracks, facts_of, pick
from waver_core.captions.scene import held_still, look
from waver_core.captions.sentences import full_text, short_text
from waver_core.registry import create
from waver_core.synthetic import TRAINING_COLOURS, TRAINING_DIRECTIONS, Video, render, training_collection

OPEN_OUTLINE = Limits(min_overlap=0.6, min_lead=0.0)
"""A coarse codec leaves colours and motion and blurs outlines: at the second reading it may be any shape."""
_STARTS = {
    "left": ("right", "upper right", "lower right"),
    "right": ("left", "upper left", "lower left"),
    "up": ("bottom", "lower left", "lower right"),
    "down": ("top", "upper left", "upper right"),
}
_GROUNDS = ("white", "beige")
app = common.new_app()


class Prompt(NamedTuple):
    """A scene to generate: what must be seen, and the same in the words of a caption and of its short form."""

    colour: str
    direction: str
    facts: SceneFacts
    text: str
    short: str


class Verdict(NamedTuple):
    """Whether the largest thing in a clip has the prompt's colour, and whether it goes the prompt's way; what was measured."""

    colour_right: bool
    direction_right: bool
    facts: SceneFacts


def prompts(seed: int = 0) -> list[Prompt]:
    """The 24 prompts, colour by colour; start, speed and ground are drawn from what the collection's captions say."""
    out = []
    for c, colour in enumerate(TRAINING_COLOURS):
        for d, direction in enumerate(TRAINING_DIRECTIONS):
            rng = np.random.default_rng([seed, c, d])
            way = Phase(direction, "steadily", round(float(rng.uniform(0.17, 0.23)), 2))
            thing = ObjectFacts(colour, "disc", "medium-sized", str(rng.choice(_STARTS[direction])), (way,))
            facts = SceneFacts((str(rng.choice(_GROUNDS)),), "bright", "static", (thing,))
            out.append(Prompt(colour, direction, facts, full_text(facts), short_text(facts)))
    return out


def measured(frames: np.ndarray, fps: float) -> SceneFacts:
    """Facts of uint8 [T, H, W, 3] by the funnel's captioner, read twice where it is unsure.

    Where it names no coloured thing or has no word on the camera, things are measured once more, with any outline and a camera
    at rest, which all prompts ask for: over a plain ground the shape's motion can pass for the camera's. They have no shape then.
    """
    facts: SceneFacts = _captioner().facts(ClipView(frames, np.arange(len(frames)) / fps, {}))
    if facts.camera is not None and any(thing.colour for thing in facts.objects):
        return facts
    scene = held_still(look(frames, np.arange(len(frames)) / fps, _flow()))
    tracks = [track for track in coloured_tracks(scene, OPEN_OUTLINE) if track.colour in CHROMATIC]
    things = [facts_of(scene, thing, len(frames) / fps) for thing in pick(tracks, OPEN_OUTLINE)]
    return replace(facts, objects=tuple(replace(thing, shape=None) for thing in things) or facts.objects)


def judge(frames: np.ndarray, fps: float, prompt: Prompt) -> Verdict:
    """The verdict on a clip uint8 [T, H, W, 3]; a clip in which no thing is found is wrong in both."""
    facts = measured(frames, fps)
    thing = facts.objects[0] if facts.objects else ObjectFacts()
    return Verdict(thing.colour == prompt.colour, thing.motion == prompt.direction, facts)


def shares(results: Sequence[tuple[Prompt, Verdict]]) -> dict[str, float]:
    """Shares of clips that are right in colour, in direction, and in both. Raises ValueError where there are none."""
    if not results:
        raise ValueError("there are no results to count")
    right = np.array([(v.colour_right, v.direction_right, v.colour_right and v.direction_right) for _, v in results])
    return dict(zip(("colour", "direction", "both"), right.mean(axis=0).tolist(), strict=True))


def table(results: Sequence[tuple[Prompt, Verdict]]) -> list[tuple[str, ...]]:
    """A row per colour and one for all: "colour / direction" in percent, per direction and over all; "-" without clips."""
    rows = []
    for colour in (*TRAINING_COLOURS, None):
        of_colour = [r for r in results if colour in (None, r[0].colour)]
        cells = [[r for r in of_colour if r[0].direction == d] for d in TRAINING_DIRECTIONS]
        rows.append((colour or "all", *(_cell(part) for part in (*cells, of_colour))))
    return rows


def _cell(results: Sequence[tuple[Prompt, Verdict]]) -> str:
    found = shares(results) if results else {}
    return f"{found['colour']:.0%} / {found['direction']:.0%}" if found else "-"


def contact_sheet(videos: Mapping[tuple[str, str], np.ndarray], labels: Mapping[tuple[str, str], str], frames: int = 5) -> Any:
    """A PIL image of clips uint8 [T, H, W, 3] by (colour, direction): rows are colours, columns directions, each cell a strip of
    frames evenly spread with its label beneath. Missing clips leave their cell empty. Raises ValueError without any clip."""
    if not videos:
        raise ValueError("a contact sheet needs at least one clip")
    side, gap, head, foot, left = 64, 2, 24, 18, 76
    strip = frames * (side + gap)
    size = (left + len(TRAINING_DIRECTIONS) * (strip + 10), head + len(TRAINING_COLOURS) * (side + foot + 4))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for d, direction in enumerate(TRAINING_DIRECTIONS):
        draw.text((left + d * (strip + 10), 4), direction, "black", font)
    for c, colour in enumerate(TRAINING_COLOURS):
        y = head + c * (side + foot + 4)
        draw.text((6, y + side // 2 - 8), colour, "black", font)
        for d, direction in enumerate(TRAINING_DIRECTIONS):
            x, clip = left + d * (strip + 10), videos.get((colour, direction))
            if clip is None:
                continue
            for i, t in enumerate(np.linspace(0, len(clip) - 1, frames).round().astype(int)):
                sheet.paste(Image.fromarray(clip[t]).resize((side, side), Image.Resampling.LANCZOS), (x + i * (side + gap), y))
            draw.text((x, y + side + 1), labels.get((colour, direction), ""), "black", font)
    return sheet


def tiny_clip(video: Video, n_frames: int = 9, fps: float = 4.0, side_px: int = 64) -> np.ndarray:
    """The first frames of a rendered video at a rate and size, uint8 [n_frames, side_px, side_px, 3]."""
    frames = list(render(video))
    at = [min(len(frames) - 1, round(k / fps * float(video.fps))) for k in range(n_frames)]
    return np.stack([cv2.resize(frames[i], (side_px, side_px), interpolation=cv2.INTER_AREA) for i in at])


def prompt_for(video: Video) -> Prompt:
    """The prompt that a video of the training collection answers."""
    shape = video.shots[0].shapes[0]
    return next(p for p in prompts() if (p.colour, p.direction) == (shape.colour, shape.direction))


@cache
def _captioner() -> Any:
    return create("captioner", "attributes")


@cache
def _flow() -> FlowEstimator:
    flow: FlowEstimator = create("flow_estimator", "dis")
    return flow


class _Case(NamedTuple):
    video: Video
    codec: str
    side_px: int
    fps: float


def _judged(case: _Case) -> tuple[Prompt, Verdict, np.ndarray]:
    cv2.setNumThreads(1)
    frames = tiny_clip(case.video, fps=case.fps, side_px=case.side_px)
    if case.codec:
        codec: VideoAutoencoder = create("video_autoencoder", case.codec)
        frames = codec.decode(codec.encode([frames]))[0]
    prompt = prompt_for(case.video)
    return prompt, judge(frames, case.fps, prompt), frames


@app.command()
def main(
    clips: Annotated[int, typer.Option(min=1, help="Rendered clips.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Another one is another collection.")] = 500,
    side: Annotated[int, typer.Option(min=16, help="Pixels, a multiple of 8.")] = 64,
    fps: Annotated[float, typer.Option(min=1, help="Frames a second; every clip has nine.")] = 4.0,
    codec: Annotated[str, typer.Option(help="Video autoencoder of the second round.")] = "dct",
    sheet: Annotated[Path | None, typer.Option(help="Write the clips of the second round as a picture.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every error.")] = False,
    jobs: common.Jobs = common.JOBS_DEFAULT,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """How often the judge is right on rendered clips of the training collection, before and after a codec."""
    before = common.machine()
    # One file in seven is a still picture.
    videos = [v for v in training_collection(clips * 2, seed) if v.file.suffix == ".mp4"][:clips]
    figures: dict[str, Any] = {"clips": len(videos), "seed": seed, "side_px": side, "fps": fps, "codec": codec}
    for name, how in (("rendered", ""), ("decoded", codec)):
        found = common.in_parallel(_judged, [_Case(v, how, side, fps) for v in videos], jobs)
        results = [(prompt, verdict) for prompt, verdict, _ in found]
        named = float(np.mean([any(o.shape for o in v.facts.objects) for _, v in results]))
        figures[name] = {**shares(results), "outline_sure": named}
        common.print_table(f"{name}: colour / direction right", ("colour", *TRAINING_DIRECTIONS, "all"), table(results))
        wrong = [(v.name, full_text(r[1].facts)) for v, r in zip(videos, results, strict=True) if not all(r[1][:2])]
        if verbose and wrong:
            common.print_table("Wrong", ("clip", "measured"), wrong, left=(0, 1))
    if sheet is not None:
        pictures = {(p.colour, p.direction): frames for p, _, frames in found}
        contact_sheet(pictures, {key: " ".join(key) for key in pictures}).save(sheet)
    common.finish("adherence", figures, save, before)


if __name__ == "__main__":
    app()
