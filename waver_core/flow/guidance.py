"""Guidance at inference: classifier-free (CFG), and video APG, which lets its scale be high without artefacts (Waver §4.5).

APG (Sadat et al., 2024) takes the difference between the conditional and the unconditional prediction, adds a momentum, bounds
its norm, and takes away the part that is parallel to the conditional prediction, which oversaturates:

    d = cond - uncond;  d = d + momentum * d_before;  d *= min(1, r / |d|)
    out = cond + (scale - 1) * (d_orthogonal + eta * d_parallel)

For video the report bounds and projects each frame by itself, over [C, H, W], which it finds to give fewer artefacts than
[C, T, H, W]. With eta = 1, no momentum and no bound this is CFG. The unconditional prediction is usually that of the negative
prompt.

**What is guided.** Any prediction of the shape [..., C, T, H, W]; here it is the *velocity*, as a network returns it and as
diffusers' guider does it. The paper of APG works on the prediction of the clean data instead. Both are linear in each other
(x_0 = x_t - t v), so CFG is the same in either, but "parallel" and the norm are not: the difference of the x_0 predictions is t
times that of the velocities, so in x_0 a bound loosens towards the end of sampling. To guide x_0, hand the guide
`x_t - t * v` of both predictions and turn its answer back with `v = (x_t - x_0) / t`. The report names a threshold and a scale,
but neither the prediction they are for, nor eta, nor a momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch

from waver_core.errors import UserError
from waver_core.flow.objectives import at_least_fp32

Prediction = TypeVar("Prediction", bound=torch.Tensor | list[torch.Tensor])
"""One prediction [..., C, T, H, W], or a list of them with shapes of their own."""

_DIMS = {"chw": (-4, -2, -1), "cthw": (-4, -3, -2, -1)}


class Guide(Protocol):
    """Guidance of one sampling run; may remember earlier steps, so it serves one run only."""

    def __call__(self, cond: Prediction, uncond: Prediction) -> Prediction:
        """The guided prediction, shaped as the two given, in fp32 or better. Called once a step, in order."""
        ...


class Guidance(Protocol):
    """The settings of a guidance."""

    def start(self) -> Guide:
        """A guide for one sampling run."""
        ...


def cfg(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """`uncond + scale (cond - uncond)` in fp32 or better: a scale of 1 is the conditional prediction, 0 the unconditional."""
    _check_shapes(cond, uncond)
    cond, uncond = at_least_fp32(cond), at_least_fp32(uncond)
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Cfg:
    """Classifier-free guidance; the report compares APG with scale 5 (Fig. 21)."""

    scale: float = 5.0

    def __post_init__(self) -> None:
        _check_finite(scale=self.scale)

    def start(self) -> Guide:
        """See `Guidance`."""
        return _guide(lambda _, c, u: cfg(c, u, self.scale))


@dataclass(frozen=True)
class Apg:
    """Video APG with the report's settings (Waver §4.5). Raises `UserError` for settings that mean nothing."""

    scale: float = 8.0
    """As in CFG: 1 guides nothing."""
    norm_threshold: float = 27.0
    """Largest norm of a difference over `dims`; 0 turns the bound off. It is absolute: the report's 27 is for a frame of
    16 x 90 x 160 latents (720p), a root mean square of 0.056 each. A smaller frame meets it later, and a tiny one never; to bound
    the same root mean square, scale it with the root of the number of elements."""
    eta: float = 0.0
    """Weight of the parallel part: 0 takes it all away, which the paper of APG advises; 1 keeps it."""
    momentum: float = 0.0
    """Weight of the difference so far; the paper of APG advises a negative one (-0.5), which steers away from earlier steps. The
    report names none, so it is off."""
    dims: Literal["chw", "cthw"] = "chw"
    """What a norm and a projection are taken over: each frame, or the whole video."""

    def __post_init__(self) -> None:
        _check_finite(scale=self.scale, norm_threshold=self.norm_threshold, eta=self.eta, momentum=self.momentum)
        if self.norm_threshold < 0:
            raise UserError(f"norm_threshold is {self.norm_threshold}: take a number above 0, or 0 for no bound")
        if abs(self.momentum) >= 1:
            raise UserError(f"momentum is {self.momentum}: take a number between -1 and 1, beyond which it grows without end")
        if self.dims not in _DIMS:
            raise UserError(f"dims is '{self.dims}': take 'chw' (each frame) or 'cthw' (the whole video)")

    def start(self) -> Guide:
        """A guide with an empty momentum; see `Guidance`."""
        averages: dict[int, torch.Tensor] = {}

        def step(item: int, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
            guided, averages[item] = apg(cond, uncond, self, averages.get(item))
            return guided

        return _guide(step)


def apg(
    cond: torch.Tensor, uncond: torch.Tensor, settings: Apg, average: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of APG: the guided prediction, and the running difference to hand to the next step.

    Predictions are [..., C, T, H, W]; leading dimensions are guided apart from one another. Both results are in fp32 or better;
    norms and projections are computed in fp64, since a frame at 720p sums 230,400 products. Raises `ValueError` where the
    shapes differ or have fewer than four dimensions.
    """
    _check_shapes(cond, uncond)
    cond, uncond = at_least_fp32(cond), at_least_fp32(uncond)
    difference = cond - uncond
    if average is not None and settings.momentum:
        difference = difference + settings.momentum * average
    d, along, dims = difference.double(), cond.double(), _DIMS[settings.dims]
    if settings.norm_threshold > 0:
        norm = torch.linalg.vector_norm(d, dim=dims, keepdim=True)
        d = d * (settings.norm_threshold / norm).clamp(max=1)  # a norm of 0 gives infinity, hence 1
    along = along / torch.linalg.vector_norm(along, dim=dims, keepdim=True).clamp_min(1e-12)
    parallel = (d * along).sum(dims, keepdim=True) * along
    update = (d - parallel + settings.eta * parallel).to(cond.dtype)
    return cond + (settings.scale - 1) * update, difference


def _guide(step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]) -> Guide:
    """A guide of tensors and of lists from one of tensors, which is told the tensor's place in the list."""

    def guide(cond: Any, uncond: Any) -> Any:
        if isinstance(cond, torch.Tensor):
            return step(0, cond, uncond)
        if len(cond) != len(uncond):
            raise ValueError(f"{len(cond)} conditional and {len(uncond)} unconditional predictions")
        return [step(k, c, u) for k, (c, u) in enumerate(zip(cond, uncond))]

    return guide


def _check_shapes(cond: torch.Tensor, uncond: torch.Tensor) -> None:
    if cond.shape != uncond.shape or cond.ndim < 4:
        shapes = f"{list(cond.shape)} and {list(uncond.shape)}"
        raise ValueError(f"predictions are two of the same shape [..., C, T, H, W], not {shapes}")


def _check_finite(**settings: float) -> None:
    for name, value in settings.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}: take a finite number")
