"""From prompts to pictures with a transformer, an autoencoder and text encoders: what training previews and serving share.

The base model makes latents from noise (Waver §2.1, §4.5), the refiner makes sharper ones from an enlarged video (§2.2). Given
frames are conditions: the first alone is image-to-video, first and last together interpolation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from waver_core.backends.contracts import TextEncoder, VideoAutoencoder
from waver_core.dit import WaverDiT, condition
from waver_core.flow.degradation import degrade_latents
from waver_core.flow.guidance import Guidance
from waver_core.flow.sampler import refine, sample
from waver_core.shapes import TEMPORAL_STRIDE, VideoShape

OnStep = Callable[[int, int, Any], bool | None]


@dataclass(frozen=True)
class Task:
    """One video or image to make. Frames are uint8 [H, W, 3] of exactly the size that is asked for."""

    prompt: str
    shape: VideoShape
    seed: int
    negative: str = ""
    first_frame: np.ndarray | None = None
    last_frame: np.ndarray | None = None


class Generator:
    """A model with the encoders it was trained with. `text_multiple` is that of its recipe."""

    def __init__(
        self, dit: WaverDiT, autoencoder: VideoAutoencoder, text_encoders: Sequence[TextEncoder], text_multiple: int = 1
    ) -> None:
        self.dit, self.autoencoder, self.text_encoders = dit, autoencoder, tuple(text_encoders)
        self.text_multiple = text_multiple
        self._black: dict[tuple[int, int], Tensor] = {}
        self._kept: dict[str, tuple[Tensor, ...]] = {}

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.dit.parameters()).device

    def latents(
        self,
        tasks: Sequence[Task],
        *,
        steps: int,
        shift: float,
        guidance: Guidance,
        hold: bool = True,
        on_step: OnStep | None = None,
    ) -> list[Tensor]:
        """Denoise all tasks together, in one batch; fp32 [16, T, h, w] each. The same seed gives the same noise for every batch.

        hold: a first frame that is given stays as it is. Its velocity is known (noise minus latent), so that takes the place of
        the model's word for that latent frame; otherwise the model copies it from its condition as well as it has learned to.
        `on_step` as in `waver_core.flow.sampler.sample`.
        """
        noise = [self._noise(task) for task in tasks]
        texts = [self._text(task.prompt) for task in tasks] + [self._text(task.negative) for task in tasks]
        given = [self._given(task) for task in tasks]
        guide = guidance.start()

        def velocity(state: list[Tensor], t: Tensor) -> list[Tensor]:
            inputs = [condition(x, self.black(task.shape), known, flags) for x, task, (known, flags) in zip(state, tasks, given)]
            both, _ = self.dit.velocity(inputs + inputs, texts, t.expand(2 * len(tasks)))
            guided: list[Tensor] = guide([v.float() for v in both[: len(tasks)]], [v.float() for v in both[len(tasks) :]])
            for number, (known, flags) in enumerate(given):
                if hold and known is not None and flags is not None and flags[0]:
                    guided[number] = torch.cat([noise[number][:, :1] - known[:, :1], guided[number][:, 1:]], dim=1)
            return guided

        with torch.no_grad():
            out: list[Tensor] = sample(velocity, noise, steps, shift, on_step)
        return out

    def refined(
        self,
        videos: Sequence[np.ndarray],
        tasks: Sequence[Task],
        *,
        steps: int,
        shift: float,
        noise_weight: float,
        on_step: OnStep | None = None,
    ) -> list[Tensor]:
        """Sharpen enlarged videos, uint8 [T, H, W, 3] of the tasks' sizes (§2.2); fp32 [16, T, h, w] each."""
        texts = [self._text(task.prompt) for task in tasks]
        encoded = self.autoencoder.encode(videos)
        return self.refined_latents(encoded, tasks, texts, steps=steps, shift=shift, noise_weight=noise_weight, on_step=on_step)

    def refined_latents(
        self,
        latents: Sequence[np.ndarray],
        tasks: Sequence[Task],
        texts: Sequence[tuple[Tensor, ...]],
        *,
        steps: int,
        shift: float,
        noise_weight: float,
        on_step: OnStep | None = None,
    ) -> list[Tensor]:
        """The same from latents [16, T, h, w] and text vectors: degraded with noise by `noise_weight`, then led to clean ones."""
        weight = torch.tensor(noise_weight, device=self.device)
        starts = [
            degrade_latents(torch.from_numpy(z).to(self.device), self._noise(task), weight)
            for z, task in zip(latents, tasks, strict=True)
        ]
        texts = [tuple(self._lengthened(vector) for vector in text) for text in texts]

        def velocity(state: list[Tensor], t: Tensor) -> list[Tensor]:
            inputs = [condition(x, self.black(task.shape)) for x, task in zip(state, tasks)]
            out, _ = self.dit.velocity(inputs, texts, t.expand(len(tasks)))
            return [v.float() for v in out]

        with torch.no_grad():
            out: list[Tensor] = refine(velocity, starts, steps, shift, on_step)
        return out

    def keep_texts(self, texts: Sequence[str]) -> None:
        """Encode these texts now and let go of the text encoders, which may be larger than the model: no others can be asked for
        afterwards."""
        self._kept = {text: self._text(text) for text in texts}
        self.text_encoders = ()

    def decode(self, latents: Sequence[Tensor]) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] of each."""
        return self.autoencoder.decode([z.float().cpu().numpy() for z in latents])

    def black(self, shape: VideoShape) -> Tensor:
        """Latents [16, 1, h, w] of a black image of this size."""
        size = (shape.height_px, shape.width_px)
        if size not in self._black:
            picture = np.zeros((1, *size, 3), np.uint8)
            self._black[size] = torch.from_numpy(self.autoencoder.encode([picture])[0]).to(self.device)
        return self._black[size]

    def _noise(self, task: Task) -> Tensor:
        """From the seed alone, on the CPU: the same on every device."""
        generator = torch.Generator().manual_seed(task.seed)
        latent = task.shape.latent
        return torch.randn(16, *latent, generator=generator).to(self.device)

    def _text(self, text: str) -> tuple[Tensor, ...]:
        if text in self._kept:
            return self._kept[text]
        return tuple(self._lengthened(torch.from_numpy(encoder.encode([text])[0])) for encoder in self.text_encoders)

    def _lengthened(self, vector: Tensor) -> Tensor:
        padding = -len(vector) % self.text_multiple
        return torch.nn.functional.pad(vector, (0, 0, 0, padding)).to(self.device)

    def _given(self, task: Task) -> tuple[Tensor | None, list[bool] | None]:
        """Latents of the given frames, each encoded as an image, and which pixel frames they are."""
        if task.first_frame is None and task.last_frame is None:
            return None, None
        flags = [False] * task.shape.frames
        known = self.black(task.shape).repeat(1, 1 + (task.shape.frames - 1) // TEMPORAL_STRIDE, 1, 1)
        for place, frame in ((0, task.first_frame), (-1, task.last_frame)):
            if frame is not None:
                flags[place] = True
                known[:, place] = torch.from_numpy(self.autoencoder.encode([frame[None]])[0]).to(self.device)[:, 0]
        return known, flags


def encoders_by_name(names: Mapping[str, Any], create: Callable[..., Any]) -> tuple[VideoAutoencoder, list[TextEncoder]]:
    """Build the backends that a recipe's `encoders` name: {autoencoder: {backend, options}, text: [...]}."""
    autoencoder = create("video_autoencoder", names["autoencoder"]["backend"], **names["autoencoder"].get("options", {}))
    text = [create("text_encoder", t["backend"], **t.get("options", {})) for t in names["text"]]
    return autoencoder, text
