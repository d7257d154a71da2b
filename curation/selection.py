"""Tiers (Waver §3.5): which clips each training resolution may see, decided from stored scores; and what-if previews."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.gates import Tiers, first_failures, pass_mask
from waver_core.errors import UserError
from waver_core.manifest import INDEX_NAME, open_parquet
from waver_core.storage import is_local, join, read_bytes

_BATCH_ROWS = 500_000


@dataclass
class TierCount:
    """What one tier keeps and why it rejects the rest."""

    clips: int = 0
    images: int = 0
    hours: float = 0.0
    rejected: dict[str, int] = field(default_factory=dict)


def add_reasons(table: pa.Table, tiers: Tiers, stage_names: list[str]) -> pa.Table:
    """Append `reason_<tier>` (null = kept), `reject_reason` and `reject_stage` (null where any tier keeps the row)."""
    failures = first_failures(table, tiers)
    for tier, first in failures.items():
        table = table.append_column(
            pa.field(f"reason_{tier}", pa.string(), metadata={"owner": "publish"}), _names(first, tiers[tier])
        )
    rejected = np.all([first >= 0 for first in failures.values()], axis=0)
    loosest = next(iter(tiers))
    reason = pc.if_else(pa.array(rejected), table[f"reason_{loosest}"], None)
    stages = [stage_names[g.stage] for g in tiers[loosest]]
    stage = pa.array(np.array([*stages, None], object)[failures[loosest]], pa.string())
    table = table.append_column(pa.field("reject_reason", pa.string(), metadata={"owner": "publish"}), reason)
    return table.append_column(
        pa.field("reject_stage", pa.string(), metadata={"owner": "publish"}), pc.if_else(pa.array(rejected), stage, None)
    )


def _names(first: np.ndarray, gates: list[Any]) -> pa.Array:
    return pa.array(np.array([*(g.name for g in gates), None], object)[first], pa.string())


def count_tiers(batch: pa.Table | pa.RecordBatch, tiers: Tiers, into: dict[str, TierCount] | None = None) -> dict[str, TierCount]:
    """Count clips, images, hours and rejections per tier; adds to `into` when it is given."""
    counts = into if into is not None else {tier: TierCount() for tier in tiers}
    duration_s = np.nan_to_num(np.asarray(pc.fill_null(batch.column("duration_s"), 0.0)))
    image = np.asarray(pc.fill_null(pc.equal(batch.column("kind"), "image"), False))
    for tier, first in first_failures(batch, tiers).items():
        count, kept = counts[tier], first < 0
        count.clips += int(kept.sum())
        count.images += int((kept & image).sum())
        count.hours += float(duration_s[kept].sum()) / 3600
        for i, n in enumerate(np.bincount(first[~kept], minlength=len(tiers[tier]))):
            if n:
                name = tiers[tier][i].name
                count.rejected[name] = count.rejected.get(name, 0) + int(n)
    return counts


@dataclass
class Preview:
    """Tiers before and after a change of thresholds, from stored scores alone."""

    rows: int
    before: dict[str, TierCount]
    after: dict[str, TierCount]
    unscored: int
    """Clips that were rejected early and that the new thresholds would let go on: a run must score them first."""


def preview(clips_folder: str, before: Tiers, after: Tiers) -> Preview:
    """Count both selections over a published clip table, batch by batch, reading only the columns that gates use."""
    columns = sorted(
        {"kind", "duration_s", "skipped_from"}
        | {c for tiers in (before, after) for t in tiers.values() for g in t for c in (g.gate.column, *g.gate.condition)}
    )
    result = Preview(0, {t: TierCount() for t in before}, {t: TierCount() for t in after}, 0)
    for batch in _batches(clips_folder, columns):
        result.rows += batch.num_rows
        count_tiers(batch, before, result.before)
        count_tiers(batch, after, result.after)
        result.unscored += _would_go_on(batch, after)
    return result


def _would_go_on(batch: pa.RecordBatch, tiers: Tiers) -> int:
    """Rows whose scoring was cut short and that some tier no longer rejects by the scores that are there."""
    short = np.asarray(pc.is_valid(batch.column("skipped_from")))
    if not short.any():
        return 0
    rows = batch.filter(pa.array(short))
    open_somewhere = np.zeros(rows.num_rows, bool)
    for gates in tiers.values():
        rejected = np.zeros(rows.num_rows, bool)
        for g in gates:
            rejected |= ~pass_mask(g.gate, rows) & np.asarray(pc.is_valid(rows.column(g.gate.column)))
        open_somewhere |= ~rejected
    return int(open_somewhere.sum())


def _batches(folder: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        index = json.loads(read_bytes(join(folder, INDEX_NAME)))
    except FileNotFoundError as error:
        raise UserError(f"no clip table at {folder}: run the funnel with this output first") from error
    for name in index["shards"]:
        uri = join(folder, name)
        with open_parquet(uri) as shard:
            missing = [c for c in columns if c not in shard.schema_arrow.names]
            if missing:
                raise UserError(f"the stored table lacks {', '.join(missing)}: run the funnel again with this configuration")
            yield from shard.iter_batches(_BATCH_ROWS, columns=columns, use_threads=is_local(uri))
