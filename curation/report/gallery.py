"""Which clips the gallery shows, and what the page is told about each.

The sample is stratified over *why* a clip went where it went: every combination of per-tier reasons is represented
before any combination gets more than its share, so a rare gate is not lost under a common one.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.report import words
from curation.report.charts import field_facts, is_number, is_text
from curation.report.issues import ISSUE_COLUMNS
from curation.report.tiers import gate_text, parent_index

MAX_TEXT = 2_000
MAX_LIST = 24
HIDDEN = {"thumbnail_frames", "reject_reason", "reject_stage", "clip_id", "source_uri", "kind", *words.HIDDEN}
"""Columns that the page shows in their own place, or not at all."""


def sample_rows(clips: pa.Table, tiers: Sequence[Mapping[str, Any]], limit: int) -> tuple[np.ndarray, int]:
    """Indices of the clips to show (in table order) and the number of strata.

    Within a stratum the smallest clip ids win. Clip ids are uuid5 values, hence a uniform draw, and one that does
    not depend on the order in which the rows arrived.
    """
    rows = clips.num_rows
    if rows <= limit or limit <= 0:
        return np.arange(min(rows, max(limit, 0))), 1
    names = ["reject_reason", *(f"reason_{tier['name']}" for tier in tiers)]
    stratum = np.zeros(rows, dtype=np.int64)
    width = 1
    for name in names:
        if name not in clips.column_names:
            continue
        encoded = clips.column(name).cast(pa.string()).combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        codes = np.asarray(encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False))
        size = len(encoded.dictionary) + 1
        if width > 2**62 // size:  # the combined code would overflow: renumber what occurs
            found, stratum = np.unique(stratum, return_inverse=True)
            width = len(found)
        stratum = stratum * size + codes
        width *= size
    _, stratum = np.unique(stratum, return_inverse=True)
    order = np.argsort(stratum, kind="stable")
    sizes = np.bincount(stratum)
    ends = np.cumsum(sizes)
    ids = pa.table({"id": clips.column("clip_id").cast(pa.large_string()).combine_chunks()})
    chosen = []
    for take, size, end in zip(fair_shares(sizes, limit), sizes, ends, strict=True):
        if not take:
            continue
        members = order[end - size : end]
        best = pc.select_k_unstable(ids.take(pa.array(members)), k=int(take), sort_keys=[("id", "ascending")])
        chosen.append(members[best.to_numpy().astype(np.int64)])
    return np.sort(np.concatenate(chosen)), len(sizes)


def fair_shares(sizes: np.ndarray, limit: int) -> np.ndarray:
    """Split ``limit`` places over strata: the same for each, what a small one leaves over goes to the larger."""
    shares = np.zeros_like(sizes)
    left = limit
    for done, index in enumerate(np.argsort(sizes, kind="stable")):
        # Rounding down leaves the odd places to the end of the order: the largest strata.
        shares[index] = min(int(sizes[index]), left // (len(sizes) - done))
        left -= int(shares[index])
    return shares


def gallery_payload(
    clips: pa.Table,
    tiers: Sequence[Mapping[str, Any]],
    stages: Sequence[str],
    limit: int,
) -> dict[str, Any]:
    """What the page's script needs: the tiers with their gates, the columns, and a row for each sampled clip."""
    rows, strata = sample_rows(clips, tiers, limit)
    table = clips.take(pa.array(rows, pa.int64()))
    columns = shown_columns(table, tiers, stages)
    data = {name: table.column(name).to_pylist() for name in table.column_names if is_showable(table.field(name))}
    empty: list[Any] = [None] * table.num_rows

    def column(name: str) -> list[Any]:
        values: list[Any] = data.get(name, empty)
        return values

    verdicts = [column(f"reason_{tier['name']}") for tier in tiers]
    written = words.clip_words(table)
    cards = []
    for index, clip_id in enumerate(column("clip_id")):
        cards.append(
            {
                "id": clip_id,
                "uri": column("source_uri")[index] or "",
                "source": column("source_id")[index] or "",
                "kind": column("kind")[index] or "",
                "start": plain(column("start_s")[index]),
                "end": plain(column("end_s")[index]),
                "width": plain(column("display_width_px")[index]),
                "height": plain(column("display_height_px")[index]),
                "reason": column("reject_reason")[index],
                "stage": column("reject_stage")[index],
                "verdicts": [reasons[index] for reasons in verdicts],
                "frames": max(1, int(column("thumbnail_frames")[index] or 1)),
                "values": [plain(data[facts["name"]][index]) for facts in columns],
                "words": written[index],
            }
        )
    return {
        "tiers": [{"name": tier["name"], "parent": parent_index(tiers, tier), "gates": gate_facts(tier)} for tier in tiers],
        "columns": columns,
        "clips": cards,
        "total": clips.num_rows,
        "strata": strata,
    }


def gate_facts(tier: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By gate: the column it reads and its condition in words."""
    gates = tier.get("gates") or ()
    return {gate["name"]: {"column": gate.get("column"), "text": gate_text(gate)} for gate in gates}


def shown_columns(table: pa.Table, tiers: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> list[dict[str, Any]]:
    """Facts of the columns in the detail panel, by stage; ``short`` drops the stage's name from the column's."""
    hidden = HIDDEN | {f"reason_{tier['name']}" for tier in tiers}
    columns = []
    for field in table.schema:
        if field.name in hidden or not is_showable(field):
            continue
        facts = field_facts(field)
        stem = field.name.removeprefix(f"{facts['stage']}_") if facts["stage"] else field.name
        if 0 < len(facts["unit"]) <= 4:  # an abbreviation such as px: the page writes it behind the value
            stem = stem.removesuffix(f"_{facts['unit']}")
        number = is_number(field.type)
        error = field.name.endswith("_error") and is_text(field.type)
        short = (field.name if stem == "score" else stem).replace("_", " ")
        issue = ISSUE_COLUMNS.get(field.name) if number else None
        columns.append({**facts, "short": short, "number": number, "error": error, "issue": issue})
    rank = {stage: position for position, stage in enumerate(stages)}
    return sorted(columns, key=lambda facts: rank.get(facts["stage"], len(rank)))


def is_showable(field: pa.Field) -> bool:
    """Scalars and lists are shown; raw bytes, structs and fixed-size vectors (embeddings) are not for reading."""
    kind = field.type
    return not (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_struct(kind)
        or pa.types.is_map(kind)
    )


def plain(value: Any) -> Any:
    """A JSON value: NaN and infinity become null, long texts and lists are cut, everything else becomes text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, list):
        more = f" … {len(value) - MAX_LIST} more" if len(value) > MAX_LIST else ""
        return plain(", ".join(str(plain(item)) for item in value[:MAX_LIST]) + more)
    text = str(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def thumbnails(payload: Mapping[str, Any], thumbnail: Callable[[str], bytes | None]) -> list[dict[str, Any] | None]:
    """Filmstrips of the sampled clips: base64 JPEG and the shape (width / height) of one frame."""
    strips: list[dict[str, Any] | None] = []
    for clip in payload["clips"]:
        jpeg = thumbnail(clip["id"])
        if not jpeg:
            strips.append(None)
            continue
        width, height = jpeg_size(jpeg) or (16 * clip["frames"], 9)
        shape = width / clip["frames"] / height
        strips.append({"jpeg": base64.b64encode(jpeg).decode("ascii"), "shape": round(shape, 4)})
    return strips


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from a JPEG's start-of-frame segment, or None. Saves decoding hundreds of images."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            return (width, height) if width and height else None
        at += 2 + length
    return None
