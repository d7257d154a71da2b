"""Gates: which tier a clip may enter, and if not, why. Null never passes.

The same gates are used three ways: on one row while its pixels are at hand (a clip that no tier can keep any more skips
the costlier stages), on whole tables when tiers are selected, and on stored scores for a preview.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.stage import StageSet
from waver_core.config import Config, Gate
from waver_core.errors import ConfigError, did_you_mean


class TierGate(NamedTuple):
    """A named gate of a tier and the position of the stage that writes its column."""

    name: str
    gate: Gate
    stage: int


Tiers = dict[str, list[TierGate]]


def tier_gates(config: Config, stages: StageSet) -> Tiers:
    """The gates of every tier in the order in which the funnel can decide them.

    Raises `ConfigError` for a gate on a column that no stage writes or on one of the wrong type.
    """
    if not config.tiers:
        raise ConfigError("tiers: at least one tier is needed, for a clip that no tier may keep is rejected")
    tiers: Tiers = {}
    for tier, gates in config.tiers.items():
        placed = []
        for name, gate in gates.items():
            where = f"tiers.{tier}.{name}"
            check_gate(where, gate, stages.schema)
            placed.append(TierGate(name, gate, stages.order_of(gate.column)))
        tiers[tier] = sorted(placed, key=lambda g: g.stage)
    return tiers


def check_gate(where: str, gate: Gate, schema: pa.Schema) -> None:
    """Raises `ConfigError` for a condition on a column that no stage writes or on one of the wrong type."""
    for column in (gate.column, *gate.condition):
        if column not in schema.names:
            raise ConfigError(f"{where}: no stage writes column '{column}': {did_you_mean(column, schema.names)}")
    for column, value in gate.condition.items():
        if not pa.types.is_string(schema.field(column).type):
            raise ConfigError(f"{where}: only '{column}: {value}' needs a column of text, but it is {schema.field(column).type}")
    kind = schema.field(gate.column).type
    numeric = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    if (gate.min is not None or gate.max is not None) and not numeric:
        raise ConfigError(f"{where}: min and max need a number, but '{gate.column}' is {kind}; use equals")
    fits = pa.types.is_boolean(kind) if isinstance(gate.equals, bool) else pa.types.is_string(kind)
    if gate.equals is not None and not fits:
        raise ConfigError(f"{where}: equals {gate.equals!r} does not fit '{gate.column}', which is {kind}")


def passes(gate: Gate, row: Mapping[str, Any]) -> bool:
    """Whether one row passes one gate."""
    if any(row.get(column) != value for column, value in gate.condition.items()):
        return True
    value = row.get(gate.column)
    if value is None or value != value:  # null or NaN
        return False
    if gate.equals is not None and value not in (gate.equals if isinstance(gate.equals, tuple) else (gate.equals,)):
        return False
    return (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)


def rejected_by(row: Mapping[str, Any], tiers: Tiers, stage: int) -> str | None:
    """The first tier's failing gate if every tier has rejected the row by stage number `stage`; None while one is open."""
    first: str | None = None
    for gates in tiers.values():
        failed = next((g.name for g in gates if g.stage <= stage and not passes(g.gate, row)), None)
        if failed is None:
            return None
        first = first or failed
    return first


def pass_mask(gate: Gate, table: pa.Table | pa.RecordBatch) -> np.ndarray:
    """Bool [N]: which rows of a table pass a gate."""
    column = table.column(gate.column)
    ok = pc.is_valid(column)
    if pa.types.is_floating(column.type):
        ok = pc.and_(ok, pc.invert(pc.is_nan(column)))
    if isinstance(gate.equals, tuple):
        ok = pc.and_(ok, pc.is_in(column, pa.array(gate.equals, pa.string())))
    elif gate.equals is not None:
        ok = pc.and_(ok, pc.equal(column, gate.equals))
    if gate.min is not None:
        ok = pc.and_(ok, pc.greater_equal(column, gate.min))
    if gate.max is not None:
        ok = pc.and_(ok, pc.less_equal(column, gate.max))
    mask = np.asarray(pc.fill_null(ok, False))  # `present` asks for no more than that
    for name, wanted in gate.condition.items():
        mask = mask | ~np.asarray(pc.fill_null(pc.equal(table.column(name), wanted), False))
    return mask


def first_failures(table: pa.Table | pa.RecordBatch, tiers: Tiers) -> dict[str, np.ndarray]:
    """Tier -> int8 [N]: index into the tier's gates of the first that a row fails, -1 where the tier keeps it.

    A gate that several tiers share is computed once.
    """
    masks: dict[Gate, np.ndarray] = {}
    out: dict[str, np.ndarray] = {}
    for tier, gates in tiers.items():
        first = np.full(table.num_rows, -1, np.int8)
        for i in range(len(gates) - 1, -1, -1):
            gate = gates[i].gate
            if gate not in masks:
                masks[gate] = pass_mask(gate, table)
            first[~masks[gate]] = i
        out[tier] = first
    return out
