"""The whole funnel in one process: what it leaves behind, what it skips, and when it refuses to call itself done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from curation.gates import tier_gates
from curation.selection import preview
from curation.stage import load_stages
from waver_core.config import load_config
from waver_core.errors import RunFailed, UserError
from waver_core.manifest import read_manifest
from waver_core.storage import list_files
from waver_core.synthetic import single_shot, write_video


@pytest.fixture(scope="module")
def finished(collection: Path, tmp_path_factory: pytest.TempPathFactory, curate: Any) -> Any:
    return curate(collection, tmp_path_factory.mktemp("finished"))


def test_a_run_leaves_everything_it_promises(finished: Any) -> None:
    output = Path(finished.output)
    tiers = list(yaml.safe_load((output / "config.yaml").read_text())["tiers"])
    assert tiers == ["192p", "480p", "720p", "ct_720p", "sft_720p", "refine_1080p"]
    for tier in tiers:
        index = json.loads((output / "tiers" / tier / "manifest.json").read_text())
        assert index["rows"] == finished.tier_rows[tier] == len(read_manifest(str(output / "tiers" / tier)))
        assert index["config_digest"] in (output / "config.yaml").read_text()
    assert finished.tier_rows["192p"] >= 5
    assert (output / "report.html").stat().st_size > 10_000
    assert {s["uri"].rsplit("/", 1)[-1] for s in pq.read_table(output / "sources.parquet").to_pylist()} >= {
        "copy.mp4",
        "still.mp4",
    }


def test_no_clip_is_dropped_and_each_rejection_has_a_reason(finished: Any) -> None:
    rows = read_manifest(f"{finished.output}/clips").to_pylist()
    assert (
        len({r["clip_id"] for r in rows}) == len(rows) == sum(s["n_clips"] or 0 for s in finished.sources if s["status"] == "ok")
    )
    for row in rows:
        kept = [t for t in finished.tier_rows if row[f"reason_{t}"] is None]
        assert bool(kept) == (row["reject_reason"] is None)
        assert (row["reject_stage"] is None) == (row["reject_reason"] is None)


def test_the_still_clip_is_rejected_as_static_and_the_exact_copy_is_no_source(finished: Any) -> None:
    rows = read_manifest(f"{finished.output}/clips").to_pylist()
    assert [r["reject_reason"] for r in rows if r["source_uri"].endswith("still.mp4")] == ["static"]
    copies = [s for s in finished.sources if s["status"] == "duplicate"]
    assert len(copies) == 1 and copies[0]["reason"] == "exact_duplicate"


def test_the_ledger_adds_up(finished: Any) -> None:
    ledger = json.loads((Path(finished.output) / "ledger.json").read_text())
    stages = {row["stage"]: row for row in ledger["stages"]}
    assert stages["ingest"]["rows_in"] == len(finished.sources)
    for before, after in zip(ledger["stages"][1:], ledger["stages"][2:], strict=False):
        if after["rows_in"] is not None:
            assert before["kept"] == after["rows_in"]
            assert before["kept"] == before["rows_in"] - sum(before["rejected"].values())
    assert stages["decode_shots"]["seconds"] > 0 and stages["decode_scores"]["seconds"] > 0


def test_rejected_clips_skip_the_later_stages_but_keep_their_row(
    collection: Path, tmp_path: Path, curate: Any, rows_of: Any
) -> None:
    curate(collection, tmp_path, "tiers.192p.bright={column: aesthetic_score, min: 7.6}")
    rows = rows_of(tmp_path)
    dull = [r for r in rows if r["reject_reason"] == "bright"]
    assert dull and all(
        r["aesthetic_score"] is not None and r["motion_total_px"] is None and r["skipped_from"] == "overlay" for r in dull
    )


def test_loosened_gates_score_what_was_skipped_and_decode_no_shots_again(
    collection: Path, tmp_path: Path, curate: Any, rows_of: Any
) -> None:
    curate(collection, tmp_path, "tiers.192p.bright={column: aesthetic_score, min: 7.6}")
    shots = [p.stat().st_mtime_ns for p in sorted((tmp_path / "work").glob("shots-*/*"))]
    again = curate(collection, tmp_path)
    assert again.decoded_sources == 0
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "work").glob("shots-*/*"))] == shots
    rows = rows_of(tmp_path)
    assert len({r["clip_id"] for r in rows}) == len(rows)
    assert all(r["motion_total_px"] is not None for r in rows if r["reject_reason"] is None)


def test_preview_agrees_with_a_run_under_the_same_thresholds(
    finished: Any, tmp_path: Path, collection: Path, curate: Any
) -> None:
    stored = Path(finished.output) / "config.yaml"
    change = "tiers.480p.aesthetic.min=7.6"
    before, after = load_config(stored), load_config(stored, [], [change])
    result = preview(f"{finished.output}/clips", tier_gates(before, load_stages(before)), tier_gates(after, load_stages(after)))
    rerun = curate(collection, tmp_path, change)
    assert {t: c.clips for t, c in result.before.items()} == finished.tier_rows
    assert {t: c.clips for t, c in result.after.items()} == rerun.tier_rows


def test_images_become_clips_of_one_frame(tmp_path: Path, curate: Any, rows_of: Any) -> None:
    import cv2

    from waver_core.video import decode

    source = tmp_path / "in"
    source.mkdir()
    shot = single_shot(
        4, camera="static", colour="blue", shape="star", direction="right", duration_s=2.2, width_px=320, height_px=180
    )
    write_video(shot, source / "moving.mp4")
    cv2.imwrite(str(source / "picture.png"), decode(str(source / "moving.mp4"))[3][..., ::-1])
    curate(source, tmp_path / "out")
    image = next(r for r in rows_of(tmp_path / "out") if r["kind"] == "image")
    assert image["reject_reason"] is None and image["duration_s"] == 0
    assert image["aesthetic_score"] > 1 and image["motion_total_px"] is None and image["fps"] is None


def test_a_list_gives_licence_and_style_to_the_rows(collection: Path, tmp_path: Path, curate: Any, rows_of: Any) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text(f"uri,licence,style,dataset\n{collection}/mixed_2.mp4,CC-BY,cg,rendered\n")
    curate(listed, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert {(r["licence"], r["style"], r["dataset"]) for r in rows} == {("CC-BY", "cg", "rendered")}


def test_a_renamed_source_is_not_decoded_again_and_bears_its_new_name(
    collection: Path, tmp_path: Path, curate: Any, rows_of: Any
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(collection / "mixed_1.mp4", source / "old.mp4")
    curate(source, tmp_path / "out")
    (source / "old.mp4").rename(source / "new.mp4")
    assert curate(source, tmp_path / "out").decoded_sources == 0
    assert {r["source_uri"].rsplit("/", 1)[-1] for r in rows_of(tmp_path / "out")} == {"new.mp4"}


def test_clip_files_hold_exactly_the_clip(collection: Path, tmp_path: Path, curate: Any, rows_of: Any) -> None:
    from waver_core.video import decode

    for mode in ("copy", "encode"):
        output = tmp_path / mode
        curate(collection / "mixed_3.mp4", output, f"funnel.stages.publish.clip_files={mode}")
        kept = [r for r in rows_of(output) if r["reason_192p"] is None]
        assert kept
        for row in kept:
            frames = decode(str(output / "files" / f"{row['clip_id']}.mp4"))
            assert len(frames) == row["end_frame"] - row["start_frame"]
            assert frames.shape[1:3] == (row["height_px"], row["width_px"])
            original = decode(row["source_uri"], start_s=row["start_s"], end_s=row["end_s"])
            assert abs(frames.astype(int) - original).mean() < 6
        assert not [n for n in list_files(str(output / "files")) if ".part" in n]


def test_a_run_in_which_nothing_survives_says_which_gate_did_it(collection: Path, tmp_path: Path, curate: Any) -> None:
    with pytest.raises(RunFailed, match=r"nothing survived: of \d+ clips, \d+ fell to size"):
        curate(collection, tmp_path, "tiers.192p.size.min=4000")
    assert (tmp_path / "report.html").exists()


def test_empty_input_is_refused_before_anything_is_written(tmp_path: Path, curate: Any) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no files in"):
        curate(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_input_and_output_may_lie_in_an_object_store(collection: Path, curate: Any, rows_of: Any, undisturbed: Any) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for file in collection.iterdir():
        store.pipe_file(f"/raw/{file.name}", file.read_bytes())
    curate("memory://raw", "memory://curated")
    rows = rows_of("memory://curated")
    assert [{**r, "source_uri": None} for r in rows] == [{**r, "source_uri": None} for r in undisturbed]
    assert rows[0]["source_uri"].startswith("memory://") and store.exists("/curated/report.html")
    assert curate("memory://raw", "memory://curated").decoded_sources == 0
