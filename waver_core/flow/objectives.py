"""What the network learns: the flow (Waver §4.3, after SD3), the refiner's flow (§2.2), and alignment with features (§4.2).

Losses come per sample, `[B]`, unreduced: the loop decides how samples weigh against each other, and a packed batch must give
each sample the loss it has alone. Samples of one micro-batch differ in shape, so they come as a list of `[C, T, H, W]` tensors;
a stacked `[B, C, T, H, W]` is the same thing. Everything is accumulated in fp32, whatever the network computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

Batch: TypeAlias = torch.Tensor | Sequence[torch.Tensor]
"""Samples: a list of tensors of any shapes, or one tensor whose first dimension counts them."""


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """bf16 and fp16 become fp32; fp64 stays, for what is checked to more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`x_t = (1 - t) x_0 + t n`, in fp32 or better: x0 exactly at t = 0 and noise exactly at t = 1.

    `t` is fp32, a scalar for one sample `[C, T, H, W]` or `[B]` for a batch of them. Raises `TypeError` for a timestep of lower
    precision and `ValueError` where the shapes do not fit.
    """
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"timesteps are fp32, not {t.dtype}")
    _same_shape(x0, noise)
    if t.shape != x0.shape[: t.ndim]:
        raise ValueError(f"timesteps {list(t.shape)} do not count the samples of {list(x0.shape)}")
    t = t.reshape(t.shape + (1,) * (x0.ndim - t.ndim))
    return (1 - t) * at_least_fp32(x0) + t * at_least_fp32(noise)


def velocity_target(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`n - x_0`, the derivative of `interpolate` in t; any shape, fp32 or better."""
    _same_shape(x0, noise)
    return at_least_fp32(noise) - at_least_fp32(x0)


def refiner_input(x_n: torch.Tensor, x_0: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`w x_n + (1 - w) x_0` (Waver §2.2); arguments as those of `interpolate`."""
    return interpolate(x_0, x_n, w)


def refiner_target(x_0: torch.Tensor, x_n: torch.Tensor) -> torch.Tensor:
    """`x_0 - x_n` (Waver §2.2): from degraded to clean, so *minus* the derivative of `refiner_input` in w."""
    return -velocity_target(x_0, x_n)


def flow_loss(pred: Batch, target: Batch, weight_mask: Batch | None = None) -> torch.Tensor:
    """Mean squared error of each sample, fp32 `[B]`.

    `weight_mask` holds a weight for each element or a shape that broadcasts to it, such as `[1, T, 1, 1]` with 0 at the frames
    that are given; the mean is then weighted. A sample whose weights are all 0 has loss and gradient 0, never NaN. Raises
    `ValueError` where prediction and target differ in number or shape, which would otherwise broadcast into a wrong loss.
    """
    _same_count(pred, target)
    if weight_mask is None:
        return torch.stack([_squared_error(p, y).mean() for p, y in zip(pred, target)])
    _same_count(pred, weight_mask)
    losses = []
    for p, y, weight in zip(pred, target, weight_mask):
        weight = at_least_fp32(weight).broadcast_to(p.shape)
        losses.append((weight * _squared_error(p, y)).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny))
    return torch.stack(losses)


def alignment_loss(h: Batch, f: Batch) -> torch.Tensor:
    """Minus the mean cosine similarity of each sample's feature vectors, fp32 `[B]` in [-1, 1] (Waver §4.2, L_align).

    `h` are the network's features after downsampling and projection, `f` those of the vision model: `[..., D]` per sample, of
    equal shapes. A vector of zeros is similar to nothing (cosine 0). Raises `ValueError` where shapes or numbers differ.
    """
    _same_count(h, f)
    losses = []
    for ours, theirs in zip(h, f):
        _same_shape(ours, theirs)
        losses.append(-torch.nn.functional.cosine_similarity(at_least_fp32(ours), at_least_fp32(theirs), dim=-1).mean())
    return torch.stack(losses)


def _squared_error(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    _same_shape(pred, target)
    return (at_least_fp32(pred) - at_least_fp32(target)).square()


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")


def _same_count(a: Batch, b: Batch) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} samples and {len(b)}: each needs its counterpart")
