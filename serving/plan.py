"""What the served checkpoints can make, and a request turned into exact numbers: sizes, frames, steps, seed.

Both need `recipe.yaml` alone, no weights: HTTP refuses what is impossible before a job is made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from serving.generate_request import GenerateRequest
from serving.settings import Settings
from waver_core.dit import DiTConfig
from waver_core.errors import ConfigError, UserError, did_you_mean
from waver_core.shapes import PATCH, SPATIAL_STRIDE, TEMPORAL_STRIDE, VideoShape, whole_frames
from waver_core.weights import read_record

DEFAULT_SECONDS = 5.0
_AREA_SLACK = 1.05
"""Sizes of other aspect ratios come out a little larger than those trained, for sides are multiples of 8."""


@dataclass(frozen=True)
class Checkpoint:
    """An export as far as planning needs it."""

    folder: str
    stage: str
    digest: str
    model: DiTConfig
    recipe: dict[str, Any]

    @property
    def label(self) -> str:
        """Stage and digest of the weights, as results name it."""
        return f"{self.stage}@{self.digest[:12]}"


@dataclass(frozen=True)
class Facts:
    """What can be asked for; the answer to `GET /capabilities`. Sizes are WIDTHxHEIGHT of the result."""

    base: str
    refiner: str | None
    kinds: tuple[str, ...]
    default_size: str
    sizes: tuple[str, ...]
    """Sizes of videos that the models were trained on; others of at most `max_pixels` work, too."""
    image_sizes: tuple[str, ...]
    size_multiple_px: int
    max_pixels: int
    """Of one frame of a refined video."""
    max_base_pixels: int
    """Of one frame of a video without the refiner."""
    max_image_pixels: int
    max_base_image_pixels: int
    max_side_px: int
    fps: float | None
    default_seconds: float
    min_seconds: float
    max_seconds: float
    steps: int
    max_steps: int
    guidance_scale: float
    max_guidance_scale: float
    styles: tuple[str, ...]
    rewrites: bool
    learned_first_frames: bool
    """Whether the base model was trained to go on from a given frame; one that was not keeps it and then does as it likes."""
    learned_last_frames: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Plan:
    """A request with every number settled. Together with the prompt and the given frames it decides every byte of the result."""

    kind: Literal["video", "image"]
    width_px: int
    height_px: int
    base_width_px: int
    base_height_px: int
    frames: int
    fps: float
    seconds: float
    seed: int
    steps: int
    shift: float
    guidance_scale: float
    norm_threshold: float
    refine: bool
    refiner_steps: int
    refiner_shift: float
    noise_weight: float
    negative: str
    style_words: str
    checkpoint: str
    refiner_checkpoint: str | None

    @property
    def base_shape(self) -> VideoShape:
        """What the base model makes."""
        return VideoShape(self.frames, self.base_height_px, self.base_width_px)

    @property
    def shape(self) -> VideoShape:
        """The result."""
        return VideoShape(self.frames, self.height_px, self.width_px)

    @property
    def refiner_seed(self) -> int:
        """Noise of its own: the same draws, laid out in another size, would follow the base model's."""
        return (self.seed + 2**30) % 2**31

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the job and for the file's metadata."""
        return asdict(self)


@lru_cache(maxsize=8)
def checkpoint(folder: str) -> Checkpoint:
    """Read an export's `recipe.yaml`, once; raises `UserError` where it is none."""
    record = read_record(folder)
    if not isinstance(record.get("digest"), str):
        raise UserError(f"{folder} is no export but a checkpoint of a running stage: serve its folder `export`")
    return Checkpoint(folder, record["recipe"]["stage"], record["digest"], DiTConfig(**record["model"]), record["recipe"])


def checkpoints(settings: Settings) -> tuple[Checkpoint, Checkpoint | None]:
    """The base model's and the refiner's; raises `ConfigError` where they are missing or do not go together."""
    cascade = settings.cascade
    if cascade.base is None:
        raise ConfigError("serving.cascade.base is not set: give the folder of an export, for example <run>/sft/export")
    base = checkpoint(cascade.base)
    if base.recipe["task"] == "refine":
        raise ConfigError(f"serving.cascade.base: {cascade.base} is a refiner; it goes into serving.cascade.refiner")
    if cascade.refiner is None:
        return base, None
    refiner = checkpoint(cascade.refiner)
    if refiner.recipe["task"] != "refine":
        raise ConfigError(f"serving.cascade.refiner: {cascade.refiner} holds {refiner.stage}, which is no refiner")
    multiples = base.recipe["data"]["text_multiple"], refiner.recipe["data"]["text_multiple"]
    if multiples[0] != multiples[1]:
        raise ConfigError(f"base and refiner were trained with texts of multiples of {multiples[0]} and {multiples[1]} tokens")
    for part in ("autoencoder", "text"):
        if base.recipe["encoders"][part] != refiner.recipe["encoders"][part]:
            raise ConfigError(f"base and refiner were trained with different encoders ({part}): serve two of one family")
    return base, refiner


def check_ranks(settings: Settings, base: Checkpoint, refiner: Checkpoint | None) -> None:
    """Raises `ConfigError` where a group of ranks cannot share out a model."""
    for name, part in settings.deployments:
        if part.ranks > 1 and name not in ("base", "refiner"):
            raise ConfigError(
                f"serving.deployments.{name}.ranks is {part.ranks}: only base and refiner are computed by several ranks"
            )
        if part.cfg_parallel and name != "base":
            raise ConfigError(f"serving.deployments.{name}.cfg_parallel: only the base model has a negative prompt")
        model = {"base": base, "refiner": refiner}.get(name)
        together = part.ranks // 2 if part.cfg_parallel else part.ranks
        if model is not None and model.model.heads % together:
            heads = model.model.heads
            raise ConfigError(
                f"serving.deployments.{name}: {heads} heads are not to be shared by {together} ranks: take a divisor"
            )


def facts(settings: Settings) -> Facts:
    """What the checkpoints of these settings can make; raises `ConfigError` or `UserError` where one cannot be served."""
    base, refiner = checkpoints(settings)
    cascade, recipe, last = settings.cascade, base.recipe, refiner or base
    video, image = _trained(last, "video"), _trained(last, "image")
    most_s = cascade.max_seconds
    if recipe["fps"]:
        possible_s = (1 + TEMPORAL_STRIDE * (base.model.max_grid[0] - 1)) / recipe["fps"]
        if possible_s < cascade.min_seconds:
            told = f"{base.label} makes at most {possible_s:g} s of video"
            raise ConfigError(f"serving.cascade.min_seconds is {cascade.min_seconds:g}, but {told}: set it lower")
        most_s = min(most_s, possible_s)
    grid = min(base.model.max_grid[1:]) * PATCH * SPATIAL_STRIDE
    largest = int(grid * cascade.upscale) if refiner else grid
    if refiner:
        largest = min(largest, min(refiner.model.max_grid[1:]) * PATCH * SPATIAL_STRIDE)
    seconds = [s for s in recipe["data"]["seconds"] if cascade.min_seconds <= s <= most_s]
    return Facts(
        base=base.label,
        refiner=refiner.label if refiner else None,
        kinds=("video", "image") if recipe["fps"] else ("image",),
        default_size=_words(video[0]),
        sizes=tuple(map(_words, video)),
        image_sizes=tuple(map(_words, image)),
        size_multiple_px=SPATIAL_STRIDE,
        max_pixels=_largest(video),
        max_base_pixels=_largest(_trained(base, "video")),
        max_image_pixels=_largest(image),
        max_base_image_pixels=_largest(_trained(base, "image")),
        max_side_px=largest,
        fps=recipe["fps"],
        default_seconds=DEFAULT_SECONDS if DEFAULT_SECONDS in seconds else max(seconds, default=cascade.min_seconds),
        min_seconds=cascade.min_seconds,
        max_seconds=round(most_s, 3),
        steps=cascade.steps or recipe["sampling"]["steps"],
        max_steps=cascade.max_steps,
        guidance_scale=cascade.guidance_scale or recipe["sampling"]["guidance_scale"],
        max_guidance_scale=cascade.max_guidance_scale,
        styles=tuple(_styles(settings, base)),
        rewrites=settings.rewriting.backend is not None,
        learned_first_frames=bool(recipe.get("i2v_probability")),
        learned_last_frames=bool(recipe["data"].get("interpolation_probability")),
    )


def plan(request: GenerateRequest, facts: Facts, settings: Settings, seed: int) -> Plan:
    """Settle every number. Raises `UserError`, one sentence, for what the models cannot do."""
    base, refiner = checkpoints(settings)
    cascade, sampling = settings.cascade, base.recipe["sampling"]
    if request.kind not in facts.kinds:
        raise UserError("this server's model makes still images only: set kind to image")
    if request.kind == "image" and (request.seconds is not None or request.first_frame or request.last_frame):
        raise UserError("an image takes neither seconds nor given frames: leave them out, or set kind to video")
    if request.refine and refiner is None:
        raise UserError("this server has no refiner: leave `refine` out or set it to false")
    refine = refiner is not None and request.refine is not False
    steps, scale = request.steps or facts.steps, request.guidance_scale or facts.guidance_scale
    if steps > facts.max_steps:
        raise UserError(f"{steps} steps are more than this server takes: at most {facts.max_steps}")
    if scale > facts.max_guidance_scale:
        raise UserError(f"a guidance scale of {scale:g} is more than this server takes: at most {facts.max_guidance_scale:g}")
    styles = _styles(settings, base)
    if request.style is not None and not styles:
        raise UserError("this server's model was trained without style words: leave `style` out")
    if request.style is not None and request.style not in styles:
        raise UserError(f"no style '{request.style}': {did_you_mean(request.style, styles)}")
    width_px, height_px, base_width_px, base_height_px = _sizes(request, facts, settings, refiner if refine and refiner else base)
    frames = _frames(request, facts, base)
    weight = cascade.noise_weight
    if weight is None and refiner is not None:
        weight = (refiner.recipe["refinement"]["noise_min"] + refiner.recipe["refinement"]["noise_max"]) / 2
    made = Plan(
        kind=request.kind,
        width_px=width_px,
        height_px=height_px,
        base_width_px=base_width_px,
        base_height_px=base_height_px,
        frames=frames,
        fps=facts.fps or 1.0,
        seconds=round(frames / facts.fps, 3) if facts.fps and request.kind == "video" else 0.0,
        seed=seed,
        steps=steps,
        shift=cascade.shift or sampling["shift"],
        guidance_scale=scale,
        norm_threshold=sampling["norm_threshold"] if cascade.norm_threshold is None else cascade.norm_threshold,
        refine=refine,
        refiner_steps=(cascade.refiner_steps or -(-steps // 2)) if refine else 0,
        refiner_shift=refiner.recipe["sampling"]["shift"] if refiner else 1.0,
        noise_weight=weight or 0.0,
        negative=", ".join(filter(None, [*base.recipe["negative_tags"], request.negative_prompt])),
        style_words=styles.get(request.style or "", ""),
        checkpoint=base.label,
        refiner_checkpoint=refiner.label if refine and refiner else None,
    )
    _check_grid(made.base_shape, base.model)
    if refine and refiner is not None:
        _check_grid(made.shape, refiner.model)
    return made


def _styles(settings: Settings, base: Checkpoint) -> dict[str, str]:
    """Words that no caption held mean nothing to the model: tags stand in the training caption only."""
    return settings.styles if "training_caption" in base.recipe["data"]["captions"] else {}


def _trained(checkpoint: Checkpoint, kind: str) -> list[tuple[int, int]]:
    """Height and width of what a model was trained on; of the other kind where it saw none of this one."""
    sizes = checkpoint.recipe[f"{kind}_sizes"] or checkpoint.recipe["video_sizes"] or checkpoint.recipe["image_sizes"]
    return list(dict.fromkeys((h, w) for h, w in sizes))


def _words(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _largest(sizes: list[tuple[int, int]]) -> int:
    return int(max(h * w for h, w in sizes) * _AREA_SLACK)


def _sizes(request: GenerateRequest, facts: Facts, settings: Settings, last: Checkpoint) -> tuple[int, int, int, int]:
    """Width and height of the result, which `last` makes, and of what the base model makes for it."""
    usual, refine, image = _words(_trained(last, request.kind)[0]), last.recipe["task"] == "refine", request.kind == "image"
    width_px, height_px = (int(n) for n in (request.size or usual).split("x"))
    multiple, least = facts.size_multiple_px, SPATIAL_STRIDE * PATCH
    if width_px % multiple or height_px % multiple or min(width_px, height_px) < least:
        near = "x".join(str(max(least, round(n / multiple) * multiple)) for n in (width_px, height_px))
        raise UserError(f"size {width_px}x{height_px} is not one of multiples of {multiple} px: take {near}")
    with_refiner = facts.max_image_pixels if image else facts.max_pixels
    most = with_refiner if refine else facts.max_base_image_pixels if image else facts.max_base_pixels
    if width_px * height_px > most:
        raise UserError(f"size {width_px}x{height_px} has more than {most} pixels: take {usual} or another of that area")
    if not refine:
        return width_px, height_px, width_px, height_px
    small = [max(least, round(n / settings.cascade.upscale / multiple) * multiple) for n in (width_px, height_px)]
    return width_px, height_px, small[0], small[1]


def _frames(request: GenerateRequest, facts: Facts, base: Checkpoint) -> int:
    if request.kind == "image" or facts.fps is None:
        return 1
    seconds = request.seconds if request.seconds is not None else facts.default_seconds
    if not facts.min_seconds <= seconds <= facts.max_seconds:
        raise UserError(f"{seconds:g} seconds are not possible: take {facts.min_seconds:g} to {facts.max_seconds:g}")
    return whole_frames(max(5, int(seconds * facts.fps + 0.5)))  # the rule of training, so that lengths are those it saw


def _check_grid(shape: VideoShape, model: DiTConfig) -> None:
    for wanted, most, side in zip(shape.latent.grid, model.max_grid, ("long", "high", "wide"), strict=True):
        if wanted > most:
            cells = 1 + 4 * (most - 1) if side == "long" else most * PATCH * SPATIAL_STRIDE
            unit = "frames" if side == "long" else "px"
            raise UserError(f"{shape.frames} frames of {shape.width_px}x{shape.height_px} are too {side}: at most {cells} {unit}")
