"""Latents to tokens and back, and the 36 channels of the unified input (Waver §2.1)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waver_core.dit import condition, patchify, unpatchify
from waver_core.shapes import LatentShape

SIZES = st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7))


@given(st.lists(SIZES, min_size=1, max_size=3), st.integers(1, 3))
def test_patches_lead_back_to_the_same_latents(sizes: list[tuple[int, int, int]], channels: int) -> None:
    shapes = [LatentShape(*size) for size in sizes]
    latents = [torch.randn(channels, *s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
    patches = patchify(latents)
    assert patches.shape == (sum(s.tokens for s in shapes), 4 * channels)
    for before, after in zip(latents, unpatchify(patches, shapes), strict=True):
        assert torch.equal(before, after)


@given(st.lists(SIZES, min_size=2, max_size=3))
def test_a_sample_has_the_same_patches_in_any_batch(sizes: list[tuple[int, int, int]]) -> None:
    latents = [torch.randn(2, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    assert torch.equal(patchify(latents), torch.cat([patchify([x]) for x in latents]))
    alike = [latents[0], -latents[0]]
    assert torch.equal(patchify(alike), torch.cat([patchify([x]) for x in alike]))


def test_tokens_run_over_time_then_rows_then_columns_and_patches_over_channels() -> None:
    t, h, w = 2, 4, 6
    numbers = torch.arange(3 * t * h * w).view(3, t, h, w)
    patches = patchify([numbers.float()])
    token = 0
    for k in range(t):
        for row in range(0, h, 2):
            for column in range(0, w, 2):
                wanted = [numbers[c, k, row + i, column + j] for c in range(3) for i in (0, 1) for j in (0, 1)]
                assert patches[token].tolist() == [float(x) for x in wanted]
                token += 1
    assert token == len(patches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_odd_last_row_and_column_are_doubled(dtype: torch.dtype) -> None:
    x = torch.arange(9.0, dtype=dtype).view(1, 1, 3, 3)
    patches = patchify([x])
    assert patches.tolist() == [[0, 1, 3, 4], [2, 2, 5, 5], [6, 7, 6, 7], [8, 8, 8, 8]]


def test_what_was_added_to_odd_sizes_has_no_part_in_the_result() -> None:
    shape = LatentShape(1, 3, 3)
    patches = torch.randn(4, 4, requires_grad=True)
    (out,) = unpatchify(patches, [shape])
    out.sum().backward()
    assert patches.grad is not None
    assert patches.grad.tolist() == [[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.fixture
def parts(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents [16, 3, 4, 5], black [16, 1, 4, 5] and known latents."""
    return tuple(torch.randn(16, n, 4, 5, generator=generator) for n in (3, 1, 3))


def test_nothing_given_is_noise_black_latents_and_an_empty_mask(parts: tuple[torch.Tensor, ...]) -> None:
    noisy, black, known = parts
    for inputs in (condition(noisy, black), condition(noisy, black, known, [False] * 9)):
        assert inputs.shape == (36, 3, 4, 5)
        assert torch.equal(inputs[:16], noisy)
        assert torch.equal(inputs[16:32], black.repeat(1, 3, 1, 1))
        assert not inputs[32:].any()


def test_a_first_frame_fills_the_first_latent_frame_and_all_four_of_its_mask_channels(parts: tuple[torch.Tensor, ...]) -> None:
    noisy, black, known = parts
    inputs = condition(noisy, black, known, [True] + [False] * 8)
    assert torch.equal(inputs[:16], noisy)
    assert torch.equal(inputs[16:32, 0], known[:, 0])
    assert torch.equal(inputs[16:32, 1:], black.expand(-1, 2, -1, -1))
    assert (inputs[32:, 0] == 1).all() and not inputs[32:, 1:].any()


def test_a_last_frame_is_the_last_of_its_latent_frames_four(parts: tuple[torch.Tensor, ...]) -> None:
    noisy, black, known = parts
    inputs = condition(noisy, black, known, [True] + [False] * 7 + [True])
    assert torch.equal(inputs[16:32, [0, 2]], known[:, [0, 2]])
    assert torch.equal(inputs[16:32, 1], black[:, 0])
    mask = inputs[32:]
    assert (mask[:, 0] == 1).all() and not mask[:, 1].any()
    assert [bool((mask[c, 2] == 1).all()) for c in range(4)] == [False, False, False, True]
    assert not mask[:3, 2].any()


@given(st.lists(st.booleans(), min_size=13, max_size=13))
def test_the_mask_says_of_every_pixel_frame_whether_it_is_given(given_frames: list[bool]) -> None:
    noisy, black, known = torch.zeros(16, 4, 2, 2), torch.zeros(16, 1, 2, 2), torch.ones(16, 4, 2, 2)
    inputs = condition(noisy, black, known, given_frames)
    for frame, flag in enumerate(given_frames):
        latent_frame, place = (0, 0) if frame == 0 else (1 + (frame - 1) // 4, (frame - 1) % 4)
        assert (inputs[32 + place, latent_frame] == flag).all()
    for latent_frame in range(4):
        own = given_frames[:1] if latent_frame == 0 else given_frames[4 * latent_frame - 3 : 4 * latent_frame + 1]
        assert (inputs[16:32, latent_frame] == any(own)).all()


def test_marks_that_do_not_fit_the_frames_are_refused(parts: tuple[torch.Tensor, ...]) -> None:
    noisy, black, known = parts
    with pytest.raises(ValueError, match="8 pixel frames are marked for 3 latent frames"):
        condition(noisy, black, known, [True] * 8)
    with pytest.raises(ValueError, match="latents are missing"):
        condition(noisy, black, None, [True] * 9)
