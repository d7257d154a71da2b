"""Distributions of the score columns, counted from *all* rows.

A column is read once and binned by array arithmetic, so the cost stays near a second for ten million rows. Each count
is split in two: clips that at least one tier keeps, and clips that none does. A reader then sees where a gate bites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.report.summary import exact

MAX_BINS = 36
MAX_CATEGORIES = 16
QUANTILE_SAMPLE = 500_000
"""Above this many values the quantiles come from an even stride: they place an axis, they decide nothing."""


def field_facts(field: pa.Field) -> dict[str, Any]:
    """The owner, unit, doc line and score flag that the funnel stores with an Arrow field (all may be missing)."""
    raw = field.metadata or {}
    text = {key: raw.get(key.encode(), b"").decode("utf-8", "replace") for key in ("owner", "unit", "doc", "score")}
    return {
        "name": field.name,
        "stage": text["owner"],
        "unit": text["unit"],
        "doc": text["doc"],
        "score": text["score"] == "1",
    }


def is_number(kind: pa.DataType) -> bool:
    """True for what gets a numeric axis; a boolean is a category of two."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def is_text(kind: pa.DataType) -> bool:
    """True for strings of any Arrow flavour, dictionary-encoded ones included."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def score_charts(clips: pa.Table, tiers: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> list[dict[str, Any]]:
    """One chart for each column marked as a score, in the order of the stages that wrote them."""
    kept = kept_by_any_tier(clips)
    charts = []
    for field in clips.schema:
        facts = field_facts(field)
        if not facts["score"]:
            continue
        values = clips.column(field.name)
        marks = thresholds(field.name, tiers)
        if is_number(field.type):
            counted = count_numbers(values, kept, marks)
        elif is_text(field.type) or pa.types.is_boolean(field.type):
            counted = count_categories(values, kept)
        else:
            continue  # vectors and lists have no axis
        charts.append({**facts, "rows": clips.num_rows, "marks": marks, **counted})
    rank = {stage: position for position, stage in enumerate(stages)}
    # A stable sort: within a stage the columns keep the table's order.
    charts.sort(key=lambda chart: (rank.get(chart["stage"], len(rank)), chart["stage"]))
    return [{**chart, "index": index} for index, chart in enumerate(charts)]


def kept_by_any_tier(clips: pa.Table) -> np.ndarray:
    """Boolean mask over the rows: no reject reason means that at least one tier keeps the clip."""
    if "reject_reason" not in clips.column_names:
        return np.ones(clips.num_rows, dtype=bool)
    return np.asarray(pc.is_null(clips.column("reject_reason")).to_numpy(), dtype=bool)


def thresholds(column: str, tiers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bounds that the tiers' gates set on a column; tiers that agree on a bound share one mark."""
    marks: dict[tuple[str, str], dict[str, Any]] = {}
    for index, tier in enumerate(tiers):
        for gate in tier.get("gates") or ():
            if gate.get("column") != column:
                continue
            for key, sign in (("min", "≥"), ("max", "≤"), ("equals", "=")):
                value = gate.get(key)
                if value is None or (isinstance(value, float) and not math.isfinite(value)):
                    continue
                new = {"sign": sign, "value": value, "text": exact(value), "tiers": []}
                mark = marks.setdefault((sign, repr(value)), new)
                if index not in mark["tiers"]:
                    mark["tiers"].append(index)
    return list(marks.values())


def count_numbers(values: pa.ChunkedArray, kept: np.ndarray, marks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bin a numeric column. ``kept + rejected`` sums to the finite values; with ``missing`` it sums to the rows.

    Values far outside the bulk are counted in the outermost bins (``below``, ``above`` say how many), so that a
    handful of extreme clips cannot squeeze all others into one bar. With ``log``, start, step and axis are in powers
    of ten; ``least``, ``most`` and ``median`` stay plain.
    """
    numbers = np.asarray(values.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)  # null becomes NaN
    finite = np.isfinite(numbers)
    found, kept = numbers[finite], kept[finite]
    whole = pa.types.is_integer(values.type)
    result: dict[str, Any] = {"kind": "number", "missing": int(len(numbers) - len(found)), "nulls": values.null_count}
    if not len(found):
        return {**result, "start": 0.0, "step": 1.0, "kept": [], "rejected": [], "below": 0, "above": 0, "log": False}
    sample = found[:: max(1, len(found) // QUANTILE_SAMPLE)]
    low, median, high = (float(q) for q in np.quantile(sample, (0.005, 0.5, 0.995)))
    least, most = float(found.min()), float(found.max())
    # A plain axis would put nearly everything in one bar. Ratios and probabilities stay plain: 0 to 1 has a meaning.
    log = least > 0 and most > 1 and high > 100 * low and median - low < 0.1 * (high - low)
    if log:
        found, whole = np.log10(found), False
        span = bulk(*(math.log10(value) for value in (least, low, high, most)))
    else:
        span = bulk(least, low, high, most)
    start, step, bins = bin_grid(*span, whole=whole, count=len(found))
    # Clip as floats: casting a huge float to an integer is undefined. The nudge keeps 0.3 / 0.1 in the bin of 0.3.
    place = np.clip((found - start) / step + 1e-9, 0, bins - 1).astype(np.int64)
    counts = np.bincount(place + bins * kept, minlength=2 * bins)
    margin = 2 * step if bins == 1 else 0.0  # a lone value gets a bar of its own, not a filled panel
    axis = axis_range(start - margin, start + step * bins + margin, marks, log=log)
    return {
        **result,
        "start": start,
        "step": step,
        "rejected": counts[:bins].tolist(),
        "kept": counts[bins:].tolist(),
        "below": int((found < start).sum()),
        "above": int((found > start + step * bins).sum()),
        "least": least,
        "most": most,
        "median": median,
        "median_is_estimate": len(sample) < len(found),
        "axis": axis,
        "whole": whole,
        "log": log,
    }


def bulk(least: float, low: float, high: float, most: float) -> tuple[float, float]:
    """The range worth drawing: all values, unless the last half per cent on a side lies far from the rest."""
    span = high - low
    if span <= 0:
        return least, most
    return (least if least >= low - span / 2 else low), (most if most <= high + span / 2 else high)


def bin_grid(low: float, high: float, *, whole: bool, count: int) -> tuple[float, float, int]:
    """Start, width and number of bins over ``[low, high]``, with a width of 1, 2 or 5 times a power of ten.

    Whole numbers get whole widths and edges at halves, or neighbouring bars would hold unequal numbers of integers.
    """
    wanted = min(MAX_BINS, max(8, 2 * math.isqrt(count)))
    span = high - low
    if span <= 0:
        width = 1.0 if whole else (10.0 ** math.floor(math.log10(abs(low))) / 10 if low else 0.1)
        return low - width / 2, width, 1
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    if whole:
        width = max(1.0, round(width))
        start = math.floor(low / width) * width - 0.5
        return start, width, max(1, math.ceil((high + 0.5 - start) / width - 1e-9))
    start = math.floor(low / width + 1e-9) * width
    return start, width, max(1, math.ceil((high - start) / width - 1e-9))


def axis_range(low: float, high: float, marks: Sequence[Mapping[str, Any]], *, log: bool = False) -> list[float]:
    """Widen the axis to thresholds near the data. One far away is pinned to the edge by the page instead."""
    span = high - low
    values = [float(mark["value"]) for mark in marks if isinstance(mark["value"], (int, float))]
    if log:
        values = [math.log10(value) for value in values if value > 0]
    near = [value for value in values if low - span / 2 <= value <= high + span / 2]
    return [min([low, *near]), max([high, *near])]


def count_categories(values: pa.ChunkedArray, kept: np.ndarray) -> dict[str, Any]:
    """Count a text or boolean column: the most frequent values first, the rest summed up as one."""
    if not pa.types.is_boolean(values.type):
        values = values.cast(pa.string())
    encoded = values.combine_chunks().dictionary_encode() if len(values) else pa.array([], pa.string())
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    if not len(encoded):
        return {"kind": "category", "missing": 0, "nulls": 0, "labels": [], "kept": [], "rejected": [], "distinct": 0}
    names = [str(name).lower() if isinstance(name, bool) else name for name in encoded.dictionary.to_pylist()]
    present = np.asarray(pc.is_valid(encoded).to_numpy(zero_copy_only=False), dtype=bool)
    codes = np.asarray(encoded.indices.fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)[present]
    size = len(names)
    counts = np.bincount(codes + size * kept[present], minlength=2 * size)
    rejected, accepted = counts[:size], counts[size:]
    order = np.lexsort((np.arange(size), -(rejected + accepted)))
    shown, rest = order[:MAX_CATEGORIES], order[MAX_CATEGORIES:]
    labels = [names[i] for i in shown]
    kept_counts, rejected_counts = accepted[shown].tolist(), rejected[shown].tolist()
    if len(rest):
        labels.append(f"{len(rest)} other values")
        kept_counts.append(int(accepted[rest].sum()))
        rejected_counts.append(int(rejected[rest].sum()))
    return {
        "kind": "category",
        "missing": values.null_count,
        "nulls": values.null_count,
        "labels": labels,
        "kept": kept_counts,
        "rejected": rejected_counts,
        "distinct": size,
        "largest": max((a + b for a, b in zip(kept_counts, rejected_counts, strict=True)), default=0),
    }
