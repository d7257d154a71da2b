"""Tiles and parts: the whole clip exactly where blocks are separate, no seam where they are not, and bounded memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waver_core.backends.contracts import VideoAutoencoder
from waver_core.errors import ConfigError, UserError
from waver_core.registry import create
from waver_core.shapes import LatentShape, VideoShape
from waver_core.tiling import _Cut, decode_frames, encode_frames


class Blocks:
    """Codes every block by itself in whole numbers, so that a tile is exact to the bit; a first frame unlike later ones."""

    fingerprint = "blocks"

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._encode(clip) for clip in clips]

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._decode(latent) for latent in latents]

    def _encode(self, clip: np.ndarray) -> np.ndarray:
        n, height, width = VideoShape(*clip.shape[:3]).latent
        weights = np.arange(1, 1 + 8 * 8 * 3).reshape(8, 8, 3)
        blocks = clip.reshape(-1, height, 8, width, 8, 3).astype(np.int64)
        sums = np.einsum("thywxc,yxc->thw", blocks, weights)
        groups = sums[1:].reshape(n - 1, 4, height, width)
        cells = np.concatenate([sums[:1] * 5, np.einsum("gthw,t->ghw", groups, np.arange(1, 5))])
        return ((cells[None] * np.arange(1, 17).reshape(16, 1, 1, 1)) % 1009).astype(np.float32)

    def _decode(self, latent: np.ndarray) -> np.ndarray:
        shape = LatentShape(*latent.shape[1:]).pixels
        cells = np.einsum("cthw,c->thw", latent.astype(np.int64), np.arange(1, 17))
        later = cells[1:, None] + np.arange(4).reshape(4, 1, 1) * 31
        frames = np.concatenate([cells[:1] * 2 + 97, later.reshape(-1, *cells.shape[1:])])
        pattern = np.arange(8 * 8 * 3).reshape(8, 8, 3) * 7
        levels = frames[:, :, None, :, None, None] + pattern[:, None]
        return (levels % 256).astype(np.uint8).reshape(*shape, 3)


class Watched:
    """Hands everything on to another autoencoder and keeps the shapes of what it was given."""

    fingerprint = "watched"

    def __init__(self, inner: VideoAutoencoder) -> None:
        self.inner = inner
        self.calls: list[list[tuple[int, ...]]] = []

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.calls.append([clip.shape for clip in clips])
        return self.inner.encode(clips)

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.calls.append([latent.shape for latent in latents])
        return self.inner.decode(latents)


def options(side_px: int = 64, overlap_px: int = 16, latent_frames: int = 3, context_latent_frames: int = 2) -> dict[str, int]:
    names = ("side_px", "overlap_px", "latent_frames", "context_latent_frames")
    return dict(zip(names, (side_px, overlap_px, latent_frames, context_latent_frames)))


@st.composite
def cuts(draw: st.DrawFn) -> dict[str, int]:
    """Any options that are allowed, small enough that small clips are cut."""
    side = draw(st.integers(2, 8))
    overlap = draw(st.integers(1, side // 2))
    return options(8 * side, 8 * overlap, draw(st.integers(1, 5)), draw(st.integers(1, 6)))


SHAPES = st.tuples(st.integers(1, 12), st.integers(2, 13), st.integers(2, 13))


def whole_numbers(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-40, 40, (16, *shape)).astype(np.float32)


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3)).astype(np.uint8)


def runs_of(frames: np.ndarray, lengths: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames in runs of those lengths, over and over; some may be empty."""
    at = 0
    for n in cycle(lengths):
        yield frames[at : at + n]
        if (at := at + n) >= len(frames):
            return


# --- equal to the whole ------------------------------------------------------------------------------------------------


@given(shape=SHAPES, cut=cuts())
def test_separate_blocks_decode_in_tiles_to_the_whole_clip_bit_for_bit(shape: tuple[int, int, int], cut: dict[str, int]) -> None:
    latents = whole_numbers(shape)
    runs = list(decode_frames(Blocks(), latents, **cut))
    assert all(len(run) for run in runs)
    assert np.array_equal(np.concatenate(runs), Blocks().decode([latents])[0])


@given(shape=SHAPES, cut=cuts(), lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any))
def test_separate_blocks_encode_in_tiles_to_the_whole_latents_bit_for_bit(
    shape: tuple[int, int, int], cut: dict[str, int], lengths: list[int]
) -> None:
    frames = noise(*LatentShape(*shape).pixels)
    latents = encode_frames(Blocks(), runs_of(frames, lengths), **cut)
    assert latents.dtype == np.float32
    assert np.array_equal(latents, Blocks().encode([frames])[0])


@given(shape=SHAPES, cut=cuts())
@settings(max_examples=25)
def test_the_dct_codec_differs_by_what_its_matrix_product_rounds(shape: tuple[int, int, int], cut: dict[str, int]) -> None:
    """A product of matrices rounds otherwise for other sizes: less than one value in a hundred thousand is one level off."""
    codec = create("video_autoencoder", "dct")
    latents = np.random.default_rng(sum(shape)).normal(0, 0.7, (16, *shape)).astype(np.float32)
    (whole,) = codec.decode([latents])
    tiled = np.concatenate(list(decode_frames(codec, latents, **cut)))
    beside = np.abs(tiled.astype(int) - whole)
    assert beside.max() <= 1 and np.count_nonzero(beside) <= 5 + 1e-5 * beside.size
    np.testing.assert_allclose(encode_frames(codec, [whole], **cut), codec.encode([whole])[0], atol=2e-5)


@pytest.mark.parametrize("name", ["dct", "blocks"])
def test_what_fits_into_one_tile_and_one_part_is_one_call_with_the_very_input(name: str) -> None:
    watched = Watched(Blocks() if name == "blocks" else create("video_autoencoder", "dct"))
    latents = whole_numbers((3, 8, 8)) / 40
    decoded = np.concatenate(list(decode_frames(watched, latents, **options())))
    assert watched.calls == [[(16, 3, 8, 8)]]
    assert np.array_equal(decoded, watched.inner.decode([latents])[0])
    encoded = encode_frames(watched, runs_of(decoded, [2]), **options())
    assert watched.calls[1:] == [[(9, 64, 64, 3)]]
    assert np.array_equal(encoded, watched.inner.encode([decoded])[0])
    assert np.array_equal(encode_frames(watched, [decoded], **options(latent_frames=10**9)), encoded)


# --- how frames are cut ------------------------------------------------------------------------------------------------


@given(cells=st.integers(2, 300), cut=cuts(), unit=st.sampled_from([1, 8]))
def test_tiles_are_alike_overlap_enough_and_none_is_a_sliver(cells: int, cut: dict[str, int], unit: int) -> None:
    axis = _Cut(**cut).axis(cells, unit)
    longest, overlap, spans = cut["side_px"] // 8 * unit, cut["overlap_px"] // 8 * unit, axis.spans
    assert spans[0].start == 0 and spans[-1].stop == axis.length == cells * unit
    assert axis.side <= longest and all(span.start % unit == 0 for span in spans)
    if len(spans) > 1:
        assert 2 * axis.side > longest
    for before, after in pairwise(spans):
        assert overlap <= before.stop - after.start < axis.side
    at = 0
    for piece in axis.pieces:  # they follow each other without a gap, inside the tiles that they take
        assert piece.start == at < piece.stop
        assert all(spans[k].start <= piece.start and piece.stop <= spans[k].stop for k in piece.tiles)
        assert len(piece.tiles) == 1 or piece.stop - piece.start == max(1, overlap // 2)
        at = piece.stop
    assert at == axis.length


def test_1080p_is_cut_as_the_defaults_say() -> None:
    cut = _Cut(640, 128, 8, 3)
    down, along = cut.axis(135, 8), cut.axis(240, 8)
    assert (down.side, down.starts) == (608, (0, 472)) and (along.side, along.starts) == (576, (0, 448, 896, 1344))


def test_later_parts_begin_with_context_that_is_thrown_away() -> None:
    watched = Watched(Blocks())
    frames = np.concatenate(list(decode_frames(watched, whole_numbers((8, 2, 2)), **options(context_latent_frames=2))))
    assert [calls[0][1] for calls in watched.calls] == [3, 5, 4] and len(frames) == 29
    encode_frames(watched, [frames], **options(context_latent_frames=2))
    assert [calls[0][0] for calls in watched.calls[3:]] == [9, 17, 13]


# --- no seams ----------------------------------------------------------------------------------------------------------


class Steps:
    """Every tile and part comes out in one level of its own, in turns low and high: the worst seam that there can be."""

    fingerprint = "steps"

    def __init__(self) -> None:
        self.calls = 0

    def _levels(self, n: int) -> list[int]:
        self.calls += 1
        return [250 * ((self.calls + k) % 2) for k in range(n)]

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        shapes = [VideoShape(*clip.shape[:3]).latent for clip in clips]
        return [np.full((16, *s), v, np.float32) for s, v in zip(shapes, self._levels(len(clips)))]

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        shapes = [LatentShape(*latent.shape[1:]).pixels for latent in latents]
        return [np.full((*s, 3), v, np.uint8) for s, v in zip(shapes, self._levels(len(latents)))]


def steepest(values: np.ndarray, axis: int) -> float:
    return float(np.abs(np.diff(values.astype(np.float64), axis=axis)).max())


@pytest.mark.parametrize("axis", [1, 2])
def test_tiles_fade_into_each_other_evenly(axis: int) -> None:
    size = [2, 2]
    size[axis - 1] = 20
    latents = np.zeros((16, 1, *size), np.float32)
    (run,) = decode_frames(Steps(), latents, **options(64, 32))
    assert set(np.unique(run)) == {0, 250, *np.rint(250 * (np.arange(16) + 0.5) / 16)}
    assert steepest(run, axis) <= 250 / 16 + 1 and steepest(run, 3 - axis) == 0
    picture = np.zeros((1, 8 * size[0], 8 * size[1], 3), np.uint8)
    assert steepest(encode_frames(Steps(), [picture], **options(64, 32)), axis + 1) <= 250 / 2 + 1e-4


def test_parts_fade_into_each_other_evenly() -> None:
    """Of four context frames two are blended, so a change from one part to the next takes eight frames."""
    cut = options(latent_frames=6, context_latent_frames=4)
    frames = np.concatenate(list(decode_frames(Steps(), np.zeros((16, 18, 2, 2), np.float32), **cut)))
    assert frames.shape == (69, 16, 16, 3) and set(np.unique(frames)) == {0, 250, *np.rint(250 * (np.arange(8) + 0.5) / 8)}
    assert steepest(frames, 0) <= 250 / 8 + 1
    latents = encode_frames(Steps(), [np.zeros((69, 16, 16, 3), np.uint8)], **cut)
    assert latents.shape == (16, 18, 2, 2) and steepest(latents, 1) <= 250 / 2 + 1e-4


@pytest.fixture
def wan_vae(tmp_path: Path) -> VideoAutoencoder:
    """A small Wan autoencoder with random weights."""
    import torch

    from tests.waver_core.backends_pretrained import tiny_encoders

    torch.set_num_threads(1)
    torch.manual_seed(0)
    checkpoint = tiny_encoders.save_wan_vae(tmp_path / "wan-tiny")
    backend: VideoAutoencoder = create("video_autoencoder", "wan_vae", checkpoint=checkpoint, device="cpu")
    return backend


def jumps(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean absolute step between neighbours along an axis, one number for each place."""
    steps = np.abs(np.diff(values.astype(np.float64), axis=axis))
    mean: np.ndarray = steps.mean(axis=tuple(k for k in range(values.ndim) if k != axis))
    return mean


def seam(tiled: np.ndarray, whole: np.ndarray, axis: int, at: int | None = None) -> float:
    """How much the error changes from one place to the next, in steps of the whole itself: the most anywhere, or at one place."""
    changes = jumps(tiled.astype(float) - whole, axis) / jumps(whole, axis).mean()
    return float(changes.max() if at is None else changes[at])


@pytest.mark.models
def test_wan_tiles_leave_no_seam_in_space(wan_vae: VideoAutoencoder) -> None:
    """Two tiles of 128 px that overlap by 64, against two of 96 px side by side."""
    latents = np.random.default_rng(0).normal(size=(16, 1, 8, 24)).astype(np.float32)
    (whole,) = wan_vae.decode([latents])
    tiled = np.concatenate(list(decode_frames(wan_vae, latents, **options(128, 64))))
    side_by_side = np.concatenate(wan_vae.decode([latents[..., :12], latents[..., 12:]]), axis=2)
    assert seam(tiled, whole, 2) < 0.25 and seam(side_by_side, whole, 2, at=95) > 1.2
    assert (jumps(tiled, 2) / jumps(whole, 2)).max() < 1.1 < 1.4 < jumps(side_by_side, 2)[95] / jumps(whole, 2)[95]
    assert np.abs(tiled.astype(float) - whole).mean() < 0.1 * whole.std()


@pytest.mark.models
def test_wan_latents_of_tiles_leave_no_seam_in_space(wan_vae: VideoAutoencoder) -> None:
    """The same, of a picture of coloured squares."""
    squares = np.random.default_rng(0).integers(0, 256, (1, 8, 24, 3))
    picture = np.kron(squares, np.ones((1, 8, 8, 1))).astype(np.uint8)
    (whole,) = wan_vae.encode([picture])
    tiled = encode_frames(wan_vae, [picture], **options(128, 64))
    side_by_side = np.concatenate(wan_vae.encode([picture[:, :, :96], picture[:, :, 96:]]), axis=3)
    assert seam(tiled, whole, 3) < 0.25 and seam(side_by_side, whole, 3, at=11) > 1.5
    assert np.abs(tiled - whole).mean() < 0.01 * whole.std()


@pytest.mark.models
def test_wan_parts_leave_no_jump_in_time_and_come_nearer_with_context(wan_vae: VideoAutoencoder) -> None:
    latents = np.random.default_rng(0).normal(size=(16, 12, 2, 2)).astype(np.float32)
    (whole,) = wan_vae.decode([latents])

    def tiled(context: int) -> np.ndarray:
        return np.concatenate(list(decode_frames(wan_vae, latents, **options(latent_frames=8, context_latent_frames=context))))

    few, many = tiled(2), tiled(6)
    assert np.array_equal(few[:25], whole[:25])  # the future says nothing about a causal model's past
    assert jumps(few, 0)[24:30].max() < 1.1 * jumps(whole, 0)[8:].max()
    off = [np.abs(clip[29:].astype(float) - whole[29:]).mean() for clip in (few, many)]
    assert off[1] < 0.8 * off[0]


# --- bounded memory ----------------------------------------------------------------------------------------------------


def peak_bytes(use: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        use()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def consume(runs: Iterator[np.ndarray]) -> None:
    for _ in runs:
        pass


@pytest.mark.parametrize("side_px", [64, 512])
def test_decoding_takes_no_more_memory_for_a_longer_clip(side_px: int) -> None:
    codec, cut = create("video_autoencoder", "dct"), options(side_px, 16, 4, 2)
    short, long = (np.zeros((16, n, 16, 16), np.float32) for n in (12, 80))
    consume(decode_frames(codec, short, **cut))  # what is made once
    peaks = [peak_bytes(lambda n=n: consume(decode_frames(codec, n, **cut))) for n in (short, long)]  # type: ignore[misc]
    assert peaks[1] < 1.05 * peaks[0]


def test_encoding_takes_more_memory_for_the_latents_of_a_longer_clip_only() -> None:
    codec, cut = create("video_autoencoder", "dct"), options(64, 16, 4, 2)

    def clip(n: int) -> Iterator[np.ndarray]:
        return (np.full((3, 128, 128, 3), k % 256, np.uint8) for k in range(n // 3))

    encode_frames(codec, clip(45), **cut)
    short, long = (peak_bytes(lambda n=n: encode_frames(codec, clip(n), **cut)) for n in (45, 321))  # type: ignore[misc]
    assert long < 1.05 * short + 2 * (16 * 81 * 16 * 16 * 4)  # the parts of the latents, and these joined


def test_no_tile_is_larger_than_asked_and_nothing_is_decoded_before_it_is_wanted() -> None:
    watched = Watched(create("video_autoencoder", "dct"))
    runs = decode_frames(watched, np.zeros((16, 20, 30, 50), np.float32), **options(64, 16, 4, 2))
    assert watched.calls == []
    next(runs)
    assert len(watched.calls) == 1
    consume(runs)
    assert len(watched.calls) == 5 and all(n <= 6 and max(h, w) <= 8 for call in watched.calls for _, n, h, w in call)
    watched.calls.clear()
    encode_frames(watched, [np.zeros((33, 240, 400, 3), np.uint8)], **options(64, 16, 4, 2))
    assert all(n <= 21 and max(h, w) <= 64 for call in watched.calls for n, h, w, _ in call)


# --- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"side_px": 60}, "side_px"),
        ({"side_px": 8}, "side_px"),
        ({"overlap_px": 0}, "overlap_px"),
        ({"overlap_px": 12}, "overlap_px"),
        ({"overlap_px": 40}, "half of side_px 64"),
        ({"latent_frames": 0}, "latent_frames"),
        ({"context_latent_frames": 0}, "still"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_coded(wrong: dict[str, int], named: str) -> None:
    for use in (
        lambda: decode_frames(Blocks(), np.zeros((16, 1, 2, 2), np.float32), **{**options(), **wrong}),
        lambda: encode_frames(Blocks(), [], **{**options(), **wrong}),
    ):
        with pytest.raises(ConfigError, match=named):
            use()


@pytest.mark.parametrize("shape", [(8, 1, 4, 4), (16, 0, 4, 4), (16, 4, 4), (16, 1, 1, 4), (16, 1, 4, 0)])
def test_latents_that_cannot_be_decoded_are_refused_at_once(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError):
        decode_frames(Blocks(), np.zeros(shape, np.float32), **options())


@pytest.mark.parametrize(
    ("runs", "named"),
    [
        ([], "no frames"),
        ([np.zeros((0, 16, 16, 3), np.uint8)], "no frames"),
        ([np.zeros((4, 16, 16, 3), np.uint8)], r"4 frames .* 1 \+ 4k"),
        ([np.zeros((3, 16, 16, 3), np.uint8)] * 4, r"12 frames .* 1 \+ 4k"),
        ([np.zeros((30, 16, 16, 3), np.uint8)], r"30 frames .* 1 \+ 4k"),
        ([np.zeros((1, 20, 16, 3), np.uint8)], "multiples of 8"),
        ([np.zeros((1, 8, 16, 3), np.uint8)], "at least 16"),
        ([np.zeros((1, 16, 16, 3), np.float32)], "uint8"),
        ([np.zeros((16, 16, 3), np.uint8)], "uint8"),
        ([np.zeros((1, 16, 16, 3), np.uint8), np.zeros((4, 16, 24, 3), np.uint8)], "one size"),
    ],
)
def test_frames_that_cannot_be_encoded_are_refused(runs: list[np.ndarray], named: str) -> None:
    with pytest.raises(UserError, match=named):
        encode_frames(Blocks(), runs, **options())
