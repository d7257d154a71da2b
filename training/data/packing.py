"""Packing of sequences by their lengths (Waver §5, bucket dataloader): SPFHP of Krell et al. 2021.

Shortest-pack-first histogram packing works on how many sequences there are of each length, not on the sequences: lengths from
the longest to the shortest, each into the pack that is shortest so far (worst fit). Packs of the same make are one group with
a count, so a million sequences take about as long as their distinct lengths. Which sequence goes where is settled afterwards.

One thing is unlike the paper, which starts a pack for each sequence that fits into none: sequences of one length may start a
pack together, as plain worst fit would have it. Else a collection of a single length would not be packed at all.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class PackShape:
    """The lengths that lie together in a pack, longest first, and how many such packs there are."""

    lengths: tuple[int, ...]
    count: int


class Packs(NamedTuple):
    """What lies in which pack: pack i holds `rows[starts[i]:starts[i + 1]]`."""

    rows: np.ndarray
    """int64 [N]"""
    starts: np.ndarray
    """int64 [packs + 1]"""


def spfhp(counts: np.ndarray, capacity: int, max_per_pack: int) -> list[PackShape]:
    """Pack a histogram: counts [capacity + 1] says how many sequences there are of each length (in tokens).

    No pack holds more than `capacity` tokens or `max_per_pack` sequences. Of two packs that could take another sequence not
    both are half empty, so there are at most twice as many as needed; with a spread of lengths it is above 99 % full.
    Raises `ValueError` for a histogram of another size, or one that counts sequences of no length.
    """
    if capacity < 1 or max_per_pack < 1 or counts.shape != (capacity + 1,):
        raise ValueError(f"packs of {capacity} tokens need limits of at least 1 and {capacity + 1} bins, not {counts.shape}")
    if counts[0] or counts.min() < 0:
        raise ValueError("every sequence has at least one token, and no length occurs less than never")
    present = np.flatnonzero(counts)[::-1].tolist()
    shortest = present[-1] if present else 0
    # Groups of equal packs that have room: (-space, serial, how many, sequences in each, chain of (length, chain) pairs).
    # The serial settles ties, so that chains are never compared; a chain shares its tail with the group it was split from.
    room: list[tuple[int, int, int, int, Any]] = []
    done: list[tuple[int, Any]] = []
    serial = 0

    def place(space: int, packs: int, depth: int, chain: Any) -> None:
        nonlocal serial
        if space < shortest or depth == max_per_pack:
            done.append((packs, chain))
        else:
            serial += 1
            heapq.heappush(room, (-space, serial, packs, depth, chain))

    for length in present:
        left = int(counts[length])
        while left and room and -room[0][0] >= length:
            space, _, packs, depth, chain = room[0]
            used = min(left, packs)
            left -= used
            if packs > used:
                heapq.heapreplace(room, (space, room[0][1], packs - used, depth, chain))
            else:
                heapq.heappop(room)
            place(-space - length, used, depth + 1, (length, chain))
        together = min(capacity // length, max_per_pack)
        for packs, each in ((left // together, together), (1, left % together)):
            if packs and each:
                chain = None
                for _ in range(each):
                    chain = (length, chain)
                place(capacity - each * length, packs, each, chain)
    done += [(packs, chain) for _, _, packs, _, chain in room]
    shapes: Counter[tuple[int, ...]] = Counter()
    for packs, chain in done:
        lengths = []
        while chain is not None:
            lengths.append(chain[0])
            chain = chain[1]
        shapes[tuple(reversed(lengths))] += packs
    return [PackShape(lengths, count) for lengths, count in shapes.items()]


def efficiency(packs: Sequence[PackShape], capacity: int) -> float:
    """Tokens over room, 0 to 1; a pack with a sequence above the capacity counts as full. 1 where there are no packs."""
    tokens = sum(sum(shape.lengths) * shape.count for shape in packs)
    rooms = sum(max(capacity, sum(shape.lengths)) * shape.count for shape in packs)
    return tokens / rooms if rooms else 1.0


def shapes_of(lengths: np.ndarray, capacity: int, max_per_pack: int) -> list[PackShape]:
    """Shapes of the packs for sequences of these lengths; one longer than the capacity stands alone."""
    found, count = np.unique(lengths, return_counts=True)
    fits = found <= capacity
    histogram = np.zeros(capacity + 1, np.int64)
    histogram[found[fits]] = count[fits]
    alone = [PackShape((length,), n) for length, n in zip(found[~fits].tolist(), count[~fits].tolist())]
    return alone + spfhp(histogram, capacity, max_per_pack)


def per_pack(shapes: Sequence[PackShape], values: np.ndarray) -> np.ndarray:
    """What is known of every shape [shapes], for every pack [packs] in the order of `fill`."""
    return np.repeat(values, np.array([s.count for s in shapes], np.int64))


def fill(shapes: Sequence[PackShape], lengths: np.ndarray, order_key: np.ndarray) -> Packs:
    """Deal sequences [N] to the packs of shapes made from their own lengths; packs come in the order of the shapes.

    Of one length, sequences are dealt by ascending `order_key` [N], ties by index: the same keys give the same packs.
    """
    sizes = per_pack(shapes, np.array([len(s.lengths) for s in shapes], np.int64))
    wanted = [np.tile(np.array(s.lengths, np.int64), s.count) for s in shapes]
    slots = np.concatenate(wanted) if wanted else np.zeros(0, np.int64)
    rows = np.empty(len(lengths), np.int64)
    rows[np.argsort(slots, kind="stable")] = np.lexsort((order_key, lengths))
    return Packs(rows, np.concatenate([[0], np.cumsum(sizes)]))


def pack(lengths: np.ndarray, capacity: int, max_per_pack: int, order_key: np.ndarray) -> list[np.ndarray]:
    """Pack sequences [N] of these lengths: the indices that lie in each pack. Each index occurs exactly once.

    A sequence that is longer than `capacity` stands alone. Raises `ValueError` for a length below 1.
    """
    if len(lengths) and lengths.min() < 1:
        raise ValueError("every sequence has at least one token")
    packs = fill(shapes_of(lengths, capacity, max_per_pack), lengths, order_key)
    return np.split(packs.rows, packs.starts[1:-1]) if len(packs.starts) > 1 else []
