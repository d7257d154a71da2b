"""Action labels (Waver §3.4, Fig. 9b): their distribution per tier, before and after balancing, and what is to be generated.

The page's script draws one *view* at a time: all clips, or those of one tier. Every node of the tree carries its counts in
all views (``n``), and where the view's tier is balanced how often its clips are drawn (``w``, the sum of their weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LEVELS = ("label_1", "label_2", "label_3")
NONE = "none"
MAX_THIRD = 8
"""Third-level labels shown under each second-level one; the others are summed up."""
MAX_DATASETS = 12
MAX_REQUESTS = 12

Counts = np.ndarray
"""float64 [2 V]: clips in each view, then weighted clips in each."""


class Weighted(Protocol):
    """What the report needs of `curation.balance.Balance`, which imports stages and is not imported here."""

    @property
    def groups(self) -> pa.Table:
        """A row per group: label_1 to label_3, dataset, and per tier the number of clips."""

    @property
    def weights(self) -> Mapping[str, np.ndarray]:
        """Balanced tier -> weight [G] of each group's clips."""


def label_summary(clips: pa.Table, tiers: Sequence[Mapping[str, Any]], balance: Weighted | None) -> dict[str, Any] | None:
    """Views and the tree of labels for the page; None where no clip has a label."""
    if any(level not in clips.column_names for level in LEVELS) or not clips.num_rows:
        return None
    names = [str(tier["name"]) for tier in tiers]
    counts = label_counts(clips, names)
    labelled = {path: n for path, n in counts.items() if path[0] is not None}
    if not labelled:
        return None
    drawn = drawn_counts(balance, names, LEVELS)
    rows = {path: np.concatenate([n, drawn.get(path, np.zeros(len(n)))]) for path, n in labelled.items()}
    weighted = [False, *(balance is not None and name in balance.weights for name in names)]
    unlabelled = sum((n for path, n in counts.items() if path[0] is None), np.zeros(1 + len(names)))
    total = sum(rows.values(), np.zeros(2 * len(weighted)))
    apart = sum((row for path, row in rows.items() if path[0] == NONE), np.zeros(2 * len(weighted)))
    with_action = {path: row for path, row in rows.items() if path[0] != NONE}
    return {
        "views": [{"name": name, "tier": i - 1, "weighted": weighted[i]} for i, name in enumerate(["All clips", *names])],
        "total": node("", total),
        "none": node(NONE, apart),
        "unlabelled": [int(n) for n in unlabelled],
        "classes": tree(with_action, len(LEVELS)),
        "datasets": dataset_rows(balance, names),
    }


def label_counts(clips: pa.Table, tiers: Sequence[str]) -> dict[tuple[Any, ...], Counts]:
    """Path of labels -> clips [V] in all and in each tier; the table is grouped once, whatever its length."""
    masks = {"n": pa.array(np.ones(clips.num_rows, np.int64))}
    masks |= {f"n{i}": pc.is_null(clips[f"reason_{tier}"]).cast(pa.int64()) for i, tier in enumerate(tiers)}
    labels = {level: clips[level].cast(pa.string()) for level in LEVELS}
    grouped = pa.table({**labels, **masks}).group_by(list(LEVELS)).aggregate([(name, "sum") for name in masks])
    numbers = np.stack([grouped[f"{name}_sum"].to_numpy() for name in masks], axis=1).astype(float)
    return {path: numbers[i] for i, path in enumerate(zip(*(grouped[level].to_pylist() for level in LEVELS), strict=True))}


def drawn_counts(balance: Weighted | None, tiers: Sequence[str], keys: Sequence[str]) -> dict[tuple[Any, ...], Counts]:
    """Path -> weighted clips [V] of each view; 0 in views that are not balanced."""
    out: dict[tuple[Any, ...], Counts] = {}
    if balance is None:
        return out
    paths = list(zip(*(pc.fill_null(balance.groups[key], NONE).to_pylist() for key in keys), strict=True))
    for view, tier in enumerate(tiers, start=1):
        if tier in balance.weights:
            often = balance.groups[tier].to_numpy() * balance.weights[tier]
            for path, value in zip(paths, often.tolist(), strict=True):
                out.setdefault(path, np.zeros(1 + len(tiers)))[view] += value
    return out


def tree(rows: Mapping[tuple[Any, ...], Counts], depth: int) -> list[dict[str, Any]]:
    """Nodes of one level with their children, the most frequent first."""
    below: dict[str, dict[tuple[Any, ...], Counts]] = {}
    for path, row in rows.items():
        below.setdefault(str(path[0]), {})[path[1:]] = row
    nodes = []
    for name, children in below.items():
        own = node(name, sum(children.values(), np.zeros(len(next(iter(children.values()))))))
        nodes.append({**own, "children": tree(children, depth - 1)} if depth > 1 else own)
    nodes.sort(key=lambda one: (-one["n"][0], one["name"]))
    if depth > 1 or len(nodes) <= MAX_THIRD:
        return nodes
    return [*nodes[:MAX_THIRD], {**added(nodes[MAX_THIRD:]), "name": f"{len(nodes) - MAX_THIRD} more labels", "rest": True}]


def node(name: str, row: Counts) -> dict[str, Any]:
    """A node as the page gets it: whole counts, weights to three digits behind the point."""
    views = len(row) // 2
    return {"name": name, "n": [int(n) for n in row[:views]], "w": [round(float(w), 3) for w in row[views:]]}


def added(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over nodes, view by view."""
    return {key: [round(sum(values), 3) for values in zip(*(one[key] for one in nodes), strict=True)] for key in ("n", "w")}


def dataset_rows(balance: Weighted | None, tiers: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """View -> the collections of a balanced tier with clips and weighted clips; left out where there is only one."""
    drawn = drawn_counts(balance, tiers, ("dataset",))
    out: dict[str, list[dict[str, Any]]] = {}
    if balance is None or len(drawn) < 2:
        return out
    names = pc.fill_null(balance.groups["dataset"], NONE).to_pylist()
    for view, tier in enumerate(tiers, start=1):
        if tier not in balance.weights:
            continue
        found: dict[str, int] = {}
        for name, count in zip(names, balance.groups[tier].to_pylist(), strict=True):
            found[name] = found.get(name, 0) + count
        rows: list[dict[str, Any]] = [
            {"name": name, "n": n, "w": round(float(drawn[(name,)][view]), 3)} for name, n in found.items() if n
        ]
        out[str(view)] = sorted(rows, key=lambda row: (-row["n"], row["name"]))[:MAX_DATASETS]
    return out


def request_rows(requests: pa.Table | None, limit: int = MAX_REQUESTS) -> dict[str, Any] | None:
    """The most wanted of the requests for synthetic clips, and their totals; None where there are none.

    Tiers that ask for the same prompt share a row, or a class that is rare everywhere would fill the table.
    """
    if requests is None or not requests.num_rows:
        return None
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for request in requests.to_pylist():
        path = [request[level] for level in LEVELS if request[level]]
        new = {"path": path, "prompt": request["prompt"], "seed": request["seed_uri"], "wanted": 0, "tiers": []}
        row = rows.setdefault((*path, request["prompt"], request["seed_uri"]), new)
        row["wanted"] += request["clips_wanted"]
        row["tiers"].append(request["tier"])
    return {
        "rows": sorted(rows.values(), key=lambda row: -row["wanted"])[:limit],  # stable: ties as the table has them
        "different": len(rows),
        "total": requests.num_rows,
        "wanted": int(pc.sum(requests["clips_wanted"]).as_py() or 0),
        "seeded": requests.num_rows - requests["seed_uri"].null_count,
    }
