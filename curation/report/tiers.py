"""The tiers as a funnel (Waver Fig. 10): what enters each from the one it is built on, what is lost there, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curation.report.charts import field_facts
from curation.report.issues import ISSUE_COLUMNS, issue_words
from curation.report.summary import exact, value_counts

JUDGE = "judge"
"""Name of the row that stands for all gates of a tier on the quality model's issues: thirteen rows would say one thing."""


def gate_text(gate: Mapping[str, Any]) -> str:
    """A gate's condition as a formula: ``overlay_text_area_ratio ≤ 0.05``."""
    column, low, high = gate.get("column") or "", gate.get("min"), gate.get("max")
    scopes = [f"{gate['kind']} only"] if gate.get("kind") in ("video", "image") else []
    scopes += [f"where {name} = {exact(value)}" for name, value in (gate.get("only") or {}).items()]
    scope = f" ({', '.join(scopes)})" if scopes else ""
    if gate.get("equals") is not None:
        return f"{column} = {exact(gate['equals'])}{scope}"
    if low is not None and high is not None:
        return f"{exact(low)} ≤ {column} ≤ {exact(high)}{scope}"
    if low is not None:
        return f"{column} ≥ {exact(low)}{scope}"
    if high is not None:
        return f"{column} ≤ {exact(high)}{scope}"
    return f"{column}{scope}"


def gate_words(gate: Mapping[str, Any], unit: str = "") -> str:
    """A gate's condition as a sentence: ``motion foreground is between 0.5 and 64 px/step, videos only``.

    unit: The column's unit, written behind the bound and dropped from the end of the column's name.
    """
    subject = (gate.get("column") or "").removesuffix(f"_{unit.split('/')[0]}" if unit else "").replace("_", " ")
    behind = f" per {unit[2:]}" if unit.startswith("1/") else f" {unit}" if unit else ""
    low, high = (None if gate.get(key) is None else exact(gate[key]).removesuffix(".0") for key in ("min", "max"))
    words = subject
    if gate.get("equals") is not None:
        words += f" is {exact(gate['equals'])}"
    elif low is not None and high is not None:
        words += f" is between {low} and {high}{behind}"
    elif low is not None:
        words += f" is at least {low}{behind}"
    elif high is not None:
        words += f" is at most {high}{behind}"
    if gate.get("kind") in ("video", "image"):
        words += f", {gate['kind']}s only"
    for name, value in (gate.get("only") or {}).items():
        words += f", where {name.replace('_', ' ')} is {exact(value)}"
    return words


def parent_index(tiers: Sequence[Mapping[str, Any]], tier: Mapping[str, Any]) -> int | None:
    """Place of the tier that this one is built on, or None."""
    return next((i for i, other in enumerate(tiers) if tier.get("from") and other["name"] == tier["from"]), None)


def tier_rows(tiers: Sequence[Mapping[str, Any]], clips: pa.Table) -> list[dict[str, Any]]:
    """Each tier with what entered it, what it lost to which gate, and its bar's widths in per cent of all clips.

    A tier's gates include those of the tier it is built on, so most of what it rejects was rejected before. Only clips
    that the parent keeps count as lost here. `gained` are clips that the parent rejects and this tier keeps: generated
    video, which the first tiers do not admit.
    """
    facts = {field.name: field_facts(field) for field in clips.schema}
    scale = 100 / max(clips.num_rows, 1)
    rows = []
    for index, tier in enumerate(tiers):
        parent = parent_index(tiers, tier)
        entered, lost, gained = passage(clips, tier["name"], None if parent is None else tiers[parent]["name"])
        kept = int(tier.get("clips") or 0)
        before = {gate["name"]: gate for gate in (() if parent is None else tiers[parent]["gates"])}
        own, inherited = [], []
        for gate in tier["gates"]:
            row = gate_row(gate, facts, lost.get(gate["name"], 0))
            same = before.get(gate["name"])
            if same is not None and gate_text(same) == gate_text(gate) and not row["count"]:
                inherited.append(row)
            else:
                change = "" if parent is None else "new" if same is None else "changed"
                own.append({**row, "change": change})
        known = {gate["name"] for gate in tier["gates"]}
        unknown: dict[str, Any] = {"text": "", "words": "", "doc": "", "issue": None, "change": "", "members": []}
        own += [{**unknown, "name": name, "count": count} for name, count in lost.items() if name not in known]
        cuts = sorted((gate for gate in own if gate["count"]), key=lambda gate: -gate["count"])
        rows.append(
            {
                "index": index,
                "name": tier["name"],
                "parent": None if parent is None else tiers[parent]["name"],
                "kept": kept,
                "entered": entered,
                "gained": gained,
                "images": int(tier.get("images") or 0),
                "hours": float(tier.get("hours") or 0.0),
                "width": kept * scale,
                "cuts": [{**gate, "width": gate["count"] * scale} for gate in cuts],
                "gates": sorted(with_judge(own), key=lambda gate: -gate["count"]),
                "inherited": with_judge(inherited),
            }
        )
    return rows


def passage(clips: pa.Table, tier: str, parent: str | None) -> tuple[int, dict[str, int], int]:
    """How many clips the parent hands on (all without one), how many of them each gate rejects, and how many join here."""
    if parent is None:
        return clips.num_rows, value_counts(clips, f"reason_{tier}"), 0
    open_before = pc.is_null(clips[f"reason_{parent}"])
    entering = clips.select([f"reason_{tier}"]).filter(open_before)
    kept = clips[f"reason_{tier}"].null_count
    return entering.num_rows, value_counts(entering, f"reason_{tier}"), kept - entering[f"reason_{tier}"].null_count


def gate_row(gate: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]], count: int) -> dict[str, Any]:
    """A gate for the table: formula, words, what its column holds, and how many clips it lost."""
    column = facts.get(gate.get("column") or "", {})
    unit = str(column.get("unit") or "")
    # "1 to 10" says what the scale is; behind a bound it would read as part of it.
    words, doc = gate_words(gate, "" if " " in unit else unit), column.get("doc") or ""
    asks = {key for key in ("min", "max", "equals", "only") if gate.get(key) is not None}
    issue = ISSUE_COLUMNS.get(gate.get("column") or "") if asks == {"max"} else None
    if issue:
        scope = f", {gate['kind']}s only" if gate.get("kind") else ""
        words = f"the quality model finds no {issue_words(issue)} (probability at most {exact(gate['max'])}){scope}"
        doc = ""
    return {
        "name": gate["name"],
        "text": gate_text(gate),
        "words": words,
        "doc": doc,
        "count": count,
        "issue": issue and issue_words(issue) + (f" ({gate['kind']}s)" if gate.get("kind") else ""),
        "max": gate.get("max"),
        "members": [],
        "change": "",
    }


def with_judge(gates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the gates on the quality model's issues together in one row, if there are several with the same bound."""
    asked = [gate for gate in gates if gate["issue"]]
    if len(asked) < 2 or len({gate["max"] for gate in asked}) > 1:
        return list(gates)
    bound = exact(asked[0]["max"])
    joined = {
        **asked[0],
        "name": JUDGE,
        "words": f"the quality model finds none of {len(asked)} issues (each with a probability of at most {bound})",
        "text": "; ".join(gate["text"] for gate in asked),
        "doc": "",
        "count": sum(gate["count"] for gate in asked),
        "members": [{**gate, "words": gate["issue"]} for gate in asked],
    }
    others = [gate for gate in gates if not gate["issue"]]
    return [*others, joined]
