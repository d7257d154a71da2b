"""Balancing a tier over action labels and sources (Waver §3.4, §3.5).

    clips/ (Parquet) -> group by labels and source, count (Ray Data) -> one weight per group -> rows of tiers/<tier>
What comes into this process is one row per group, not per clip. Oversampling is capped; what it cannot mend becomes a
table of requests for the generator: prompts, and where there is one an image to start from (Waver §4.4, step 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.serial import Executor
from curation.stage import StageSet
from waver_core.manifest import read_index, write_table
from waver_core.storage import join
from waver_core.taxonomy import Taxonomy

KEYS = ("label_1", "label_2", "label_3", "dataset")
NONE = "none"
SUBJECT_FIRST = ("Animals", "Vehicles, Objects and Nature")
"""First-level classes whose labels name who or what acts."""
REQUEST_SCHEMA = pa.schema(
    [
        ("tier", pa.string()),
        ("label_1", pa.string()),
        ("label_2", pa.string()),
        ("label_3", pa.string()),
        ("clips_wanted", pa.int64()),
        ("share", pa.float64()),
        ("prompt", pa.string()),
        ("seed_clip_id", pa.string()),
        ("seed_uri", pa.string()),
        ("seed_time_s", pa.float64()),
    ]
)


class Rules(Protocol):
    """The options of the stage `balance` that the weights depend on."""

    label_power: float
    source_power: float
    cap: float


@dataclass(frozen=True)
class Balance:
    """Counts of every group (a row each, with the columns of `KEYS`), and per balanced tier a weight for each."""

    groups: pa.Table
    weights: dict[str, np.ndarray]
    requests: pa.Table = field(default_factory=REQUEST_SCHEMA.empty_table)
    """What is asked of the generator, the most lacking classes first."""

    def weight_of(self, tier: str, clips: pa.Table) -> pa.Array:
        """float64 [N]: a tier's weight for each clip; 1 where the tier is not balanced."""
        if tier not in self.weights:
            return pa.array(np.ones(len(clips)))
        at = pc.index_in(_joined(clips), _joined(self.groups)).combine_chunks()
        return pa.array(self.weights[tier]).take(at)


def balance_tiers(output: str, clips: pa.Table, tiers: list[str], stages: StageSet, execute: Executor) -> Balance | None:
    """Weigh the tiers that the stage `balance` names and write `synthetic_requests.parquet`; None without that stage."""
    if "balance" not in {s.name for s in stages.stages} or not len(clips):
        return None
    options = stages.named("balance").options
    folder = join(output, "clips")
    uris = [join(folder, name) for name in read_index(folder)["shards"]]
    groups = execute.count(uris, KEYS, {tier: f"reason_{tier}" for tier in tiers}).sort_by([(k, "ascending") for k in KEYS])
    chosen = list(options.tiers)
    balance = Balance(groups, {tier: group_weights(groups, groups[tier].to_numpy(), options) for tier in chosen})
    taxonomy = stages.named("label").taxonomy
    rows = [row for tier in chosen for row in _requests(tier, balance, clips, options, taxonomy)]
    rows.sort(key=lambda r: (r["share"], r["tier"], r["label_2"]))
    requests = pa.Table.from_pylist(rows[: options.max_requests], schema=REQUEST_SCHEMA)
    write_table(join(output, "synthetic_requests.parquet"), requests)
    return replace(balance, requests=requests)


def group_weights(groups: pa.Table, count: np.ndarray, rules: Rules) -> np.ndarray:
    """Weight [G] of each group's rows; the mean over all rows is 1, and every weight lies within [1/cap, cap].

    The factor of a class is (mean size of its siblings / its size)^power, level by level; that of a source likewise.
    Rows without a label are a class of its own at the first level that is never lifted.
    """
    names = [np.asarray(groups[k].to_pylist(), object) for k in KEYS]
    product = np.ones(len(count))
    for depth in range(3):
        parents = ["\0".join(p) for p in zip(*names[:depth], strict=True)] if depth else [""] * len(count)
        factors = _factors(np.array(parents, object), names[depth], count, rules.label_power)
        product *= np.where(names[depth] == NONE, np.minimum(factors, 1.0), factors)
    product *= _factors(np.array([""] * len(count), object), names[3], count, rules.source_power)
    return _normalised(product, count, rules.cap)


def _factors(parent: np.ndarray, child: np.ndarray, count: np.ndarray, power: float) -> np.ndarray:
    """(mean size of the siblings / own size)^power per group; 1 for classes without rows."""
    _, parent_at = np.unique(parent, return_inverse=True)
    _, child_at = np.unique(np.array([f"{a}\0{b}" for a, b in zip(parent, child, strict=True)], object), return_inverse=True)
    size = np.bincount(child_at, count).astype(float)
    owner = np.zeros(len(size), int)
    owner[child_at] = parent_at
    filled = size > 0
    siblings = np.bincount(owner[filled], minlength=parent_at.max() + 1 if len(parent_at) else 0)
    total = np.bincount(owner, size, minlength=len(siblings))
    mean = np.divide(total, siblings, out=np.zeros_like(total), where=siblings > 0)
    factor = np.ones(len(size))
    factor[filled] = (mean[owner[filled]] / size[filled]) ** power
    return factor[child_at]


def _normalised(product: np.ndarray, count: np.ndarray, cap: float) -> np.ndarray:
    """Scale by the one factor that brings the mean over rows to 1 once weights are clipped to [1/cap, cap]."""
    total = count.sum()
    if not total:
        return np.ones(len(product))
    low, high = 1e-12, 1e12
    for _ in range(200):  # the mean grows with the factor, so halving the interval (in logarithms) finds it
        middle = float(np.sqrt(low * high))
        mean = (np.clip(product * middle, 1 / cap, cap) * count).sum() / total
        low, high = (middle, high) if mean < 1 else (low, middle)
    return np.clip(product * float(np.sqrt(low * high)), 1 / cap, cap)


def _requests(tier: str, balance: Balance, clips: pa.Table, options: Any, taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """Rows of the request table for the second-level classes that stay too rare in a tier whatever their weights."""
    groups, weights = balance.groups, balance.weights[tier]
    drawn = groups[tier].to_numpy() * weights
    total = float(drawn.sum())
    if not total:
        return []
    kept = clips.filter(pc.is_null(clips[f"reason_{tier}"]))
    at_level: dict[str, float] = {}
    held: dict[str, int] = {}
    for two, three, rows, often in zip(*(groups[c].to_pylist() for c in ("label_2", "label_3", tier)), drawn, strict=True):
        at_level[two] = at_level.get(two, 0.0) + float(often)
        held[three] = held.get(three, 0) + rows
    requests = []
    for first, classes in taxonomy.tree.items():
        for second, labels in classes.items():
            have = at_level.get(second, 0.0)
            if have / total >= options.min_share:
                continue
            wanted = int(np.ceil(options.min_share * total - have))
            # The labels that the tier has least of, in the taxonomy's order among equals.
            rarest = sorted(labels, key=lambda name: held.get(name, 0))[: min(options.prompts_per_class, wanted)]
            for i, label in enumerate(rarest):
                place = {"tier": tier, "label_1": first, "label_2": second, "label_3": label}
                each = wanted // len(rarest) + (i < wanted % len(rarest))
                requests.append({**place, "clips_wanted": each, "share": have / total, **_prompt(kept, place)})
    return requests


def _prompt(kept: pa.Table, place: dict[str, str]) -> dict[str, Any]:
    """A prompt, and a picture to start from: the first frame of the best looking clip of the tier with this label, whose
    caption is then the prompt, or else of its second-level class. Neither is there for what the tier lacks altogether."""
    best = _best(kept, "label_3", place["label_3"])
    prompt = best["caption"] if best else _sentence(place)
    best = best or _best(kept, "label_2", place["label_2"])
    seed = {"seed_clip_id": best["clip_id"], "seed_uri": best["source_uri"], "seed_time_s": best["start_s"]} if best else {}
    return {"prompt": prompt, **seed}


def _best(kept: pa.Table, column: str, label: str) -> dict[str, Any] | None:
    same = kept.filter(pc.equal(kept[column], label))
    if not len(same):
        return None
    order = pc.sort_indices(same, [("aesthetic_score", "descending"), ("clip_id", "ascending")])
    row: dict[str, Any] = same.take(order[:1]).to_pylist()[0]
    return row


def _sentence(place: dict[str, str]) -> str:
    """A label as a prompt. Those of people begin with the verb and want a subject; "dog fetching a stick" has its own."""
    label = place["label_3"]
    return f"{label[0].upper()}{label[1:]}." if place["label_1"] in SUBJECT_FIRST else f"A person {label}."


def _joined(table: pa.Table) -> pa.ChunkedArray:
    """One string per row out of its group's keys."""
    parts = [pc.fill_null(table[k], NONE) for k in KEYS]
    return pc.binary_join_element_wise(*parts, "\x1f")
