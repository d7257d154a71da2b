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
from waver_core.denoising import Inputs, OnStep, denoise, device_of, lengthened, sharpen
from waver_core.dit import WaverDiT
from waver_core.flow.guidance import Guidance
from waver_core.shapes import VideoShape


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
        return device_of(self.dit)

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
        `hold` and `on_step` as in `denoise`."""
        samples = [self.inputs(task) for task in tasks]
        return denoise(self.dit, samples, steps=steps, shift=shift, guidance=guidance, hold=hold, on_step=on_step)

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
        padded = [tuple(self._lengthened(vector) for vector in text) for text in texts]
        samples = [
            Inputs(task.shape.latent, task.seed, self.black(task.shape), text) for task, text in zip(tasks, padded, strict=True)
        ]
        starts = [torch.from_numpy(z) for z in latents]
        return sharpen(self.dit, starts, samples, steps=steps, shift=shift, noise_weight=noise_weight, on_step=on_step)

    def inputs(self, task: Task) -> Inputs:
        """A task with its texts and given frames encoded."""
        frames = {0: task.first_frame, -1: task.last_frame}
        given = {place: self._encoded(frame) for place, frame in frames.items() if frame is not None}
        texts = self._text(task.prompt), self._text(task.negative)
        return Inputs(task.shape.latent, task.seed, self.black(task.shape), *texts, given)

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
            self._black[size] = self._encoded(np.zeros((*size, 3), np.uint8))
        return self._black[size]

    def _text(self, text: str) -> tuple[Tensor, ...]:
        if text in self._kept:
            return self._kept[text]
        return tuple(self._lengthened(torch.from_numpy(encoder.encode([text])[0])) for encoder in self.text_encoders)

    def _lengthened(self, vector: Tensor) -> Tensor:
        return lengthened(vector, self.text_multiple).to(self.device)

    def _encoded(self, frame: np.ndarray) -> Tensor:
        return torch.from_numpy(self.autoencoder.encode([frame[None]])[0]).to(self.device)


def encoders_by_name(names: Mapping[str, Any], create: Callable[..., Any]) -> tuple[VideoAutoencoder, list[TextEncoder]]:
    """Build the backends that a recipe's `encoders` name: {autoencoder: {backend, options}, text: [...]}."""
    autoencoder = create("video_autoencoder", names["autoencoder"]["backend"], **names["autoencoder"].get("options", {}))
    text = [create("text_encoder", t["backend"], **t.get("options", {})) for t in names["text"]]
    return autoencoder, text
