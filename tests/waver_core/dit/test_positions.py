"""Rotary positions against complex numbers, and what they are for: attention scores that know differences only."""

from __future__ import annotations

import cmath
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waver_core.dit import Layout, WaverDiT
from waver_core.dit.positions import FactorisedPositions, rope_angles, rotate, timestep_features
from waver_core.shapes import LatentShape

DIMS = (6, 4, 6)
PLACE = st.tuples(st.integers(0, 60), st.integers(0, 120), st.integers(0, 120))


def turned(x: torch.Tensor, place: tuple[int, int, int]) -> torch.Tensor:
    """x [H, d] at a place."""
    angles = rope_angles(torch.tensor([place]), DIMS)
    return rotate(x[None], angles.cos()[:, None], angles.sin()[:, None])[0]


@given(PLACE)
def test_rotation_is_multiplication_with_complex_numbers(place: tuple[int, int, int]) -> None:
    x = torch.randn(2, sum(DIMS), generator=torch.Generator().manual_seed(0))
    out = turned(x, place)
    half = sum(DIMS) // 2
    for head in range(2):
        pair = 0
        for axis, dim in enumerate(DIMS):
            for i in range(dim // 2):
                angle = place[axis] * 10_000.0 ** (-2 * i / dim)
                z = complex(x[head, pair], x[head, pair + half]) * cmath.exp(1j * angle)
                assert abs(complex(out[head, pair], out[head, pair + half]) - z) < 2e-5
                pair += 1
        assert pair == half


@given(PLACE, PLACE, PLACE)
def test_scores_depend_on_differences_of_positions_alone(a: tuple[int, ...], b: tuple[int, ...], moved: tuple[int, ...]) -> None:
    q, k = torch.randn(2, 1, sum(DIMS), generator=torch.Generator().manual_seed(1))
    score = (turned(q, a) * turned(k, b)).sum()  # type: ignore[arg-type]
    there = [tuple(x + y for x, y in zip(place, moved)) for place in (a, b)]
    again = (turned(q, there[0]) * turned(k, there[1])).sum()  # type: ignore[arg-type]
    assert abs(score - again) < 1e-4


def test_every_axis_turns_and_length_stays() -> None:
    x = torch.randn(1, sum(DIMS), generator=torch.Generator().manual_seed(2))
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    results = [turned(x, place) for place in places]
    assert torch.equal(results[0], x)
    for i, result in enumerate(results):
        assert abs(result.norm() - x.norm()) < 1e-5
        assert all((result - other).abs().max() > 0.1 for other in results[:i])


def test_angles_are_exact_to_fp32_far_out_and_the_result_has_the_type_of_x() -> None:
    angles = rope_angles(torch.tensor([[100_000, 0, 0]]), DIMS)
    assert angles.dtype == torch.float32
    assert torch.equal(angles[0, :3], torch.tensor([100_000 * 10_000.0 ** (-2 * i / 6) for i in range(3)]))
    x = torch.randn(1, 2, 16).bfloat16()
    assert rotate(x, torch.ones(1, 1, 8), torch.zeros(1, 1, 8)).dtype == torch.bfloat16


def test_text_is_not_turned_and_video_is_by_its_place(make_model: Callable[..., WaverDiT]) -> None:
    layout = Layout([LatentShape(2, 4, 4), LatentShape(1, 2, 6)], [[2, 1], [1, 3]])
    model = make_model()
    rope = model._rope(layout)
    text_cos, video_cos = layout.split(rope.cos[:, 0])
    text_sin, video_sin = layout.split(rope.sin[:, 0])
    assert (text_cos == 1).all() and not text_sin.any()
    angles = rope_angles(layout.positions, model.config.rope_dims)
    assert torch.allclose(video_cos, angles.cos()) and torch.allclose(video_sin, angles.sin())


def test_factorised_positions_are_sums_of_a_time_a_row_and_a_column() -> None:
    tables = FactorisedPositions((3, 4, 5), 6)
    with torch.no_grad():
        for table in tables.tables:
            table.normal_(generator=torch.Generator().manual_seed(len(table)))
    places = torch.tensor([[0, 0, 0], [2, 3, 4], [1, 3, 0]])
    out = tables(places)
    for row, (t, y, x) in zip(out, places.tolist()):
        assert torch.allclose(row, tables.tables[0][t] + tables.tables[1][y] + tables.tables[2][x])


def test_factorised_positions_start_as_sinusoids_that_tell_every_place_apart() -> None:
    tables = FactorisedPositions((4, 6, 6), 32)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(6), torch.arange(6))
    out = tables(places).detach()
    assert out.abs().max() <= 1.5 + 1e-6
    assert torch.pdist(out).min() > 0.05


@pytest.mark.parametrize("width", [7, 8])
def test_tables_of_odd_widths_have_their_width(width: int) -> None:
    assert FactorisedPositions((2, 2, 2), width)(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, width)


def test_timesteps_are_told_apart_where_bfloat16_would_not() -> None:
    close = torch.tensor([0.999, 0.9995])
    assert close.bfloat16().unique().numel() == 1
    features = timestep_features(close)
    assert features.shape == (2, 256) and features.dtype == torch.float32
    assert (features[0] - features[1]).abs().max() > 0.1
    assert torch.equal(timestep_features(close[1:]), features[1:])
