"""Seconds a clip, backend by backend: what each costs on the device at hand, loaded and warm, in batches as in a run.

It measures the backends of a profile whose packages and checkpoints are here and names the others, so the same command
serves the embedded profile on a laptop and `full` on a GPU. Ray is not needed. Decoding is not counted.

    python benchmarks/backends.py --profile small --clips 16 --batch 8
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from curation.backend_check import Need, alone, needs_of
from curation.scores_pass import sample_clips
from curation.stage import ClipMedia, Row, Stage, load_stages
from waver_core.config import load_config
from waver_core.isolation import isolated
from waver_core.manifest import CLIP_COLUMNS
from waver_core.synthetic import single_shot, write_video
from waver_core.video import open_video

CLIP_S = 3.0
app = common.new_app()


def measure(stage: Stage, media: list[ClipMedia], batch: int) -> dict[str, Any]:
    """Time a stage with one backend over clips: the first batch loads and warms it up, the rest counts."""
    call: Any = (lambda part: stage.annotate([m.row for m in part])) if "text" in stage.hooks else stage.score_many
    started = time.perf_counter()
    _raise_first(isolated(call, media[:batch]))
    loaded = time.perf_counter()
    done = 0
    for first in range(0, len(media), batch):
        part = media[first : first + batch]
        _raise_first(isolated(call, part))
        done += len(part)
    spent_s = time.perf_counter() - loaded
    return {"first_batch_s": loaded - started, "ms_per_clip": 1000 * spent_s / done, "clips_per_s": done / spent_s}


def _raise_first(results: list[Row | Exception]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


def media_of(stage: Stage, paths: list[str]) -> list[ClipMedia]:
    """The frames that a stage asks for, of every clip; rows with what its hooks would have found in the first decode left out."""
    out = []
    for number, path in enumerate(paths):
        row: Row = {c.name: None for c in CLIP_COLUMNS} | {"clip_id": str(number), "source_uri": path, "kind": "video"}
        row |= {"start_s": 0.0, "end_s": CLIP_S, "duration_s": CLIP_S, "motion_camera": "static"}
        row["caption"] = "A red disc moves to the left over a brown background while the camera pans to the right."
        if "clip" not in stage.hooks:
            out.append(ClipMedia(row, {}))
            continue
        with open_video(path) as video:
            out += list(sample_clips(video, [row], list(stage.requests())))
    return out


def run(needs: list[Need], stages: Any, paths: list[str], batch: int) -> list[dict[str, Any]]:
    """A row per backend of stages that score clips or texts."""
    rows = []
    for need in needs:
        stage = stages.named(need.stage)
        if not {"clip", "text"} & set(stage.hooks):
            continue  # what only watches the first decode is timed by benchmarks/funnel.py
        named = {"stage": need.stage, "capability": need.use.capability, "backend": need.use.name}
        missing = [*need.problems, *(["vLLM serves it, inside a run only"] if need.in_executor else [])]
        if missing:
            rows.append({**named, "missing": "; ".join(missing)})
            continue
        only = alone(stage, need.use)
        device = str(getattr(need.use.create(), "device", "cpu"))
        rows.append({**named, "device": device, **measure(only, media_of(only, paths), batch)})
    return rows


@app.command()
def main(
    profile: Annotated[list[str] | None, typer.Option("--profile", help="Profile to merge in; repeat for several.")] = None,
    clips: Annotated[int, typer.Option(help="Rendered clips of three seconds.", min=1)] = 12,
    batch: Annotated[int, typer.Option(help="Clips handed over together.", min=1)] = 4,
    save: common.Save = False,
) -> None:
    """Milliseconds a clip of every backend of a profile that can run here."""
    before = common.machine()
    config = load_config(None, profile or [])
    stages = load_stages(config)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{k}.mp4")) for k in range(clips)]
        for k, path in enumerate(paths):
            write_video(single_shot(k, duration_s=CLIP_S), path)
        rows = run(needs_of(config, stages), stages, paths, batch)
    columns = ("stage", "capability", "backend", "device", "first_batch_s", "ms_per_clip", "clips_per_s", "missing")
    common.print_table("backends", columns, [[r.get(c) for c in columns] for r in rows], left=(0, 1, 2, 3, 7))
    if not any("ms_per_clip" in r for r in rows):
        raise SystemExit("none of these backends can run here: see the last column, or make check-backends")
    name = "_".join(["backends", *(profile or ["embedded"])])
    common.finish(name, {"clips": clips, "clip_s": CLIP_S, "batch": batch, "backends": rows}, save, before)


if __name__ == "__main__":
    app()
