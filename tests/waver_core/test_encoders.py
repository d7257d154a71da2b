"""The embedded encoders measure what they say: the DCT codec, hashed text, and classical features."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waver_core.backends.embedded import dct_codec, frame_statistics, hashed_text
from waver_core.errors import ConfigError
from waver_core.registry import create
from waver_core.synthetic import render, single_shot


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def texture(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.5), None, 0, 255, cv2.NORM_MINMAX)


def scene(direction: str = "right", colour: str = "red", frames: int = 9, size_px: int = 64) -> np.ndarray:
    video = single_shot(
        3, colour=colour, direction=direction, duration_s=frames / 8, width_px=size_px, height_px=size_px, fps=8,
        speed_short_sides_per_s=0.4,
    )  # fmt: skip
    return np.stack(list(render(video)))[:frames]


# --- the DCT codec -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("later", "length"), [(False, 8 * 8 * 3), (True, 4 * 8 * 8 * 3)])
def test_the_kept_blocks_are_orthonormal(later: bool, length: int) -> None:
    matrix = dct_codec.basis(later)
    assert matrix.shape == (16, length)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(16), atol=1e-12)


@pytest.mark.parametrize("scaling", ["root", "unit", "none"])
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(0, 2), height=st.integers(2, 4), width=st.integers(2, 4))
def test_what_was_decoded_encodes_to_the_same_latents(scaling: str, seed: int, k: int, height: int, width: int) -> None:
    codec = create("video_autoencoder", "dct", scaling=scaling)
    latent = np.random.default_rng(seed).normal(0, 0.3, (16, 1 + k, height, width)).astype(np.float32)  # nothing clips
    (again,) = codec.encode(codec.decode([latent]))
    assert np.abs(again - latent).max() < 0.06


@given(seed=st.integers(0, 2**32 - 1))
def test_encoding_a_decoded_clip_again_loses_only_what_rounding_and_clipping_take(seed: int) -> None:
    codec = create("video_autoencoder", "dct")
    clip = cv2.GaussianBlur(np.random.default_rng(seed).integers(64, 192, (24, 16, 15)).astype(np.uint8), (0, 0), 2)
    (once,) = codec.decode(codec.encode([clip.reshape(24, 16, 5, 3).transpose(2, 0, 1, 3)]))
    (twice,) = codec.decode(codec.encode([once]))
    assert np.abs(once.astype(int) - twice).max() <= 2


def test_a_still_clip_has_the_first_frame_s_first_ten_channels_throughout_and_no_change() -> None:
    still = np.repeat(texture(32, 48)[None], 9, axis=0)
    (latent,) = create("video_autoencoder", "dct").encode([still])
    np.testing.assert_allclose(latent[:10, 1:], np.repeat(latent[:10, :1], 2, axis=1), atol=1e-4)
    assert np.abs(latent[10:, 1:]).max() < 1e-4 < np.abs(latent[10:, 0]).max()


def test_channels_say_what_they_are_named_for() -> None:
    codec = create("video_autoencoder", "dct")
    frames = {
        "white": np.full((5, 16, 16, 3), 255, np.uint8),
        "red": np.broadcast_to(np.array([255, 0, 0], np.uint8), (5, 16, 16, 3)),
        "green": np.broadcast_to(np.array([0, 255, 0], np.uint8), (5, 16, 16, 3)),
        "darker to the right": np.broadcast_to(np.linspace(255, 0, 16).astype(np.uint8)[:, None], (5, 16, 16, 3)),
    }
    white, red, green, ramp = (codec.encode([np.ascontiguousarray(f)])[0] for f in frames.values())
    assert white[0].min() > 1 and np.abs(white[1:]).max() < 1e-4
    assert red[6].min() > 1 and green[9].min() > 1 and np.abs(green[6]).max() < 1e-4
    assert ramp[1].min() > 0.5 and np.abs(ramp[2]).max() < 1e-4
    fading = np.repeat(np.linspace(255, 0, 5).astype(np.uint8), 16 * 16 * 3).reshape(5, 16, 16, 3)
    assert codec.encode([fading])[0][10, 1].min() > 0.5


@pytest.mark.parametrize("size_px", [64, 128])
def test_rendered_scenes_come_back_well_enough_to_be_recognised(size_px: int) -> None:
    codec, clip = create("video_autoencoder", "dct"), scene(size_px=size_px)
    (decoded,) = codec.decode(codec.encode([clip]))
    assert psnr_db(clip[:1], decoded[:1]) > 27 and psnr_db(clip[1:], decoded[1:]) > 24


def test_a_smooth_clip_comes_back_nearly_whole() -> None:
    x, y, t = np.meshgrid(np.arange(64), np.arange(64), np.arange(9), indexing="xy")
    waves = [np.sin((x + 2 * t) / 14 + k) * np.cos((y - t) / 17) for k in range(3)]
    clip = np.rint(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8).transpose(2, 0, 1, 3)
    codec = create("video_autoencoder", "dct")
    assert psnr_db(clip, codec.decode(codec.encode([clip]))[0]) > 36


def test_latents_of_rendered_scenes_have_a_mean_square_near_one() -> None:
    clips = [scene(d, c) for d, c in (("right", "red"), ("left", "cyan"), ("up", "white"), ("down", "black"))]
    for scaling in ("root", "unit", "none"):
        latents = create("video_autoencoder", "dct", scaling=scaling).encode(clips)
        assert 0.5 < np.mean(np.square(latents)) < 2
    with pytest.raises(ConfigError, match="root"):
        create("video_autoencoder", "dct", scaling="rot")


# --- hashed text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hashed_words", "hashed_pairs"])
@given(text=st.text(max_size=60), position=st.sampled_from([0.0, 0.25, 0.9]))
def test_vectors_have_a_mean_square_of_one(name: str, text: str, position: float) -> None:
    (vectors,) = create("text_encoder", name, position=position, max_tokens=12).encode([text])
    assert 1 <= len(vectors) <= 12
    np.testing.assert_allclose(np.mean(np.square(vectors), axis=1), 1, atol=1e-4)


def test_vectors_are_the_same_on_every_machine() -> None:
    (words,), (pairs,) = (create("text_encoder", n, dim=8).encode(["disc"]) for n in ("hashed_words", "hashed_pairs"))
    np.testing.assert_allclose(words[1], WORD_VECTOR, atol=1e-4)
    np.testing.assert_allclose(pairs[1], PAIR_VECTOR, atol=1e-4)


WORD_VECTOR = [1.3089, 0.0782, -1.9856, 1.0049, -0.8037, -0.6441, 0.3652, 0.3656]
PAIR_VECTOR = [1.3101, 0.0782, -1.9874, -0.9985, -0.8045, -0.6447, 0.3656, 0.3659]


def test_words_are_split_where_a_reader_would() -> None:
    words = hashed_text.words_of("The disc's 2.5 red-blue rings, i.e. THE end.")[1:]
    assert words == ["the", "disc's", "2.5", "red", "blue", "rings", ",", "i", ".", "e", ".", "the", "end", "."]


def test_words_alike_in_spelling_are_alike_and_others_are_not() -> None:
    (v,) = create("text_encoder", "hashed_words", dim=512, position=0.0).encode(["moving moves disc MOVING"])
    cosine = v @ v.T / 512
    assert cosine[1, 2] > 0.12 > abs(cosine[1, 3]) and cosine[1, 4] == pytest.approx(1, abs=1e-5)


def test_a_pair_knows_the_word_before_and_its_place_among_the_two() -> None:
    encoder = create("text_encoder", "hashed_pairs", dim=512, position=0.0)
    red_disc, blue_disc, disc_red, again = (
        encoder.encode([t])[0][-1] for t in ("red disc", "blue disc", "disc red", "a red disc")
    )
    for other in (blue_disc, disc_red):
        assert abs(red_disc @ other) / 512 < 0.15
    np.testing.assert_allclose(red_disc, again)


@pytest.mark.parametrize("options", [{"dim": 12}, {"dim": 0}, {"max_tokens": 0}, {"position": 1.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        create("text_encoder", "hashed_words", **options)


# --- classical features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (-2, 0), (0, 2), (0, -2)])
def test_flow_features_point_where_the_picture_moves(dx: int, dy: int) -> None:
    big = texture(160, 160)
    clip = np.stack([big[40 - dy * t : 104 - dy * t, 40 - dx * t : 104 - dx * t] for t in range(9)])
    (features,) = create("feature_extractor", "frame_statistics").extract([clip], [(3, 2, 2)])
    x, y = (features[..., frame_statistics.NAMES.index(name)] for name in ("flow_x", "flow_y"))
    assert np.abs(x - np.sign(dx) * 2.5).max() < 0.4 and np.abs(y - np.sign(dy) * 2.5).max() < 0.4


def test_an_image_does_not_move_and_colours_are_where_they_are() -> None:
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, :32, :32] = (255, 0, 0)
    extractor = frame_statistics.FrameStatistics()
    raw = extractor.measure(image, (1, 2, 2))[0]
    assert not raw[..., frame_statistics.NAMES.index("change") : frame_statistics.NAMES.index("flow_spread") + 1].any()
    assert np.unravel_index(raw[..., frame_statistics.NAMES.index("red_blue")].argmax(), (2, 2)) == (0, 0)


def test_gradients_fall_into_their_direction() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (64, 64, 3))
    extractor = frame_statistics.FrameStatistics()
    for picture, name in ((ramp, "gradient_0_deg"), (ramp.transpose(1, 0, 2), "gradient_90_deg")):
        raw = extractor.measure(np.ascontiguousarray(picture)[None], (1, 1, 1))[0, 0, 0]
        directions = {n: raw[k] for k, n in enumerate(frame_statistics.NAMES) if n.startswith("gradient_") and n.endswith("deg")}
        assert max(directions, key=directions.__getitem__) == name


def test_cells_of_time_are_equal_shares_of_the_clip() -> None:
    clip = np.zeros((4, 64, 64, 3), np.uint8)
    clip[2:] = 255
    raw = frame_statistics.FrameStatistics().measure(clip, (2, 1, 1))
    luma = raw[:, 0, 0, 0]
    assert luma[0] == pytest.approx(-np.sqrt(3), abs=1e-3) and luma[1] == pytest.approx(np.sqrt(3), abs=1e-3)


def test_features_are_about_standardised() -> None:
    clips = [scene(d, c) for d, c in (("right", "red"), ("left", "cyan"), ("up", "white"), ("down", "black"))]
    found = create("feature_extractor", "frame_statistics").extract(clips, [(3, 4, 4)] * 4)
    assert 0.5 < float(np.std(found)) < 1.5 and float(np.abs(np.mean(found))) < 0.5
