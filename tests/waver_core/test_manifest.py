"""The clip table: its columns explain themselves, its ids are stable, and a reader sees one whole manifest or another."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.stage import load_stages
from waver_core import manifest
from waver_core.config import load_config
from waver_core.errors import UserError
from waver_core.manifest import (
    CLIP_COLUMNS,
    INDEX_NAME,
    VERSION,
    Column,
    build_schema,
    clip_id,
    publish,
    read_manifest,
    read_tables,
    rows_to_table,
    write_table,
)
from waver_core.storage import join, list_files, remove, write_atomic

SPEED = Column("motion_px", pa.float64(), "mean speed", "px/step", score=True)
LABEL = Column("motion_camera", pa.string(), "what the camera did")


def table_of(n: int, first: int = 0) -> pa.Table:
    rows = [{"clip_id": clip_id("s", k, k + 1), "start_frame": k, "motion_px": k / 2} for k in range(first, first + n)]
    return rows_to_table(rows, build_schema({"motion": [SPEED]}))


def test_every_field_carries_owner_unit_and_sentence() -> None:
    schema = build_schema({"motion": [SPEED, LABEL]})
    assert schema.field("motion_px").metadata == {b"owner": b"motion", b"unit": b"px/step", b"doc": b"mean speed", b"score": b"1"}
    assert schema.field("motion_camera").metadata == {b"owner": b"motion", b"doc": b"what the camera did"}
    assert schema.field("start_s").metadata[b"owner"] == b"ingest"
    assert schema.metadata == {b"openwaver_manifest_version": str(VERSION).encode()}
    assert schema.names == [*(c.name for c in CLIP_COLUMNS), "motion_px", "motion_camera"]


def test_the_shipped_stages_document_every_column_they_write() -> None:
    stages = load_stages(load_config())
    owners = {s.name for s in stages.stages}
    for field in stages.schema:
        assert field.metadata[b"owner"].decode() in owners, field.name
        assert len(field.metadata[b"doc"]) > 3, field.name
    assert pa.types.is_string(stages.schema.field("motion_error").type)


def test_metadata_survives_parquet(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.parquet")
    write_table(uri, table_of(2), {"seconds": "{}"})
    schema = pq.read_schema(uri)
    assert schema.field("motion_px").metadata[b"unit"] == b"px/step"
    assert schema.metadata[b"seconds"] == b"{}" and schema.metadata[b"openwaver_manifest_version"] == b"1"


@pytest.mark.parametrize("owned", [{"a": [SPEED], "b": [SPEED]}, {"motion": [SPEED, SPEED]}])
def test_a_column_of_two_stages_is_refused(owned: dict[str, list[Column]]) -> None:
    with pytest.raises(UserError, match="column 'motion_px' is written by two stages"):
        build_schema(owned)


def test_a_stage_may_not_take_a_column_of_the_clip_itself() -> None:
    with pytest.raises(UserError, match="'start_s' is written by two stages: ingest and motion"):
        build_schema({"motion": [Column("start_s", pa.float64(), "mine")]})


def test_unknown_keys_of_a_row_are_refused_and_missing_ones_are_null() -> None:
    schema = build_schema({"motion": [SPEED]})
    with pytest.raises(UserError, match="columns that no stage declares: motion_camra, zoom"):
        rows_to_table([{"clip_id": "a"}, {"motion_camra": "x", "zoom": 1}], schema)
    table = rows_to_table([{"clip_id": "a"}], schema)
    assert table["motion_px"].to_pylist() == [None] and table["clip_id"].to_pylist() == ["a"]
    assert rows_to_table([], schema).schema.equals(schema, check_metadata=True)


def test_clip_id_is_pinned() -> None:
    assert clip_id("0123456789abcdef", 24, 96) == "54987c47-2c38-53ff-a8a1-7e5a63f1a007"


def test_clip_id_differs_for_other_spans_and_sources() -> None:
    spans = [("s", 0, 10), ("s", 0, 11), ("s", 1, 10), ("s", 1, 0), ("t", 0, 10), ("s:0", 1, 0), ("s", 10, 1)]
    assert len({clip_id(*span) for span in spans}) == len(spans)
    assert clip_id("s", 0, 10) == clip_id("s", 0, 10)


@pytest.mark.parametrize(("rows", "per_shard", "shards"), [(0, 4, 1), (3, 4, 1), (4, 4, 1), (5, 4, 2), (13, 4, 4)])
def test_publish_and_read_round_trip(tmp_path: Path, rows: int, per_shard: int, shards: int) -> None:
    folder, table = str(tmp_path / "m"), table_of(rows)
    names = publish(folder, table, rows_per_shard=per_shard, facts={"tier": "192p"})
    assert len(names) == shards
    again = read_manifest(folder)
    assert again.equals(table)
    assert again.schema.field("motion_px").metadata == table.schema.field("motion_px").metadata
    index = json.loads((tmp_path / "m" / INDEX_NAME).read_text())
    assert index == {"version": VERSION, "rows": rows, "shards": names, "tier": "192p"}


def test_publish_works_on_other_file_systems() -> None:
    folder = "memory://test-manifest"
    publish(folder, table_of(5), rows_per_shard=2, facts={})
    publish(folder, table_of(3, first=7), rows_per_shard=2, facts={})
    assert read_manifest(folder)["start_frame"].to_pylist() == [7, 8, 9]
    assert len(list_files(folder, ".parquet")) == 2
    remove(folder, recursive=True)


def test_shards_of_the_older_manifest_are_removed_and_equal_ones_stay(tmp_path: Path) -> None:
    folder = str(tmp_path)
    old = publish(folder, table_of(6), rows_per_shard=2, facts={})
    new = publish(folder, table_of(4), rows_per_shard=2, facts={})
    assert new == old[:2]
    assert [uri.rsplit("/", 1)[1] for uri in list_files(folder, ".parquet")] == sorted(new)


def test_the_index_is_written_after_its_shards_and_before_the_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(manifest, "write_atomic", lambda uri, data: (events.append(f"+{uri[-7:]}"), write_atomic(uri, data))[1])
    monkeypatch.setattr(manifest, "remove", lambda uri: (events.append(f"-{uri[-7:]}"), remove(uri))[1])
    publish(str(tmp_path), table_of(3), rows_per_shard=2, facts={})
    publish(str(tmp_path), table_of(1, first=50), rows_per_shard=2, facts={})
    shard, index = "parquet", INDEX_NAME[-7:]
    assert events == [f"+{shard}", f"+{shard}", f"+{index}", f"+{shard}", f"+{index}", f"-{shard}", f"-{shard}"]


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_a_publish_that_breaks_off_leaves_the_older_manifest_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    before = table_of(5)
    publish(str(tmp_path), before, rows_per_shard=3, facts={})
    calls = iter(range(10))

    def sometimes(uri: str, data: bytes | str) -> None:
        if next(calls) == fail_at:
            raise OSError("disk full")
        write_atomic(uri, data)

    monkeypatch.setattr(manifest, "write_atomic", sometimes)
    with pytest.raises(OSError, match="disk full"):
        publish(str(tmp_path), table_of(5, first=20), rows_per_shard=3, facts={})
    assert read_manifest(str(tmp_path)).equals(before)


def test_reading_where_there_is_no_manifest_or_a_newer_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest at .*run curation/run_funnel.py"):
        read_manifest(str(tmp_path))
    write_atomic(join(str(tmp_path), INDEX_NAME), json.dumps({"version": 99, "rows": 0, "shards": []}))
    with pytest.raises(UserError, match="version 99, this code reads 1"):
        read_manifest(str(tmp_path))


def test_read_tables_fills_columns_that_older_shards_lack(tmp_path: Path) -> None:
    old, new = str(tmp_path / "old.parquet"), str(tmp_path / "new.parquet")
    write_table(old, table_of(2).drop_columns(["motion_px"]))
    write_table(new, table_of(1, first=9))
    table = read_tables([old, new], build_schema({"motion": [SPEED]}))
    assert table["motion_px"].to_pylist() == [None, None, 4.5]
    assert read_tables([], build_schema({})).num_rows == 0
