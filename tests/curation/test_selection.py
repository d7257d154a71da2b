"""Selection from stored scores: reasons, counts and previews against a plain loop over rows."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.gates import TierGate, Tiers, passes
from curation.selection import TierCount, add_reasons, count_tiers, preview
from waver_core import manifest
from waver_core.config import Gate
from waver_core.errors import UserError

STAGES = ["ingest", "technical", "aesthetic", "motion"]
SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("kind", pa.string()),
        ("duration_s", pa.float64()),
        ("size", pa.int32()),
        ("score", pa.float64()),
        ("camera", pa.string()),
        ("skipped_from", pa.string()),
    ]
)


def tiers_with(score: float = 4.0) -> Tiers:
    """Two tiers over three stages."""
    long = TierGate("long", Gate(column="duration_s", min=2, kind="video"), 0)
    size = TierGate("size", Gate(column="size", min=300), 1)
    nice = TierGate("nice", Gate(column="score", min=score), 2)
    camera = TierGate("camera", Gate(column="camera", equals="static"), 3)
    return {"low": [long, TierGate("nice", Gate(column="score", min=score / 2), 2)], "high": [long, size, nice, camera]}


def random_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Rows with nulls, NaN, images, and clips whose scoring was cut short at some stage."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        image = rng.random() < 0.2
        skipped = rng.choice([None, "aesthetic", "motion"], p=[0.6, 0.2, 0.2])
        score = None if skipped == "aesthetic" or rng.random() < 0.1 else float(rng.uniform(0, 10))
        rows.append(
            {
                "clip_id": f"c{i:04d}",
                "kind": "image" if image else "video",
                "duration_s": 0.0 if image else float(rng.uniform(0, 10)),
                "size": int(rng.integers(100, 900)),
                "score": math.nan if score is not None and rng.random() < 0.05 else score,
                "camera": None if skipped else str(rng.choice(["static", "shake"])),
                "skipped_from": skipped,
            }
        )
    return rows


def first_failure(row: dict[str, Any], gates: list[TierGate]) -> TierGate | None:
    return next((g for g in gates if not passes(g.gate, row)), None)


def naive_counts(rows: list[dict[str, Any]], tiers: Tiers) -> dict[str, TierCount]:
    counts = {}
    for tier, gates in tiers.items():
        failed = [first_failure(row, gates) for row in rows]
        kept = [row for row, gate in zip(rows, failed, strict=True) if gate is None]
        hours = sum(row["duration_s"] for row in kept) / 3600
        images = sum(row["kind"] == "image" for row in kept)
        counts[tier] = TierCount(len(kept), images, hours, dict(Counter(g.name for g in failed if g is not None)))
    return counts


def assert_same(found: dict[str, TierCount], expected: dict[str, TierCount]) -> None:
    assert list(found) == list(expected)
    for tier, count in expected.items():
        assert (found[tier].clips, found[tier].images, found[tier].rejected) == (count.clips, count.images, count.rejected)
        assert found[tier].hours == pytest.approx(count.hours)


@pytest.mark.parametrize("seed", range(4))
def test_reasons_agree_with_a_plain_loop(seed: int) -> None:
    rows, tiers = random_rows(300, seed), tiers_with()
    table = add_reasons(pa.Table.from_pylist(rows, schema=SCHEMA), tiers, STAGES)
    assert table.column_names == [*SCHEMA.names, "reason_low", "reason_high", "reject_reason", "reject_stage"]
    kept = 0
    for row, found in zip(rows, table.to_pylist(), strict=True):
        failed = {tier: first_failure(row, gates) for tier, gates in tiers.items()}
        assert found["reason_low"] == (failed["low"].name if failed["low"] else None)
        assert found["reason_high"] == (failed["high"].name if failed["high"] else None)
        lost = failed["low"] if all(failed.values()) else None
        assert found["reject_reason"] == (lost.name if lost else None)
        assert found["reject_stage"] == (STAGES[lost.stage] if lost else None)
        kept += lost is None
    assert 30 < kept < 300
    assert table.schema.field("reason_low").metadata[b"owner"] == b"publish"


def test_reasons_of_an_empty_table() -> None:
    table = add_reasons(SCHEMA.empty_table(), tiers_with(), STAGES)
    assert table.num_rows == 0 and table.schema.field("reject_stage").type == pa.string()


@pytest.mark.parametrize("seed", range(4))
def test_counts_agree_with_a_plain_loop_in_one_batch_or_several(seed: int) -> None:
    rows, tiers = random_rows(300, seed), tiers_with()
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    expected = naive_counts(rows, tiers)
    assert_same(count_tiers(table, tiers), expected)
    counts = {tier: TierCount() for tier in tiers}
    for batch in table.to_batches(max_chunksize=37):
        count_tiers(batch, tiers, counts)
    assert_same(counts, expected)


def published(tmp_path: Any, rows: list[dict[str, Any]], per_shard: int) -> str:
    folder = str(tmp_path / "clips")
    manifest.publish(folder, pa.Table.from_pylist(rows, schema=SCHEMA), rows_per_shard=per_shard, facts={})
    return folder


@pytest.mark.parametrize(("seed", "score", "per_shard"), [(0, 4.0, 1000), (1, 2.0, 64), (2, 7.0, 50), (3, 0.0, 300)])
def test_preview_counts_both_selections_and_what_has_to_be_scored_first(
    tmp_path: Any, seed: int, score: float, per_shard: int
) -> None:
    rows, before, after = random_rows(300, seed), tiers_with(4.0), tiers_with(score)
    found = preview(published(tmp_path, rows, per_shard), before, after)
    assert found.rows == 300
    assert_same(found.before, naive_counts(rows, before))
    assert_same(found.after, naive_counts(rows, after))
    unscored = 0
    for row in rows:
        if row["skipped_from"] is not None:
            open_somewhere = [all(passes(g.gate, row) or row[g.gate.column] is None for g in gates) for gates in after.values()]
            unscored += any(open_somewhere)
    assert found.unscored == unscored


def test_unscored_clips_are_those_that_the_new_thresholds_let_go_on(tmp_path: Any) -> None:
    base = {"kind": "video", "duration_s": 5.0, "size": 500}
    rows = [
        {**base, "clip_id": "a", "score": 3.0, "camera": None, "skipped_from": "motion"},  # cut short, now good enough
        {**base, "clip_id": "b", "score": 0.5, "camera": None, "skipped_from": "motion"},  # cut short, still too bad
        {**base, "clip_id": "c", "score": 9.0, "camera": "static", "skipped_from": None},  # scored in full
        {**base, "clip_id": "d", "score": 3.0, "camera": None, "skipped_from": None},  # not cut short: an error left a null
    ]
    gates = {
        t: {"low": [TierGate("n", Gate(column="score", min=t), 2), TierGate("c", Gate(column="camera", equals="static"), 3)]}
        for t in (4, 2)
    }
    folder = published(tmp_path, rows, 10)
    assert preview(folder, gates[4], gates[4]).unscored == 0
    found = preview(folder, gates[4], gates[2])
    assert found.unscored == 1
    assert (found.before["low"].clips, found.after["low"].clips) == (1, 1)


def test_preview_says_what_is_missing(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"no clip table at .*run the funnel"):
        preview(str(tmp_path / "none"), tiers_with(), tiers_with())
    folder = published(tmp_path, random_rows(3, 0), 10)
    new = {"low": [TierGate("x", Gate(column="not_there", min=0), 2)]}
    with pytest.raises(UserError, match="the stored table lacks not_there"):
        preview(folder, tiers_with(), new)


def test_preview_reads_only_the_columns_of_the_gates(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    folder = published(tmp_path, random_rows(20, 0), 7)
    asked: list[list[str]] = []
    real = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["columns"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    low = {"low": tiers_with()["low"]}
    preview(folder, low, low)
    assert asked == [["duration_s", "kind", "score", "skipped_from"]] * 3
