"""The models behind the stages, as plain objects that compute when they are called: text encoders, networks, autoencoder.

Each can be built in a process of its own; what a stage does is the same wherever it runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.cascade import BaseWork, Conditions, DecodeWork, RefineWork, Upscaled, UpscaleWork, Vectors
from serving.plan import Checkpoint, Plan
from serving.rewriting import Rewriter, Rewritten
from serving.settings import Cascade, Tiles
from serving.streaming import OnStep
from waver_core.backends.contracts import Rewriting, VideoAutoencoder
from waver_core.denoising import Branches, Inputs, denoise, lengthened, sharpen
from waver_core.dit import WaverDiT
from waver_core.dit.attention import SequenceGroup
from waver_core.flow.degradation import resize
from waver_core.flow.guidance import Apg
from waver_core.flow.sampler import Stop
from waver_core.pictures import fitted, middle
from waver_core.registry import create
from waver_core.shapes import VideoShape
from waver_core.tiling import decode_frames, encode_frames
from waver_core.video import Mp4Writer, write_png
from waver_core.weights import load_into

_MAX_KEPT = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rewritten(rewriter: Rewriter, request: Rewriting, enabled: bool) -> Rewritten:
    """See `Stages.rewrite`."""
    return rewriter.rewrite(request) if enabled else Rewritten(request.tagged(request.prompt), request.prompt)


class TextEncoders:
    """The encoders that a checkpoint was trained with."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        names = checkpoint.recipe["encoders"]["text"]
        self._encoders = [create("text_encoder", n["backend"], **n.get("options", {})) for n in names]
        self._multiple = checkpoint.recipe["data"]["text_multiple"]

    def encode(self, texts: Sequence[str]) -> list[Vectors]:
        """See `Stages.encode`."""
        return [
            tuple(lengthened(torch.from_numpy(e.encode([text])[0]), self._multiple).numpy() for e in self._encoders)
            for text in texts
        ]


class Denoiser:
    """A network with its weights, ready to sample: the base model or the refiner.

    sequence, branches: this process' place in a group that computes every sample together (see `serving.ranks`).
    """

    def __init__(
        self, checkpoint: Checkpoint, cascade: Cascade, sequence: SequenceGroup | None = None, branches: Branches | None = None
    ) -> None:
        self._cuda = torch.cuda.is_available()
        device = "cuda" if self._cuda else "cpu"
        with torch.device("meta"):
            self._dit = WaverDiT(checkpoint.model)
        load_into(self._dit, checkpoint.folder, dtype=_DTYPES[cascade.dtype], device=device)
        self._dit.eval().requires_grad_(False)
        self._dit.sequence_group = sequence
        self._branches = branches
        self.steps_done = 0
        """Network steps since the start; stands still while nothing is computed."""

    def base(self, work: BaseWork, on_step: OnStep) -> np.ndarray:
        """See `Stages.base`; raises `Stop` where `on_step` ends it."""
        plan = work.plan
        sample = _inputs(plan.base_shape, plan.seed, work.conditions, work.text, work.negative)
        guidance = Apg(scale=plan.guidance_scale, norm_threshold=plan.norm_threshold)
        (latents,) = denoise(
            self._dit,
            [sample],
            steps=plan.steps,
            shift=plan.shift,
            guidance=guidance,
            on_step=self._counted(on_step),
            branches=self._branches,
        )
        return latents.float().cpu().numpy()

    def refine(self, work: RefineWork, on_step: OnStep) -> np.ndarray:
        """See `Stages.refine`; raises `Stop` where `on_step` ends it."""
        plan = work.plan
        sample = _inputs(plan.shape, plan.refiner_seed, work.conditions, work.text)
        (latents,) = sharpen(
            self._dit,
            [torch.from_numpy(work.latents)],
            [sample],
            steps=plan.refiner_steps,
            shift=plan.refiner_shift,
            noise_weight=plan.noise_weight,
            on_step=self._counted(on_step),
        )
        return latents.float().cpu().numpy()

    def _counted(self, on_step: OnStep) -> OnStep:
        def step(done: int, steps: int, *_: object) -> bool:
            if self._cuda:
                torch.cuda.synchronize()  # kernels are only queued so far: a step is done when they are
            self.steps_done += done > 0
            return on_step(done, steps)

        return step


class Pictures:
    """The autoencoder, in tiles, and files."""

    def __init__(self, checkpoint: Checkpoint, cascade: Cascade) -> None:
        names = checkpoint.recipe["encoders"]["autoencoder"]
        self._autoencoder: VideoAutoencoder = create("video_autoencoder", names["backend"], **names.get("options", {}))
        self._tiles: Tiles = cascade.tiles
        self._crf = cascade.crf
        self._kept_black: dict[tuple[int, int], np.ndarray] = {}

    def conditions(self, shape: VideoShape, frames: Mapping[int, np.ndarray]) -> Conditions:
        """See `Stages.conditions`."""
        size = shape.height_px, shape.width_px
        return Conditions(self._black(*size), {k: self._encoded([fitted(f, *size)[None]]) for k, f in frames.items()})

    def upscale(self, work: UpscaleWork, on_step: OnStep) -> Upscaled:
        """See `Stages.upscale`: a run of frames at a time goes through all of it; the preview is written on the way."""
        plan = work.plan
        with _Film(plan, work.metadata, self._crf) as film:

            def enlarged() -> Iterator[np.ndarray]:
                # Decoding is the first half of the steps; encoding goes along, or follows where the clip is one part.
                for run in self._decoded(work.latents, plan.frames, lambda done, n: on_step(done, 2 * n)):
                    film.add(run)
                    yield _enlarged(run, plan.height_px, plan.width_px)

            latents = self._encoded(enlarged())
            on_step(2 * plan.frames, 2 * plan.frames)
            return Upscaled(latents, film.data())

    def decode(self, work: DecodeWork, on_step: OnStep) -> bytes:
        """See `Stages.decode`."""
        with _Film(work.plan, work.metadata, self._crf) as film:
            for run in self._decoded(work.latents, work.plan.frames, on_step):
                film.add(run)
            return film.data()

    def _decoded(self, latents: np.ndarray, frames: int, on_step: OnStep) -> Iterator[np.ndarray]:
        done = 0
        if not on_step(0, frames):
            raise Stop(0, frames)
        for run in decode_frames(self._autoencoder, latents, **self._tiles.model_dump()):
            yield run
            done += len(run)
            if not on_step(done, frames):
                raise Stop(done, frames)

    def _encoded(self, runs: Iterator[np.ndarray] | Sequence[np.ndarray]) -> np.ndarray:
        return encode_frames(self._autoencoder, runs, **self._tiles.model_dump())

    def black(self, height_px: int, width_px: int) -> np.ndarray | None:
        """Latents of a black image of a size that was asked for before."""
        return self._kept_black.get((height_px, width_px))

    def _black(self, height_px: int, width_px: int) -> np.ndarray:
        size = height_px, width_px
        if size not in self._kept_black:
            if len(self._kept_black) >= _MAX_KEPT:
                self._kept_black.clear()
            self._kept_black[size] = self._encoded([np.zeros((1, *size, 3), np.uint8)])
        return self._kept_black[size]


class _Film:
    """Frames of a plan as a file in the making: an MP4, or a PNG where there is one frame."""

    def __init__(self, plan: Plan, metadata: Mapping[str, str], crf: int) -> None:
        self._still, self._metadata = plan.kind == "image", metadata
        self._options: dict[str, Any] = {"fps": plan.fps, "crf": crf, "metadata": metadata}

    def __enter__(self) -> _Film:
        self._stack = ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="openwaver-"))
        self._path = str(Path(folder) / "film")
        if not self._still:
            self._writer = self._stack.enter_context(Mp4Writer(self._path, **self._options))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, frames: np.ndarray) -> None:
        """The next frames, uint8 [n, H, W, 3]."""
        for frame in frames:
            if self._still:
                write_png(self._path, frame, self._metadata)
            else:
                self._writer.add(frame)

    def data(self) -> bytes:
        """End the file and read it."""
        if not self._still:
            self._writer.close()
        return Path(self._path).read_bytes()


def _enlarged(frames: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """[n, h, w, 3] -> [n, height_px, width_px, 3]: resized to cover the size, and cut to it in the middle."""
    scale = max(height_px / frames.shape[1], width_px / frames.shape[2])
    covering = max(height_px, round(frames.shape[1] * scale)), max(width_px, round(frames.shape[2] * scale))
    return middle(resize(frames, *covering), height_px, width_px)


def _inputs(shape: VideoShape, seed: int, conditions: Conditions, text: Vectors, negative: Vectors = ()) -> Inputs:
    given = {place: torch.from_numpy(z) for place, z in conditions.given.items()}
    words, unwanted = (tuple(torch.from_numpy(v) for v in vectors) for vectors in (text, negative))
    return Inputs(shape.latent, seed, torch.from_numpy(conditions.black), words, unwanted, given)
