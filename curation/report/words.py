"""What has been written about each clip of the gallery: caption, sub-actions, labels, training caption.

The page shows these in their own place and not among the scores. A key without a value is left out: 400 captions weigh
enough as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from curation.report.actions import LEVELS

HIDDEN = (
    "caption",
    "caption_short",
    "caption_actions",
    "caption_camera",
    "caption_style",
    "caption_spatial",
    *LEVELS,
    "training_caption",
)
"""Columns that the panel shows in words, and nowhere else."""
REVIEWS = ("review",)
MAX_CAPTION = 4_000
MAX_ITEMS = 40
"""Sub-actions, and spatial sentences, of one clip."""


def clip_words(table: pa.Table) -> list[dict[str, Any]]:
    """One dictionary per row; see `row_words`."""
    present = [name for name in (*HIDDEN, *REVIEWS) if name in table.column_names]
    return [row_words(row) for row in table.select(present).to_pylist()]


def row_words(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of one clip: caption, short, actions [text, start_s, end_s], camera, style, spatial, labels, training, review.

    `training` is the training caption in three parts, before the caption, the caption, and behind it (Waver §4.5 puts tags
    there); its middle is null where it is the caption itself, and the whole stands in it where it cannot be told apart.
    """
    caption = row.get("caption")
    labels = [row.get(level) for level in LEVELS]
    found = {
        "caption": cut(caption),
        "short": cut(row.get("caption_short")),
        "actions": actions(row.get("caption_actions")),
        "camera": cut(row.get("caption_camera")),
        "style": cut(row.get("caption_style")),
        "spatial": [cut(text) for text in (row.get("caption_spatial") or [])[:MAX_ITEMS] if text],
        "labels": [cut(label) for label in labels if label] if labels[0] else None,
        "training": training(row.get("training_caption"), caption),
        "review": next((row[name] for name in REVIEWS if row.get(name)), None),
    }
    return {key: value for key, value in found.items() if value}


def actions(found: Any) -> list[list[Any]]:
    """Sub-actions as [text, start, end]; times that are no numbers become null."""
    shown = (found or [])[:MAX_ITEMS]
    return [[cut(one.get("text")) or "", second(one.get("start_s")), second(one.get("end_s"))] for one in shown]


def second(value: Any) -> float | None:
    """A time to the millisecond, or None."""
    return round(float(value), 3) if isinstance(value, (int, float)) and math.isfinite(value) else None


def training(text: str | None, caption: str | None) -> list[str | None] | None:
    """A training caption in three parts: see `row_words`."""
    if not text:
        return None
    before, found, after = text.partition(caption) if caption else ("", "", "")
    return [cut(before), None, cut(after)] if found else ["", cut(text), ""]


def cut(text: Any) -> Any:
    """A text of sensible length."""
    return text if not isinstance(text, str) or len(text) <= MAX_CAPTION else text[:MAX_CAPTION] + "…"
