"""A video autoencoder without weights: an orthonormal DCT cut down to 16 channels, in place of the Wan VAE (Waver §2).

Colours go through an orthonormal transform: luma (R+G+B), then the axes R-B and 2G-R-B. The first frame alone is coded in
blocks of 8x8, every further group of four frames in blocks of 4x8x8; of each block 16 coefficients are kept, and what
decodes is the projection onto them. The first ten mean the same in both kinds of block, the picture averaged over time:

    luma    mean, x, y, xx, xy, yy     R-B    mean, x, y     green    mean

(x: the first cosine along the width, xx the second, and so on.) The other six are finer detail in the first frame, which
must stand alone (luma xxx, xxy, xyy, yyy, green x and y), and change over time in the groups (luma t, tx, ty, tt, R-B t,
green t). Of six sets with both axes treated alike this one lost least on rendered scenes of 64 px, and little to the best on
film: 26 to 36 dB over a clip, 29 to 40 dB in first frames. It is a lossy codec, not a model: at 64 px its blocks show.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from waver_core.errors import ConfigError, did_you_mean
from waver_core.registry import register
from waver_core.shapes import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE, LatentShape, VideoShape

_COLOURS = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]) / np.sqrt([[3], [2], [6]])
"""Rows: luma, R-B, green; columns: R, G, B."""

# (colour, t, y, x) of each channel, and the root mean square of its coefficient over rendered scenes of 64x64 and 192x352
# px. The unit: colours from -1 to 1, and such that a still block has the same coefficients as a first frame and in a group.
_SHARED = (
    ((0, 0, 0, 0), 4.5),
    ((0, 0, 0, 1), 1.1),
    ((0, 0, 1, 0), 1.1),
    ((0, 0, 0, 2), 0.55),
    ((0, 0, 1, 1), 0.72),
    ((0, 0, 2, 0), 0.55),
    ((1, 0, 0, 0), 2.2),
    ((1, 0, 0, 1), 0.39),
    ((1, 0, 1, 0), 0.39),
    ((2, 0, 0, 0), 1.06),
)
_FIRST = (
    ((0, 0, 0, 3), 0.34),
    ((0, 0, 1, 2), 0.46),
    ((0, 0, 2, 1), 0.46),
    ((0, 0, 3, 0), 0.34),
    ((2, 0, 0, 1), 0.26),
    ((2, 0, 1, 0), 0.26),
)
_LATER = (
    ((0, 1, 0, 0), 0.55),
    ((0, 1, 0, 1), 0.335),
    ((0, 1, 1, 0), 0.335),
    ((0, 2, 0, 0), 0.2),
    ((1, 1, 0, 0), 0.43),
    ((2, 1, 0, 0), 0.27),
)
_SCALINGS = {"none": 0.0, "root": 0.5, "unit": 1.0}
"""Power of the root mean square by which a channel is divided."""


@register("video_autoencoder", "dct")
class DctCodec:
    """A few milliseconds each way for 17 frames of 352x192 on one core.

    scaling: what each channel is divided by, before one common factor that brings the mean square of all to about 1.
    "root" (the default) takes the root of the channel's own size, so that detail and motion weigh in the loss without
    drowning the colours; "unit" takes its size; "none" leaves the basis orthogonal and nearly all of the loss to the mean
    colours.
    """

    def __init__(self, scaling: str = "root") -> None:
        if scaling not in _SCALINGS:
            raise ConfigError(f"dct has no scaling '{scaling}': {did_you_mean(scaling, _SCALINGS)}")
        self.fingerprint = f"dct-1 scaling={scaling}"
        self._first, self._later = (_scaled(kind, scaling) for kind in (False, True))

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `VideoAutoencoder`: uint8 [1+4k, 8h, 8w, 3] -> float32 [16, 1+k, h, w]."""
        return [self._encode(clip) for clip in clips]

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `VideoAutoencoder`: float32 [16, 1+k, h, w] -> uint8 [1+4k, 8h, 8w, 3]."""
        return [self._decode(latent) for latent in latents]

    def _encode(self, clip: np.ndarray) -> np.ndarray:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], not {clip.dtype} {list(clip.shape)}")
        shape = VideoShape(*clip.shape[:3]).latent
        latent = np.empty((LATENT_CHANNELS, *shape), np.float32)
        latent[:, :1] = _analyse(clip[:1], self._first[0], shape._replace(frames=1))
        if shape.frames > 1:
            latent[:, 1:] = _analyse(clip[1:], self._later[0], shape._replace(frames=shape.frames - 1))
        return latent

    def _decode(self, latent: np.ndarray) -> np.ndarray:
        if latent.ndim != 4 or latent.shape[0] != LATENT_CHANNELS or not latent.shape[1]:
            raise ValueError(f"latents must be [{LATENT_CHANNELS}, 1+k, h, w], not {list(latent.shape)}")
        shape = LatentShape(*latent.shape[1:]).pixels
        clip = np.empty((*shape, 3), np.uint8)
        clip[:1] = _synthesise(latent[:, :1], self._first[1], 1)
        if shape.frames > 1:
            clip[1:] = _synthesise(latent[:, 1:], self._later[1], TEMPORAL_STRIDE)
        return clip


def _analyse(frames: np.ndarray, matrix: np.ndarray, shape: LatentShape) -> np.ndarray:
    """Frames uint8 [n*d, 8h, 8w, 3], matrix [d*8*8*3, 16] -> [16, n, h, w]."""
    side, depth = SPATIAL_STRIDE, len(frames) // shape.frames
    blocks = frames.reshape(shape.frames, depth, shape.height, side, shape.width, side, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    flat = blocks.reshape(-1, matrix.shape[0]).astype(np.float32)
    flat -= 127.5
    return (flat @ matrix).T.reshape(LATENT_CHANNELS, *shape)


def _synthesise(latent: np.ndarray, matrix: np.ndarray, depth: int) -> np.ndarray:
    """Latents [16, n, h, w], matrix [16, d*8*8*3] -> frames uint8 [n*d, 8h, 8w, 3]."""
    _, n, height, width = latent.shape
    side = SPATIAL_STRIDE
    flat = latent.reshape(LATENT_CHANNELS, -1).T.astype(np.float32) @ matrix
    flat += 128.0  # 127.5 for the middle, 0.5 to round to the nearest
    np.clip(flat, 0, 255.5, out=flat)
    blocks = flat.astype(np.uint8).reshape(n, height, width, depth, side, side, 3)
    return blocks.transpose(0, 3, 1, 4, 2, 5, 6).reshape(n * depth, height * side, width * side, 3)


def _scaled(later: bool, scaling: str) -> tuple[np.ndarray, np.ndarray]:
    """The matrices of `_analyse` and `_synthesise`, for levels that run from -127.5 to 127.5."""
    sizes = np.array([size for _, size in (*_SHARED, *(_LATER if later else _FIRST))])
    factor = sizes ** -_SCALINGS[scaling]
    factor /= np.sqrt(np.mean((factor * sizes) ** 2))
    if later:
        factor /= np.sqrt(TEMPORAL_STRIDE)  # so that a still block has the coefficients of a first frame
    analysis = basis(later) * (factor / 127.5)[:, None]
    synthesis = basis(later) * (127.5 / factor)[:, None]
    return np.ascontiguousarray(analysis.T, dtype=np.float32), synthesis.astype(np.float32)


@cache
def basis(later: bool) -> np.ndarray:
    """The 16 orthonormal blocks that are kept, float64 [16, depth * 8 * 8 * 3]; depth 4 for `later`, else 1."""
    depth = TEMPORAL_STRIDE if later else 1
    time, space = _cosines(depth), _cosines(SPATIAL_STRIDE)
    blocks = [
        np.einsum("t,y,x,c->tyxc", time[t], space[y], space[x], _COLOURS[c])
        for (c, t, y, x), _ in (*_SHARED, *(_LATER if later else _FIRST))
    ]
    matrix = np.stack(blocks).reshape(LATENT_CHANNELS, -1)
    matrix.flags.writeable = False
    return matrix


def _cosines(n: int) -> np.ndarray:
    """The orthonormal DCT-II of length n: row k is its k-th cosine."""
    rows = np.cos(np.pi * np.outer(np.arange(n), np.arange(n) + 0.5) / n) * np.sqrt(2 / n)
    rows[0] /= np.sqrt(2)
    return rows
