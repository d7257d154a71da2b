"""What a dry run finds out of a stage on a cluster: its mesh, its memory, and what each shape that it draws costs.

Shapes come from the recipe. How often each occurs is counted in encoded samples or the funnel's output where they are there; else
the report's volumes are taken, evenly over the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.data.plan import TEXT_TOKENS, Plan
from training.data.samples import build_samples
from training.data.shards import EncodedSamples
from training.job import feature_dim, text_dims
from training.parallel.budget import StageMemory, stage_memory
from training.parallel.cost import MeanStep, MicroBatch, Setting, StepCost, mean_step, step_cost
from training.parallel.hardware import Cluster
from training.parallel.mesh import plan_mesh
from training.parallel.rates import rates_of
from training.recipe import Recipe, Size
from training.trainee import model_config
from waver_core.dit import preset
from waver_core.errors import BackendUnavailable
from waver_core.shapes import VideoShape
from waver_core.storage import exists, join

FEATURE_DIM = 3584
"""Width of the semantic features where their model is not on this machine: Qwen2.5-VL-7B's, as in §4.2."""


class ShapePlan(NamedTuple):
    """What the stage can draw, of one size (lying and standing together) and number of frames."""

    kind: str
    """"video" or "image\""""
    shape: VideoShape
    batch: MicroBatch
    """As many samples as a micro-batch holds"""
    steps: float
    """Of an epoch, were all its micro-batches in full steps"""
    cost: StepCost
    """Of a step of such micro-batches"""


@dataclass(frozen=True)
class DryRun:
    """The plan of a stage on a cluster."""

    recipe: Recipe
    setting: Setting
    memory: StageMemory
    memory_bytes: float
    """Of one device"""
    shapes: tuple[ShapePlan, ...]
    mean: MeanStep
    steps: float
    """Of the whole stage"""
    counted_from: str
    """Where the numbers of samples come from"""
    notes: tuple[str, ...]
    """What was assumed for want of something"""


class _Drawn(NamedTuple):
    """Samples of an epoch by shape, text tokens of each encoder, and steps where they are known."""

    samples: dict[tuple[str, VideoShape], float]
    texts: tuple[int, ...]
    steps: int | None
    source: str


def build(
    recipe: Recipe, cluster: Cluster, samples: str | None = None, curated: Sequence[str] = (), measured: str | None = None
) -> DryRun:
    """Plan a stage. `samples` is a folder of encoded ones, `curated` the funnel's outputs: used for counts where given.

    Raises `UserError` where the mesh does not fit the cluster, or state and activations exceed a device's memory.
    """
    encoded = EncodedSamples(samples) if samples is not None and exists(join(samples, "index.json")) else None
    dims, notes = _dims(recipe, None if encoded is None else tuple(encoded.index["dims"]["text"]))
    config = model_config(recipe, dims)
    features, told = _feature_dim(recipe)
    notes += told
    mesh = plan_mesh(cluster.workers, config.heads, recipe.parallel.shard, recipe.parallel.sequence)
    per_step = recipe.data.micro_batches_per_step
    if mesh.data_workers > per_step:
        notes += (
            f"Training would refuse: {mesh.data_workers} data workers share {per_step} micro-batches a step, so some have "
            "nothing to do. Raise training.data.micro_batches_per_step or training.parallel.sequence.",
        )
    itemsize = 2 if recipe.workers.dtype == "bfloat16" else 4
    if itemsize == 4 and cluster.accelerator.name != "cpu":
        notes += (f"The recipe computes in float32; rates are those of bf16 on a {cluster.accelerator.name}.",)
    device = cluster.accelerator
    memory_bytes = (recipe.parallel.memory_gib or device.memory_gib) * 2**30
    drawn, rates = _drawn(recipe, encoded, curated), rates_of(device, measured)
    memory = stage_memory(
        recipe,
        config,
        mesh,
        memory_bytes,
        on_gpu=device.name != "cpu",
        host_bytes=device.host_gib * 2**30,
        feature_dim=features,
        text_tokens=sum(drawn.texts),
        rates=rates,
    )
    setting = Setting(
        config=config,
        parameters=memory.parameters,
        mesh=mesh,
        cluster=cluster,
        rates=rates,
        memory=memory.plan,
        micro_batches_per_step=per_step,
        itemsize=itemsize,
        compiled=recipe.parallel.compile,
    )
    shapes = tuple(_shape_plan(recipe, setting, kind, shape, n, drawn.texts) for (kind, shape), n in drawn.samples.items())
    steps = drawn.steps or recipe.schedule.max_steps or recipe.epochs * sum(row.steps for row in shapes)
    mean = mean_step([row.cost for row in shapes], [row.steps for row in shapes])
    return DryRun(recipe, setting, memory, memory_bytes, shapes, mean, steps, drawn.source, notes)


def _shape_plan(
    recipe: Recipe, setting: Setting, kind: str, shape: VideoShape, samples: float, texts: tuple[int, ...]
) -> ShapePlan:
    latent = shape.latent
    each = latent.tokens + sum(texts)
    n = min(max(1, recipe.data.micro_batch_tokens // each), recipe.data.max_per_pack)
    batch = MicroBatch((latent,) * n, (texts,) * n)
    return ShapePlan(kind, shape, batch, samples / n / setting.micro_batches_per_step, step_cost(setting, batch))


def _dims(recipe: Recipe, encoded: tuple[int, ...] | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Widths of the text encoders: of the encoded samples, of the encoders themselves, or of the preset that is made for them."""
    if encoded is not None:
        return encoded, ()
    try:
        return text_dims(recipe), ()
    except BackendUnavailable:
        known = preset(recipe.model.preset).text_dims
        if len(known) != len(recipe.encoders.text):
            raise
        widths = " and ".join(f"{dim:,}" for dim in known)
        return known, (f"The text encoders are not on this machine; their vectors are taken to be {widths} wide.",)


def _feature_dim(recipe: Recipe) -> tuple[int | None, tuple[str, ...]]:
    try:
        return feature_dim(recipe), ()
    except BackendUnavailable:
        return FEATURE_DIM, (f"The feature extractor is not on this machine; its features are taken to be {FEATURE_DIM:,} wide.",)


def _drawn(recipe: Recipe, encoded: EncodedSamples | None, curated: Sequence[str]) -> _Drawn:
    """Samples of an epoch: counted where there are some, else the report's volume, evenly over the recipe's shapes."""
    most = (int(encoder.options.get("max_tokens", TEXT_TOKENS)) for encoder in recipe.encoders.text)
    texts = tuple(_lengthened(n, recipe.data.text_multiple) for n in most)
    if encoded is not None or curated:
        if encoded is not None:
            table, dropped, source = encoded.table, encoded.index["dropped"], f"encoded samples in {encoded.folder}"
        else:
            built = build_samples([join(folder, "tiers", recipe.tier) for folder in curated], recipe)
            table, dropped, source = built.table, built.dropped, f"clips in {', '.join(curated)}"
        plan = Plan(table, recipe, dropped)
        counted: dict[tuple[str, VideoShape], float] = {}
        trained = table.select(["kind", "frames", "height_px", "width_px", "weight", "held_out"]).to_pylist()
        for kind, told in plan.report.items():
            rows = [row for row in trained if row["kind"] == kind and not row["held_out"]]
            whole = sum(row["weight"] for row in rows)
            for row in rows:
                key = kind, _lying(VideoShape(row["frames"], row["height_px"], row["width_px"]))
                counted[key] = counted.get(key, 0.0) + told["drawn"] * row["weight"] / whole
        if "text_tokens" in table.column_names:
            mean = round(sum(table["text_tokens"].to_pylist()) / len(table) / len(texts))
            texts = tuple(_lengthened(mean, recipe.data.text_multiple) for _ in texts)
        kept = {key: n for key, n in sorted(counted.items(), key=lambda item: (item[0][0] == "image", item[0][1])) if n > 0}
        return _Drawn(kept, texts, plan.total_steps(), source)
    volume = recipe.volume_m
    video, image = (volume.video * 1e6, volume.image * 1e6) if volume is not None else (1.0, 1.0)
    if recipe.data.image_share is not None and recipe.video_sizes and recipe.data.image_share < 1:
        image = video * recipe.data.image_share / (1 - recipe.data.image_share)
    shapes = {
        "video": _shapes(recipe.video_sizes, recipe.frame_counts),
        "image": _shapes(recipe.image_sizes, (1,)),
    }
    drawn = {
        (kind, shape): total * share
        for (kind, found), total in zip(shapes.items(), (video, image), strict=True)
        for shape, share in found.items()
        if total > 0
    }
    return _Drawn(drawn, texts, None, "the report's volumes, evenly over the shapes (an estimate)")


def _shapes(sizes: Sequence[Size], frame_counts: Sequence[int]) -> dict[VideoShape, float]:
    """Shapes with their shares: every size and number of frames alike, lying and standing ones together."""
    found: dict[VideoShape, float] = {}
    for height_px, width_px in sizes:
        for frames in frame_counts:
            shape = _lying(VideoShape(frames, height_px, width_px))
            found[shape] = found.get(shape, 0.0) + 1 / len(sizes) / len(frame_counts)
    return found


def _lying(shape: VideoShape) -> VideoShape:
    return VideoShape(shape.frames, *sorted((shape.height_px, shape.width_px)))


def _lengthened(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple
