"""Pixels, latents and tokens: the 1 + 4k rule, the strides, and the odd rows of 1080 lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waver_core.errors import UserError
from waver_core.shapes import LatentShape, VideoShape, whole_frames


def test_the_reports_sizes_in_latents_and_tokens() -> None:
    assert VideoShape(1, 256, 256).latent == (1, 32, 32)
    assert VideoShape(81, 480, 864).latent == (21, 60, 108)
    assert VideoShape(81, 480, 864).latent.tokens == 21 * 30 * 54
    assert VideoShape(241, 720, 1280).latent.grid == (61, 45, 80)


def test_1080_lines_are_135_rows_of_latents_and_68_rows_of_tokens() -> None:
    latent = VideoShape(237, 1080, 1920).latent
    assert latent == (60, 135, 240)
    assert latent.grid == (60, 68, 120)
    assert latent.tokens == 60 * 68 * 120
    assert VideoShape(1, 1920, 1080).latent.grid == (1, 120, 68)


@given(st.integers(1, 500), st.integers(2, 300), st.integers(2, 300))
def test_latents_know_what_they_decode_to(frames: int, height: int, width: int) -> None:
    latent = LatentShape(frames, height, width)
    assert latent.pixels.frames % 4 == 1
    assert latent.pixels.latent == latent


@given(st.integers(1, 2000))
def test_whole_frames_is_the_largest_1_plus_4k_that_is_not_above(frames: int) -> None:
    whole = whole_frames(frames)
    assert whole % 4 == 1 and frames - 4 < whole <= frames


def test_one_frame_is_an_image() -> None:
    assert VideoShape(1, 16, 16).is_image
    assert not VideoShape(5, 16, 16).is_image


@pytest.mark.parametrize("frames", [0, -3, 2, 4, 8, 80])
def test_other_frame_counts_are_refused_with_the_nearest_that_works(frames: int) -> None:
    with pytest.raises(UserError, match=r"take 1 \+ 4k of them, for example (\d+) or (\d+)") as caught:
        VideoShape(frames, 64, 64).latent  # noqa: B018
    near = whole_frames(max(1, frames))
    assert f"for example {near} or {near + 4}" in str(caught.value)


@pytest.mark.parametrize("size", [(100, 64), (64, 100), (8, 64), (64, 8), (0, 64), (-16, 64)])
def test_sizes_that_the_strides_do_not_divide_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="multiples of 8, at least 16"):
        VideoShape(5, *size).latent  # noqa: B018


def test_no_video_is_empty() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        whole_frames(0)
