"""Cost of micro-batches: counted as attention really pairs tokens, fitted to measurements, dealt so that nobody waits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from training.data.cost import CLASS_STEP, Measured, MicroBatchCost, counted_cost, fit_cost, rounds, sample_pairs, video_pairs
from waver_core.dit import Layout, preset
from waver_core.shapes import LatentShape

COST = MicroBatchCost(fixed_s=0.01, per_token_s=2e-6, per_pair_s=3e-10)
COSTS = st.lists(st.integers(100, 125).map(lambda c: c / 100), min_size=1, max_size=70)
"""Of micro-batches of one bucket."""


@given(packs=st.lists(st.lists(st.integers(1, 70_000), min_size=1, max_size=9), min_size=1, max_size=9))
def test_many_packs_cost_what_each_costs(packs: list[list[int]]) -> None:
    lengths = np.concatenate([np.array(p, np.int64) for p in packs])
    starts = np.cumsum([0, *map(len, packs)])[:-1]
    assert COST.of_packs(lengths, lengths**2, starts).tolist() == [COST.of(p) for p in packs]
    wanted = [0.01 + 2e-6 * sum(p) + 3e-10 * sum(n * n for n in p) for p in packs]
    assert [COST.of(p) for p in packs] == pytest.approx(wanted, rel=1e-12)


def test_no_packs_and_no_time() -> None:
    assert COST.of_packs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)).shape == (0,)
    with pytest.raises(ValidationError, match="a micro-batch takes time"):
        MicroBatchCost(fixed_s=0, per_token_s=0, per_pair_s=0)
    with pytest.raises(ValidationError):
        MicroBatchCost(fixed_s=-1, per_token_s=1, per_pair_s=0)


@given(seconds=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=30))
def test_a_class_spans_less_than_its_step_and_dearer_is_never_in_a_lower_one(seconds: list[float]) -> None:
    values = np.sort(np.array(seconds))
    classes = COST.classes(values, 65_536)
    assert (np.diff(classes) >= 0).all()
    for number in np.unique(classes):
        members = values[classes == number]
        assert members.max() / members.min() < float(CLASS_STEP) * (1 + 1e-12)


def test_classes_are_counted_from_a_full_pack_without_attention() -> None:
    full = COST.of([1] * 65_536)
    assert COST.classes(np.array([full, 1.24 * full, 1.26 * full, 0.99 * full, 0.79 * full]), 65_536).tolist() == [
        0,
        0,
        1,
        -1,
        -2,
    ]
    # The same edges as exact fractions, far away too: a logarithm could fall on either side of them.
    edges = np.array([full * float(CLASS_STEP**k) for k in (-40, -7, 0, 7, 40)])
    assert COST.classes(edges * (1 + 1e-12), 65_536).tolist() == [-40, -7, 0, 7, 40]
    assert COST.classes(edges * (1 - 1e-12), 65_536).tolist() == [-41, -8, -1, 6, 39]


@pytest.mark.parametrize("name", ["waver_12b", "waver_1b", "tiny"])
def test_counted_cost_has_attention_even_with_matrices_at_six_widths(name: str) -> None:
    config = preset(name)
    cost = counted_cost(config)
    assert cost.per_token_s / cost.per_pair_s == pytest.approx(6 * config.width)
    wide = counted_cost(preset(name, mlp_ratio=8.0))
    assert wide.per_token_s / wide.per_pair_s == pytest.approx(10 * config.width)
    # A forward of 12.3 B parameters takes at most 2 FLOPs each for a token: those of text count once, though there are two sets.
    if name == "waver_12b":
        assert cost.per_token_s * 4e14 / 3 == pytest.approx(2 * 56 * 12 * 3072**2)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("grid", [(1, 4, 4), (5, 7, 6), (6, 1, 9)])
def test_pairs_are_those_of_the_model(windowed: bool, grid: tuple[int, int, int]) -> None:
    config = preset("tiny", windowed=windowed, dual_blocks=3, single_blocks=5)
    shape, text = LatentShape(grid[0], 2 * grid[1], 2 * grid[2]), 11
    layout = Layout([shape], [[7, 4]])
    real = sum(layout.plan(config.attention_kind(block)).pairs() for block in range(config.blocks)) / config.blocks
    video = video_pairs(grid, config)
    found = sample_pairs(np.array([text]), np.array([shape.tokens]), np.array([video]))
    assert abs(found[0] - real) <= 0.5
    assert (video < shape.tokens**2) == windowed
    if not windowed:
        assert found[0] == (shape.tokens + text) ** 2


def in_step(costs: list[float], shares: list[list[int]]) -> float:
    """Time where workers wait for one another after each micro-batch; one that has none left computes the cheapest."""
    most = max(map(len, shares))
    padded = [[costs[i] for i in share] + [min(costs)] * (most - len(share)) for share in shares]
    return sum(max(column) for column in zip(*padded))


def sums(costs: list[float], shares: list[list[int]]) -> list[float]:
    """Time of each worker by itself, with the cheapest computed again by those that lack one."""
    most = max(map(len, shares))
    return [sum(costs[i] for i in share) + min(costs) * (most - len(share)) for share in shares]


def turns(n: int, world: int) -> list[list[int]]:
    """Round robin."""
    return [list(range(rank, n, world)) for rank in range(world)]


@given(costs=COSTS, world=st.integers(1, 20))
@settings(max_examples=300)
def test_micro_batches_are_dealt_once_each_and_evenly(costs: list[float], world: int) -> None:
    shares = rounds(costs, world)
    assert len(shares) == world and sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert max(map(len, shares)) == -(-len(costs) // world) and max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares == rounds(list(costs), world)
    ranked = sorted(costs, reverse=True) + [min(costs)] * (-len(costs) % world)
    spread = max(ranked[k] - ranked[k + world - 1] for k in range(0, len(ranked), world))
    loads = sums(costs, shares)
    assert max(loads) - min(loads) <= spread + 1e-9
    in_turns = turns(len(costs), world)
    assert in_step(costs, shares) <= in_step(costs, in_turns) + 1e-9
    assert max(loads) <= max(sums(costs, in_turns)) + spread * (1 - 1 / world) + 1e-9


def test_equal_costs_are_dealt_in_turns_and_unequal_ones_better() -> None:
    for n in (1, 7, 24):
        assert rounds([0.3] * n, 4) == turns(n, 4)
    costs = (1 + 0.25 * np.random.default_rng(0).random(256)).tolist()
    for world in (8, 64, 128):
        mean = sum(costs) / world
        assert max(sums(costs, rounds(costs, world))) / mean < 1.03
        assert in_step(costs, rounds(costs, world)) / mean < 1.06 < in_step(costs, turns(256, world)) / mean
    assert rounds([4.0, 1.0, 3.0, 2.0], 2) == [[0, 1], [2, 3]]


def spread_of(cost: MicroBatchCost) -> list[Measured]:
    """What exact timing of packs of several kinds would find."""
    packs = [[65_536 >> k] * (1 << k) for k in range(6)] + [[n] for n in (1_000, 8_000, 30_000)]
    both = [(sum(p), sum(n * n for n in p)) for p in packs]
    return [Measured(*x, float(cost.seconds(*map(np.array, x)))) for x in both]


@pytest.mark.parametrize("values", [(0.01, 2e-6, 3e-11), (0.0, 2e-6, 3e-11), (0.2, 1e-6, 0.0), (1.0, 0.0, 0.0)])
def test_a_fit_finds_the_cost_that_made_the_times(values: tuple[float, float, float]) -> None:
    cost = MicroBatchCost(fixed_s=values[0], per_token_s=values[1], per_pair_s=values[2])
    fit = fit_cost(spread_of(cost))
    assert tuple(fit.cost.model_dump().values()) == pytest.approx(values, rel=1e-6, abs=1e-13)
    assert fit.worst_error < 1e-6


def test_a_fit_is_never_negative_and_no_neighbour_is_better() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        measured = [m._replace(seconds=m.seconds * rng.uniform(0.5, 1.5)) for m in spread_of(COST)]
        fit = fit_cost(measured)
        best = np.array(list(fit.cost.model_dump().values()))
        assert (best >= 0).all() and best.any()
        assert fit.worst_error >= fit.mean_error > 0.05
        rows = np.array([(1, m.tokens, m.pairs) for m in measured]) / np.array([m.seconds for m in measured])[:, None]
        assert rows @ best - 1 == pytest.approx(fit.errors)
        least = np.linalg.norm(rows @ best - 1)
        for _ in range(50):
            other = np.maximum(0, best + rng.normal(0, 0.1, 3) * [0.01, 2e-6, 3e-10])
            assert np.linalg.norm(rows @ other - 1) >= least - 1e-9


def test_measurements_that_tell_nothing_are_refused() -> None:
    alike = [Measured(1000 * n, 5 * 1000 * n, 0.1 * n) for n in range(1, 9)]  # pairs grow with tokens only
    for measured in (spread_of(COST)[:2], alike, []):
        with pytest.raises(ValueError, match="too few or too alike"):
            fit_cost(measured)
