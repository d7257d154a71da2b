"""Videos that a stage makes while it trains, from the averaged weights: an MP4 (or PNG) and a filmstrip per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from training.data.shards import Sample
from training.recipe import Recipe
from waver_core.dit import WaverDiT
from waver_core.flow.guidance import Apg
from waver_core.generation import Generator, Task, encoders_by_name
from waver_core.registry import create
from waver_core.shapes import LatentShape, VideoShape, whole_frames
from waver_core.video import write_mp4

_STRIP_FRAMES = 6
_STRIP_HEIGHT_PX = 96


class Previews:
    """Samples the prompts of `recipe.sampling` into `<folder>/step-<n>/`; built once a run, encoders included."""

    def __init__(self, recipe: Recipe, dit: WaverDiT, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        autoencoder, text = encoders_by_name(recipe.encoders.model_dump(), create)
        self._generator = Generator(dit, autoencoder, text, recipe.data.text_multiple)
        self._generator.keep_texts([] if recipe.task == "refine" else [*recipe.sampling.prompts, self._negative()])

    def make(self, step: int, *, write: bool) -> list[Path]:
        """Make one sample of every prompt. All workers that share the model call it; `write` on one of them."""
        sampling = self.recipe.sampling
        tasks = [Task(p, self._shape(), sampling.seed + k, self._negative()) for k, p in enumerate(sampling.prompts)]
        guidance = Apg(scale=sampling.guidance_scale, norm_threshold=sampling.norm_threshold)
        latents = self._generator.latents(tasks, steps=sampling.steps, shift=sampling.shift, guidance=guidance)
        if not write:
            return []
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        videos = self._generator.decode(latents)
        paths = [write_sample(folder / f"{k:02d}", video, self.recipe.fps) for k, video in enumerate(videos)]
        write_sheet(folder / "sheet.jpg", videos)
        (folder / "prompts.txt").write_text("".join(f"{k:02d} {t.prompt}\n" for k, t in enumerate(tasks)))
        return paths

    def refine(self, step: int, samples: Sequence[Sample], *, write: bool) -> list[Path]:
        """Refine degraded clips; the sheet has each as degraded, refined and true, under one another."""
        recipe = self.recipe
        tasks, starts = [], []
        for number, sample in enumerate(samples):
            assert sample.degraded is not None
            tasks.append(Task("", LatentShape(*sample.latents.shape[1:]).pixels, recipe.sampling.seed + number))
            starts.append(sample.degraded)
        weight = (recipe.refinement.noise_min + recipe.refinement.noise_max) / 2
        texts = [tuple(torch.from_numpy(v) for v in sample.texts[0]) for sample in samples]
        latents = self._generator.refined_latents(
            starts, tasks, texts, steps=recipe.sampling.steps, shift=recipe.sampling.shift, noise_weight=weight
        )
        if not write:
            return []
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        refined = self._generator.decode(latents)
        degraded, true = (self._generator.autoencoder.decode(x) for x in (starts, [s.latents for s in samples]))
        write_sheet(folder / "sheet.jpg", [video for trio in zip(degraded, refined, true, strict=True) for video in trio])
        return [write_sample(folder / f"{k:02d}", video, recipe.fps) for k, video in enumerate(refined)]

    def _negative(self) -> str:
        return ", ".join(self.recipe.negative_tags)

    def _shape(self) -> VideoShape:
        if not self.recipe.video_sizes:
            return VideoShape(1, *self.recipe.image_sizes[0])
        wanted = whole_frames(max(1, int(self.recipe.sampling.seconds * (self.recipe.fps or 1))))
        frames = max((n for n in self.recipe.frame_counts if n <= wanted), default=self.recipe.frame_counts[0])
        return VideoShape(frames, *self.recipe.video_sizes[0])


def write_sample(path: Path, video: np.ndarray, fps: float | None) -> Path:
    """uint8 [T, H, W, 3] -> an MP4, or a PNG of a single frame."""
    if len(video) == 1:
        out = path.with_suffix(".png")
        Image.fromarray(video[0]).save(out)
        return out
    out = path.with_suffix(".mp4")
    write_mp4(str(out), iter(video), fps=fps or 24.0, crf=12)
    return out


def write_sheet(path: Path, videos: Sequence[np.ndarray]) -> None:
    """A filmstrip of each video under one another."""
    Image.fromarray(np.concatenate([filmstrip(video) for video in videos])).save(path, quality=90)


def filmstrip(video: np.ndarray, frames: int = _STRIP_FRAMES, height_px: int = _STRIP_HEIGHT_PX) -> np.ndarray:
    """uint8 [T, H, W, 3] -> some frames side by side, uint8 [h, w, 3]."""
    chosen = np.linspace(0, len(video) - 1, frames).round().astype(int)
    width_px = max(1, round(video.shape[2] * height_px / video.shape[1]))
    cells = [cv2.resize(video[i], (width_px, height_px), interpolation=cv2.INTER_AREA) for i in chosen]
    return np.concatenate([np.pad(cell, ((1, 1), (1, 1), (0, 0)), constant_values=255) for cell in cells], axis=1)
