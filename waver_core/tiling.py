"""Encoding and decoding in tiles and parts, for clips that do not fit into memory whole, over any `VideoAutoencoder`.

In space, tiles of one size overlap. They are measured in latent cells of 8 px and spread evenly, so that none is a sliver. A
network sees nothing beyond a tile's edge, so what it makes there is wrong: the outer quarter of an overlap is thrown away on
either side, and over the half between one tile fades into the next. In time, a clip is cut into parts of so many latent
frames. The autoencoder is causal and codes the first frame of whatever it gets as a picture of its own, so every part but
the first begins with latent frames of context. The first half of them is thrown away; over the other half the part before
fades into this one.

Blends are float32 and rounded once; where tiles agree, as those of a codec of separate blocks do, they change nothing. What
fits into one tile and one part goes through the autoencoder in one call. The Wan autoencoder remembers some 38 latent frames,
so only a clip in one part is exact in time; its network takes one latent frame after the other, so that a longer part costs
memory for its frames, not for more of the network.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from waver_core.backends.contracts import VideoAutoencoder
from waver_core.errors import ConfigError, UserError
from waver_core.shapes import LATENT_CHANNELS, PATCH, SPATIAL_STRIDE, TEMPORAL_STRIDE, LatentShape, VideoShape


class _Piece(NamedTuple):
    """A stretch of an axis that one tile covers alone, or over which a tile fades into the next."""

    start: int
    stop: int
    tiles: tuple[int, ...]


class _Axis(NamedTuple):
    """The tiles along the height or the width of a frame; all numbers are of one unit, cells or pixels."""

    length: int
    side: int
    starts: tuple[int, ...]
    pieces: tuple[_Piece, ...]

    @property
    def spans(self) -> list[slice]:
        """What each tile covers."""
        return [slice(start, start + self.side) for start in self.starts]


class _Part(NamedTuple):
    """Latent frames [start, stop) of a clip, and how many before them are coded with them and blended with the last part's."""

    start: int
    stop: int
    context: int
    blended: int


@dataclass(frozen=True)
class _Cut:
    """How clips are cut; the options of `decode_frames`, checked."""

    side_px: int
    overlap_px: int
    latent_frames: int
    context_latent_frames: int

    def __post_init__(self) -> None:
        side, overlap = self.side_px, self.overlap_px
        if side % SPATIAL_STRIDE or side < PATCH * SPATIAL_STRIDE:
            raise ConfigError(f"side_px must be a multiple of 8, at least 16, not {side}")
        if overlap % SPATIAL_STRIDE or not SPATIAL_STRIDE <= overlap <= side // 2:
            raise ConfigError(f"overlap_px must be a multiple of 8, from 8 to half of side_px {side}, not {overlap}")
        if self.latent_frames < 1 or self.context_latent_frames < 1:
            raise ConfigError(
                f"latent_frames and context_latent_frames must be at least 1, not {self.latent_frames} and "
                f"{self.context_latent_frames}: without context a part would begin with a frame that was coded as a still"
            )

    def part(self, index: int) -> _Part:
        """The part of that number, as if the clip never ended."""
        start = index * self.latent_frames
        context = min(self.context_latent_frames, start)
        return _Part(start, start + self.latent_frames, context, min(context // 2, self.latent_frames))

    def axis(self, cells: int, unit: int) -> _Axis:
        """The tiles over so many cells, as few as do and as small as these allow; in cells times `unit`."""
        side, overlap = self.side_px // SPATIAL_STRIDE, self.overlap_px // SPATIAL_STRIDE
        n = max(1, -(-(cells - overlap) // (side - overlap)))
        side = -(-(cells + (n - 1) * overlap) // n)
        starts = [round(k * (cells - side) / max(1, n - 1)) * unit for k in range(n)]
        # A ramp takes half of the overlap and lies in the middle of what two tiles share, which can be more than was asked.
        width = max(1, overlap * unit // 2)
        pieces, done = [], 0
        for k, (before, after) in enumerate(pairwise(starts)):
            ramp = (after + before + side * unit - width) // 2
            pieces += [_Piece(done, ramp, (k,)), _Piece(ramp, ramp + width, (k, k + 1))]
            done = ramp + width
        pieces.append(_Piece(done, cells * unit, (n - 1,)))
        return _Axis(cells * unit, side * unit, tuple(starts), tuple(p for p in pieces if p.start < p.stop))

    def axes(self, shape: LatentShape, unit: int) -> tuple[_Axis, _Axis]:
        """The tiles down and across frames of that shape, in cells times `unit`."""
        return self.axis(shape.height, unit), self.axis(shape.width, unit)


def decode_frames(
    autoencoder: VideoAutoencoder,
    latents: np.ndarray,
    *,
    side_px: int,
    overlap_px: int,
    latent_frames: int,
    context_latent_frames: int,
) -> Iterator[np.ndarray]:
    """Latents float32 [16, 1+k, h, w] -> runs of frames uint8 [n, 8h, 8w, 3], 1 + 4k in all, in order.

    side_px, overlap_px: of the tiles; a side that is no longer stays whole. latent_frames: of one part, context_latent_frames:
    before it. Held at a time are the decoded tiles of one part and a few whole frames. Raises `UserError` at once, before
    anything is decoded, for latents or options that cannot be.
    """
    cut = _Cut(side_px, overlap_px, latent_frames, context_latent_frames)
    if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS or not latents.shape[1]:
        raise UserError(f"latents of shape {list(latents.shape)} cannot be decoded: give [{LATENT_CHANNELS}, 1+k, h, w]")
    _ = LatentShape(*latents.shape[1:]).pixels.latent  # refuses a single row or column
    return _decoded(autoencoder, latents, cut)


def _decoded(autoencoder: VideoAutoencoder, latents: np.ndarray, cut: _Cut) -> Iterator[np.ndarray]:
    """The parts one after the other; what belongs to a part is gone before the next is decoded."""
    last: list[np.ndarray] = []
    index = 0
    while (part := cut.part(index)).start < latents.shape[1]:
        last = yield from _decoded_part(autoencoder, latents, cut, part, cut.part(index + 1).blended, last)
        index += 1


def _decoded_part(
    autoencoder: VideoAutoencoder, latents: np.ndarray, cut: _Cut, part: _Part, kept_back: int, last: list[np.ndarray]
) -> Generator[np.ndarray, None, list[np.ndarray]]:
    """Yield a part's frames, first those that it shares with the part before (`last`, float32, one array for each latent
    frame); return what the next part will share, unless there is none."""
    shape = LatentShape(*latents.shape[1:])
    rows, columns = cut.axes(shape, 1)
    clip = latents[:, part.start - part.context : part.stop]
    tiles = autoencoder.decode([clip[..., down, along] for down, along in product(rows.spans, columns.spans)])
    rows, columns = cut.axes(shape, SPATIAL_STRIDE)
    held: list[np.ndarray] = []
    if part.stop >= shape.frames:
        kept_back = 0
    for k in range(part.context - part.blended, clip.shape[1]):
        frames = slice(max(0, TEMPORAL_STRIDE * (k - 1) + 1), TEMPORAL_STRIDE * k + 1)
        fading, keep = k < part.context, k >= clip.shape[1] - kept_back
        run = _joined([tile[frames] for tile in tiles], rows, columns, np.float32 if fading or keep else np.uint8)
        if fading:
            first = TEMPORAL_STRIDE * (k - part.context + part.blended)
            share = _ramp(TEMPORAL_STRIDE * part.blended)[first : first + TEMPORAL_STRIDE]
            run = _mixed([last.pop(0), run], share[:, None, None, None])
        if keep:
            held.append(run)
        else:
            yield run if run.dtype == np.uint8 else np.rint(run).astype(np.uint8)
    return held


def encode_frames(
    autoencoder: VideoAutoencoder,
    frames: Iterable[np.ndarray],
    *,
    side_px: int,
    overlap_px: int,
    latent_frames: int,
    context_latent_frames: int,
) -> np.ndarray:
    """Runs of frames uint8 [n, H, W, 3] of any lengths, 1 + 4k in all -> latents float32 [16, 1+k, H/8, W/8].

    The options are those of `decode_frames`. Held at a time are the frames of one part with its context, and their latents;
    latents are blended where tiles and parts overlap. Raises `UserError` for options, sizes and numbers of frames that
    cannot be; the last of these only shows when the frames end.
    """
    cut = _Cut(side_px, overlap_px, latent_frames, context_latent_frames)
    latents: list[np.ndarray] = []
    buffer, filled, total = np.empty((0, 0, 0, 3), np.uint8), 0, 0
    part = cut.part(0)
    for run in frames:
        if run.dtype != np.uint8 or run.ndim != 4 or run.shape[3] != 3:
            raise UserError(f"frames of {run.dtype} {list(run.shape)} cannot be encoded: give uint8 [n, height, width, 3]")
        if not total:
            _ = VideoShape(1, *run.shape[1:3]).latent
            buffer = np.empty((0, *run.shape[1:]), np.uint8)
        if run.shape[1:] != buffer.shape[1:]:
            raise UserError(f"frames of {run.shape[1:3]} px follow ones of {buffer.shape[1:3]} px: give frames of one size")
        total += len(run)
        while len(run):
            wanted = 1 + TEMPORAL_STRIDE * (part.context + cut.latent_frames - 1)
            taken = run[: wanted - filled]
            if filled + len(taken) > len(buffer):  # it grows with the clip, so that a part may be set longer than any clip
                grown = np.empty((min(wanted, 2 * (filled + len(taken))), *run.shape[1:]), np.uint8)
                grown[:filled] = buffer[:filled]
                buffer = grown
            buffer[filled : filled + len(taken)] = taken
            filled, run = filled + len(taken), run[len(taken) :]
            if filled == wanted:
                _append(latents, _encoded_part(autoencoder, buffer[:filled], cut, part), part.blended)
                part = cut.part(len(latents))
                # The next part begins with the last frame of the group before its context, in place of a first frame.
                filled = 1 + TEMPORAL_STRIDE * (part.context - 1)
                buffer[:filled] = buffer[wanted - filled : wanted].copy()
    if not total:
        raise UserError("there are no frames to encode: give 1 + 4k of them")
    _ = VideoShape(total, *buffer.shape[1:3]).latent
    if total > 1 + TEMPORAL_STRIDE * (part.start - 1):
        _append(latents, _encoded_part(autoencoder, buffer[:filled], cut, part), part.blended)
    return np.concatenate(latents, axis=1)


def _encoded_part(autoencoder: VideoAutoencoder, clip: np.ndarray, cut: _Cut, part: _Part) -> np.ndarray:
    """Frames of a part with its context -> latents [16, n, h, w], those to be blended with the last part's first."""
    shape = VideoShape(*clip.shape[:3]).latent
    rows, columns = cut.axes(shape, SPATIAL_STRIDE)
    tiles = autoencoder.encode([clip[:, down, along] for down, along in product(rows.spans, columns.spans)])
    useful = [tile[:, part.context - part.blended :, ..., None] for tile in tiles]
    return _joined(useful, *cut.axes(shape, 1), dtype=np.float32)[..., 0]


def _append(latents: list[np.ndarray], new: np.ndarray, blended: int) -> None:
    """Add a part's latents, the first `blended` of which fade in over the last ones there."""
    if blended:
        before = latents[-1]
        mixed = _mixed([before[:, -blended:], new[:, :blended]], _ramp(blended)[:, None, None])
        latents[-1] = np.concatenate([before[:, :-blended], mixed], axis=1)
    latents.append(new[:, blended:])


def _joined(tiles: list[np.ndarray], rows: _Axis, columns: _Axis, dtype: DTypeLike) -> np.ndarray:
    """Tiles [..., h, w, c], row by row -> the whole [..., H, W, c] as `dtype`; blends become whole numbers for uint8."""
    if len(tiles) == 1:
        return tiles[0].astype(dtype, copy=False)
    whole = np.empty((*tiles[0].shape[:-3], rows.length, columns.length, tiles[0].shape[-1]), dtype)
    for down, along in product(rows.pieces, columns.pieces):
        bands = []
        for row in down.tiles:
            top = rows.starts[row]
            cuts = []
            for column in along.tiles:
                left, tile = columns.starts[column], tiles[row * len(columns.starts) + column]
                cuts.append(tile[..., down.start - top : down.stop - top, along.start - left : along.stop - left, :])
            bands.append(_mixed(cuts, _ramp(along.stop - along.start)[:, None]))
        piece = _mixed(bands, _ramp(down.stop - down.start)[:, None, None])
        target = whole[..., down.start : down.stop, along.start : along.stop, :]
        target[...] = np.rint(piece) if target.dtype == np.uint8 and piece.dtype != np.uint8 else piece
    return whole


def _ramp(steps: int) -> np.ndarray:
    """The later one's share at each step of a blend, rising evenly between 0 and 1."""
    return ((np.arange(steps) + 0.5) / steps).astype(np.float32)


def _mixed(pieces: list[np.ndarray], share: np.ndarray) -> np.ndarray:
    """One piece as it is; of two, `share` of the later, float32, written so that equal values give that value exactly."""
    if len(pieces) == 1:
        return pieces[0]
    before = pieces[0].astype(np.float32, copy=False)
    change = pieces[1] - before
    change *= share
    change += before
    return change
