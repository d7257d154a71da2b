"""From a drawn sample to what the model is shown and what it must predict (Waver §2.1, §2.2, §4.3).

Everything random about a sample (its noise, timestep, caption, whether its first frame is given) comes from a generator that
is seeded by (seed, stage, epoch, sample, repeat) alone. So it is the same on any number of workers and after any restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data.shards import Sample
from training.recipe import Recipe, Timesteps
from waver_core.dit import condition
from waver_core.flow import objectives
from waver_core.flow.degradation import degrade_latents
from waver_core.flow.timesteps import Shifted, clamp, named
from waver_core.flow.timesteps import Timesteps as Distribution
from waver_core.shapes import SPATIAL_STRIDE, TEMPORAL_STRIDE, LatentShape

IMAGE, VIDEO = "image", "video"


class Example(NamedTuple):
    """One sample, ready for the model; tensors are fp32."""

    inputs: Tensor
    """[36, T, h, w]"""
    target: Tensor
    """[16, T, h, w], what the output is compared with"""
    t: Tensor
    """[] the timestep in [0, 1]"""
    texts: tuple[Tensor, ...]
    """Per text encoder [L, dim]"""
    features: Tensor | None
    """[Tf, Hf, Wf, dim] for alignment"""
    kind: str
    """"image" or "video\""""
    task: str
    """What was given: t2i, t2v, i2v, interpolation, refine"""

    @property
    def tokens(self) -> int:
        """Of video and text."""
        return LatentShape(*self.inputs.shape[1:]).tokens + sum(len(text) for text in self.texts)

    def to(self, device: str) -> Example:
        """The same on a device; `t` is fp32 everywhere."""
        moved = (self.inputs, self.target, self.t)
        features = None if self.features is None else self.features.to(device)
        inputs, target, t = (x.to(device, non_blocking=True) for x in moved)
        return self._replace(inputs=inputs, target=target, t=t, texts=tuple(x.to(device) for x in self.texts), features=features)


class Conditioner:
    """Makes examples for one recipe. `constants` are the arrays that the encoded samples share: empty text, black images."""

    def __init__(self, recipe: Recipe, constants: Mapping[str, np.ndarray]) -> None:
        self.recipe = recipe
        self._n_text = len(recipe.encoders.text)
        self._black = {k: torch.from_numpy(v) for k, v in constants.items() if k.startswith("black_")}
        self._empty = tuple(torch.from_numpy(constants[f"empty_text_{e}"]) for e in range(self._n_text))
        self._timesteps: dict[str, Distribution] = {
            kind: Shifted(_named(spec), recipe.shift) for kind, spec in recipe.timesteps.items()
        }
        parts = np.array(list(recipe.data.captions.values()), np.float64)
        self._caption_bounds = torch.from_numpy(np.cumsum(parts / parts.sum()))

    def example(self, sample: Sample, generator: torch.Generator, t: float | None = None) -> Example:
        """Draw everything about one sample. With `t` given nothing is dropped or conditioned: for the held-out loss."""
        x0 = torch.from_numpy(sample.latents)
        kind = IMAGE if x0.shape[1] == 1 else VIDEO
        choice, dropped, conditioned = torch.rand(3, generator=generator).tolist()
        drawn = self._timesteps[kind].sample(generator)  # drawn with `t` given too, so that the noise is the same
        timestep = drawn if t is None else clamp(torch.tensor(t))
        noise = torch.randn(x0.shape, generator=generator)
        number = min(int(torch.searchsorted(self._caption_bounds, choice, right=True)), len(sample.texts) - 1)
        if t is not None:
            number = 0
        texts = tuple(torch.from_numpy(v) for v in sample.texts[number])
        if t is None and dropped < self.recipe.data.text_dropout:
            texts = self._empty
        texts = tuple(lengthened(text, self.recipe.data.text_multiple) for text in texts)
        features = None if sample.features is None else torch.from_numpy(sample.features)
        black = self.black(x0)
        if self.recipe.task == "refine":
            inputs, target = self._refine(sample, x0, noise, timestep, generator)
            return Example(condition(inputs, black), target, timestep, texts, features, kind, "refine")
        noisy = objectives.interpolate(x0, noise, timestep)
        given, known, task = (None, None, "t2i") if kind == IMAGE else (None, None, "t2v")
        if kind == VIDEO and t is None:
            given, known, task = self._given(sample, x0, conditioned)
        target = objectives.velocity_target(x0, noise)
        return Example(condition(noisy, black, known, given), target, timestep, texts, features, kind, task)

    def black(self, latents: Tensor) -> Tensor:
        """Latents of a black image of the same size, [16, 1, h, w]."""
        height, width = latents.shape[2] * SPATIAL_STRIDE, latents.shape[3] * SPATIAL_STRIDE
        return self._black[f"black_{height}x{width}"]

    def _given(self, sample: Sample, x0: Tensor, u: float) -> tuple[list[bool] | None, Tensor | None, str]:
        """Which pixel frames are known, and the latents to read them from (I2V with a probability of 0.2, §4.1)."""
        frames = 1 + TEMPORAL_STRIDE * (x0.shape[1] - 1)
        first = self.recipe.i2v_probability
        if u < first:
            return [True] + [False] * (frames - 1), x0, "i2v"
        if u < first + self.recipe.data.interpolation_probability and sample.last_latent is not None:
            known = torch.cat([x0[:, :-1], torch.from_numpy(sample.last_latent)], dim=1)
            return [True] + [False] * (frames - 2) + [True], known, "interpolation"
        return None, None, "t2v"

    def _refine(self, sample: Sample, x0: Tensor, noise: Tensor, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Between degraded and clean latents (§2.2)."""
        if sample.degraded is None:
            raise ValueError("a refine stage needs samples encoded with degraded latents")
        low, high = self.recipe.refinement.noise_min, self.recipe.refinement.noise_max
        w_d = low + (high - low) * torch.rand((), generator=generator)
        x_n = degrade_latents(torch.from_numpy(sample.degraded), noise, w_d)
        return objectives.refiner_input(x_n, x0, w), objectives.refiner_target(x0, x_n)


def generator_of(*counters: int | str) -> torch.Generator:
    """A CPU generator whose numbers follow from the counters alone."""
    digest = hashlib.blake2b(":".join(map(str, counters)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def lengthened(text: Tensor, multiple: int) -> Tensor:
    """[L, dim] with zero vectors after it, so that L is a multiple; the same wherever a model of the recipe is used."""
    return torch.nn.functional.pad(text, (0, 0, 0, -len(text) % multiple))


def _named(spec: Timesteps) -> Distribution:
    return named(spec.distribution, mean=spec.mean, std=spec.std, scale=spec.scale)
