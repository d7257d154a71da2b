"""Gates: one rule said three ways (a row, a table, early rejection) must always agree, and null never passes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.gates import TierGate, Tiers, first_failures, pass_mask, passes, rejected_by, tier_gates
from curation.stage import load_stages
from waver_core.config import Gate, load_config

SCHEMA = pa.schema([("kind", pa.string()), ("x", pa.float64()), ("n", pa.int64()), ("flag", pa.bool_()), ("word", pa.string())])
numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-3, 3, width=32))
rows = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["video", "image", None]),
        "x": st.one_of(st.none(), numbers, st.just(math.nan), st.just(math.inf)),
        "n": st.one_of(st.none(), st.integers(-3, 3)),
        "flag": st.sampled_from([True, False, None]),
        "word": st.sampled_from(["a", "b", "", None]),
    }
)
kinds = st.sampled_from([None, "video", "image"])


@st.composite
def gates(draw: st.DrawFn) -> Gate:
    """A valid gate on any of the columns."""
    column = draw(st.sampled_from(["x", "n", "flag", "word"]))
    kind = draw(kinds)
    if column == "flag":
        return Gate(column=column, equals=draw(st.booleans()), kind=kind)
    if column == "word":
        return Gate(column=column, equals=draw(st.sampled_from(["a", "b", "c"])), kind=kind)
    low, high = sorted(draw(st.tuples(numbers, numbers)))
    which = draw(st.sampled_from(["min", "max", "both"]))
    return Gate(column=column, min=low if which != "max" else None, max=high if which != "min" else None, kind=kind)


@st.composite
def some_tiers(draw: st.DrawFn) -> Tiers:
    """One to three tiers of up to four gates each, in the order of the stages that decide them."""
    made: Tiers = {}
    for name in ("low", "middle", "high")[: draw(st.integers(1, 3))]:
        placed = [TierGate(f"g{i}", gate, draw(st.integers(0, 5))) for i, gate in enumerate(draw(st.lists(gates(), max_size=4)))]
        made[name] = sorted(placed, key=lambda g: g.stage)
    return made


def table_of(values: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(values, schema=SCHEMA)


@given(st.lists(rows, min_size=1, max_size=8), gates())
def test_a_row_and_a_table_agree(values: list[dict[str, Any]], gate: Gate) -> None:
    mask = pass_mask(gate, table_of(values))
    assert mask.dtype == bool
    assert mask.tolist() == [passes(gate, row) for row in values]


@given(st.lists(rows, min_size=1, max_size=8), gates(), st.integers(0, 7))
def test_chunked_and_sliced_tables_agree_with_whole_ones(values: list[dict[str, Any]], gate: Gate, at: int) -> None:
    table = table_of(values)
    parts = pa.concat_tables([table.slice(0, at), table.slice(at)])
    assert pass_mask(gate, parts).tolist() == pass_mask(gate, table).tolist()
    batch = table.slice(at % len(values)).to_batches()[0]
    assert pass_mask(gate, batch).tolist() == pass_mask(gate, table).tolist()[at % len(values) :]


@given(rows, gates())
def test_null_and_nan_never_pass_where_the_gate_applies(row: dict[str, Any], gate: Gate) -> None:
    for empty in (None, math.nan) if gate.column == "x" else (None,):
        blank = {**row, gate.column: empty}
        assert passes(gate, blank) == (gate.kind is not None and row["kind"] != gate.kind)
        assert pass_mask(gate, table_of([blank])).tolist() == [passes(gate, blank)]


@given(st.lists(rows, min_size=1, max_size=6), some_tiers(), st.integers(-1, 6))
def test_early_rejection_agrees_with_the_tables_first_failures(values: list[dict[str, Any]], tiers: Tiers, stage: int) -> None:
    early = {tier: [g for g in placed if g.stage <= stage] for tier, placed in tiers.items()}
    failures = first_failures(table_of(values), early)
    for i, row in enumerate(values):
        firsts = {tier: int(failures[tier][i]) for tier in tiers}
        reason = rejected_by(row, tiers, stage)
        if any(first < 0 for first in firsts.values()):
            assert reason is None
        else:
            loosest = next(iter(tiers))
            assert reason == early[loosest][firsts[loosest]].name


@given(st.lists(rows, min_size=1, max_size=6), some_tiers())
def test_first_failures_name_the_first_gate_that_fails(values: list[dict[str, Any]], tiers: Tiers) -> None:
    failures = first_failures(table_of(values), tiers)
    for tier, placed in tiers.items():
        expected = [next((k for k, g in enumerate(placed) if not passes(g.gate, row)), -1) for row in values]
        assert failures[tier].tolist() == expected


@given(rows, some_tiers(), st.integers(-1, 5))
def test_what_is_rejected_stays_rejected_at_every_later_stage(row: dict[str, Any], tiers: Tiers, stage: int) -> None:
    if rejected_by(row, tiers, stage) is not None:
        assert rejected_by(row, tiers, stage + 1) is not None


@pytest.mark.parametrize(
    ("gate", "value", "expected"),
    [
        ({"min": 2.0}, 2.0, True),
        ({"min": 2.0}, 1.999, False),
        ({"max": 2.0}, 2.0, True),
        ({"max": 2.0}, 2.001, False),
        ({"min": 0.0, "max": 0.0}, 0.0, True),
        ({"max": 2.0}, math.inf, False),
        ({"min": 2.0}, math.inf, True),
        ({"max": 2.0}, -math.inf, True),
        ({"max": 2.0}, math.nan, False),
    ],
)
def test_thresholds_are_inclusive(gate: dict[str, float], value: float, expected: bool) -> None:
    made = Gate(column="x", **gate)
    assert passes(made, {"x": value}) is expected
    assert pass_mask(made, table_of([{"x": value}])).tolist() == [expected]


def test_a_missing_column_of_a_row_does_not_pass() -> None:
    assert not passes(Gate(column="x", min=0), {})


def test_a_gate_for_videos_lets_images_through_and_not_what_has_no_kind() -> None:
    gate = Gate(column="x", min=1, kind="video")
    values = [{"kind": k, "x": 0.0} for k in ("video", "image", None)]
    assert pass_mask(gate, table_of(values)).tolist() == [False, True, True]


def test_an_empty_table_has_an_empty_mask() -> None:
    assert pass_mask(Gate(column="x", min=0), SCHEMA.empty_table()).tolist() == []
    assert first_failures(SCHEMA.empty_table(), {"low": [TierGate("g", Gate(column="x", min=0), 1)]})["low"].tolist() == []


def test_gates_of_the_shipped_tiers_stand_in_the_order_of_the_stages() -> None:
    config = load_config()
    stages = load_stages(config)
    names = [s.name for s in stages.stages]
    placed = {g.name: names[g.stage] for g in tier_gates(config, stages)["480p"]}
    assert placed["duration"] == "ingest"
    assert (placed["size"], placed["duplicate"]) == ("technical", "dedup")
    assert (placed["aesthetic"], placed["text"], placed["motion"]) == ("aesthetic", "overlay", "motion")
    loosest = [g.stage for g in tier_gates(config, stages)["192p"]]
    assert loosest == sorted(loosest)


def test_a_stricter_tier_keeps_no_clip_that_its_parent_rejects() -> None:
    config = load_config(profiles=["demo"])
    stages = load_stages(config)
    tiers = tier_gates(config, stages)
    rng = np.random.default_rng(0)
    wide = {"duration_s": 14, "short_side_px": 2200, "fps": 60, "aesthetic_score": 10, "motion_foreground_px": 80}
    columns: dict[str, Any] = {}
    for field in stages.schema:
        if pa.types.is_floating(field.type) or pa.types.is_integer(field.type):
            values = rng.uniform(0, wide.get(field.name, 1), 4000)
            columns[field.name] = pa.array(values, pa.float64(), mask=rng.random(4000) < 0.02)
        elif pa.types.is_boolean(field.type):
            columns[field.name] = pa.array(rng.random(4000) < 0.9)
    columns["kind"] = pa.array(["video", "image"] * 2000)
    columns["caption"] = pa.array(["A caption."] * 4000, mask=rng.random(4000) < 0.02)
    columns["review"] = pa.array(rng.choice(["real", "picked", "approved", "rejected"], 4000))
    failures = first_failures(pa.table(columns), tiers)
    assert (failures["192p"] < 0).sum() > 50
    for tier, parent in config.tier_parents.items():
        if parent is not None:
            # Reviewed generated video is what a later tier lets in anew (Waver §3.5, SFT).
            generated = np.asarray(columns["review"].to_pylist()) == "approved"
            assert not ((failures[tier] < 0) & (failures[parent] >= 0) & ~generated).any(), tier
