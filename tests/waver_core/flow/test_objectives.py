"""Signs and ends of both flows; and a sample's loss is its own, whatever shares its batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waver_core.flow.objectives import (
    alignment_loss,
    flow_loss,
    interpolate,
    refiner_input,
    refiner_target,
    velocity_target,
)

SHAPES = [(16, 1, 6, 4), (16, 3, 4, 4), (16, 2, 8, 2)]


def pair(generator: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_noise_is_at_one_and_data_at_zero_exactly(generator: torch.Generator) -> None:
    x0, n = pair(generator, 3, 16, 2, 4, 4)
    assert torch.equal(interpolate(x0, n, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, n, torch.ones(3)), n)


def test_each_sample_of_a_batch_has_its_own_timestep(generator: torch.Generator) -> None:
    x0, n = pair(generator, 3, 16, 2, 4, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    for mixed, x, noise, one in zip(interpolate(x0, n, t), x0, n, t):
        assert torch.equal(mixed, interpolate(x, noise, one))


@given(st.floats(0.05, 0.95))
def test_targets_are_the_slopes_of_the_paths(t: float) -> None:
    x0, n = (part.double() for part in pair(torch.Generator().manual_seed(1), 16, 2, 4, 4))
    step = 1e-3
    before, after = (torch.tensor(t + d, dtype=torch.float64) for d in (-step, step))
    slope = (interpolate(x0, n, after) - interpolate(x0, n, before)) / (2 * step)
    assert torch.allclose(velocity_target(x0, n), slope, atol=1e-9)
    slope = (refiner_input(n, x0, after) - refiner_input(n, x0, before)) / (2 * step)
    assert torch.allclose(refiner_target(x0, n), -slope, atol=1e-9)


def test_the_refiner_starts_degraded_and_its_target_leads_to_the_clean(generator: torch.Generator) -> None:
    x_0, x_n = pair(generator, 16, 2, 4, 4)
    assert torch.equal(refiner_input(x_n, x_0, torch.tensor(1.0)), x_n)
    assert torch.equal(refiner_input(x_n, x_0, torch.tensor(0.0)), x_0)
    assert torch.allclose(x_n + refiner_target(x_0, x_n), x_0, atol=1e-6)


def test_low_precision_latents_are_mixed_in_fp32_and_low_precision_timesteps_refused(generator: torch.Generator) -> None:
    x0, n = (part.bfloat16() for part in pair(generator, 16, 2, 4, 4))
    assert interpolate(x0, n, torch.tensor(0.3)).dtype == torch.float32
    assert velocity_target(x0, n).dtype == torch.float32
    with pytest.raises(TypeError, match="fp32"):
        interpolate(x0, n, torch.tensor(0.3, dtype=torch.bfloat16))


def test_what_would_broadcast_silently_is_refused(generator: torch.Generator) -> None:
    x0, n = pair(generator, 16, 2, 4, 4)
    with pytest.raises(ValueError, match="shapes differ"):
        interpolate(x0, n[:, :1], torch.tensor(0.5))
    with pytest.raises(ValueError, match="do not count"):
        interpolate(x0, n, torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="shapes differ"):
        flow_loss([x0], [n[:, :1]])
    with pytest.raises(ValueError, match="counterpart"):
        flow_loss([x0, n], [n])
    with pytest.raises(ValueError, match="shapes differ"):
        alignment_loss([x0], [n[:1]])
    with pytest.raises(ValueError, match="counterpart"):
        alignment_loss([x0], [])


def test_a_list_has_the_losses_of_a_batch_and_of_its_samples_alone(generator: torch.Generator) -> None:
    pred, target = pair(generator, 4, 16, 3, 4, 4)
    weight = torch.rand((4, 1, 3, 1, 1), generator=generator)
    for mask in (None, weight):
        batch = flow_loss(pred, target, mask)
        listed = flow_loss(list(pred), list(target), None if mask is None else list(mask))
        alone = [flow_loss([p], [y], None if mask is None else [mask[k]]) for k, (p, y) in enumerate(zip(pred, target))]
        assert batch.shape == (4,) and batch.dtype == torch.float32
        assert torch.equal(batch, listed)
        assert torch.equal(batch, torch.cat(alone))
    assert torch.allclose(flow_loss(pred, target), (pred - target).square().flatten(1).mean(1), atol=1e-6)


def test_samples_of_different_shapes_keep_to_themselves(generator: torch.Generator) -> None:
    pairs = [pair(generator, *shape) for shape in SHAPES]
    preds, targets = [p.requires_grad_() for p, _ in pairs], [y for _, y in pairs]
    losses = flow_loss(preds, targets)
    assert torch.allclose(losses, torch.stack([torch.nn.functional.mse_loss(p, y) for p, y in pairs]))
    losses[1].backward()
    assert [p.grad is not None and bool(p.grad.any()) for p in preds] == [False, True, False]


def test_masked_frames_count_for_nothing(generator: torch.Generator) -> None:
    pred, target = pair(generator, 16, 3, 4, 4)
    mask = torch.tensor([0.0, 1.0, 1.0]).reshape(1, 3, 1, 1)
    wanted = (pred - target)[:, 1:].square().mean()
    assert torch.allclose(flow_loss([pred], [target], [mask]), wanted)
    pred[:, 0] = 1e6
    assert torch.allclose(flow_loss([pred], [target], [mask]), wanted)
    assert torch.allclose(flow_loss([pred], [target], [5 * mask]), wanted)


def test_a_sample_with_nothing_to_learn_has_loss_and_gradient_zero(generator: torch.Generator) -> None:
    pred, target = pair(generator, 16, 1, 4, 4)
    loss = flow_loss([pred.requires_grad_()], [target], [torch.zeros(1, 1, 1, 1)])
    loss.sum().backward()
    assert loss.item() == 0
    assert pred.grad is not None and not pred.grad.any()


def test_losses_accumulate_in_fp32() -> None:
    ones = torch.ones((16, 8, 32, 32), dtype=torch.bfloat16)
    loss = flow_loss([1.0078125 * ones], [ones])  # the next bfloat16 above 1; its square is lost in a bfloat16 sum
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.0078125**2, rel=1e-5)


@given(st.floats(0.01, 100))
def test_alignment_is_minus_the_cosine_whatever_the_lengths(scale: float) -> None:
    generator = torch.Generator().manual_seed(2)
    h, f = pair(generator, 2, 3, 4, 24)
    cosine = (h * f).sum(-1) / (h.norm(dim=-1) * f.norm(dim=-1))
    assert torch.allclose(alignment_loss([scale * h], [f]), -cosine.mean(), atol=1e-5)
    assert alignment_loss([scale * f, -scale * f], [f, f]).tolist() == pytest.approx([-1, 1], abs=1e-5)


def test_alignment_is_per_sample_and_survives_zero_vectors(generator: torch.Generator) -> None:
    pairs = [pair(generator, *grid, 8) for grid in [(1, 2, 2), (2, 3, 1)]]
    losses = alignment_loss([h for h, _ in pairs], [f for _, f in pairs])
    assert losses.shape == (2,)
    assert torch.equal(losses[1:], alignment_loss([pairs[1][0]], [pairs[1][1]]))
    zero = torch.zeros((2, 2, 2, 8), requires_grad=True)
    loss = alignment_loss([zero], [torch.ones_like(zero)])
    loss.sum().backward()
    assert loss.item() == 0
    assert zero.grad is not None and bool(zero.grad.isfinite().all())
