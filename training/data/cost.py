"""What a micro-batch costs, and how the micro-batches of a step are dealt so that no worker waits for another (Waver §5).

Tokens are a poor measure: matrices take time by the token, attention by the pair of tokens that see each other. So a cost is

    fixed_s + per_token_s x tokens + per_pair_s x pairs

where a sample of L tokens has L x L pairs under full attention, and fewer in a refiner's windows. `training/calibrate.py`
measures the three numbers; without them they follow from counting operations. They stand in the recipe, so the order of data
stays the same whatever machine a run goes on with.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from waver_core.config import Strict

if TYPE_CHECKING:
    from waver_core.dit import DiTConfig

CLASS_STEP = Fraction(5, 4)
"""Micro-batches of a class differ in cost by less than this factor."""
_CLASSES = 160
_BOUNDS = np.array([float(CLASS_STEP**k) for k in range(-_CLASSES, _CLASSES + 1)])
"""Exact to the last bit on every machine, as logarithms are not: a pack must not change its class with the processor."""
_FLOPS_PER_S = 4e14
"""For `counted_cost`: about what the report gets of an H100 (Table 3). Only ratios matter to the order of data."""


class MicroBatchCost(Strict):
    """Time of one forward and backward of one micro-batch on one worker."""

    fixed_s: float = Field(ge=0)
    """Of a micro-batch, however small: launches, casts and gathers of weights."""
    per_token_s: float = Field(ge=0)
    per_pair_s: float = Field(ge=0)
    """Per pair of tokens that see each other, on the mean over the blocks."""

    @model_validator(mode="after")
    def _takes_time(self) -> MicroBatchCost:
        if self.fixed_s + self.per_token_s + self.per_pair_s <= 0:
            raise ValueError("a micro-batch takes time: one of fixed_s, per_token_s and per_pair_s must be above 0")
        return self

    def seconds(self, tokens: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """float64, of micro-batches with so many tokens and pairs, elementwise."""
        return self.fixed_s + self.per_token_s * np.asarray(tokens, np.float64) + self.per_pair_s * np.asarray(pairs, np.float64)

    def of(self, lengths: Sequence[int]) -> float:
        """Seconds of one micro-batch with samples of these lengths under full attention."""
        return float(self.seconds(np.array(sum(lengths)), np.array(sum(n * n for n in lengths))))

    def of_packs(self, tokens: np.ndarray, pairs: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Seconds of many, float64 [packs]: tokens and pairs [samples] of pack i stand from `starts[i]` to the next start.

        Sums are of whole numbers, so that they do not depend on their order.
        """
        if not len(starts):
            return np.zeros(0)
        return self.seconds(np.add.reduceat(tokens, starts), np.add.reduceat(pairs, starts))

    def classes(self, seconds: np.ndarray, tokens: int) -> np.ndarray:
        """int64: cost in steps of `CLASS_STEP`. A micro-batch of this many tokens that attention takes no time for has 0."""
        alone = self.seconds(np.array(tokens), np.array(tokens))  # samples of one token each
        return np.searchsorted(_BOUNDS, seconds / alone, side="right") - (_CLASSES + 1)


def counted_cost(config: DiTConfig) -> MicroBatchCost:
    """The cost by floating-point operations, for want of a measurement.

    A token costs a block its matrices, 2 (4 D^2 + 2 D x MLP width) FLOPs; a pair costs 4 D, for the scores and for the sum of
    the values. With an MLP four times as wide as the model, attention costs as much as the matrices at 6 D tokens: 18,432 for
    Waver's 3,072, 768 for the preset `tiny`. Modulation (half a token's worth a sample) and what lies outside the blocks are
    left out. A backward takes two forwards.
    """
    per_token = 2 * (4 * config.width**2 + 2 * config.width * config.mlp_width)
    times = 3 * config.blocks / _FLOPS_PER_S
    return MicroBatchCost(fixed_s=0.0, per_token_s=times * per_token, per_pair_s=times * 4 * config.width)


def video_pairs(grid: tuple[int, int, int], config: DiTConfig) -> int:
    """Pairs among the video tokens of a sample on the mean over the blocks: N^2, or less where some blocks attend in windows."""
    from waver_core.dit.layout import WINDOWS

    kinds = [config.attention_kind(block) for block in range(config.blocks)]
    total = 0
    for kind in set(kinds):
        pairs = 1
        for n, windows in zip(grid, WINDOWS.get(kind, (1, 1, 1)), strict=True):
            small, larger = divmod(n, min(windows, n))  # windows are as even as whole tokens allow
            pairs *= (min(windows, n) - larger) * small**2 + larger * (small + 1) ** 2
        total += kinds.count(kind) * pairs
    return round(Fraction(total, config.blocks))


def sample_pairs(text_tokens: np.ndarray, video_tokens: np.ndarray, video_pairs: np.ndarray) -> np.ndarray:
    """Pairs of samples, int64: text sees and is seen by everything, windows or not."""
    return text_tokens * (text_tokens + 2 * video_tokens) + video_pairs


def rounds(costs: Sequence[float], world: int) -> list[list[int]]:
    """Deal micro-batches to workers: the numbers [world][rounds] of each, dearest round first.

    Sharded workers run in step: each block's weights are gathered by all at once, so the first micro-batch of the slowest worker
    holds up the first of all others. Hence rounds of like cost: micro-batches from the dearest down, `world` of them a round.
    That makes the sum of the rounds' dearest as small as it can be. Within a round the dearest goes to the worker with the least
    so far, which balances the sums too: no two workers' sums are further apart than the costs within some round.

    All get equally many but in the last round, where some may lack one; they will compute the cheapest again, so they count as if
    they had it. A function of the arguments alone: ties are settled by number.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0.0] * world
    for first in range(0, len(order), world):
        workers = sorted(range(world), key=lambda w: (loads[w], w))
        members = order[first : first + world]
        for worker, number in zip(workers, members):
            shares[worker].append(number)
        for place, worker in enumerate(workers):
            loads[worker] += costs[members[min(place, len(members) - 1)]]
    return shares


class Measured(NamedTuple):
    """A micro-batch that was timed."""

    tokens: int
    pairs: int
    seconds: float


class Fit(NamedTuple):
    """A cost, and how far it is from each measurement: fitted over measured, less one."""

    cost: MicroBatchCost
    errors: tuple[float, ...]

    @property
    def mean_error(self) -> float:
        """Mean of the sizes."""
        return float(np.mean(np.abs(self.errors)))

    @property
    def worst_error(self) -> float:
        """The largest size."""
        return float(np.max(np.abs(self.errors)))


def fit_cost(measurements: Sequence[Measured]) -> Fit:
    """The cost that fits best: least squares of the relative errors, no number below 0.

    Raises `ValueError` where the measurements are too few or too alike to tell the three numbers apart.
    """
    rows = np.array([(1.0, m.tokens, m.pairs) for m in measurements], np.float64).reshape(-1, 3)
    seconds = np.array([m.seconds for m in measurements], np.float64)
    relative = rows / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    relative = relative / np.where(scale, scale, 1.0)
    if np.linalg.matrix_rank(relative, tol=1e-6) < 3:
        raise ValueError(f"{len(rows)} measurements are too few or too alike: vary the number of samples and their lengths")
    best, least = np.zeros(3), np.inf
    # The best without negative numbers is the plain best on the columns that it uses; there are seven sets of them.
    for columns in (list(c) for size in (1, 2, 3) for c in combinations(range(3), size)):
        found = np.linalg.lstsq(relative[:, columns], np.ones(len(rows)), rcond=None)[0]
        left = float(np.linalg.norm(relative[:, columns] @ found - 1))
        if (found >= 0).all() and left < least:
            best, least = np.zeros(3), left
            best[columns] = found
    values = best / scale
    cost = MicroBatchCost(fixed_s=float(values[0]), per_token_s=float(values[1]), per_pair_s=float(values[2]))
    return Fit(cost, tuple((rows @ values / seconds - 1).tolist()))
