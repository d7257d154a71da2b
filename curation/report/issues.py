"""The quality model's issues (Waver §3.2, Fig. 9a): how many of the clips it saw have each, and how many have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curation.report.charts import kept_by_any_tier
from waver_core.backends.contracts import ISSUES

LIKELY = 0.5
"""From this probability on a clip counts as having the issue; the page's scripts are told."""
ISSUE_COLUMNS = {f"quality_{issue}": issue for issue in ISSUES}
HIGH_QUALITY = "quality_high"


def issue_words(issue: str) -> str:
    """``dark_or_blurry`` as one reads it."""
    return issue.replace("_", " ")


def issue_summary(clips: pa.Table, tiers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Counts for the chart of issues, the most frequent first; None where no clip was judged.

    A clip can have several issues, so the counts do not add up to the clips. Each is split into clips that some tier
    keeps and clips that none does. `tier` is the first tier that asks for the issue to be absent.
    """
    present = [column for column in ISSUE_COLUMNS if column in clips.column_names]
    kept = kept_by_any_tier(clips)
    judged = np.zeros(clips.num_rows, dtype=bool)
    faulty = np.zeros(clips.num_rows, dtype=bool)
    rows: list[dict[str, Any]] = []
    for column in present:
        values = probabilities(clips, column)
        likely = values >= LIKELY  # a null is NaN here, and no NaN is
        judged |= np.isfinite(values)
        faulty |= likely
        asked = (i for i, tier in enumerate(tiers) if any(gate.get("column") == column for gate in tier["gates"]))
        issue = ISSUE_COLUMNS[column]
        rows.append({"issue": issue, "words": issue_words(issue), "tier": next(asked, None), **split(likely, kept)})
    if not judged.any():
        return None
    rows.sort(key=lambda row: -row["count"])  # stable: ties keep the order of the report
    clean = split(judged & ~faulty, kept)
    high = probabilities(clips, HIGH_QUALITY) >= LIKELY if HIGH_QUALITY in clips.column_names else None
    return {
        "judged": int(judged.sum()),
        "clips": clips.num_rows,
        "clean": clean,
        "high": None if high is None else int(high.sum()),
        "rows": rows,
        "largest": max([clean["count"], *(row["count"] for row in rows)]) or 1,
        "likely": LIKELY,
    }


def probabilities(clips: pa.Table, column: str) -> np.ndarray:
    """float64 [N] of a column; null becomes NaN."""
    return np.asarray(clips[column].cast(pa.float64()).to_numpy(), dtype=np.float64)


def split(mask: np.ndarray, kept: np.ndarray) -> dict[str, int]:
    """How many rows of a mask some tier keeps (``kept``) and how many none does (``cut``)."""
    count, good = int(mask.sum()), int((mask & kept).sum())
    return {"count": count, "kept": good, "cut": count - good}
