"""Euler against flows whose end is known: straight, curved, and that of Gaussian data; and how a run is stopped."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waver_core.errors import UserError
from waver_core.flow.degradation import degrade_latents
from waver_core.flow.objectives import refiner_target, velocity_target
from waver_core.flow.sampler import INFERENCE_SHIFT, Stop, refine, sample, timesteps


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 200), st.floats(0.1, 20))
def test_timesteps_fall_from_exactly_one_to_exactly_zero(steps: int, shift: float) -> None:
    t = timesteps(steps, shift)
    assert t.dtype == torch.float32 and t.shape == (steps + 1,)
    assert t[0] == 1 and t[-1] == 0
    assert bool((t.diff() < 0).all())


def test_timesteps_are_shifted_towards_noise() -> None:
    assert INFERENCE_SHIFT == 7.0
    assert timesteps(4, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert timesteps(4).tolist() == pytest.approx([1, 21 / 22, 7 / 8, 7 / 10, 0])
    with pytest.raises(UserError, match="at least 1"):
        timesteps(0)
    with pytest.raises(UserError, match="above 0"):
        timesteps(4, 0)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 7.0])
def test_a_straight_flow_is_solved_exactly_by_any_number_of_steps(steps: int, shift: float) -> None:
    x0, noise = randn(0, 16, 2, 4, 4), randn(1, 16, 2, 4, 4)
    found = sample(lambda x, t: velocity_target(x0, noise), noise, steps, shift)
    assert torch.allclose(found, x0, atol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_the_refiner_undoes_a_degradation_along_a_straight_flow(steps: int) -> None:
    x_0, x_n = randn(0, 16, 2, 4, 4), degrade_latents(randn(2, 16, 2, 4, 4), randn(1, 16, 2, 4, 4), torch.tensor(0.9))
    seen: list[float] = []

    def target(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen.append(w.item())
        return refiner_target(x_0, x_n)

    assert torch.allclose(refine(target, x_n, steps), x_0, atol=2e-6)
    assert seen == timesteps(steps)[:-1].tolist()


@pytest.mark.parametrize("shift", [1.0, 7.0])
def test_the_error_on_a_curved_flow_is_of_first_order(shift: float) -> None:
    """dx/dt = x cos(3t), from x(1) = 1: halving the steps doubles the error."""
    exact = math.exp(-math.sin(3) / 3)
    start = torch.ones(1, dtype=torch.float64)
    errors = [abs(sample(lambda x, t: x * torch.cos(3 * t), start, n, shift).item() - exact) for n in (100, 200, 400, 800)]
    assert errors[-1] < 0.01
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.4), (-2.0, 2.0)])
def test_gaussian_data_come_out_with_their_mean_and_deviation(mean: float, std: float) -> None:
    """The velocity E[n - x_0 | x_t] of data N(mean, std^2) is linear, and its flow takes noise n to mean + std * n."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean

    noise = randn(3, 20_000)
    found = sample(velocity, noise, 500, 3.0)
    assert found.mean().item() == pytest.approx(mean, abs=0.03)
    assert found.std().item() == pytest.approx(std, rel=0.03)
    assert (found - (mean + std * noise)).abs().max().item() < 0.1


def test_a_list_is_sampled_as_its_parts_alone() -> None:
    noises = [randn(0, 16, 1, 4, 4), randn(1, 16, 3, 2, 6)]

    def bend(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * t

    def bend_all(xs: list[torch.Tensor], t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert isinstance(xs, list) and t.shape == () and t.dtype == torch.float32
        return tuple(bend(x, t) for x in xs)

    together = sample(bend_all, noises, 5)
    assert isinstance(together, list)
    for found, noise in zip(together, noises):
        assert torch.equal(found, sample(bend, noise, 5))


def test_the_state_is_fp32_whatever_the_network_computes_in() -> None:
    noise = randn(0, 16, 1, 4, 4).bfloat16()
    dtypes: set[torch.dtype] = set()

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        dtypes.update((x.dtype, t.dtype))
        return x.bfloat16()

    assert sample(velocity, noise, 3).dtype == torch.float32
    assert dtypes == {torch.float32}


def test_noise_is_left_as_it_was_and_no_graph_is_kept() -> None:
    noise = randn(0, 16, 1, 4, 4).requires_grad_()
    before = noise.detach().clone()
    assert not sample(lambda x, t: 2 * x, noise, 3).requires_grad
    assert torch.equal(noise, before)


def test_progress_is_told_before_the_first_step_and_after_each() -> None:
    told: list[tuple[int, int]] = []
    calls: list[float] = []
    states: list[torch.Tensor] = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(t.item())
        return x

    def on_step(done: int, steps: int, state: Any) -> None:
        assert len(calls) == done
        told.append((done, steps))
        states.append(state)

    noise = randn(0, 16, 1, 4, 4)
    result = sample(velocity, noise, 3, on_step=on_step)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert torch.equal(states[0], noise) and torch.equal(states[-1], result)


@pytest.mark.parametrize("run", [sample, refine])
@pytest.mark.parametrize("after", [0, 2, 4])
@pytest.mark.parametrize("raises", [False, True])
def test_a_run_is_stopped_between_two_steps(run: Any, after: int, raises: bool) -> None:
    calls: list[float] = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(t.item())
        return x

    def on_step(done: int, steps: int, state: Any) -> bool:
        if done == after and raises:
            raise Stop(done, steps)
        return done < after

    with pytest.raises(Stop, match=f"after {after} of 4 steps") as caught:
        run(velocity, randn(0, 16, 1, 4, 4), 4, on_step=on_step)
    assert len(calls) == after
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.done, copy.steps) == (after, 4)


def test_predictions_of_another_shape_are_refused() -> None:
    noise = randn(0, 16, 2, 4, 4)
    with pytest.raises(ValueError, match="predictions have the shapes"):
        sample(lambda x, t: x[:, :1], noise, 2)
    with pytest.raises(ValueError, match="predictions have the shapes"):
        sample(lambda x, t: x[:1], [noise, noise], 2)
    with pytest.raises(ValueError, match="nothing to sample"):
        sample(lambda x, t: x, [], 2)
