"""Which timesteps training sees: logit-normal (Eq. 1) for images, mode (Eq. 2) for video, then the sigma shift (Waver §4.3).

`LogitNormal`, `Mode` and `Uniform` draw from a generator, or one number from each of several, so that a sample's timestep
depends on that sample's seed alone. `Shifted` moves any of them towards noise, as the stages of Table 2 do. All of it is fp32:
near t = 1 a bfloat16 has steps of 1/256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from waver_core.errors import UserError, did_you_mean

MODE_SCALE = 1.29
"""Scale of mode sampling for T2V and I2V."""
MODE_SCALE_MIN, MODE_SCALE_MAX = -1.0, 2 / (math.pi - 2)
"""Between these Eq. 2 falls monotonically, so it is a change of variable."""
T_MARGIN = 1e-5
"""Drawn timesteps are clamped to [T_MARGIN, 1 - T_MARGIN]: at 0 and 1 exactly, logits are infinite and one of the two ends of
the flow has left the input. It moves a few draws in a hundred thousand, by less than what the network resolves."""

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


def normal(generator: Generators, size: tuple[int, ...] = ()) -> torch.Tensor:
    """Standard normal numbers, fp32: `size` from one generator, [B, *size] from a sequence of B."""
    if isinstance(generator, torch.Generator):
        return torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32)
    return torch.stack([normal(one, size) for one in generator])


def uniform(generator: Generators, size: tuple[int, ...] = ()) -> torch.Tensor:
    """Numbers uniform in [0, 1), fp32: `size` from one generator, [B, *size] from a sequence of B."""
    if isinstance(generator, torch.Generator):
        return torch.rand(size, generator=generator, device=generator.device, dtype=torch.float32)
    return torch.stack([uniform(one, size) for one in generator])


def clamp(t: torch.Tensor) -> torch.Tensor:
    """Keep timesteps strictly between 0 and 1, by `T_MARGIN`."""
    return t.clamp(T_MARGIN, 1 - T_MARGIN)


def shift(t: torch.Tensor, a: float) -> torch.Tensor:
    """`a t / (1 + (a - 1) t)` (SD3): above 1, `a` moves timesteps towards noise; 0 and 1 stay, and 1 / a undoes it.

    Larger videos need it: more pixels say the same thing, so more noise is needed to hide it. Raises `UserError` unless a > 0.
    """
    if not (a > 0 and math.isfinite(a)):
        raise UserError(f"a shift of {a} is impossible: take a number above 0, 1 for none")
    return a * t / (a * t + (1 - t))  # the same divisor, but exactly 1 at t = 1


def logit_normal(z: torch.Tensor, m: float, s: float) -> torch.Tensor:
    """Standard normal numbers to timesteps whose logit has mean `m` and deviation `s` (Eq. 1)."""
    _check_std(s)
    return torch.sigmoid(m + s * z)


def mode(u: torch.Tensor, s: float = MODE_SCALE) -> torch.Tensor:
    """Numbers uniform in [0, 1] to timesteps (Eq. 2). Falls from f(0) = 1 over f(.5) = .5 to f(1) = 0.

    Raises `UserError` for a scale at which Eq. 2 turns round, which would count some timesteps twice.
    """
    _check_scale(s)
    return 1 - u - s * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def logit_normal_density(t: torch.Tensor, m: float, s: float) -> torch.Tensor:
    """Eq. 1 at `t`, fp64; 0 outside (0, 1)."""
    _check_std(s)
    t = t.double()
    inside = (t > 0) & (t < 1)
    t = torch.where(inside, t, 0.5)
    density = torch.exp(-((torch.logit(t) - m) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi) * t * (1 - t))
    return torch.where(inside, density, 0.0)


def mode_density(t: torch.Tensor, s: float = MODE_SCALE) -> torch.Tensor:
    """Density of `mode(u, s)` for uniform u at `t`, fp64; 0 outside [0, 1].

    Eq. 2 has no inverse in closed form: u is found by bisection, and the density is 1 / |f'(u)|.
    """
    _check_scale(s)
    t = t.double()
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(54):  # halvings until fp64 has no number between the two
        middle = (low + high) / 2
        above = mode(middle, s) > t
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    slope = 1 + s - s * math.pi / 2 * torch.sin(math.pi * (low + high) / 2)
    return torch.where((t >= 0) & (t <= 1), 1 / slope, 0.0)


class Timesteps(Protocol):
    """A distribution of timesteps."""

    def sample(self, generator: Generators, size: tuple[int, ...] = ()) -> torch.Tensor:
        """Timesteps strictly within (0, 1), fp32, on the generator's device: `size` from one generator, [B, *size] from B."""
        ...

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """Density at `t`, fp64 (Waver Fig. 14)."""
        ...


@dataclass(frozen=True)
class LogitNormal:
    """Images: `LogitNormal(0.5, 1)` (Waver §4.3, Eq. 1)."""

    mean: float = 0.5
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_std(self.std)

    def sample(self, generator: Generators, size: tuple[int, ...] = ()) -> torch.Tensor:
        """See `Timesteps`."""
        return clamp(logit_normal(normal(generator, size), self.mean, self.std))

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """See `Timesteps`."""
        return logit_normal_density(t, self.mean, self.std)


@dataclass(frozen=True)
class Mode:
    """Video: `Mode(1.29)`, which the report finds to give larger motion (Waver §4.3, Eq. 2)."""

    scale: float = MODE_SCALE

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def sample(self, generator: Generators, size: tuple[int, ...] = ()) -> torch.Tensor:
        """See `Timesteps`."""
        return clamp(mode(uniform(generator, size), self.scale))

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """See `Timesteps`."""
        return mode_density(t, self.scale)


@dataclass(frozen=True)
class Uniform:
    """Every timestep alike; the refiner's weight `w` is "sampled from [0, 1]" (Waver §2.2)."""

    def sample(self, generator: Generators, size: tuple[int, ...] = ()) -> torch.Tensor:
        """See `Timesteps`."""
        return clamp(uniform(generator, size))

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """See `Timesteps`."""
        return ((t >= 0) & (t <= 1)).double()


@dataclass(frozen=True)
class Shifted:
    """What a stage trains on: a distribution moved by the stage's sigma shift (Waver Table 2)."""

    base: Timesteps
    shift: float = 1.0

    def __post_init__(self) -> None:
        shift(torch.zeros(()), self.shift)

    def sample(self, generator: Generators, size: tuple[int, ...] = ()) -> torch.Tensor:
        """See `Timesteps`."""
        return clamp(shift(self.base.sample(generator, size), self.shift))

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """See `Timesteps`."""
        before = shift(t.double(), 1 / self.shift)
        return self.base.density(before) * (1 + (self.shift - 1) * before) ** 2 / self.shift


def named(distribution: str, *, mean: float = 0.0, std: float = 1.0, scale: float = MODE_SCALE) -> Timesteps:
    """The distribution that a recipe names: `logit_normal` (mean, std), `mode` (scale) or `uniform`; else `UserError`."""
    if distribution == "logit_normal":
        return LogitNormal(mean, std)
    if distribution == "mode":
        return Mode(scale)
    if distribution == "uniform":
        return Uniform()
    known = ["logit_normal", "mode", "uniform"]
    raise UserError(f"no distribution of timesteps '{distribution}': {did_you_mean(distribution, known)}")


def _check_std(s: float) -> None:
    if not s > 0:
        raise UserError(f"logit-normal timesteps cannot have a deviation of {s}: take a number above 0, 1.0 in the report")


def _check_scale(s: float) -> None:
    if not MODE_SCALE_MIN <= s <= MODE_SCALE_MAX:
        raise UserError(f"mode timesteps cannot have a scale of {s}: take -1 to {MODE_SCALE_MAX:.2f}, {MODE_SCALE} in the report")
