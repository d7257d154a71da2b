"""The steps of one epoch, made when they are looked at: from micro-batches to buckets, to steps, to their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from training.data.cost import rounds
from training.data.counter_hash import hash64

_BATCHES, _STEPS = 3, 4


class Draw(NamedTuple):
    """One sample, drawn: noise, timestep and condition come from these three and the seed."""

    row: int
    """Position in the table of samples."""
    epoch: int
    repeat: int
    """Counts the draws of this row in this epoch, from 0."""


class Step(NamedTuple):
    """What one update of the weights is made of: micro-batches of one bucket."""

    bucket: str
    micro_batches: tuple[tuple[Draw, ...], ...]
    costs: tuple[float, ...]
    """Seconds of each micro-batch, as the recipe's cost has them"""

    def share(self, rank: int, world: int) -> tuple[tuple[Draw, ...], ...]:
        """Micro-batches of one of `world` workers, so that all take about equally long, and at every place about the same.

        Shares differ by one at most, and one may be empty in a small last step. A worker alone has all of them in order.
        """
        if world == 1:
            return self.micro_batches
        return tuple(self.micro_batches[i] for i in rounds(self.costs, world)[rank])

    @property
    def cheapest(self) -> tuple[Draw, ...]:
        """The micro-batch of least cost: what a worker with a shorter share computes again, with weight 0, to keep in step."""
        return self.micro_batches[min(range(len(self.costs)), key=lambda i: (self.costs[i], i))]


class MicroBatches(NamedTuple):
    """Micro-batches of a kind: number i holds draws `starts[i]` to `starts[i + 1]`."""

    rows: np.ndarray
    """int64 [draws]"""
    repeats: np.ndarray
    """int64 [draws]"""
    starts: np.ndarray
    """int64 [micro-batches + 1]"""
    bucket: np.ndarray
    """int64 [micro-batches], a key of `names`"""
    names: dict[int, str]

    def draws(self, i: int, epoch: int) -> tuple[Draw, ...]:
        """The draws of a micro-batch."""
        span = slice(self.starts[i], self.starts[i + 1])
        return tuple(Draw(row, epoch, repeat) for row, repeat in zip(self.rows[span].tolist(), self.repeats[span].tolist()))


CostsOf = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Rows [samples] of each micro-batch -> seconds of each, float64 [micro-batches]."""


class _StepSpan(NamedTuple):
    """A step, not yet made: which micro-batches of which kind."""

    batches: MicroBatches
    bucket: str
    members: np.ndarray


class EpochSteps(Sequence[Step]):
    """Steps of an epoch in order; a slice is a part of it, an item is made anew each time."""

    def __init__(self, spans: Sequence[_StepSpan], epoch: int, costs_of: CostsOf) -> None:
        self._spans, self._epoch, self._costs_of = spans, epoch, costs_of

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> EpochSteps: ...

    def __getitem__(self, index: int | slice) -> Step | EpochSteps:
        if isinstance(index, slice):
            return EpochSteps(self._spans[index], self._epoch, self._costs_of)
        batches, bucket, members = self._spans[index]
        rows = [batches.rows[batches.starts[i] : batches.starts[i + 1]] for i in members]
        costs = tuple(self._costs_of(rows).tolist())
        return Step(bucket, tuple(batches.draws(i, self._epoch) for i in members.tolist()), costs)

    def summary(self, tokens: np.ndarray, room: int) -> dict[str, dict[str, Any]]:
        """Per bucket: drawn, tokens, micro_batches, steps, room (tokens that would fit) and efficiency.

        `tokens` [table] is the length of each row; `room` what a micro-batch holds. One that is longer counts as full.
        """
        out: dict[str, dict[str, Any]] = {}
        kinds = {id(span.batches): span.batches for span in self._spans}
        sums_of = {key: np.concatenate([[0], np.cumsum(tokens[batches.rows])]) for key, batches in kinds.items()}
        for batches, bucket, members in self._spans:
            sums, first, last = sums_of[id(batches)], batches.starts[members], batches.starts[members + 1]
            held = sums[last] - sums[first]
            counts = out.setdefault(bucket, dict.fromkeys(("drawn", "tokens", "micro_batches", "steps", "room"), 0))
            counts["drawn"] += int((last - first).sum())
            counts["tokens"] += int(held.sum())
            counts["micro_batches"] += len(members)
            counts["steps"] += 1
            counts["room"] += int(np.maximum(held, room).sum())
        for counts in out.values():
            counts["efficiency"] = counts["tokens"] / counts["room"]
        return dict(sorted(out.items()))


def deal_steps(kinds: Sequence[MicroBatches], per_step: int, seed: int, epoch: int, costs_of: CostsOf) -> EpochSteps:
    """Shuffle the micro-batches of each bucket, cut them into steps, and shuffle the steps of all buckets together."""
    spans: list[_StepSpan] = []
    for number, batches in enumerate(kinds):
        key = hash64(seed, epoch, _BATCHES, number, np.arange(len(batches.bucket)))
        order = np.lexsort((key, batches.bucket))
        sorted_buckets = batches.bucket[order]
        for code, name in batches.names.items():
            first, last = np.searchsorted(sorted_buckets, [code, code + 1])
            spans += [_StepSpan(batches, name, order[at : min(at + per_step, last)]) for at in range(first, last, per_step)]
    key = hash64(seed, epoch, _STEPS, np.arange(len(spans)))
    return EpochSteps([spans[i] for i in np.argsort(key, kind="stable").tolist()], epoch, costs_of)
