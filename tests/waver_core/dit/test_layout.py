"""Who belongs together: windows that miss no token, joint orders that lead back, plans that follow the rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waver_core.dit.attention import AttentionPlan
from waver_core.dit.layout import WINDOWS, Layout, Segments, window_tokens
from waver_core.shapes import LatentShape

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
SHAPE = st.tuples(st.integers(1, 2), st.integers(2, 5), st.integers(2, 5))
SAMPLES = st.lists(st.tuples(SHAPE, st.lists(st.integers(1, 3), min_size=2, max_size=2)), min_size=1, max_size=4)


def layout_of(samples: list[tuple[tuple[int, int, int], list[int]]]) -> Layout:
    return Layout([LatentShape(*shape) for shape, _ in samples], [lengths for _, lengths in samples])


@given(GRIDS, st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
def test_every_token_is_in_exactly_one_window(grid: tuple[int, int, int], counts: tuple[int, int, int]) -> None:
    windows = window_tokens(grid, counts)
    tokens = torch.cat(windows).sort().values
    assert torch.equal(tokens, torch.arange(grid[0] * grid[1] * grid[2]))
    wanted = 1
    for size, count in zip(grid, counts):
        wanted *= min(size, count)
    assert len(windows) == wanted


@given(GRIDS)
def test_windows_are_boxes_as_even_as_whole_tokens_allow(grid: tuple[int, int, int]) -> None:
    numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    for counts in WINDOWS.values():
        sides: list[set[int]] = [set(), set(), set()]
        for window in window_tokens(grid, counts):
            places = torch.nonzero(torch.isin(numbers, window))
            extent = (places.amax(0) - places.amin(0) + 1).tolist()
            assert extent[0] * extent[1] * extent[2] == len(window)
            for seen, side in zip(sides, extent):
                seen.add(side)
        assert all(max(seen) - min(seen) <= 1 for seen in sides)


def test_the_reports_windows_cut_space_in_four_and_time_in_two() -> None:
    assert WINDOWS == {"space": (1, 2, 2), "time": (2, 1, 1)}
    assert [len(w) for w in window_tokens((3, 67, 4), (1, 2, 2))] == [3 * 34 * 2, 3 * 34 * 2, 3 * 33 * 2, 3 * 33 * 2]


@given(SAMPLES)
def test_join_puts_a_samples_text_before_its_video_and_split_leads_back(samples: list) -> None:
    layout = layout_of(samples)
    text = torch.arange(layout.text.total)
    video = 1000 + torch.arange(layout.video.total)
    joint = layout.join(text[:, None], video[:, None])[:, 0]
    wanted, t, v = [], 0, 0
    for n_text, n_video in zip(layout.text.lengths, layout.video.lengths):
        wanted += [*range(t, t + n_text), *range(1000 + v, 1000 + v + n_video)]
        t, v = t + n_text, v + n_video
    assert joint.tolist() == wanted
    for before, after in zip((text, video), layout.split(joint)):
        assert torch.equal(before, after)


def test_uniform_and_ragged_batches_are_told_apart() -> None:
    assert layout_of([((1, 4, 4), [2, 1]), ((1, 4, 4), [1, 2])]).uniform
    assert layout_of([((1, 2, 8), [3, 0]), ((1, 4, 4), [1, 2])]).uniform  # as many tokens, of another grid
    assert not layout_of([((1, 4, 4), [2, 1]), ((1, 4, 4), [2, 2])]).uniform
    assert not layout_of([((1, 4, 4), [2, 1]), ((2, 4, 4), [2, 1])]).uniform


@given(SAMPLES)
def test_spreading_gives_every_token_its_own_samples_vector(samples: list) -> None:
    segments = layout_of(samples).joint
    tokens, own = segments.spread(torch.zeros(segments.total, 1), torch.arange(len(samples)).float()[:, None])
    assert (tokens + own).flatten().tolist() == segments.sample.tolist()
    assert segments.sample.tolist() == [i for i, n in enumerate(segments.lengths) for _ in range(n)]


def test_positions_start_at_zero_for_each_sample() -> None:
    layout = layout_of([((2, 3, 4), [1, 1]), ((1, 2, 4), [1, 1])])
    wanted = [[t, y, x] for t in range(2) for y in range(2) for x in range(2)] + [[0, 0, 0], [0, 0, 1]]
    assert layout.positions.tolist() == wanted


@given(SAMPLES, st.sampled_from(["space", "time"]))
def test_in_windows_video_sees_its_window_and_its_text_and_text_sees_all_of_its_sample(samples: list, kind: str) -> None:
    layout = layout_of(samples)
    plan = layout.plan(kind)
    assert plan.q_index is not None and plan.k_index is not None and plan.q_back is not None
    assert torch.equal(plan.q_index.sort().values, torch.arange(layout.joint.total))
    assert torch.equal(plan.q_index[plan.q_back], torch.arange(layout.joint.total))
    starts = torch.tensor([0, *layout.joint.lengths]).cumsum(0).tolist()
    for queries, keys in zip(plan.q_index.split(list(plan.q_lengths)), plan.k_index.split(list(plan.k_lengths)), strict=True):
        (sample,) = layout.joint.sample[queries].unique().tolist()
        start, n_text = starts[sample], layout.text.lengths[sample]
        texts = list(range(start, start + n_text))
        if queries[0] < start + n_text:
            assert queries.tolist() == texts
            assert keys.tolist() == list(range(start, starts[sample + 1]))
        else:
            assert sorted(keys.tolist()) == sorted(texts + queries.tolist())
            window = (queries - start - n_text).tolist()
            windows = window_tokens(layout.shapes[sample].grid, WINDOWS[kind])
            assert window in [w.tolist() for w in windows]


def test_pairs_are_counted() -> None:
    layout = layout_of([((2, 4, 4), [2, 1]), ((1, 2, 4), [1, 1])])  # 8 and 2 video tokens
    assert layout.plan("full").pairs() == 11 * 11 + 4 * 4
    assert layout.plan("space").pairs() == 3 * 11 + 8 * (3 + 2) + 2 * 4 + 2 * (2 + 1)
    assert layout.plan("time").pairs() == 3 * 11 + 8 * (3 + 4) + 2 * 4 + 2 * (2 + 2)
    assert AttentionPlan([2, 3], [4, 5]).pairs() == 23


def test_a_plan_is_made_once() -> None:
    layout = layout_of([((2, 4, 4), [2, 1])])
    assert layout.plan("space") is layout.plan("space")


def test_batches_of_nothing_or_of_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="make no batch"):
        Layout([], [])
    with pytest.raises(ValueError, match="1 videos and 2 texts"):
        Layout([LatentShape(1, 2, 2)], [[1], [2]])


def test_segments_of_one_length_broadcast() -> None:
    tokens, own = Segments([3, 3], "cpu").spread(torch.zeros(6, 5), torch.zeros(2, 5))
    assert tokens.shape == (2, 3, 5) and own.shape == (2, 1, 5)
