"""Totals in words and rows: the verdict sentence, the ledger and the sources as the template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAX_SOURCES = 1_000
SOURCE_COLUMNS = ("source_id", "uri", "kind", "status", "reason", "error", "duration_s", "bytes", "n_clips")
STATUSES = ("quarantined", "duplicate", "ok")
"""In the order in which a reader wants them: what went wrong first."""


def number(value: float | int | None) -> str:
    """Three significant digits, thousands separated; whole numbers in full; a dash for what is not known."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def percent(part: float, whole: float) -> str:
    """A share for reading: never "0 %" for something, never "100 %" for less than all."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.0f} %" if share >= 10 or share == 0 else f"{share:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds in the unit a person would say."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if not seconds:
        return "0 s"
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{number(round(seconds / 3600, 1))} h"


def counted(count: int, one: str, many: str | None = None) -> str:
    """``1 clip``, ``2 clips``, ``no clips``."""
    word = one if count == 1 else many or one + "s"
    return f"{count:,} {word}" if count else f"no {word}"


def exact(value: Any) -> str:
    """A threshold as it was configured: never rounded, or the page would contradict the verdicts."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return " or ".join(exact(one) for one in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def totals(clips: pa.Table, sources: pa.Table) -> dict[str, Any]:
    """Counts over all rows. Seconds are of video clips: a still image has no length."""
    kinds = value_counts(clips, "kind")
    seconds = 0.0
    if "duration_s" in clips.column_names and clips.num_rows:
        length = clips.column("duration_s").cast(pa.float64()).to_numpy()
        seconds = float(np.nansum(np.where(np.isfinite(length), length, np.nan)))
    reasons = value_counts(clips, "reject_reason")
    return {
        "sources": sources.num_rows,
        "statuses": value_counts(sources, "status"),
        "clips": clips.num_rows,
        "images": kinds.get("image", 0),
        "videos": clips.num_rows - kinds.get("image", 0),
        "seconds": seconds,
        "hours": seconds / 3600,
        "kept": clips.num_rows - sum(reasons.values()),
        "reasons": reasons,
    }


def value_counts(table: pa.Table, name: str) -> dict[str, int]:
    """How often each non-null value of a text column occurs, the most frequent first."""
    if name not in table.column_names or not table.num_rows:
        return {}
    counted_values = pc.value_counts(table.column(name).cast(pa.string()).drop_null()).to_pylist()
    pairs = [(row["values"], int(row["counts"])) for row in counted_values]
    return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def verdict(total: Mapping[str, Any], tiers: Sequence[Mapping[str, Any]]) -> str:
    """The run in one sentence of plain English."""
    clips = counted(total["clips"], "clip")
    size = []
    if total["images"]:
        size += [counted(total["videos"], "video"), counted(total["images"], "image")]
    if total["seconds"]:
        size.append(duration(total["seconds"]))
    if not total["sources"] and not total["clips"]:
        return "The run found no sources."
    sentence = f"{counted(total['sources'], 'source').capitalize()} gave {clips}"
    sentence += f" ({', '.join(size)})" if size and total["clips"] else ""
    reached = [(tier["name"], int(tier.get("clips") or 0)) for tier in tiers]
    if total["clips"] and reached and not any(count for _, count in reached):
        worst = next(iter(total["reasons"].items()), None)
        sentence += "; none reaches a tier" + (f", most often because of {worst[0]} ({worst[1]:,})" if worst else "")
    elif total["clips"] and reached:
        words = [f"{count:,} tier {name}" for name, count in reached]
        words[0] = words[0].replace(" tier", " reaches tier" if reached[0][1] == 1 else " reach tier", 1)
        sentence += "; " + ", ".join(words)
    quarantined = total["statuses"].get("quarantined", 0)
    if quarantined:
        sentence += f"; {counted(quarantined, 'file')} {'was' if quarantined == 1 else 'were'} quarantined"
    return sentence + "."


def tone(total: Mapping[str, Any]) -> str:
    """``bad`` when nothing usable came out (a run that "completes" with no clips has failed), else ``good``."""
    return "good" if total["clips"] and total["kept"] else "bad"


def ledger_rows(ledger: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages with their share of the measured time (stages overlap, so the wall clock is no measure of them)."""
    stages = list(ledger.get("stages") or ())
    spent = sum(float(stage.get("seconds") or 0.0) for stage in stages)
    rows = []
    for stage in stages:
        rejected = {str(name): int(count) for name, count in (stage.get("rejected") or {}).items()}
        seconds = float(stage.get("seconds") or 0.0)
        rows.append(
            {
                "stage": stage["stage"],
                "rows_in": stage.get("rows_in"),
                "kept": stage.get("kept"),
                "rejected": dict(sorted(rejected.items(), key=lambda pair: -pair[1])),
                "errors": int(stage.get("errors") or 0),
                "seconds": seconds,
                "share": 100 * seconds / spent if spent else 0.0,
            }
        )
    return rows


def source_rows(sources: pa.Table, limit: int = MAX_SOURCES) -> list[dict[str, Any]]:
    """Rows of the source table: quarantined first, then duplicates, then by address; at most ``limit``."""
    rows: list[dict[str, Any]] = []
    if not sources.num_rows:
        return rows
    status = sources.column("status").cast(pa.string())
    known = pc.index_in(status, value_set=pa.array(STATUSES)).fill_null(len(STATUSES))
    keyed = pa.table({"rank": known, "uri": sources.column("uri").cast(pa.string())})
    order = pc.sort_indices(keyed, sort_keys=[("rank", "ascending"), ("uri", "ascending")])
    for row in sources.take(order.slice(0, limit)).to_pylist():
        folder, slash, name = (row.get("uri") or "").rpartition("/")
        rows.append({**dict.fromkeys(SOURCE_COLUMNS), **row, "folder": folder + slash, "file": name})
    return rows
