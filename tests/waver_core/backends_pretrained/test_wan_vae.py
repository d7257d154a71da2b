"""The Wan autoencoder from a small random checkpoint on disk: the library's own numbers, normalised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.waver_core.backends_pretrained import tiny_encoders
from waver_core.errors import ConfigError, UserError
from waver_core.registry import create

pytestmark = pytest.mark.models


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return tiny_encoders.save_wan_vae(tmp_path / "wan-tiny")


def clip_of(seed: int, frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A smooth random clip, uint8 [T, H, W, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3)).astype(np.uint8)
    return np.stack([cv2.normalize(cv2.GaussianBlur(f, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX) for f in noise])


def test_latents_are_the_library_s_mode_normalised_by_the_config(checkpoint: str) -> None:
    from diffusers import AutoencoderKLWan

    clip = clip_of(0, 5)
    (latent,) = create("video_autoencoder", "wan_vae", checkpoint=checkpoint, device="cpu").encode([clip])
    model = AutoencoderKLWan.from_pretrained(Path(checkpoint) / "vae").eval()
    mean, std = (np.array(v).reshape(16, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    with torch.inference_mode():
        posterior = model.encode(torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist
    assert latent.shape == (16, 2, 4, 6) and latent.dtype == np.float32
    np.testing.assert_allclose(latent, (posterior.mean[0].numpy() - mean) / std, atol=1e-5)


def test_decoding_undoes_the_normalisation(checkpoint: str) -> None:
    from diffusers import AutoencoderKLWan

    latent = np.random.default_rng(0).normal(size=(16, 2, 4, 6)).astype(np.float32)
    (clip,) = create("video_autoencoder", "wan_vae", checkpoint=checkpoint, device="cpu").decode([latent])
    model = AutoencoderKLWan.from_pretrained(Path(checkpoint) / "vae").eval()
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    with torch.inference_mode():
        pixels = model.decode(torch.from_numpy(latent)[None] * std + mean).sample[0]
    expected = np.rint((pixels.permute(1, 2, 3, 0).numpy() + 1) * 127.5)
    assert clip.shape == (5, 32, 48, 3) and clip.dtype == np.uint8
    assert clip.min() < clip.max() and np.abs(clip - expected).max() <= 1


def test_clips_of_several_shapes_come_back_in_order(checkpoint: str) -> None:
    clips = [clip_of(0, 5), clip_of(1, 1), clip_of(2, 5), clip_of(3, 1, 48, 32), clip_of(4, 5)]
    together = create("video_autoencoder", "wan_vae", checkpoint=checkpoint, device="cpu", batch_size=2).encode(clips)
    alone = create("video_autoencoder", "wan_vae", checkpoint=checkpoint, device="cpu")
    for clip, latent in zip(clips, together, strict=True):
        np.testing.assert_allclose(latent, alone.encode([clip])[0], atol=1e-5)
    decoded = alone.decode(together)
    assert [d.shape for d in decoded] == [c.shape for c in clips]


def test_tiles_come_near_the_whole_and_are_named_in_the_fingerprint(checkpoint: str) -> None:
    clip = clip_of(0, 1, 96, 128)
    whole = create("video_autoencoder", "wan_vae", checkpoint=checkpoint, device="cpu")
    tiled = create("video_autoencoder", "wan_vae", checkpoint=checkpoint, device="cpu", tile_px=64)
    assert whole.fingerprint != tiled.fingerprint and "tile_px=64" in tiled.fingerprint
    (exact,), (near,) = whole.encode([clip]), tiled.encode([clip])
    assert near.shape == exact.shape and np.abs(near - exact).max() > 0
    np.testing.assert_allclose(near[:, :, :4, :4], exact[:, :, :4, :4], atol=0.05)
    assert tiled.decode([near])[0].shape == clip.shape
    with pytest.raises(ConfigError, match="multiple of 32"):
        create("video_autoencoder", "wan_vae", tile_px=100)


def test_what_is_wrong_or_missing_is_named_with_its_remedy(checkpoint: str, tmp_path: Path, check_missing: Callable) -> None:
    missing = create("video_autoencoder", "wan_vae", device="cpu")
    check_missing(missing, lambda: missing.encode([clip_of(0, 5)]))
    with pytest.raises(UserError, match=r"1 \+ 4k"):
        create("video_autoencoder", "wan_vae", checkpoint=checkpoint, device="cpu").encode([clip_of(0, 4)])
    other = tiny_encoders.save_wan_vae(tmp_path / "other", z_dim=48, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    with pytest.raises(ConfigError, match="48 channels"):
        create("video_autoencoder", "wan_vae", checkpoint=other, device="cpu").encode([clip_of(0, 1)])
