"""Latents to tokens and back, and the task-unified input of Waver §2.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from waver_core.shapes import PATCH, TEMPORAL_STRIDE, LatentShape


def patchify(latents: Sequence[Tensor]) -> Tensor:
    """[C, T, h, w] of each sample -> patches [N, C * 4] of all, sample after sample, each in the order time, row, column.

    An odd row or column of latents is doubled at its end (1080 lines make 135), for a patch is 2 x 2.
    """
    if len({x.shape for x in latents}) == 1:
        return _patches(torch.stack(tuple(latents)))
    return torch.cat([_patches(x[None]) for x in latents])


def _patches(x: Tensor) -> Tensor:
    s, c, _, h, w = x.shape
    if h % PATCH or w % PATCH:
        x = F.pad(x.flatten(0, 1), (0, w % PATCH, 0, h % PATCH, 0, 0), mode="replicate").unflatten(0, (s, c))
    x = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # s c t rows 2 columns 2
    return x.permute(0, 2, 3, 5, 1, 4, 6).reshape(-1, c * PATCH * PATCH)


def unpatchify(patches: Tensor, shapes: Sequence[LatentShape]) -> list[Tensor]:
    """The way back: [N, C * 4] -> [C, T, h, w] of each sample; the rows and columns that were added are cut off."""
    if len(set(shapes)) == 1:
        return list(_latents(patches, shapes[0], len(shapes)).unbind())
    parts = patches.split([s.tokens for s in shapes])
    return [_latents(part, shape, 1)[0] for part, shape in zip(parts, shapes, strict=True)]


def _latents(patches: Tensor, shape: LatentShape, samples: int) -> Tensor:
    t, rows, columns = shape.grid
    x = patches.view(samples, t, rows, columns, -1, PATCH, PATCH).permute(0, 4, 1, 2, 5, 3, 6)
    return x.reshape(samples, -1, t, rows * PATCH, columns * PATCH)[..., : shape.height, : shape.width]


def condition(noisy: Tensor, black: Tensor, known: Tensor | None = None, given: Sequence[bool] | None = None) -> Tensor:
    """The unified input of one sample: noisy [16, T, h, w] -> [36, T, h, w] = noisy, condition, mask (Waver §2.1).

    black: latents of a black image [16, 1, h, w], which stand for every frame that is not given.
    known: latents [16, T, h, w] of what is given; only latent frames with a given pixel frame are read.
    given: for each of the 1 + 4 (T - 1) pixel frames whether it is known; None is text-to-video. The first latent frame stands
    for one pixel frame, so its four mask channels agree.
    """
    frames = noisy.shape[1]
    condition_latents = black.expand(-1, frames, -1, -1)
    mask = noisy.new_zeros(TEMPORAL_STRIDE, frames, *noisy.shape[2:])
    if given is not None and any(given):
        if known is None or len(given) != 1 + TEMPORAL_STRIDE * (frames - 1):
            raise ValueError(f"{len(given)} pixel frames are marked for {frames} latent frames, or their latents are missing")
        flags = torch.tensor([*[given[0]] * TEMPORAL_STRIDE, *given[1:]], dtype=noisy.dtype, device=noisy.device)
        per_frame = flags.view(frames, TEMPORAL_STRIDE).T  # [4, T]
        mask = mask + per_frame[:, :, None, None]
        condition_latents = torch.where(per_frame.amax(0)[None, :, None, None] > 0, known, condition_latents)
    return torch.cat([noisy, condition_latents, mask])
