"""Where shots begin and end: exact on rendered cuts, dissolves and fades, silent on everything that merely moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.gradual import gradual_transitions
from curation.shots import Shot, ShotRules, Transition, hard_cuts, split_shots
from waver_core.backends.embedded.color_layout import ColorLayout
from waver_core.synthetic import Background, Camera, random_video, single_shot

RULES = ShotRules()
KINDS = ("cut", "dissolve", "fade", "fade_white")


def signals(small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Luma thumbnails [T, 18, 32] and the similarity of each frame with the one before [T], as the segment stage has them."""
    grey = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), (32, 18), interpolation=cv2.INTER_AREA) for f in small]
    vectors = ColorLayout().embed(small)
    return np.stack(grey), np.einsum("td,td->t", vectors, np.concatenate([vectors[:1], vectors[:-1]]))


def find(small: np.ndarray, fps: float = 24.0) -> tuple[list[int], list[Transition]]:
    luma, similarity = signals(small)
    cuts = hard_cuts(similarity, [], RULES)
    sure = [c for c in cuts if similarity[c] < RULES.cut_similarity]
    return cuts, gradual_transitions(luma, sure, fps, RULES)


@pytest.fixture(scope="session")
def rendered(render_to_disk: Callable) -> Callable[[str, int], Any]:
    """`rendered(kind, seed)`: a video of four shots with one kind of transition, written once."""
    made: dict[tuple[str, int], Any] = {}

    def get(kind: str, seed: int) -> Any:
        if (kind, seed) not in made:
            video = random_video(
                seed, n_shots=4, width_px=256, height_px=144, durations_s=(2.0, 2.6), transitions=(kind,), name=f"{kind}_{seed}"
            )
            made[kind, seed] = render_to_disk(video)
        return made[kind, seed]

    return get


@pytest.mark.parametrize("seed", [1, 2])
def test_hard_cuts_are_found_to_the_frame(rendered: Callable, seed: int) -> None:
    video = rendered("cut", seed)
    cuts, gradual = find(video.small)
    assert cuts == [start for start, _ in video.ends("cut")]
    assert gradual == []


@pytest.mark.parametrize(
    ("kind", "seed", "tolerance"), [("dissolve", 2, 3), ("dissolve", 4, 3), ("fade", 1, 2), ("fade_white", 4, 2)]
)
def test_gradual_transitions_are_found_with_both_ends(rendered: Callable, kind: str, seed: int, tolerance: int) -> None:
    video = rendered(kind, seed)
    cuts, gradual = find(video.small)
    truth = video.ends(kind)
    assert [t.kind for t in gradual] == [kind.removesuffix("_white")] * len(truth)
    assert np.abs(np.array([t[1:] for t in gradual]) - np.array(truth)).max() <= tolerance
    shots = split_shots(len(video.small), cuts, gradual, [])
    assert len(shots) == 4
    assert {s.transition_in for s in shots[1:]} == {kind.removesuffix("_white")}


@pytest.mark.parametrize("fps", [12, 30])
def test_a_dissolve_is_found_at_other_rates(frames_of: Callable, fps: int) -> None:
    video = random_video(4, n_shots=2, width_px=128, height_px=72, fps=fps, durations_s=(2.0, 2.2), transitions=("dissolve",))
    frames = frames_of(video)
    n = video.transitions[0].duration_frames
    start = round(video.shots[0].duration_s * fps)
    _, gradual = find(frames, fps)
    assert [t.kind for t in gradual] == ["dissolve"]
    assert abs(gradual[0].start - start) <= 3 and abs(gradual[0].end - start - n) <= 3


def test_fades_at_both_ends_of_a_file(frames_of: Callable) -> None:
    video = single_shot(2, width_px=128, height_px=72, duration_s=2.0)
    frames = frames_of(replace(video, fade_in_frames=18, fade_out_frames=24))
    _, gradual = find(frames)
    assert [t.kind for t in gradual] == ["fade", "fade"]
    assert gradual[0].start == 0 and abs(gradual[0].end - 18) <= 2
    assert abs(gradual[1].start - (18 + 48)) <= 2 and gradual[1].end == len(frames)


def test_a_cut_to_black_and_back_leaves_out_the_black_frames_only(frames_of: Callable) -> None:
    a, b = (frames_of(single_shot(s, width_px=128, height_px=72, duration_s=1.0)) for s in (1, 2))
    frames = np.concatenate([a, np.zeros((6, 72, 128, 3), np.uint8), b])
    cuts, gradual = find(frames)
    assert [tuple(t) for t in gradual] == [("blank", 24, 30)]
    shots = split_shots(len(frames), cuts, gradual, [])
    assert [tuple(s) for s in shots] == [(0, 24, "edge", "blank"), (30, 54, "blank", "edge")]


MOVES = {
    "static": Camera("static"),
    "slow_pan": Camera("pan_right", 0.12),
    "quick_pan": Camera("pan_left", 0.5),
    "tilt": Camera("tilt_up", 0.12),
    "zoom_in": Camera("zoom_in", zoom_factor_per_s=1.15),
    "zoom_out": Camera("zoom_out", zoom_factor_per_s=1.15),
    "shake": Camera("shake"),
}


@pytest.mark.parametrize("background", ["terrain", "brick", "bokeh"])
@pytest.mark.parametrize("move", MOVES)
def test_a_moving_camera_is_no_transition(frames_of: Callable, move: str, background: str) -> None:
    where = Background(background, "ocean")
    video = single_shot(3, camera=MOVES[move], background=where, shape="star", duration_s=2.5, width_px=128, height_px=72)
    assert find(frames_of(video)) == ([], [])


@pytest.mark.parametrize(("size", "speed"), [(0.9, 1.0), (0.9, 2.0), (0.6, 0.5)])
@pytest.mark.parametrize("background", ["terrain", "stripes"])
def test_a_large_object_that_passes_is_no_transition(frames_of: Callable, background: str, size: float, speed: float) -> None:
    where = Background(background, "ocean")
    video = single_shot(
        3,
        background=where,
        shape="square",
        duration_s=2.5,
        size_short_sides=size,
        speed_short_sides_per_s=speed,
        width_px=128,
        height_px=72,
    )
    assert find(frames_of(video)) == ([], [])


@pytest.mark.parametrize(
    ("gain_from", "gain_to", "first", "last"), [(1, 0.6, 12, 36), (0.7, 1.2, 5, 45), (1, 0.75, 20, 24), (1, 0.4, 10, 40)]
)
def test_a_change_of_exposure_is_no_transition(
    frames_of: Callable, gain_from: float, gain_to: float, first: int, last: int
) -> None:
    frames = frames_of(single_shot(3, background=Background("terrain", "ocean"), width_px=128, height_px=72))
    gain = np.interp(np.arange(len(frames)), [first, last], [gain_from, gain_to])[:, None, None, None]
    assert find(np.clip(frames * gain, 0, 255).astype(np.uint8)) == ([], [])


# --- hard cuts from similarities alone ---------------------------------------------------------------------------------


def similarity_with(drops: dict[int, float], n: int = 60, level: float = 0.99) -> np.ndarray:
    values = np.full(n, level)
    values[0] = 1.0
    for at, value in drops.items():
        values[at] = value
    return values


def test_a_lone_drop_is_a_cut_without_a_proposal() -> None:
    assert hard_cuts(similarity_with({20: 0.3, 41: 0.55}), [], RULES) == [20, 41]


def test_a_shallow_drop_is_a_cut_only_where_it_was_proposed() -> None:
    similarity = similarity_with({20: 0.8})
    assert hard_cuts(similarity, [], RULES) == []
    assert hard_cuts(similarity, [20], RULES) == [20]
    assert hard_cuts(similarity, [22], RULES) == [20]  # a proposal may be off by two frames
    assert hard_cuts(similarity, [30], RULES) == []


def test_a_proposal_that_descriptors_do_not_confirm_is_no_cut() -> None:
    assert hard_cuts(similarity_with({20: 0.9}), [20], RULES) == []


def test_restless_frames_are_no_cuts() -> None:
    similarity = similarity_with({t: 0.5 + 0.02 * (t % 3) for t in range(10, 50)})
    assert hard_cuts(similarity, [], RULES) == []


def test_of_two_drops_close_together_the_stronger_stays() -> None:
    assert hard_cuts(similarity_with({20: 0.4, 22: 0.2}), [20, 22], RULES) == [22]
    assert hard_cuts(similarity_with({20: 0.2, 22: 0.4}), [20, 22], RULES) == [20]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=80), st.lists(st.integers(0, 90), max_size=6))
def test_cuts_are_inside_sorted_and_apart(values: list[float], proposed: list[int]) -> None:
    similarity = np.array([1.0, *values])
    cuts = hard_cuts(similarity, proposed, RULES)
    assert cuts == sorted(cuts) and all(0 < c < len(similarity) for c in cuts)
    assert all(b - a >= 3 for a, b in pairwise(cuts))


# --- splitting ---------------------------------------------------------------------------------------------------------


@st.composite
def spans(draw: st.DrawFn, n: int, most: int) -> list[tuple[int, int]]:
    """Up to `most` disjoint spans in [0, n), in order, with a frame or more between them."""
    edges = sorted(draw(st.sets(st.integers(0, n), max_size=2 * most)))
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]


@st.composite
def films(draw: st.DrawFn) -> tuple[int, list[int], list[Transition], list[tuple[int, int]]]:
    n = draw(st.integers(1, 120))
    cuts = sorted(draw(st.sets(st.integers(1, n), max_size=6)) - {n})
    kinds = st.sampled_from(["dissolve", "fade", "blank"])
    gradual = [Transition(draw(kinds), a, b) for a, b in draw(spans(n, 3))]
    return n, cuts, gradual, draw(spans(n, 2))


@given(films())
def test_shots_cover_everything_outside_transitions_and_gaps(film: tuple[int, list[int], list[Transition], list]) -> None:
    n, cuts, gradual, gaps = film
    shots = split_shots(n, cuts, gradual, gaps)
    assert all(0 <= s.start < s.end <= n for s in shots)
    assert all(a.end <= b.start for a, b in pairwise(shots))
    outside = set(range(n)) - {f for a, b in [*((t.start, t.end) for t in gradual), *gaps] for f in range(a, b)}
    assert {f for s in shots for f in range(s.start, s.end)} == outside


@given(films())
def test_cuts_split_shots_unless_they_lie_in_or_beside_a_gradual_one(film: tuple[int, list[int], list[Transition], list]) -> None:
    n, cuts, gradual, gaps = film
    shots = split_shots(n, cuts, gradual, gaps)
    soft = [*((t.start, t.end) for t in gradual), *gaps]
    lone = [c for c in cuts if not any(a - 1 <= c <= b + 1 for a, b in soft)]
    assert [s.start for s in shots if s.transition_in == "cut"] == lone
    assert [s.end for s in shots if s.transition_out == "cut"] == lone
    for cut in set(cuts) - set(lone):
        beside = [s for s in shots if s.start == cut and s.transition_in == "cut"]
        assert beside == []


@given(films())
def test_only_the_ends_of_the_file_are_edges(film: tuple[int, list[int], list[Transition], list]) -> None:
    n, cuts, gradual, gaps = film
    for shot in split_shots(n, cuts, gradual, gaps):
        assert (shot.transition_in == "edge") == (shot.start == 0)
        assert (shot.transition_out == "edge") == (shot.end == n)


def test_splitting_by_example() -> None:
    gradual = [Transition("dissolve", 20, 30), Transition("fade", 90, 100)]
    shots = split_shots(100, [10, 25, 31, 60], gradual, [(70, 75)])
    assert shots == [
        Shot(0, 10, "edge", "cut"),
        Shot(10, 20, "cut", "dissolve"),
        Shot(30, 60, "dissolve", "cut"),
        Shot(60, 70, "cut", "gap"),
        Shot(75, 90, "gap", "fade"),
    ]
    assert split_shots(5, [], [Transition("blank", 0, 5)], []) == []
