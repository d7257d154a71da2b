"""Samplers against their densities, Eq. 1 and Eq. 2 against known values, and what the shift promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waver_core.errors import UserError
from waver_core.flow.timesteps import (
    MODE_SCALE_MAX,
    T_MARGIN,
    LogitNormal,
    Mode,
    Shifted,
    Timesteps,
    Uniform,
    logit_normal,
    logit_normal_density,
    mode,
    mode_density,
    named,
    shift,
)

DISTRIBUTIONS: list[Timesteps] = [
    LogitNormal(),
    LogitNormal(-0.5, 0.4),
    Mode(),
    Mode(-0.8),
    Mode(0.81),
    Uniform(),
    Shifted(LogitNormal(), 3.0),
    Shifted(Mode(), 3.0),
    Shifted(Mode(), 0.5),
    Shifted(Uniform(), 4.5),
]

shifts = st.floats(0.1, 20)
times = st.floats(0, 1)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_mode_has_the_values_of_equation_2() -> None:
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert mode(u, 1.29).tolist() == pytest.approx([1, 0.6164, 0.5, 0.3836, 0], abs=5e-5)
    assert mode(u).dtype == torch.float32


@given(st.floats(-1, MODE_SCALE_MAX))
def test_mode_falls_and_is_symmetric_at_every_allowed_scale(s: float) -> None:
    u = torch.linspace(0, 1, 501, dtype=torch.float64)
    t = mode(u, s)
    assert bool((t.diff() <= 1e-12).all())
    assert torch.allclose(t + t.flip(0), torch.ones_like(t), atol=1e-12)


@pytest.mark.parametrize("s", [-1.01, MODE_SCALE_MAX + 0.01, math.nan])
def test_a_scale_at_which_mode_turns_round_is_refused(s: float) -> None:
    with pytest.raises(UserError, match=r"take -1 to 1\.75"):
        Mode(s)
    with pytest.raises(UserError, match="scale"):
        mode_density(f64(0.5), s)


def test_just_beyond_the_largest_scale_mode_is_no_longer_monotone() -> None:
    s, u = MODE_SCALE_MAX + 0.02, torch.linspace(0, 1, 1001, dtype=torch.float64)
    t = 1 - u - s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    assert bool((t.diff() > 0).any())


@pytest.mark.parametrize("s", [0.0, -1.0, math.nan])
def test_a_deviation_that_is_none_is_refused(s: float) -> None:
    with pytest.raises(UserError, match="deviation"):
        LogitNormal(0.5, s)


def test_logit_normal_is_the_logistic_function_of_a_normal_number() -> None:
    t = logit_normal(torch.tensor([-1.0, 0.0, 1.0]), 0.5, 1.0)
    assert t.tolist() == pytest.approx([1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1.5))], abs=1e-6)


def test_densities_have_the_values_of_the_equations() -> None:
    assert logit_normal_density(f64(0.5), 0.0, 1.0).item() == pytest.approx(4 / math.sqrt(2 * math.pi))
    slopes = 1 + 1.29 - 1.29 * math.pi / 2  # Eq. 2 at u = 1/2, where t = 1/2
    assert mode_density(f64(0.5), 1.29).item() == pytest.approx(1 / slopes, rel=1e-9)
    assert mode_density(f64(0.0, 1.0), 1.29).tolist() == pytest.approx([1 / 2.29, 1 / 2.29], rel=1e-6)
    assert logit_normal_density(f64(-0.1, 0.0, 1.0, 1.1), 0.5, 1.0).tolist() == [0, 0, 0, 0]
    assert mode_density(f64(-0.1, 1.1)).tolist() == [0, 0]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_samples_follow_the_density(distribution: Timesteps, generator: torch.Generator) -> None:
    """Kolmogorov-Smirnov: the integral of the density against the share of draws below; 1.95 / sqrt(n) is once in 1,000."""
    n, cells = 100_000, 4000
    drawn = distribution.sample(generator, (n,))
    assert drawn.dtype == torch.float32 and drawn.shape == (n,)
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    cumulative = (distribution.density(middles) / cells).cumsum(0)
    assert cumulative[-1].item() == pytest.approx(1, abs=2e-3)
    edges = torch.arange(1, cells + 1, dtype=torch.float64) / cells
    below = torch.searchsorted(drawn.double().sort().values, edges, right=True) / n
    assert (below - cumulative).abs().max().item() < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("distribution", [LogitNormal(), Mode(), Shifted(Mode(), 3.0)], ids=repr)
def test_a_histogram_of_samples_fits_the_density(distribution: Timesteps, generator: torch.Generator) -> None:
    """Chi-square over 20 bins: above 43.8 (19 degrees of freedom) once in 1,000."""
    n, bins, fine = 50_000, 20, 200
    found = torch.histc(distribution.sample(generator, (n,)), bins, 0, 1).double()
    middles = (torch.arange(bins * fine, dtype=torch.float64) + 0.5) / (bins * fine)
    wanted = n * (distribution.density(middles) / (bins * fine)).reshape(bins, fine).sum(1)
    keep = wanted > 5
    assert float(((found - wanted)[keep] ** 2 / wanted[keep]).sum()) < 43.8


def test_the_report_s_figure_14_mode_is_sharper_than_logit_normal() -> None:
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    image, video = Shifted(LogitNormal(0.5, 1), 3.0).density(t), Shifted(Mode(1.29), 3.0).density(t)
    assert video.max() > image.max()
    assert t[video.argmax()].item() == pytest.approx(shift(f64(0.5), 3.0).item(), abs=0.03)


@given(times, shifts)
def test_a_shift_keeps_the_ends_the_order_and_is_undone_by_its_inverse(t: float, a: float) -> None:
    moved = shift(f64(0, t, 1), a)
    assert moved[0] == 0 and moved[2] == 1 and 0 <= moved[1] <= 1
    assert shift(moved, 1 / a)[1].item() == pytest.approx(t, abs=1e-9)
    assert (moved[1] >= t - 1e-12) if a >= 1 else (moved[1] <= t + 1e-12)


@given(times, times, shifts)
def test_a_shift_is_monotone(t: float, other: float, a: float) -> None:
    low, high = shift(f64(*sorted((t, other))), a).tolist()
    assert low <= high + 1e-15


@given(times, shifts, shifts)
def test_shifts_multiply(t: float, a: float, b: float) -> None:
    assert shift(shift(f64(t), a), b).item() == pytest.approx(shift(f64(t), a * b).item(), abs=1e-9)


def test_a_shift_of_one_changes_nothing_and_of_zero_is_refused() -> None:
    t = torch.linspace(0, 1, 11)
    assert torch.equal(shift(t, 1.0), t)
    for a in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="above 0"):
            Shifted(Uniform(), a)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_each_generator_gives_one_timestep_that_depends_on_it_alone(distribution: Timesteps) -> None:
    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = distribution.sample(seeded(5, 6, 7))
    assert together.shape == (3,) and together.dtype == torch.float32
    assert len(set(together.tolist())) == 3
    assert torch.equal(distribution.sample(seeded(7, 5)), together[[2, 0]])
    assert torch.equal(distribution.sample(seeded(6)[0]), together[1])


class Extreme(Uniform):
    """A distribution whose draws are as near to the ends as clamped ones come."""

    def sample(self, generator: object, size: tuple[int, ...] = ()) -> torch.Tensor:
        return torch.tensor([T_MARGIN, 1 - T_MARGIN])


@pytest.mark.parametrize("a", [0.01, 1.0, 7.0, 1e4])
def test_drawn_timesteps_never_touch_0_or_1(a: float, generator: torch.Generator) -> None:
    t = Shifted(Extreme(), a).sample(generator)
    assert bool(((t > 0) & (t < 1)).all())
    assert bool((LogitNormal(0, 50).sample(generator, (1000,)).logit().abs() < math.inf).all())


def test_recipes_name_the_distributions() -> None:
    assert named("logit_normal", mean=0.5, std=1.0) == LogitNormal(0.5, 1.0)
    assert named("mode", scale=1.0) == Mode(1.0)
    assert named("uniform") == Uniform()
    with pytest.raises(UserError, match="did you mean 'mode'"):
        named("moed")
