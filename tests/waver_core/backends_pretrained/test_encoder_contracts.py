"""Every autoencoder, text encoder and feature extractor keeps its contract: the embedded ones, and the others in small."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.waver_core.backends_pretrained import tiny_chat, tiny_encoders
from waver_core.backends.contracts import FeatureExtractor, TextEncoder, VideoAutoencoder
from waver_core.errors import UserError
from waver_core.registry import backends, create

pytestmark = pytest.mark.models
SAVERS: dict[str, Callable[[Path], str]] = {
    "wan_vae": tiny_encoders.save_wan_vae,
    "t5": tiny_encoders.save_t5,
    "qwen2_5": tiny_chat.save_qwen_text,
    "qwen2_5_vl": tiny_chat.save_qwen_vl,
}
EMBEDDED = {"dct", "hashed_words", "hashed_pairs", "frame_statistics"}
TEXTS = ["A red disc moves to the right.", "", "ring", " \n", "2.5 blue squares, «naïve» 東京 \x00", "word " * 400]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Builds a backend by its name, the same object for the same options."""
    folder = tmp_path_factory.mktemp("tiny")

    @cache
    def build(capability: str, name: str, fresh: bool = False) -> Any:
        if name in EMBEDDED:
            return create(capability, name)
        place = folder / name
        return create(capability, name, checkpoint=str(place) if place.exists() else SAVERS[name](place), device="cpu")

    return build


def each(capability: str) -> pytest.MarkDecorator:
    """One case for every backend of a capability, new ones included."""
    return pytest.mark.parametrize("name", backends(capability))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("capability", ["video_autoencoder", "text_encoder", "feature_extractor"])
def test_fingerprints_are_stable_and_differ(capability: str, built: Callable[..., Any]) -> None:
    prints = [built(capability, name).fingerprint for name in backends(capability)]
    assert all(prints) and len(set(prints)) == len(prints)
    assert prints == [built(capability, name, fresh=True).fingerprint for name in backends(capability)]


@each("video_autoencoder")
def test_latents_have_the_shape_that_shapes_promise(name: str, built: Callable[..., Any]) -> None:
    codec = built("video_autoencoder", name)
    assert isinstance(codec, VideoAutoencoder)
    clips = [noise(5, 16, 24, 3), noise(1, 32, 16, 3), np.zeros((5, 16, 24, 3), np.uint8)]
    before = [clip.copy() for clip in clips]
    latents = codec.encode(clips)
    assert [latent.shape for latent in latents] == [(16, 2, 2, 3), (16, 1, 4, 2), (16, 2, 2, 3)]
    assert all(latent.dtype == np.float32 and np.isfinite(latent).all() for latent in latents)
    decoded = codec.decode(latents)
    assert [clip.shape for clip in decoded] == [clip.shape for clip in clips]
    assert all(clip.dtype == np.uint8 for clip in decoded)
    assert all(np.array_equal(a, b) for a, b in zip(clips, before))
    assert all(np.array_equal(a, b) for a, b in zip(latents, codec.encode(clips)))
    assert codec.encode([]) == [] and codec.decode([]) == []


@each("video_autoencoder")
def test_latents_depend_on_no_later_frame_and_no_other_clip(name: str, built: Callable[..., Any]) -> None:
    codec, clip = built("video_autoencoder", name), noise(9, 16, 16, 3)
    (latent,) = codec.encode([clip])
    changed = clip.copy()
    changed[5:] = 255 - changed[5:]
    with_changed, first_alone, shorter = (
        codec.encode([c, noise(1, 16, 16, 3, seed=1)])[0] for c in (changed, clip[:1], clip[:5])
    )
    np.testing.assert_allclose(with_changed[:, :2], latent[:, :2], atol=1e-4)
    np.testing.assert_allclose(first_alone, latent[:, :1], atol=1e-4)
    np.testing.assert_allclose(shorter, latent[:, :2], atol=1e-4)
    assert np.abs(with_changed[:, 2] - latent[:, 2]).max() > 1e-3


@each("video_autoencoder")
@pytest.mark.parametrize("shape", [(4, 16, 16), (0, 16, 16), (5, 20, 16), (5, 16, 8)])
def test_a_clip_without_latents_is_refused_by_shapes(name: str, shape: tuple[int, int, int], built: Callable[..., Any]) -> None:
    codec = built("video_autoencoder", name)
    with pytest.raises(UserError, match="cannot be encoded"):
        codec.encode([np.zeros((*shape, 3), np.uint8)])
    with pytest.raises(ValueError, match="uint8"):
        codec.encode([np.zeros((5, 16, 16, 3), np.float32)])
    with pytest.raises(ValueError, match="latents must be"):
        codec.decode([np.zeros((4, 2, 2, 2), np.float32)])


@each("text_encoder")
def test_texts_have_a_vector_per_token_and_at_least_one(name: str, built: Callable[..., Any]) -> None:
    encoder = built("text_encoder", name)
    assert isinstance(encoder, TextEncoder)
    found = encoder.encode(TEXTS)
    assert all(v.dtype == np.float32 and v.shape[1:] == (encoder.dim,) and np.isfinite(v).all() for v in found)
    assert all(1 <= len(v) <= encoder.max_tokens for v in found)
    assert len(found[1]) == 1 and len(found[0]) > len(found[2]) and len(found[5]) == encoder.max_tokens
    for text, vectors in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vectors, atol=1e-4)
    assert encoder.encode([]) == []


@each("text_encoder")
def test_the_order_of_words_counts(name: str, built: Callable[..., Any]) -> None:
    one, other = built("text_encoder", name).encode(["a red disc left of a blue ring", "a blue disc left of a red ring"])
    assert one.shape == other.shape and np.abs(one - other).max() > 0.05
    # Not even as sets of vectors are they the same.
    distance = np.abs(one[:, None] - other[None]).max(axis=-1)
    assert distance.min(axis=1).max() > 0.01


@each("feature_extractor")
def test_features_lie_on_the_wanted_grid(name: str, built: Callable[..., Any]) -> None:
    extractor = built("feature_extractor", name)
    assert isinstance(extractor, FeatureExtractor)
    clips = [noise(5, 56, 84, 3), noise(1, 64, 64, 3), np.zeros((9, 64, 56, 3), np.uint8), noise(2, 56, 56, 3)]
    grids = [(2, 4, 6), (1, 3, 3), (3, 2, 2), (4, 9, 9)]
    found = extractor.extract(clips, grids)
    assert [f.shape for f in found] == [(*grid, extractor.dim) for grid in grids]
    assert all(f.dtype == np.float32 and np.isfinite(f).all() for f in found)
    for clip, grid, features in zip(clips, grids, found, strict=True):
        np.testing.assert_allclose(extractor.extract([clip], [grid])[0], features, atol=1e-5)
    assert found[0].std(axis=(0, 1, 2)).max() > 0.01
    with pytest.raises(ValueError, match="uint8"):
        extractor.extract([np.zeros((2, 56, 56, 3))], [(1, 1, 1)])
    with pytest.raises(ValueError, match="argument"):
        extractor.extract(clips, grids[:1])
