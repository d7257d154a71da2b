"""What shrinking loses and keeps, that numpy and torch agree, and the noise's range."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waver_core.errors import UserError
from waver_core.flow.degradation import LatentDegradation, _bicubic, _bicubic_fp32, degrade_latents, degrade_pixels, resize


def noise_frames(frames: int = 3, height: int = 36, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3)).astype(np.uint8)


def wave(period_px: float, height: int = 90, width: int = 120) -> np.ndarray:
    """A grating along the width, uint8 [1, H, W, 3]."""
    row = 127.5 + 100 * np.sin(2 * np.pi * np.arange(width) / period_px)
    return np.broadcast_to(row[None, None, :, None], (1, height, width, 3)).round().astype(np.uint8)


def contrast(frames: np.ndarray) -> float:
    """Deviation, without the border."""
    return float(frames[:, 12:-12, 12:-12].astype(float).std())


def test_the_report_s_sizes() -> None:
    frames = np.zeros((1, 1080, 1920, 3), np.uint8)
    assert resize(frames, 360, 640).shape == (1, 360, 640, 3)
    assert degrade_pixels(frames).shape == frames.shape


def test_numpy_and_torch_agree_and_the_input_is_left_alone() -> None:
    frames = noise_frames()
    before = frames.copy()
    found = degrade_pixels(frames)
    assert isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.shape == frames.shape
    tensor = degrade_pixels(torch.from_numpy(frames))
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.uint8
    assert np.array_equal(tensor.numpy(), found)
    assert np.array_equal(frames, before)
    assert np.array_equal(degrade_pixels(frames[:, :, ::-1]), degrade_pixels(np.ascontiguousarray(frames[:, :, ::-1])))


@pytest.mark.parametrize(("height", "width"), [(12, 16), (72, 100), (36, 100), (72, 48), (10, 100), (108, 144)])
def test_what_gpus_compute_is_what_the_cpu_does_to_two_levels_even_on_noise(height: int, width: int) -> None:
    pixels = torch.from_numpy(noise_frames()).permute(0, 3, 1, 2)
    fast, any_device = (f(pixels, height, width) for f in (_bicubic, _bicubic_fp32))
    assert any_device.dtype == torch.uint8
    assert (fast.int() - any_device.int()).abs().max() <= 2


def test_coarse_detail_stays_and_fine_detail_goes_without_aliasing() -> None:
    coarse, fine = wave(24.0), wave(3.2)
    assert contrast(degrade_pixels(coarse)) > 0.9 * contrast(coarse)
    assert contrast(degrade_pixels(fine)) < 0.15 * contrast(fine)
    aliased = np.repeat(fine[:, :, ::3], 3, axis=2)  # what taking every third pixel would make of it
    assert contrast(aliased) > 0.8 * contrast(fine)


def test_colours_brightness_and_place_stay() -> None:
    flat = np.broadcast_to(np.array([10, 128, 250], np.uint8), (2, 36, 48, 3))
    assert np.array_equal(degrade_pixels(flat), flat)
    frames = noise_frames()
    assert degrade_pixels(frames).mean() == pytest.approx(frames.mean(), abs=1.0)
    dot = np.zeros((1, 45, 45, 3), np.uint8)
    dot[0, 21:24, 21:24] = 255
    ys, xs = np.nonzero(degrade_pixels(dot)[0, :, :, 0] > 64)
    assert (ys.mean(), xs.mean()) == pytest.approx((22, 22), abs=0.01)


def test_frames_are_degraded_apart_in_any_number() -> None:
    frames = noise_frames(19, 24, 24)
    together = degrade_pixels(frames)
    assert np.array_equal(together, np.concatenate([degrade_pixels(frames[k : k + 1]) for k in range(len(frames))]))
    assert degrade_pixels(frames[:0]).shape == (0, 24, 24, 3)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(1, 50))
def test_any_size_and_factor_comes_back_at_its_size(height: int, width: int, factor: float) -> None:
    frames = noise_frames(1, height, width)
    assert degrade_pixels(frames, factor).shape == frames.shape


def test_a_factor_of_one_changes_nothing_and_larger_ones_ever_more() -> None:
    frames = noise_frames()
    assert np.array_equal(degrade_pixels(frames, 1.0), frames)
    left = [contrast(degrade_pixels(frames, factor)) for factor in (1.5, 2, 3, 4)]
    assert left == sorted(left, reverse=True)


def test_what_cannot_be_degraded_is_refused() -> None:
    frames = noise_frames()
    for factor in (0.5, math.inf, math.nan):
        with pytest.raises(UserError, match="at least 1"):
            degrade_pixels(frames, factor)
    with pytest.raises(TypeError, match="uint8"):
        degrade_pixels(frames.astype(np.float32))
    with pytest.raises(ValueError, match="T, H, W, 3"):
        resize(frames[0], 12, 12)
    with pytest.raises(ValueError, match="empty"):
        resize(frames, 0, 12)


def test_latents_are_mixed_with_noise_by_weight(generator: torch.Generator) -> None:
    x, noise = torch.randn((2, 16, 2, 4, 4), generator=generator), torch.randn((2, 16, 2, 4, 4), generator=generator)
    w = torch.tensor([0.85, 0.95])
    mixed = degrade_latents(x, noise, w)
    for k in range(2):
        assert torch.allclose(mixed[k], (1 - w[k]) * x[k] + w[k] * noise[k])
        assert torch.equal(mixed[k], degrade_latents(x[k], noise[k], w[k]))


def test_the_weight_is_uniform_in_its_range_and_each_sample_has_its_own() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    w = LatentDegradation().sample(generators)
    assert w.shape == (2000,) and w.dtype == torch.float32
    assert 0.85 <= w.min() < 0.8505 and 0.9495 < w.max() <= 0.95
    assert w.mean().item() == pytest.approx(0.9, abs=0.002)
    assert w.std().item() == pytest.approx(0.1 / math.sqrt(12), rel=0.05)
    assert torch.equal(LatentDegradation().sample(torch.Generator().manual_seed(7)), w[7])
    assert LatentDegradation(0.9, 0.9).sample(generators[0]).item() == pytest.approx(0.9)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.5), (0.5, 1.1), (0.9, 0.8), (math.nan, 0.9)])
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match="no range"):
        LatentDegradation(low, high)
