"""Sizes in pixels, latents and tokens, and the rules that tie them together.

The autoencoder's strides are 4 x 8 x 8 and it is causal: the first latent frame stands for the first pixel frame alone, each
further one for four, so a video has 1 + 4k frames. A token is a patch of 1 x 2 x 2 latent cells (Waver §2.1). 1080 lines make
135 rows of latents, which two do not divide: the model pads such a row and cuts it off again, so a grid is rounded up.
"""

from __future__ import annotations

from typing import NamedTuple

from waver_core.errors import UserError

TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
LATENT_CHANNELS = 16
PATCH = 2
"""Latent cells along each side of a token."""


class LatentShape(NamedTuple):
    """Latent cells of a video or image (one frame)."""

    frames: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        return self.frames, -(-self.height // PATCH), -(-self.width // PATCH)

    @property
    def tokens(self) -> int:
        """Number of video tokens."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def pixels(self) -> VideoShape:
        """What decodes from it."""
        return VideoShape(1 + TEMPORAL_STRIDE * (self.frames - 1), self.height * SPATIAL_STRIDE, self.width * SPATIAL_STRIDE)


class VideoShape(NamedTuple):
    """Frames and size of a video or image (one frame), in pixels."""

    frames: int
    height_px: int
    width_px: int

    @property
    def latent(self) -> LatentShape:
        """Its latents. Raises `UserError` where the frames are not 1 + 4k or the strides do not divide the size."""
        frames, height_px, width_px = self
        if frames < 1 or (frames - 1) % TEMPORAL_STRIDE:
            near = whole_frames(max(1, frames))
            raise UserError(f"{frames} frames cannot be encoded: take 1 + 4k of them, for example {near} or {near + 4}")
        if min(height_px, width_px) < SPATIAL_STRIDE * PATCH or height_px % SPATIAL_STRIDE or width_px % SPATIAL_STRIDE:
            raise UserError(f"{height_px}x{width_px} px cannot be encoded: height and width must be multiples of 8, at least 16")
        return LatentShape(1 + (frames - 1) // TEMPORAL_STRIDE, height_px // SPATIAL_STRIDE, width_px // SPATIAL_STRIDE)

    @property
    def is_image(self) -> bool:
        """Whether it is a single frame."""
        return self.frames == 1


def whole_frames(frames: int) -> int:
    """The largest 1 + 4k that is not above `frames`; raises `ValueError` below 1."""
    if frames < 1:
        raise ValueError(f"a video has at least one frame, not {frames}")
    return 1 + (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE
