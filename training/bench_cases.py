"""What `training/bench.py` measures: micro-batches as stages have them, and the settings under which they are run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from training.parallel.ceilings import ATTENTION_KERNELS
from training.parallel.checkpointing import Mode
from waver_core.errors import UserError, did_you_mean
from waver_core.shapes import LatentShape, VideoShape, whole_frames


@dataclass(frozen=True)
class Case:
    """A micro-batch: latent shape of every sample, and its text tokens from every encoder."""

    name: str
    shapes: tuple[LatentShape, ...]
    text_lengths: tuple[tuple[int, ...], ...]
    windowed: bool = False
    """The refiner's (§2.2)"""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample, text and video."""
        return tuple(shape.tokens + sum(text) for shape, text in zip(self.shapes, self.text_lengths, strict=True))


_FULL: dict[str, tuple[tuple[int, int], float, tuple[float, ...]]] = {
    "192p": ((192, 352), 16, ()),
    "480p": ((480, 864), 16, (5,)),
    "720p": ((720, 1280), 24, (5,)),
    "1080p": ((1080, 1920), 24, (3,)),
}
"""Size in pixels, frames a second and seconds of each sample; none given: as many short ones as a pack holds."""
_QUICK: dict[str, tuple[tuple[int, int], float, tuple[float, ...]]] = {
    "192p": ((48, 64), 16, ()),
    "480p": ((64, 96), 16, (1,)),
    "720p": ((96, 128), 24, (1,)),
    "1080p": ((136, 240), 24, (0.5,)),  # rows of latents that two does not divide, as 1080 lines make
}
CASES = tuple(_FULL)
PACK_SECONDS = (2, 3, 4, 5, 6, 8, 10)
"""Lengths of the samples of a pack, in turn (`training.data.seconds`)."""


def case_of(name: str, quick: bool = False, encoders: int = 2, pack_tokens: int | None = None) -> Case:
    """A micro-batch by the name of its resolution; `quick` is small enough for a CPU. Raises `UserError` for other names."""
    if name not in CASES:
        raise UserError(f"no case '{name}': {did_you_mean(name, CASES)}")
    (height_px, width_px), fps, durations_s = (_QUICK if quick else _FULL)[name]
    room = pack_tokens or (256 if quick else 65_536)
    text = 8 if quick else 256
    shapes: list[LatentShape] = []
    texts: list[tuple[int, ...]] = []
    for duration_s in durations_s or PACK_SECONDS * 16:
        frames = whole_frames(max(5, int(duration_s * fps / (8 if quick and not durations_s else 1) + 0.5)))
        shape = VideoShape(frames, height_px, width_px).latent
        # Short captions and long ones in a pack; a sample of its own has its text at full length.
        own = (text,) * encoders if durations_s else tuple(text // 4 + (37 * len(shapes) + e) % text for e in range(encoders))
        if shape.tokens + sum(own) <= room or durations_s:
            shapes.append(shape)
            texts.append(own)
            room -= shape.tokens + sum(own)
    return Case(name, tuple(shapes), tuple(texts), windowed=name == "1080p")


@dataclass(frozen=True)
class Settings:
    """What may be switched."""

    compile: bool = True
    checkpointing: Mode = "none"
    offload: bool = False
    attention: str = "default"
    """`default`: what the model takes; a kernel of `ATTENTION_KERNELS`; or, in place of the kernel for variable lengths,
    `padded`: groups of like length, or `each`: one segment after another, by cuDNN where it can"""
    packed: bool = True
    """Samples of a pack together, or one after another"""
    windowed: bool = False

    @property
    def label(self) -> str:
        """For a table."""
        words = ["compiled" if self.compile else "eager", f"recompute {self.checkpointing}"]
        words += ["offload"] * self.offload
        words += [] if self.attention == "default" else [f"{self.attention} attention"]
        words += [] if self.packed else ["not packed"]
        words += ["windows"] * self.windowed
        return ", ".join(words)


def candidates(case: Case) -> list[Settings]:
    """Compiled, with each way of recomputation: the fastest is best."""
    modes: tuple[Mode, ...] = ("none", "selective", "full")
    return [Settings(checkpointing=mode, windowed=case.windowed) for mode in modes]


OPTIONS = ("checkpointing", "windows", "compile", "offload", "packing", "attention")
"""What rows may be asked for by; without `checkpointing`, only the least recomputation that runs is tried."""


def variations(case: Case, best: Settings, device: torch.device) -> list[tuple[str, Settings]]:
    """The best settings with one of them changed, and offloading, the most telling first; each with its word of `OPTIONS`."""
    modes: list[Mode] = [best.checkpointing, *(mode for mode in ("selective", "none") if mode != best.checkpointing)]
    offloaded = [("offload", replace(best, checkpointing=mode, offload=True)) for mode in modes]
    ragged = len(case.shapes) > 1 or best.windowed
    kernels: tuple[str, ...] = ("each", "padded") if ragged else tuple(ATTENTION_KERNELS)
    others = [("attention", replace(best, attention=name)) for name in kernels] if device.type == "cuda" else []  # a CPU has one
    found = [("windows", replace(best, windowed=False))] if case.windowed else []
    found += [*others[:1], offloaded[0], ("compile", replace(best, compile=False)), *others[1:], *offloaded[1:]]
    if len(case.shapes) > 1:
        found.append(("packing", replace(best, packed=False)))
    return found
