"""The refiner's low-quality inputs (Waver §2.2): pixels shrunk and enlarged again, then latents mixed with noise.

The first stands for the lower resolution of the base model's video, the second for what that model gets wrong; at inference the
base model's video is only enlarged (`resize`) before its latents meet the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from waver_core.errors import UserError
from waver_core.flow.objectives import interpolate
from waver_core.flow.timesteps import Generators, uniform

PIXEL_FACTOR = 3.0
"""1080p -> 360p -> 1080p."""
_CHUNK_FRAMES = 8

Frames = TypeVar("Frames", np.ndarray, torch.Tensor)


def resize(frames: Frames, height_px: int, width_px: int) -> Frames:
    """Bicubic with antialiasing: uint8 [T, H, W, 3], numpy or torch, to [T, height_px, width_px, 3] of the same kind.

    Both ways of `degrade_pixels` and the enlargement at inference go through here, so that they agree. A CPU
    and a GPU differ by two levels at most. Raises `TypeError` unless the frames are uint8, and `ValueError` for another shape or
    an empty size.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames)) if isinstance(frames, np.ndarray) else frames
    if pixels.dtype != torch.uint8:
        raise TypeError(f"frames are uint8, not {pixels.dtype}")
    if pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"frames are [T, H, W, 3], not {list(pixels.shape)}")
    if min(height_px, width_px) < 1:
        raise ValueError(f"frames of {height_px}x{width_px} px are empty")
    resized = torch.empty((len(pixels), height_px, width_px, 3), dtype=torch.uint8, device=pixels.device)
    for first in range(0, len(pixels), _CHUNK_FRAMES):
        chunk = pixels[first : first + _CHUNK_FRAMES].permute(0, 3, 1, 2)
        if pixels.device.type == "cpu":  # alone in having kernels for uint8, a dozen times as fast as its fp32 ones
            chunk = _bicubic(chunk, height_px, width_px)
        else:
            chunk = _bicubic_fp32(chunk, height_px, width_px)
        resized[first : first + _CHUNK_FRAMES] = chunk.permute(0, 2, 3, 1)
    return resized.numpy() if isinstance(frames, np.ndarray) else resized


def _bicubic(pixels: torch.Tensor, height_px: int, width_px: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(pixels, size=(height_px, width_px), mode="bicubic", antialias=True)


def _bicubic_fp32(pixels: torch.Tensor, height_px: int, width_px: int) -> torch.Tensor:
    """The same on any device: uint8 kernels clip after each of their two passes, width first, and so does this."""
    wide = _bicubic(pixels.float(), pixels.shape[2], width_px).round().clamp(0, 255)
    return _bicubic(wide, height_px, width_px).round().clamp(0, 255).to(torch.uint8)


def degrade_pixels(frames: Frames, factor: float = PIXEL_FACTOR) -> Frames:
    """Shrink by `factor` and enlarge to the size it had: uint8 [T, H, W, 3], numpy or torch, to the same (Waver §2.2).

    A side that the factor does not divide is rounded to the nearest pixel, one at least. Raises `UserError` for a factor below
    1, else as `resize`.
    """
    if not 1 <= factor < float("inf"):
        raise UserError(f"a pixel factor of {factor} shrinks nothing: take a number of at least 1, 3 in the report")
    _, height_px, width_px = frames.shape[:3]
    small = resize(frames, max(1, round(height_px / factor)), max(1, round(width_px / factor)))
    return resize(small, height_px, width_px)


def degrade_latents(x: torch.Tensor, noise: torch.Tensor, w_d: torch.Tensor) -> torch.Tensor:
    """`x_n = (1 - w_d) x + w_d n`, fp32 (Waver §2.2): one sample with a scalar `w_d`, or a batch with `[B]`; `w_d` is fp32.

    `x` are the latents of the pixel-degraded video. A larger `w_d` leaves more to the prompt: that is how the refiner edits.
    """
    return interpolate(x, noise, w_d)


@dataclass(frozen=True)
class LatentDegradation:
    """The range of `w_d` in training (Waver §2.2). Raises `UserError` unless 0 <= low <= high <= 1."""

    low: float = 0.85
    high: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(f"w_d from {self.low} to {self.high} is no range within 0 and 1: the report has 0.85 to 0.95")

    def sample(self, generator: Generators) -> torch.Tensor:
        """Uniform in [low, high], fp32: a scalar from one generator, [B] from a sequence of B."""
        return (self.low + (self.high - self.low) * uniform(generator)).clamp(self.low, self.high)
