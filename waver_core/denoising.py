"""The two loops of generation on tensors alone: from noise to latents, and from degraded latents to clean ones.

Everything a loop needs is in `Inputs`, which may travel between processes, so the network can lie somewhere else than the
encoders. Several processes may compute one loop together: each calls it with the same inputs; `dit.sequence_group` shares out
the tokens, `branches` the prompt and the negative prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from waver_core.dit import WaverDiT, condition
from waver_core.flow.degradation import degrade_latents
from waver_core.flow.guidance import Guidance
from waver_core.flow.sampler import refine, sample
from waver_core.shapes import TEMPORAL_STRIDE, LatentShape

OnStep = Callable[[int, int, Any], bool | None]


class Branches(Protocol):
    """Two processes (or groups) of which the first computes the prompt's velocities, the second the negative prompt's."""

    rank: int

    def both(self, own: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The prompt's and the negative prompt's velocities on either side, from one's own."""
        ...


@dataclass(frozen=True)
class Inputs:
    """One video or image to make, encoded. Latents are fp32 [16, 1, h, w] for a frame, texts [L, dim] for every encoder."""

    shape: LatentShape
    seed: int
    black: Tensor
    """Latents of a black image: what stands for frames that are not given."""
    text: tuple[Tensor, ...]
    negative: tuple[Tensor, ...] = ()
    given: Mapping[int, Tensor] = field(default_factory=dict)
    """Latents of given frames, each encoded as an image: 0 is the first, -1 the last."""


def denoise(
    dit: WaverDiT,
    samples: Sequence[Inputs],
    *,
    steps: int,
    shift: float,
    guidance: Guidance,
    hold: bool = True,
    on_step: OnStep | None = None,
    branches: Branches | None = None,
) -> list[Tensor]:
    """Latents of all samples together, in one batch; fp32 [16, T, h, w] each, on the model's device (Waver §4.5).

    hold: a first frame that is given stays as it is. Its velocity is known (noise minus latent), so that takes the place of
    the model's word for that latent frame; otherwise the model copies it from its condition as well as it has learned to.
    `on_step` as in `waver_core.flow.sampler.sample`.
    """
    device = device_of(dit)
    noise = [noise_of(s, device) for s in samples]
    black = [s.black.to(device) for s in samples]
    known = [_known(s, device) for s in samples]
    texts, negatives = ([[t.to(device) for t in texts] for texts in side] for side in _sides(samples))
    guide = guidance.start()

    def velocity(state: list[Tensor], t: Tensor) -> list[Tensor]:
        inputs = [condition(x, b, *k) for x, b, k in zip(state, black, known)]
        if branches is None:
            out, _ = dit.velocity(inputs + inputs, texts + negatives, t.expand(2 * len(samples)))
            cond, uncond = out[: len(samples)], out[len(samples) :]
        else:
            own, _ = dit.velocity(inputs, negatives if branches.rank else texts, t.expand(len(samples)))
            cond, uncond = branches.both(list(own))
        guided: list[Tensor] = guide([v.float() for v in cond], [v.float() for v in uncond])
        for number, s in enumerate(samples):
            if hold and 0 in s.given:
                first = noise[number][:, :1] - s.given[0].to(device)
                guided[number] = torch.cat([first, guided[number][:, 1:]], dim=1)
        return guided

    with torch.no_grad():
        latents: list[Tensor] = sample(velocity, noise, steps, shift, on_step)
    return latents


def sharpen(
    dit: WaverDiT,
    latents: Sequence[Tensor],
    samples: Sequence[Inputs],
    *,
    steps: int,
    shift: float,
    noise_weight: float,
    hold: bool = True,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """Refine latents [16, T, h, w] of enlarged videos: degraded with noise by `noise_weight`, then led to clean ones (§2.2).

    hold: a first frame that is given, at the size of the result, becomes that frame, as in `denoise`: where it leads to is known,
    so the enlarged one need not be guessed from. The report says nothing of it; the refiner's own condition stays black, as in
    its training.
    """
    device = device_of(dit)
    weight = torch.tensor(noise_weight, device=device)
    starts = [degrade_latents(z.to(device), noise_of(s, device), weight) for z, s in zip(latents, samples, strict=True)]
    black = [s.black.to(device) for s in samples]
    texts = [[t.to(device) for t in s.text] for s in samples]

    def velocity(state: list[Tensor], t: Tensor) -> list[Tensor]:
        inputs = [condition(x, b) for x, b in zip(state, black)]
        out, _ = dit.velocity(inputs, texts, t.expand(len(samples)))
        led = [v.float() for v in out]
        for number, s in enumerate(samples):
            if hold and 0 in s.given:
                first = s.given[0].to(device) - starts[number][:, :1]
                led[number] = torch.cat([first, led[number][:, 1:]], dim=1)
        return led

    with torch.no_grad():
        out: list[Tensor] = refine(velocity, starts, steps, shift, on_step)
    return out


def noise_of(sample: Inputs, device: torch.device | str = "cpu") -> Tensor:
    """From the seed alone, drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(sample.seed)
    return torch.randn(16, *sample.shape, generator=generator).to(device)


def device_of(dit: WaverDiT) -> torch.device:
    """Where the model lies."""
    return next(dit.parameters()).device


def lengthened(vectors: Tensor, multiple: int) -> Tensor:
    """Text vectors [L, dim] with zero ones up to a multiple of tokens, as in training (`data.text_multiple`)."""
    return torch.nn.functional.pad(vectors, (0, 0, 0, -len(vectors) % multiple))


def _sides(samples: Sequence[Inputs]) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    return [s.text for s in samples], [s.negative for s in samples]


def _known(sample: Inputs, device: torch.device) -> tuple[Tensor | None, list[bool] | None]:
    """Latents of the given frames in their places, black elsewhere, and which pixel frames they are."""
    if not sample.given:
        return None, None
    flags = [False] * (1 + TEMPORAL_STRIDE * (sample.shape.frames - 1))
    known = sample.black.to(device).repeat(1, sample.shape.frames, 1, 1)
    for place, latent in sample.given.items():
        flags[place] = True
        known[:, place] = latent.to(device)[:, 0]
    return known, flags
