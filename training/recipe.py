"""pipelines.yaml `training:` -> `Recipe`: one stage of Waver Table 2 with everything that it needs, fully resolved.

Shared settings stand beside `stages`; a stage may override any of them under the same name. So a new stage is a few lines in
pipelines.yaml and nothing here.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from training.data.cost import MicroBatchCost
from waver_core.config import Config, Strict, digest_of, merge, validate
from waver_core.errors import ConfigError, did_you_mean
from waver_core.shapes import VideoShape, whole_frames

Size = tuple[int, int]
"""Height and width in pixels."""


class Model(Strict):
    """Which network is trained."""

    preset: str
    """A name of `waver_core.dit.PRESETS`."""
    overrides: dict[str, Any] = {}
    """Fields of `waver_core.dit.DiTConfig` to change."""


class Backend(Strict):
    """A backend and the arguments of its constructor."""

    backend: str
    options: dict[str, Any] = {}


class Encoders(Strict):
    """What turns clips and captions into what the model sees (Waver §2)."""

    autoencoder: Backend
    text: tuple[Backend, ...] = Field(min_length=1)
    """Their tokens are joined; the report has two."""
    features: Backend | None = None
    """Semantic features for alignment (§4.2)."""


class Data(Strict):
    """Which samples there are and how they are drawn, conditioned and packed."""

    captions: dict[str, float] = {"training_caption": 1.0}
    """Caption columns of the manifest and how often each is used, in parts."""
    seconds: tuple[float, ...] = (2, 3, 4, 5, 6, 8, 10)
    """Lengths of video samples; a clip takes the longest that it fills."""
    windows: int = Field(1, ge=1)
    """Samples cut from one clip at most, at different start times."""
    min_kept_area: float = Field(0.6, gt=0, le=1)
    """A clip is dropped where the crop to the nearest aspect ratio would keep less of it."""
    max_upscale: float = Field(1.0, ge=1)
    """A clip is dropped where it would have to be enlarged by more."""
    image_share: float | None = Field(None, ge=0, le=1)
    """Images among the samples of an epoch; None takes every clip as often as its weight says (Table 2's volumes)."""
    text_multiple: int = Field(1, ge=1)
    """Texts are lengthened to a multiple of so many tokens, with zero vectors that the model sees; so lengths stay few."""
    text_dropout: float = Field(0.1, ge=0, le=1)
    interpolation_probability: float = Field(0.0, ge=0, le=1)
    """How often the first and the last frame are given; the report names the task, no figure."""
    held_out_share: float = Field(0.002, ge=0, lt=1)
    """Sources kept for the held-out loss."""
    max_held_out: int = Field(256, ge=0)
    packing: Literal["spfhp", "bucket"] = "spfhp"
    """`spfhp`: samples of several lengths share a micro-batch (§5); `bucket`: all of one shape."""
    micro_batch_tokens: int = Field(65_536, ge=1)
    """Tokens (video and text) of one forward at most; a sample that is longer stands alone."""
    max_per_pack: int = Field(64, ge=1)
    micro_batches_per_step: int = Field(64, ge=1)
    """Over all workers together, so that a step is the same on any number of them."""
    cost: MicroBatchCost | None = None
    """Time of a micro-batch, by which they are bucketed and dealt to workers; `training/calibrate.py` measures it. None counts
    operations. Another cost makes another order of data, so a run keeps the one that it was begun with."""
    max_dropped_share: float = Field(0.1, ge=0, le=1)
    """A run refuses to start where more of any bucket's clips than this could not be used."""
    seed: int = 0


class Optimizer(Strict):
    """AdamW, clipping, warm-up, the exponential moving average, and what counts as a spike."""

    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    eps: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(1000, ge=0)
    cooldown_share: float = Field(0.0, ge=0, le=1)
    """Last part of the stage in which the rate falls to zero in a line; 0 keeps it constant, as the report's stages do."""
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    spike_ratio: float = Field(10.0, gt=1)
    """A step whose gradient norm is this many times the running median is skipped."""
    max_spikes: int = Field(20, ge=1)
    """Skipped steps in succession at which the run stops."""


class Timesteps(Strict):
    """How timesteps are drawn (Waver §4.3)."""

    distribution: Literal["logit_normal", "mode", "uniform"]
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    scale: float = 1.29


class Alignment(Strict):
    """Alignment with semantic features (Waver §4.2)."""

    weight: float = Field(0.5, ge=0)
    block: int = Field(16, ge=1)
    """Block whose output is aligned, counted from 1; a smaller model takes the one at the same depth."""
    spatial_factor: int = Field(2, ge=1)
    temporal_factor: int = Field(4, ge=1)
    hidden: int = Field(2048, ge=1)


class Refinement(Strict):
    """The refiner's degradations (Waver §2.2)."""

    pixel_factor: float = Field(3.0, ge=1)
    """1080p goes down to 360p and up again."""
    noise_min: float = Field(0.85, ge=0, le=1)
    noise_max: float = Field(0.95, ge=0, le=1)


class Sampling(Strict):
    """Videos made while training, from the averaged weights."""

    every_steps: int = Field(2000, ge=0)
    """0 makes none."""
    prompts: tuple[str, ...] = ()
    seconds: float = Field(5.0, gt=0)
    steps: int = Field(40, ge=1)
    shift: float = Field(7.0, gt=0)
    """Of the timesteps at inference; larger than any in training."""
    guidance_scale: float = Field(8.0, ge=1)
    norm_threshold: float = Field(27.0, ge=0)
    seed: int = 0


class Schedule(Strict):
    """When checkpoints are written, losses reported, and the run ends."""

    max_steps: int | None = Field(None, ge=1)
    """None: as many as the epochs take."""
    max_minutes: float | None = Field(None, gt=0)
    """Ends the stage after this much training time, checkpoint written; for demos."""
    checkpoint_every_steps: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(10, ge=1)
    """Averaging (§4.5) merges 7 to 10 of them."""
    log_every_steps: int = Field(10, ge=1)
    validate_every_steps: int = Field(1000, ge=0)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)


class Workers(Strict):
    """What Ray Train starts."""

    count: int = Field(1, ge=1)
    min_count: int | None = Field(None, ge=1)
    """Elastic: after a failure the stage goes on with as few as these, where no more can be had. None waits for all."""
    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)
    max_failures: int = Field(3, ge=0)
    """Times a dead worker is replaced; the stage goes on from its last checkpoint."""
    threads: int | None = Field(None, ge=1)
    """Threads of torch in each worker; None takes what `cpus` says."""
    hang_after_s: float | None = Field(1800.0, gt=0)
    """A worker that makes no progress for so long prints where it stands and ends, so that it is replaced. None never ends it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the forward and backward are computed; weights, reductions and the optimiser are fp32."""


class Parallel(Strict):
    """How a stage is spread over its workers, and what is given up to make it fit (Waver §5)."""

    shard: int | None = Field(None, ge=1)
    """Workers along the mesh's axis of shards; with `sequence` it makes the inner shard size (the report: 64 or 128). None takes
    all workers, so that there are no replicas."""
    sequence: int = Field(1, ge=1)
    """Workers that compute one sample together, each a part of its tokens (Ulysses); a divisor of the heads."""
    compile: bool = False
    """Every block as one graph."""
    checkpointing: Literal["none", "selective", "full", "auto"] = "none"
    """What a block keeps for its backward: everything; attention and matrix products; its input only. `auto`: as much as fits."""
    offload: Literal["none", "all", "auto"] = "none"
    """Blocks whose activations wait for the backward in host memory."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory of one device, for `auto`; None asks the device."""


class Volume(Strict):
    """Clips that the report's stage saw, in millions. Kept with the recipe for comparison; what is drawn follows the manifest."""

    video: float
    image: float


class Recipe(Strict):
    """One training stage, fully resolved. Written beside everything that it makes."""

    stage: str
    task: Literal["t2i", "t2v", "refine"]
    after: str | None
    """Stage whose checkpoint it starts from; None starts from nothing."""
    tier: str
    video_sizes: tuple[Size, ...]
    image_sizes: tuple[Size, ...]
    fps: float | None
    """Frame rate of video samples."""
    epochs: float = Field(gt=0)
    shift: float = Field(gt=0)
    """Sigma shift of training timesteps; grows with the resolution."""
    i2v_probability: float = Field(0.0, ge=0, le=1)
    align: bool = False
    min_short_side_px: int | None = None
    """Only clips from originals at least this large."""
    volume_m: Volume | None = None
    model: Model
    encoders: Encoders
    data: Data
    optimizer: Optimizer
    timesteps: dict[Literal["image", "video"], Timesteps]
    alignment: Alignment
    refinement: Refinement
    sampling: Sampling
    schedule: Schedule
    workers: Workers
    parallel: Parallel = Field(default_factory=Parallel)
    negative_tags: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        for height_px, width_px in (*self.video_sizes, *self.image_sizes):
            VideoShape(1, height_px, width_px).latent  # noqa: B018 (refuses impossible sizes)
        if self.task == "t2i" and self.video_sizes:
            raise ValueError("a t2i stage takes no video: leave `video` out")
        if self.task != "t2i" and not self.video_sizes:
            raise ValueError(f"a {self.task} stage needs `video`, the name of a resolution")
        if bool(self.video_sizes) != (self.fps is not None):
            raise ValueError("`fps` belongs to stages with video, and to them only")
        if self.align and self.encoders.features is None:
            raise ValueError("`align` needs encoders.features")
        missing = [
            k for k, sizes in (("image", self.image_sizes), ("video", self.video_sizes)) if sizes and k not in self.timesteps
        ]
        if missing:
            raise ValueError(f"timesteps.{missing[0]} is missing")
        return self

    @property
    def frame_counts(self) -> tuple[int, ...]:
        """Frames that video samples may have, 1 + 4k each, ascending."""
        if self.fps is None:
            return ()
        return tuple(sorted({whole_frames(max(5, int(s * self.fps + 0.5))) for s in self.data.seconds}))

    @property
    def digest(self) -> str:
        """Twelve hex digits that change when any setting does."""
        return digest_of(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The recipe as a file that `from_yaml` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


_SHARED = (
    "model",
    "encoders",
    "data",
    "optimizer",
    "timesteps",
    "alignment",
    "refinement",
    "sampling",
    "schedule",
    "workers",
    "parallel",
)


def stages(config: Config) -> dict[str, dict[str, Any]]:
    """The declared stages, in order. Raises `ConfigError` where pipelines.yaml has none."""
    declared = config.training.get("stages")
    if not isinstance(declared, dict) or not declared:
        raise ConfigError("training.stages is missing from the configuration")
    return declared


def load_recipe(config: Config, stage: str) -> Recipe:
    """Resolve one stage. Raises `ConfigError` with the nearest name where there is none of that name, or says what is wrong
    with its settings: an unknown key, tier, resolution or parent."""
    declared = stages(config)
    if stage not in declared:
        raise ConfigError(f"no training stage '{stage}': {did_you_mean(stage, declared)}")
    unknown = set(config.training) - {"stages", "resolutions", *_SHARED}
    if unknown:
        word = sorted(unknown)[0]
        raise ConfigError(f"training.{word}: unknown key, {did_you_mean(word, ['stages', 'resolutions', *_SHARED])}")
    where = f"training.stages.{stage}"
    raw = dict(declared[stage])
    shared = merge({key: config.training.get(key, {}) for key in _SHARED}, {k: raw.pop(k) for k in _SHARED if k in raw})
    if "lr" in raw:
        shared["optimizer"] = {**shared["optimizer"], "lr": raw.pop("lr")}
    after = raw.get("after")
    if after is not None and after not in declared:
        raise ConfigError(f"{where}.after: no training stage '{after}': {did_you_mean(after, declared)}")
    if raw.get("tier") not in config.tiers:
        raise ConfigError(f"{where}.tier: no tier '{raw.get('tier')}': {did_you_mean(str(raw.get('tier')), config.tiers)}")
    video, image = raw.pop("video", None), raw.pop("image", None)
    sizes = {
        "video_sizes": _sizes(config, [video] if video else [], f"{where}.video", video=True),
        "image_sizes": _sizes(config, [image] if isinstance(image, str) else image or [], f"{where}.image", video=False),
    }
    fixed = {"stage": stage, "after": after, "fps": raw.pop("fps", None), "profiles": config.profiles}
    # Words that no caption held mean nothing to the model: tags stand in the training caption only.
    tagged = "training_caption" in (shared["data"].get("captions") or {"training_caption": 1})
    tags = {"negative_tags": config.tags.negative_words() if tagged else []}
    recipe: Recipe = validate(Recipe, {**raw, **fixed, **tags, **sizes, **shared}, where)
    return recipe


def _sizes(config: Config, names: list[str], where: str, *, video: bool) -> list[Size]:
    """The sizes of named resolutions: every aspect ratio for images, 16:9 and 9:16 for video (§4.1)."""
    known = config.training.get("resolutions") or {}
    found: list[Size] = []
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: no resolution '{name}': {did_you_mean(str(name), known)}")
        for ratio, size in known[name].items():
            if not video or ratio in ("16:9", "9:16") or not {"16:9", "9:16"} & set(known[name]):
                found.append(tuple(size))
    return list(dict.fromkeys(found))


def recipe_from_yaml(text: str, where: str) -> Recipe:
    """Read a recipe that was written beside a checkpoint; raises `ConfigError` where it is none."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} holds no recipe")
    recipe: Recipe = validate(Recipe, raw, where)
    return recipe
