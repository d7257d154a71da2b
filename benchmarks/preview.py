"""What-if previews and tier selection over a score table of ten million clips: seconds and memory of a fresh process.

The table is random but has every column of a published clip table, its types, its nulls and its layout (shards, index,
config.yaml). Thresholds are changed as a user does it, with the command itself:

    run_funnel.py preview --output DIR --set tiers.480p.aesthetic.min=5

Selection adds `reason_<tier>` and `reject_reason` batch by batch and counts them, as a run does at its end. The project
wants the preview in under 20 s and 4 GB.

    python benchmarks/preview.py --rows 10000000
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from curation.gates import Tiers, tier_gates
from curation.selection import add_reasons
from curation.stage import StageSet, load_stages
from waver_core.backends.contracts import ISSUES
from waver_core.config import load_config
from waver_core.manifest import INDEX_NAME, VERSION

CHANGE = "tiers.480p.aesthetic.min=5"
_RANGES: dict[str, tuple[float, float]] = {  # so that every gate rejects some rows and keeps others
    "duration_s": (1.0, 10.0),
    "fps": (8.0, 60.0),
    "aesthetic_score": (2.0, 8.0),
    "aesthetic_sharpness": (0.0, 1.0),
    "overlay_text_area_ratio": (0.0, 0.12),
    "overlay_watermark": (0.0, 1.0),
    "motion_total_px": (0.0, 12.0),
    "motion_active_ratio": (0.0, 1.0),
    "motion_foreground_px": (0.0, 40.0),
    "technical_black_border_ratio": (0.0, 0.1),
    "technical_bits_per_pixel": (0.0, 0.3),
    **{f"quality_{name}": (0.0, 0.55) for name in ISSUES},
}
_WORDS = {
    "kind": ["video"] * 9 + ["image"],
    "technical_codec": ["h264", "hevc", "vp9"],
    "technical_pixel_format": ["yuv420p"],
    "segment_transition_in": ["cut", "dissolve", "fade", "edge"],
    "segment_transition_out": ["cut", "dissolve", "fade", "edge"],
    "overlay_text_kind": ["none", "none", "scene", "burned_in"],
    "motion_camera": ["static", "pan_left", "pan_right", "zoom_in", "shake", "complex"],
    "dataset": ["a", "b", "c"],
    "licence": ["cc-by", "cc0"],
    "style": ["real", "anime_2d"],
    "review": ["real"],
    "caption": [" ".join(["A person in a red coat walks to the left."] * 8)],
    "caption_short": ["A person walks to the left."],
    "caption_camera": ["static", "pan_left"],
    "caption_style": ["real"],
    "label_1": ["Body Movement", "Ball Sports", "none"],
    "label_2": ["Walking", "Basketball", "none"],
    "label_3": ["walking", "dribbling a basketball", "none"],
    "training_caption": [" ".join(["A person in a red coat walks to the left."] * 9)],
    "skipped_from": ["aesthetic", "overlay", "motion"],
}
_SIDES = np.array([180, 360, 480, 720, 1080, 1440, 2160], np.int32)
app = common.new_app()


def column(field: pa.Field, first: int, rows: int, rng: np.random.Generator) -> pa.Array:
    """A column of random values that look like the field's own; cheap, and null where a real one often is."""
    name, kind = field.name, field.type
    if name.endswith("_error"):
        return pa.nulls(rows, kind)
    if name in ("clip_id", "source_id", "dedup_group"):  # unique (a source has about ten clips), 36 and 32 characters long
        numbers = pa.array(np.arange(first, first + rows) // (1 if name == "clip_id" else 10))
        return pc.binary_join_element_wise(
            "00000000-0000-5000-8000-0000" if name == "clip_id" else "f" * 24, pc.utf8_lpad(numbers.cast(pa.string()), 8, "0"), ""
        )
    if name == "source_uri":
        numbers = pa.array(np.arange(first, first + rows) // 10).cast(pa.string())
        return pc.binary_join_element_wise("s3://collection/videos/", numbers, ".mp4", "")
    if name == "short_side_px":
        return pa.array(rng.choice(_SIDES, rows), kind)
    if pa.types.is_string(kind):
        codes = pa.array(rng.integers(0, len(_WORDS[name]), rows, np.int32), mask=rng.random(rows) < _null_share(name))
        return pa.DictionaryArray.from_arrays(codes, pa.array(_WORDS[name])).cast(kind)
    if pa.types.is_boolean(kind):
        return pa.array(rng.random(rows) < 0.9)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(_numbers(kind.value_type, rows * kind.list_size, rng), kind.list_size).cast(kind)
    if pa.types.is_list(kind) and not pa.types.is_floating(kind.value_type) and not pa.types.is_integer(kind.value_type):
        return pa.array([None] * rows, kind)  # sentences and spans: no tier looks at them
    if pa.types.is_list(kind):
        offsets = pa.array(np.arange(0, 4 * rows + 1, 4, dtype=np.int32))
        return pa.ListArray.from_arrays(offsets, _numbers(kind.value_type, rows * 4, rng)).cast(kind)
    if pa.types.is_floating(kind):
        low, high = _RANGES.get(name, (0.0, 1.0))
        return pa.array(rng.uniform(low, high, rows), kind, mask=rng.random(rows) < 0.02)
    return pa.array(rng.integers(0, 2000, rows), kind)


def _null_share(name: str) -> float:
    """`skipped_from` is null for most clips, the others hardly ever."""
    return 0.7 if name == "skipped_from" else 0.01


def _numbers(kind: pa.DataType, count: int, rng: np.random.Generator) -> pa.Array:
    if pa.types.is_floating(kind):
        return pa.array(rng.random(count, np.float32), kind)
    return pa.array(rng.integers(0, 2**31, count, np.int64)).cast(kind)


def make_table(folder: str, rows: int, shards: int) -> None:
    """Write `<folder>/clips` as a finished run leaves it; shard by shard, so that any number of rows fits."""
    config = load_config()
    stages = load_stages(config)
    tiers = tier_gates(config, stages)
    clips = Path(folder) / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    names = []
    for shard in range(shards):
        first, last = rows * shard // shards, rows * (shard + 1) // shards
        rng = np.random.default_rng([7, shard])
        arrays = [column(field, first, last - first, rng) for field in stages.schema]
        table = add_reasons(pa.table(arrays, schema=stages.schema), tiers, [s.name for s in stages.stages])
        names.append(f"part-{shard:05d}.parquet")
        pq.write_table(table, clips / names[-1], compression="zstd")
    (clips / INDEX_NAME).write_text(json.dumps({"version": VERSION, "rows": rows, "shards": names}))


def select_all(folder: str) -> None:
    """Select the tiers of a stored table batch by batch and print what each keeps; run as a process of its own."""
    config = load_config(Path(folder) / "config.yaml")
    stages = load_stages(config)
    tiers = tier_gates(config, stages)
    kept = dict.fromkeys(tiers, 0)
    for part in _parts(folder, tiers):
        for tier, count in _kept(part, tiers, stages).items():
            kept[tier] += count
    print(json.dumps(kept))


def _parts(folder: str, tiers: Tiers) -> Any:
    columns = sorted({"kind"} | {g.gate.column for gates in tiers.values() for g in gates})
    for name in json.loads((Path(folder) / "clips" / INDEX_NAME).read_text())["shards"]:
        with pq.ParquetFile(Path(folder) / "clips" / name) as shard:
            yield from (pa.Table.from_batches([batch]) for batch in shard.iter_batches(500_000, columns=columns))


def _kept(part: pa.Table, tiers: Tiers, stages: StageSet) -> dict[str, int]:
    named = add_reasons(part, tiers, [s.name for s in stages.stages])
    return {tier: named[f"reason_{tier}"].null_count for tier in tiers}


def measure(rows: int, shards: int, work: Path, repeat: int) -> dict[str, Any]:
    """Make the table where it is missing, then time both commands; medians of the repeats."""
    config = load_config()
    schema = load_stages(config).schema
    folder = work / f"preview-{rows}-{common.digest(shards, schema, common.source_digest(sys.modules[__name__]))}"
    figures: dict[str, Any] = {"rows": rows, "shards": shards, "columns": len(schema)}
    if not folder.exists():
        common.console().print(f"writing {rows:,} rows into {folder}")
        work.mkdir(parents=True, exist_ok=True)
        # In a process of its own: a child's peak memory counts from its parent's size at the start.
        with tempfile.TemporaryDirectory(dir=work) as part:
            call = f"from benchmarks.preview import make_table; make_table({part + '/table'!r}, {rows}, {shards})"
            figures["make"] = common.run_measured([sys.executable, "-c", call])
            Path(part, "table").rename(folder)
    (folder / "config.yaml").write_text(config.resolved_yaml())  # tiers and options may have changed since; scores have not
    figures["table_mb"] = sum(p.stat().st_size for p in folder.rglob("*")) / 2**20
    preview = [sys.executable, "curation/run_funnel.py", "preview", "--output", str(folder), "--set", CHANGE]
    call = f"from benchmarks.preview import select_all; select_all({str(folder)!r})"
    for name, command in (("preview", preview), ("selection", [sys.executable, "-c", call])):
        runs = [common.run_measured(command) for _ in range(repeat)]
        best = sorted(runs, key=lambda r: r["wall_s"])[len(runs) // 2]
        figures[name] = {**best, "rows_per_s": rows / best["wall_s"]}
    return figures


@app.command()
def main(
    rows: Annotated[int, typer.Option(help="Clips in the table.", min=1)] = 10_000_000,
    shards: Annotated[int, typer.Option(help="Parquet files.", min=1)] = 20,
    repeat: Annotated[int, typer.Option(help="Times each is run; the median counts.", min=1)] = 1,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """Seconds and peak memory of a preview and of tier selection."""
    before = common.machine()
    figures = measure(rows, shards, work, repeat)
    print(figures["preview"].pop("output"))
    figures["kept"] = json.loads(figures["selection"].pop("output"))
    keys = ("wall_s", "cpu_s", "peak_rss_mb", "rows_per_s")
    lines = [(name, *(figures[name].get(k) for k in keys)) for name in ("make", "preview", "selection") if name in figures]
    title = f"{rows:,} clips, {figures['columns']} columns, {figures['table_mb']:,.0f} MB in {shards} files"
    common.print_table(title, ("", "wall s", "cpu s", "peak RSS MB", "rows/s"), lines)
    figures.pop("make", None)
    common.finish("preview", figures, save, before)


if __name__ == "__main__":
    app()
