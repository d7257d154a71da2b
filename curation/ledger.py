"""The ledger: what came into each stage, what was kept, what was rejected and why, what failed, and how long it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from curation.gates import Tiers
from curation.selection import TierCount
from curation.stage import StageSet
from waver_core.telemetry import duration_text


def build_ledger(
    clips: pa.Table, sources: list[dict[str, Any]], stages: StageSet, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """A row per stage and for both decodes: {stage, rows_in, kept, rejected {reason: n}, errors, seconds}.

    `ingest` counts sources, the others clips. A clip leaves the funnel at the stage whose column made the loosest tier
    reject it, provided that every tier does.
    """
    bad = Counter(s["reason"] for s in sources if s["status"] != "ok")
    rows: list[dict[str, Any]] = [_row("ingest", len(sources), dict(bad), bad.get("internal_error", 0), seconds)]
    by_stage: dict[str, Counter[str]] = {}
    if clips.num_rows:
        grouped = (
            clips.select(["reject_stage", "reject_reason"])
            .group_by(["reject_stage", "reject_reason"])
            .aggregate([([], "count_all")])
        )
        for row in grouped.to_pylist():
            if row["reject_reason"] is not None:
                by_stage.setdefault(row["reject_stage"], Counter())[row["reject_reason"]] += row["count_all"]
    left = clips.num_rows
    for stage in stages.stages:
        if stage.name == "ingest":
            continue
        rejected = dict(by_stage.get(stage.name, {}))
        column = f"{stage.name}_error"
        errors = int(pc.sum(pc.is_valid(clips[column])).as_py() or 0) if column in clips.column_names else 0
        rows.append(_row(stage.name, left, rejected, errors, seconds))
        left -= sum(rejected.values())
    for name in sorted((n for n in seconds if n.startswith("decode_")), key=_decode_order):
        rows.append(
            {"stage": name, "rows_in": None, "kept": None, "rejected": {}, "errors": 0, "seconds": seconds.get(name, 0.0)}
        )
    return {"stages": rows}


def _decode_order(name: str) -> tuple[bool, bool, str]:
    return name != "decode_shots", name != "decode_scores", name


def _row(stage: str, rows_in: int, rejected: dict[str, int], errors: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    kept = rows_in - sum(rejected.values())
    return {
        "stage": stage,
        "rows_in": rows_in,
        "kept": kept,
        "rejected": rejected,
        "errors": errors,
        "seconds": seconds.get(stage, 0.0),
    }


def print_ledger(ledger: Mapping[str, Any], console: Console) -> None:
    """The ledger as a table on the terminal."""
    table = Table(title="Ledger", title_justify="left", header_style="bold")
    for name, justify in (
        ("stage", "left"),
        ("in", "right"),
        ("kept", "right"),
        ("rejected", "left"),
        ("errors", "right"),
        ("worker time", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in ledger["stages"]:
        rejected = ", ".join(f"{n} {reason}" for reason, n in sorted(row["rejected"].items(), key=lambda kv: -kv[1]))
        counts = ["" if row[k] is None else f"{row[k]:,}" for k in ("rows_in", "kept")]
        table.add_row(row["stage"], *counts, rejected, str(row["errors"] or ""), duration_text(row["seconds"]))
    console.print(table)


def print_tiers(tiers: Tiers, counts: Mapping[str, TierCount], console: Console) -> None:
    """Clips and hours per tier, with the reasons that cost most."""
    table = Table(title="Tiers", title_justify="left", header_style="bold")
    for name, justify in (("tier", "left"), ("clips", "right"), ("images", "right"), ("video", "right"), ("rejected by", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for tier in tiers:
        count = counts[tier]
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(count.rejected.items(), key=lambda kv: -kv[1])[:5])
        table.add_row(tier, f"{count.clips - count.images:,}", f"{count.images:,}", duration_text(count.hours * 3600), reasons)
    console.print(table)


def print_bad_sources(sources: list[dict[str, Any]], console: Console, limit: int = 20) -> None:
    """What became of the files that gave no clips."""
    bad = [s for s in sources if s["status"] != "ok" or s.get("note")]
    if not bad:
        return
    table = Table(title="Files that need a look", title_justify="left", header_style="bold")
    for name in ("file", "status", "reason", "what happened"):
        table.add_column(name, overflow="fold")
    for source in bad[:limit]:
        text = source.get("error") or source.get("note") or ""
        table.add_row(str(source["uri"]).rsplit("/", 1)[-1], source["status"], source.get("reason") or "", text)
    if len(bad) > limit:
        table.add_row(f"and {len(bad) - limit} more", "", "", "see sources.parquet")
    console.print(table)
