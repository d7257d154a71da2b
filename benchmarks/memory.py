"""Memory of one worker over a long 1080p source: the two passes must stay flat, however long the file is.

A few seconds of different shots are rendered and encoded once; their packets are then written again and again with
shifted timestamps, so that a 30-minute file takes seconds to make. Each pass runs over it in a process of its own, with
the serial executor and gates that keep every clip, while the memory that belongs to that process alone (USS) is sampled.
The project wants at most 2 GB per worker. The first pass keeps about 0.6 kB a frame by design, 26 MB in 30 minutes.

    python benchmarks/memory.py --minutes 30
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from curation.gates import tier_gates
from curation.passes import later_passes
from curation.scores_pass import ScoresPass
from curation.serial import Serial, units_of
from curation.shots_pass import ShotsPass
from curation.stage import load_stages
from curation.tables import clips_of, pending_clips, units_by_source
from curation.workfolder import WorkFolder
from waver_core.config import load_config
from waver_core.synthetic import Video, random_video

PASSES = ("shots", "scores")
app = common.new_app()


def segment(seconds: float, height_px: int, seed: int) -> Video:
    """A video of that length, 16:9, of shots of about 4 s with every kind of transition."""
    n_shots = max(1, round(seconds / 4.5))
    each = (seconds / n_shots, seconds / n_shots)
    size = (height_px * 16 // 18 * 2, height_px)
    name = f"memory_{height_px}p_{seed}"
    return random_video(seed, n_shots=n_shots, durations_s=each, fps=24, width_px=size[0], height_px=size[1], name=name)


def repeat_packets(source: Path, target: Path, minutes: float) -> int:
    """Write the packets of `source` over and over, timestamps shifted, until `minutes` are full; the number of frames."""
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.pts is not None]
        spans = [(p.pts, p.dts, bytes(p), p.is_keyframe) for p in packets]
        step = round(1 / (stream.average_rate * stream.time_base))
        rounds = max(1, round(minutes * 60 * float(stream.average_rate) / len(packets)))
        part = target.with_name(f"part-{target.name}")
        with av.open(str(part), "w", format="mp4") as out:
            copy = out.add_stream_from_template(stream)
            copy.time_base = stream.time_base
            for number in range(rounds):
                shift = number * len(packets) * step
                for pts, dts, data, is_key in spans:
                    packet = av.Packet(data)
                    packet.pts, packet.dts, packet.duration = pts + shift, dts + shift, step
                    packet.time_base, packet.stream, packet.is_keyframe = stream.time_base, copy, is_key
                    out.mux(packet)
    part.replace(target)
    return rounds * len(packets)


def run_pass(name: str, source: str, folder: str) -> None:
    """One pass over one source in this process; the second one takes up what the first has left in the work folder."""
    config = load_config(Path(folder) / "open.yaml")
    stages = load_stages(config)
    scores = next(p for p in later_passes(config, stages) if p.name == "scores")
    work = WorkFolder(folder, {"shots": "bench", "scores": "bench"}, "bench")
    if name == "shots":
        work.prepare()
        facts = {"source_id": "bench", "uri": source, "kind": "video", "bytes": Path(source).stat().st_size}
        units = units_of([{**facts, "dataset": None, "licence": None, "style": None, "stamp": None}], 1)
        done = list(Serial().run(ShotsPass, (config, work), units, config.funnel.resources("shots")))
    else:
        sources = work.read_sources()[0]
        clips = clips_of(sources, sources, work, stages)
        units = units_by_source(pending_clips(clips, sources, work, scores, stages, tier_gates(config, stages)), 1)
        done = list(Serial().run(ScoresPass, (config, work, "scores"), units, scores.resources))
    found = work.read_sources()[0][0]
    print(json.dumps({"frames": found["n_frames"], "clips": found["n_clips"], "reason": done[0]["reason"]}))


def watch_pass(name: str, source: Path, folder: str) -> dict[str, Any]:
    """Run a pass in a process of its own and follow its memory."""
    call = f"from benchmarks.memory import run_pass; run_pass({name!r}, {str(source)!r}, {folder!r})"
    with common.Usage(memory=True) as usage:
        done = subprocess.run([sys.executable, "-c", call], cwd=common.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the pass '{name}' failed:\n{done.stderr[-3000:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    if said["reason"]:
        raise SystemExit(f"the pass '{name}' failed: {said['reason']}")
    times_s, memory_mb = (np.array(v) for v in zip(*usage.series, strict=True))
    steady = times_s > 0.25 * times_s[-1]  # the start loads code and networks
    growth = float(np.polyfit(times_s[steady], memory_mb[steady], 1)[0]) * usage.wall_s if steady.sum() > 3 else None
    return {
        "wall_s": usage.wall_s,
        "cpu_s": usage.cpu_s,
        "frames_per_s": said["frames"] / usage.wall_s,
        "frames": said["frames"],
        "clips": said["clips"],
        "peak_uss_mb": usage.peaks["peak_process_uss_mb"],
        "peak_rss_mb": usage.peaks["peak_rss_mb"],
        "growth_mb": growth,
        "uss_mb": over_time(times_s, memory_mb),
    }


def over_time(times_s: np.ndarray, memory_mb: np.ndarray, n_bins: int = 12) -> list[tuple[float, float]]:
    """The largest value in each of `n_bins` equal stretches of time, as (their end in seconds, MB)."""
    ends = np.linspace(0, times_s[-1], n_bins + 1)[1:]
    at = np.minimum(np.searchsorted(ends, times_s), n_bins - 1)
    return [(float(end), float(memory_mb[at == i].max())) for i, end in enumerate(ends) if (at == i).any()]


def measure(minutes: float, segment_s: float, height_px: int, work: Path, jobs: int) -> dict[str, Any]:
    """Make the source where it is missing, then follow both passes over it."""
    piece = common.rendered([segment(segment_s, height_px, 40)], work, jobs)[0]
    source = piece.with_name(f"{piece.stem}-{minutes:g}min.mp4")
    if not source.exists():
        repeat_packets(piece, source, minutes)
    figures: dict[str, Any] = {"minutes": minutes, "height_px": height_px, "source_mb": source.stat().st_size / 2**20}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        common.config_file(Path(folder) / "open.yaml", tiers=common.OPEN_TIERS)
        for name in PASSES:
            figures[name] = watch_pass(name, source, folder)
    return figures


def report(figures: dict[str, Any]) -> None:
    """Peaks, speed, and memory over time as bars."""
    keys = ("wall_s", "frames", "frames_per_s", "clips", "peak_uss_mb", "peak_rss_mb", "growth_mb")
    columns = ("pass", "wall s", "frames", "frames/s", "clips", "peak USS MB", "peak RSS MB", "growth MB")
    title = f"{figures['minutes']:g} min of {figures['height_px']}p; growth: slope after the first quarter times the length"
    common.print_table(title, columns, [(name, *(figures[name][k] for k in keys)) for name in PASSES])
    top_mb = max(mb for name in PASSES for _, mb in figures[name]["uss_mb"])
    rows = [(name, f"{at:.0f} s", mb, "█" * round(40 * mb / top_mb)) for name in PASSES for at, mb in figures[name]["uss_mb"]]
    common.print_table("Largest USS up to each point in time", ("pass", "until", "MB", ""), rows, left=(0, 3))


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="Length of the source.", min=0.05)] = 30.0,
    segment_s: Annotated[float, typer.Option(help="Length of the piece that is rendered and repeated.", min=0.5)] = 20.0,
    height: Annotated[int, typer.Option(help="Lines of the source.", min=72)] = 1080,
    jobs: common.Jobs = common.JOBS_DEFAULT,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """Peak memory of each pass over a long source, its course over time, and frames per second."""
    before = common.machine()
    figures = measure(minutes, segment_s, height, work, jobs)
    report(figures)
    common.finish("memory", figures, save, before)


if __name__ == "__main__":
    app()
