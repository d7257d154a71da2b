"""How much the whole funnel costs beside bare decoding of the same files on the same cores, in one run.

Bare decoding is the floor: PyAV through `waver_core.video.open_video`, every frame of every file once and nothing done
with it, by as many single-threaded processes as there are cores and by one process with libav's own threads; the faster
of the two counts. The funnel is the command a user types, on Ray, with text detection and without it (then the text gates
of the tiers are opened, for nothing passes a gate without a score). Three times are given for it: the command's wall
time; the run's own (`wall_s` of ledger.json: Ray's cluster has started, its workers have not); and the workers' seconds
over the cores, which leaves out all of Ray and of Python's start. Memory is sampled in a run of its own, for sampling
costs time.

    python benchmarks/funnel.py --repeat 3 --save
    python benchmarks/funnel.py --input videos
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from curation.stage import load_stages
from waver_core.config import load_config
from waver_core.errors import MediaError
from waver_core.manifest import read_manifest
from waver_core.synthetic import Video, random_video
from waver_core.synthetic.timeline import n_frames
from waver_core.video import open_video

_LOOKS: tuple[tuple[int, int, Fraction | int], ...] = (
    (640, 360, 24),
    (854, 480, 25),
    (1280, 720, 30),
    (960, 540, Fraction(30000, 1001)),
    (480, 854, 25),
)
app = common.new_app()


class Decoded(NamedTuple):
    """One file decoded: frames, seconds of video, processor seconds of the process that did it."""

    frames: int
    video_s: float
    cpu_s: float


def collection(minutes: float, seed: int) -> list[Video]:
    """Random videos of about 25 s and several sizes until they add up."""
    videos: list[Video] = []
    while sum(float(n_frames(v) / v.fps) for v in videos) < minutes * 60:
        width, height, fps = _LOOKS[len(videos) % len(_LOOKS)]
        name = f"funnel_{seed + len(videos)}_{width}x{height}"
        n_shots = max(1, min(6, round(minutes * 60 / 4)))
        one = random_video(seed + len(videos), n_shots=n_shots, width_px=width, height_px=height, fps=fps, name=name)
        videos.append(one)
    return videos


def decode_all(item: tuple[str, int]) -> Decoded:
    """Decode every frame of a file with so many threads (0: libav's choice); unreadable files count as nothing."""
    path, threads = item
    started, count, last_s = time.process_time(), 0, 0.0
    try:
        with open_video(path, threads=threads) as video:
            for frame in video.frames():
                count, last_s = count + 1, frame.time_s + 1 / (video.info.fps or 25.0)
    except MediaError:
        pass
    return Decoded(count, last_s, time.process_time() - started)


def bare_decode(paths: Sequence[Path], processes: int, threads: int) -> dict[str, float]:
    """Wall and processor seconds of decoding all files; the processes are up before the clock starts."""
    items = [(str(p), threads) for p in sorted(paths, key=lambda p: -p.stat().st_size)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(decode_all, [items[-1]] * processes))
        started = time.perf_counter()
        done = list(pool.map(decode_all, items))
        wall_s = time.perf_counter() - started
    frames, video_s = sum(d.frames for d in done), sum(d.video_s for d in done)
    return {"wall_s": wall_s, "cpu_s": sum(d.cpu_s for d in done), "frames": frames, "video_s": video_s}


def without_text() -> list[str]:
    """Overrides that switch text detection off and open the gates that would then reject every clip."""
    tiers = load_config().tiers
    gates = {
        f"tiers.{t}.{name}" for t, gates in tiers.items() for name, g in gates.items() if g.column.startswith("overlay_text")
    }
    off = [
        "funnel.stages.overlay.text_backend=null",
        "funnel.stages.quality.backend_options.text_backend=null",
        "funnel.stages.caption.backend_options.read_text=false",
    ]
    return [*off, *(f"{gate}={{column: duration_s, min: 0}}" for gate in gates)]


def run_funnel(source: str, overrides: Sequence[str], options: Sequence[str] = (), memory: bool = False) -> dict[str, Any]:
    """One run of the command on a fresh output: its times, memory if asked for, and what the ledger says."""
    with tempfile.TemporaryDirectory(prefix="openwaver-bench-") as folder:
        output = f"{folder}/out"
        sets = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, "curation/run_funnel.py", "--input", source, "--output", output, *sets, *options]
        with common.Usage(memory=memory) as usage:
            done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the funnel failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        ledger = json.loads(Path(output, "ledger.json").read_text())
        clips = read_manifest(f"{output}/clips")
    seconds = {row["stage"]: row["seconds"] for row in ledger["stages"] if row["seconds"]}
    skipped = len(clips) - clips["skipped_from"].null_count
    run = {"run_s": ledger["wall_s"], "worker_s": sum(seconds.values()), "stages_s": seconds}
    return {**usage.figures(), **run, "clips": len(clips), "clips_not_fully_scored": skipped}


def measure(
    paths: Sequence[Path], source: str, repeat: int, cores: int, memory: bool = True, serial: bool = False
) -> dict[str, Any]:
    """Everything, `repeat` times in turn so that a drift of the machine hits all alike; medians of the repeats."""
    plain: list[dict[str, Any]] = []
    threaded: list[dict[str, Any]] = []
    runs: dict[str, list[dict[str, Any]]] = {"with_text": [], "without_text": []}
    overrides = {"with_text": [], "without_text": without_text()}
    options = ["--serial"] if serial else []
    for _ in range(repeat):
        plain.append(bare_decode(paths, min(cores, len(paths)), 1))
        threaded.append(bare_decode(paths, 1, 0))
        for name, sets in overrides.items():
            runs[name].append(run_funnel(source, sets, options))
    decode = {"processes": _medians(plain), "threads": _medians(threaded)}
    floor = min(decode.values(), key=lambda d: d["wall_s"])
    facts = {name: floor[name] for name in ("video_s", "frames")}
    figures: dict[str, Any] = {"cores": cores, "files": len(paths), **facts, "decode": decode}
    figures["bare_decode"] = floor
    for name, sets in overrides.items():
        run = _medians(runs[name])
        if memory:
            watched = run_funnel(source, sets, options, memory=True)
            run |= {k: v for k, v in watched.items() if k.startswith("peak_")}
        run["worker_wall_s"] = run["worker_s"] / (1 if serial else cores)
        run["ratio"] = {k: run[k] / floor["wall_s"] for k in ("wall_s", "run_s", "worker_wall_s")}
        run["ratio"]["cpu_s"] = run["cpu_s"] / floor["cpu_s"]
        run["ratio"]["worker_s"] = run["worker_s"] / floor["cpu_s"]
        run["real_time_factor"] = figures["video_s"] / run["wall_s"]
        figures[name] = run
    return figures


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median of every number, mappings included."""
    out: dict[str, Any] = {}
    for key, value in runs[0].items():
        values = [run.get(key, {} if isinstance(value, dict) else 0.0) for run in runs]
        out[key] = _medians(values) if isinstance(value, dict) else median(values)
    return out


def report(figures: dict[str, Any]) -> None:
    """Times and ratios, shares of the stages, memory."""
    video_s, floor = figures["video_s"], figures["bare_decode"]
    title = f"{figures['files']} files, {video_s:,.0f} s of video, {figures['frames']:,.0f} frames, {figures['cores']} cores"
    rows: list[tuple[Any, ...]] = []
    for name, label in (("processes", "bare decode, a process per core"), ("threads", "bare decode, one process with threads")):
        spent = figures["decode"][name]
        rows.append((label, spent["wall_s"], spent["wall_s"] / floor["wall_s"], spent["cpu_s"], None, video_s / spent["wall_s"]))
    for name, label in (("with_text", "funnel"), ("without_text", "funnel without text detection")):
        run, ratio = figures[name], figures[name]["ratio"]
        rows.append((label, run["wall_s"], ratio["wall_s"], run["cpu_s"], ratio["cpu_s"], run["real_time_factor"]))
        rows.append(("  after Ray's start", run["run_s"], ratio["run_s"], None, None, video_s / run["run_s"]))
        alone = run["worker_wall_s"]
        rows.append(("  its workers alone", alone, ratio["worker_wall_s"], run["worker_s"], ratio["worker_s"], video_s / alone))
    common.print_table(title, ("", "wall s", "x bare", "cpu s", "x bare cpu", "x real time"), rows)
    stages = figures["with_text"]["stages_s"] | figures["without_text"]["stages_s"]
    shares = []
    for stage in sorted(stages, key=lambda s: -figures["with_text"]["stages_s"].get(s, 0.0)):
        spent = [figures[name]["stages_s"].get(stage, 0.0) for name in ("with_text", "without_text")]
        parts = [f"{s / figures[n]['worker_s']:.1%}" for s, n in zip(spent, ("with_text", "without_text"), strict=True)]
        shares.append((stage, spent[0], parts[0], spent[1], parts[1]))
    common.print_table("Workers' seconds by stage", ("stage", "with text", "share", "without text", "share"), shares)
    keys = ("clips", "clips_not_fully_scored", "peak_pss_mb", "peak_uss_mb", "peak_rss_mb", "peak_process_uss_mb")
    runs = [(name, *(figures[name].get(k) for k in keys)) for name in ("with_text", "without_text")]
    columns = ("run", "clips", "cut short", "PSS MB", "USS MB", "RSS MB", "largest USS MB")
    common.print_table("Memory of the process tree", columns, runs)


@app.command()
def main(
    source: Annotated[Path | None, typer.Option("--input", help="Folder of videos; default: a rendered collection.")] = None,
    minutes: Annotated[float, typer.Option(help="Length of the rendered collection.", min=0.02)] = 6.0,
    repeat: Annotated[int, typer.Option(help="Times each is run; medians count.", min=1)] = 1,
    memory: Annotated[bool, typer.Option(help="Sample memory in a further run each.")] = True,
    serial: Annotated[bool, typer.Option("--serial", help="Run the funnel in one process, without Ray.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the rendered collection.", min=0)] = 900,
    jobs: common.Jobs = common.JOBS_DEFAULT,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """Wall and processor time of the funnel over bare decoding, shares of the stages, peak memory."""
    before = common.machine()
    if source is not None:
        listed = load_stages(load_config()).named("ingest").list_input(str(source))
        paths = [Path(f["uri"]) for f in listed if f["kind"] == "video"]
        figures = measure(paths, str(source.resolve()), repeat, jobs, memory, serial)
    else:
        paths = common.rendered(collection(minutes, seed), work, jobs)
        given = common.input_list(work / f"funnel-{common.digest(paths)}.csv", paths)
        figures = measure(paths, str(given), repeat, jobs, memory, serial)
    report(figures)
    common.finish("funnel", {"input": str(source or "rendered"), "repeat": repeat, "serial": serial, **figures}, save, before)


if __name__ == "__main__":
    app()
