"""The slot for what people have looked at: generated video (Waver §4.4), and real clips picked by hand (§3.5, SFT).

An opinion counts once two annotators agree on it and none objects.
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from waver_core.errors import UserError
from waver_core.storage import read_bytes

SYNTHETIC = "synthetic"
"""The `style` by which the input list marks generated videos."""
_COLUMNS = {"clip_id": pa.string(), "reviewer": pa.string(), "approved": pa.bool_()}
_REVIEWERS = 2


def review_states(clips: pa.Table, reviews_uri: str | None) -> pa.Array:
    """Per clip a word.

    A real clip is `real`, `picked` (approved by two) or `rejected` (by anyone); a generated one, which the input list marks
    by its style, is `approved`, `rejected` or `pending` (too few opinions).

    reviews_uri: Parquet with a row per opinion: clip_id, reviewer, approved; further columns, such as a reason, are free.
    A row with a null among the three is no opinion.
    Raises `UserError` when it cannot be read or lacks a column.
    """
    synthetic = pc.fill_null(pc.equal(clips["style"], SYNTHETIC), False)
    approved, rejected = _verdicts(reviews_uri) if reviews_uri else (set(), set())
    ids = clips["clip_id"]
    good = pc.is_in(ids, pa.array(sorted(approved), pa.string()))
    state = pc.if_else(synthetic, pc.if_else(good, "approved", "pending"), pc.if_else(good, "picked", "real"))
    result = pc.if_else(pc.is_in(ids, pa.array(sorted(rejected), pa.string())), "rejected", state)
    return result.combine_chunks() if isinstance(result, pa.ChunkedArray) else result


def _verdicts(uri: str) -> tuple[set[str], set[str]]:
    try:
        table = pq.read_table(io.BytesIO(read_bytes(uri)))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"funnel.stages.ingest.reviews: {uri} cannot be read as Parquet: {error}") from error
    if any(pa.types.is_string(table.schema.field(n).type) for n in ("approved",) if n in table.column_names):
        raise UserError(f"funnel.stages.ingest.reviews: approved in {uri} is text; it must be true or false")
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"funnel.stages.ingest.reviews: {uri} lacks {', '.join(missing)}; it needs {', '.join(_COLUMNS)}")
    try:
        opinions = table.select(list(_COLUMNS)).cast(pa.schema(list(_COLUMNS.items()))).drop_null()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        kinds = ", ".join(f"{name} ({kind})" for name, kind in _COLUMNS.items())
        raise UserError(f"funnel.stages.ingest.reviews: {uri} must hold {kinds}: {error}") from error
    reviewers: dict[str, set[str]] = {}
    rejected: set[str] = set()
    for row in opinions.to_pylist():
        if not row["approved"]:
            rejected.add(row["clip_id"])
        else:
            reviewers.setdefault(row["clip_id"], set()).add(row["reviewer"])
    return {clip for clip, who in reviewers.items() if len(who) >= _REVIEWERS} - rejected, rejected
