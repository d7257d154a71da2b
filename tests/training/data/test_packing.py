"""SPFHP against its promises: every row once, no pack too full, and nearly full ones for the lengths that training meets."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.packing import PackShape, efficiency, fill, pack, shapes_of, spfhp

LENGTHS = st.lists(st.integers(1, 140), max_size=200)


@given(lengths=LENGTHS, capacity=st.integers(1, 100), depth=st.integers(1, 8), seed=st.integers(0, 9))
def test_every_row_lies_in_one_pack_and_no_pack_is_too_full(lengths: list[int], capacity: int, depth: int, seed: int) -> None:
    array = np.array(lengths, np.int64)
    packs = pack(array, capacity, depth, np.random.default_rng(seed).random(len(lengths)))
    assert sorted(np.concatenate(packs).tolist() if packs else []) == list(range(len(lengths)))
    for rows in packs:
        assert 1 <= len(rows) <= depth
        assert array[rows].sum() <= capacity or len(rows) == 1


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=200), depth=st.integers(1, 8))
def test_at_most_one_pack_with_places_left_is_half_empty(lengths: list[int], depth: int) -> None:
    shapes = shapes_of(np.array(lengths), 100, depth)
    half_empty = sum(s.count for s in shapes if len(s.lengths) < depth and sum(s.lengths) <= 50)
    assert half_empty <= 1
    rooms = sum(s.count for s in shapes)
    assert rooms <= 2 * -(-sum(lengths) // 100) + sum(s.count for s in shapes if len(s.lengths) == depth)


@given(lengths=LENGTHS, depth=st.integers(1, 8))
def test_worst_fit_one_sequence_at_a_time_makes_as_many_packs(lengths: list[int], depth: int) -> None:
    """The histogram is only a faster way to the same packs (up to which of two packs with equal room is taken)."""
    if depth < 8:
        lengths = [n for n in lengths if n > 140 / (depth + 1)]  # the limit on sequences never binds: ties cannot matter
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        open_ = [p for p in packs if sum(p) + length <= 140 and len(p) < depth]
        if open_:
            min(open_, key=sum).append(length)
        else:
            packs.append([length])
    if all(len(p) < depth for p in packs):
        assert sum(s.count for s in shapes_of(np.array(lengths, np.int64), 140, depth)) == len(packs)


def test_the_longest_come_first_and_shorter_ones_go_to_the_emptiest_pack() -> None:
    counts = np.zeros(11, np.int64)
    counts[[7, 6, 3, 1]] = 1, 1, 1, 2
    assert {s.lengths for s in spfhp(counts, 10, 9)} == {(7, 1, 1), (6, 3)}
    assert sorted(s.lengths for s in spfhp(counts, 10, 2)) == [(1,), (6, 3), (7, 1)]


def test_sequences_of_one_length_share_packs() -> None:
    shapes = shapes_of(np.full(10, 3), 10, 64)
    assert sorted(shapes, key=lambda s: s.count) == [PackShape((3,), 1), PackShape((3, 3, 3), 3)]


def test_a_sequence_above_the_capacity_stands_alone_and_counts_as_full() -> None:
    shapes = shapes_of(np.array([25, 4, 6]), 10, 64)
    assert {s.lengths for s in shapes} == {(25,), (6, 4)}
    assert efficiency(shapes, 10) == 1.0


def test_efficiency_is_tokens_over_room() -> None:
    assert efficiency([PackShape((5, 2), 2), PackShape((10,), 1)], 10) == 24 / 30
    assert efficiency([], 10) == 1.0


def test_the_order_key_says_which_row_goes_where() -> None:
    lengths = np.array([4, 4, 4, 4, 6, 6])
    key = np.array([3, 2, 1, 0, 0, 1])
    packs = fill(shapes_of(lengths, 10, 8), lengths, key)
    assert packs.rows.tolist() == fill(shapes_of(lengths, 10, 8), lengths, key).rows.tolist()
    other = pack(lengths, 10, 8, key[::-1].copy())
    assert [p.tolist() for p in other] != [p.tolist() for p in pack(lengths, 10, 8, key)]
    with_six = [p.tolist() for p in pack(lengths, 10, 8, key) if 4 in p.tolist() or 5 in p.tolist()]
    assert sorted(with_six) == [[4, 3], [5, 2]]  # the lowest keys are dealt first


@pytest.mark.parametrize("counts", [np.zeros(5), np.array([1] + [0] * 10), np.array([0, -1] + [0] * 9)])
def test_a_histogram_that_makes_no_sense_is_refused(counts: np.ndarray) -> None:
    with pytest.raises(ValueError):
        spfhp(counts.astype(np.int64), 10, 4)


def test_a_length_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        pack(np.array([0, 3]), 10, 4, np.zeros(2))


def million_lengths() -> np.ndarray:
    """Tokens of a million clips of 2 to 10 s at 16 fps, half of them 192p and half 480p, with texts of 40 to 500 tokens."""
    rng = np.random.default_rng(0)
    seconds = rng.uniform(2, 10.1, 1_000_000)
    frames = np.array([29, 45, 61, 77, 93, 125, 157])
    latent = 1 + (frames[np.searchsorted(frames / 16, seconds, side="right") - 1] - 1) // 4
    return latent * rng.choice([12 * 22, 30 * 54], len(seconds)) + rng.integers(40, 501, len(seconds))


def test_a_million_clips_fill_their_packs_in_a_moment() -> None:
    lengths = million_lengths()
    started = time.process_time()
    shapes = shapes_of(lengths, 65_536, 64)
    assert time.process_time() - started < 5
    assert sum(len(s.lengths) * s.count for s in shapes) == len(lengths)
    assert efficiency(shapes, 65_536) >= 0.99
