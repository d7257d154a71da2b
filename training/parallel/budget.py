"""What a stage's memory holds on one worker: state, what is at work, and a plan for the activations in what is left (Waver §5).

One plan serves the whole stage, made for the heaviest micro-batch that its recipe can draw.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from training.data.plan import TEXT_TOKENS
from training.parallel.memory import HOST_BYTES_PER_S, MemoryPlan, plan_memory
from training.parallel.mesh import MeshPlan
from training.parallel.rates import ELEMENTWISE_PASSES, ELEMENTWISE_PASSES_EAGER, Rates
from training.parallel.state import Parameters, StateBytes, activation_budget, count_parameters, state_bytes
from training.recipe import Recipe
from waver_core.dit import DiTConfig
from waver_core.dit.flops import step_flops
from waver_core.errors import UserError
from waver_core.shapes import LatentShape, VideoShape

_WORKING, _WORKING_EAGER, _EXCHANGING = 10, 16, 4
"""Tensors [n, D] that a block's backward has at once beside what was kept: the gradients of the MLP's hidden layer (it is four
wide) before and after its activation, or those of queries, keys, values and output with what attention adds up in fp32; more
without compilation, which has rotations in fp32 one by one; and what Ulysses sends and gets."""

HOST_SHARE = 0.75
"""Of host memory, for activations; the rest is for data, checkpoints under way and the system."""

MIXED = 3
"""Bytes of a saved number where about half of what is saved is in fp32."""


class StageMemory(NamedTuple):
    """Bytes on one worker, and how its activations are to fit."""

    parameters: Parameters
    state: StateBytes
    working_bytes: int
    """Of the block that computes: gradients of activations, and buffers"""
    budget_bytes: float
    """Left for activations"""
    plan: MemoryPlan


def stage_memory(
    recipe: Recipe,
    config: DiTConfig,
    mesh: MeshPlan,
    memory_bytes: float | None,
    *,
    on_gpu: bool,
    host_bytes: float | None = None,
    feature_dim: int | None = None,
    text_tokens: int | None = None,
    rates: Rates | None = None,
) -> StageMemory:
    """Plan a worker with `memory_bytes`; None asks for no limit, which only a recipe without `auto` can do.

    host_bytes: memory of the host for this worker; None is no limit. text_tokens: of a sample, from all encoders;
    None takes the most that is usual. rates: of the device; with them no more is offloaded than copies can hide.
    Raises `UserError` that names the fix where state or activations do not fit.
    """
    parallel = recipe.parallel
    if memory_bytes is None and "auto" in (parallel.checkpointing, parallel.offload):
        raise UserError("parallel.checkpointing or parallel.offload is auto: without a GPU give parallel.memory_gib, too")
    low = recipe.workers.dtype == "bfloat16"
    itemsize = 2 if low else 4
    # A lone worker computes under autocast: norms and the tokens between blocks are saved in fp32, products in bf16.
    saved = MIXED if low and mesh.world == 1 else itemsize
    parameters = count_parameters(config, recipe, feature_dim)
    state = state_bytes(parameters, mesh, itemsize)
    video = -(-heaviest_tokens(recipe) // mesh.sequence)
    texts = TEXT_TOKENS * len(recipe.encoders.text) if text_tokens is None else text_tokens
    text = -(-texts // mesh.sequence)
    working = working_bytes(config, video + text, saved, mesh.sequence, compiled=parallel.compile)
    budget = inf if memory_bytes is None else activation_budget(memory_bytes, state, on_gpu=on_gpu) - working
    if memory_bytes is not None and budget <= 0:
        raise UserError(
            f"without activations a worker takes {(memory_bytes - budget) / 2**30:,.1f} GiB of the {memory_bytes / 2**30:,.1f} "
            f"that its device has: raise parallel.shard (weights are spread over {mesh.inner} workers now) or parallel.sequence, "
            "or take more workers"
        )
    plan = plan_memory(
        config,
        video,
        text,
        1,
        budget,
        itemsize=saved,
        checkpointing=parallel.checkpointing,
        offload=parallel.offload,
        block_seconds=None if rates is None else block_seconds(recipe, config, mesh, rates, texts),
        host_bytes_per_s=HOST_BYTES_PER_S if rates is None else rates.host.value,
        host_budget_bytes=None if host_bytes is None else HOST_SHARE * host_bytes,
        sequence=mesh.sequence,
        uniform=False if recipe.data.packing == "spfhp" else None,
    )
    if plan.device_bytes > budget:  # choices that the recipe makes are planned whether they fit or not
        raise UserError(
            f"activations of the largest micro-batch take {plan.device_bytes / 2**30:,.1f} GiB and {budget / 2**30:,.1f} GiB are "
            "left for them: set parallel.checkpointing and parallel.offload to auto, raise parallel.sequence or lower "
            "data.micro_batch_tokens"
        )
    return StageMemory(parameters, state, working, budget, plan)


def block_seconds(recipe: Recipe, config: DiTConfig, mesh: MeshPlan, rates: Rates, text_tokens: int) -> float:
    """Forward of a block over the heaviest micro-batch, were its samples the mean of the recipe's shapes: one plan serves both
    long videos, behind whose attention any copy hides, and images, behind whose hardly any does."""
    itemsize = 2 if recipe.workers.dtype == "bfloat16" else 4
    per_token = []
    for shape in _shapes(recipe):
        flops = step_flops(config, (shape,), (text_tokens,))
        products = (flops.forward - flops.attention) / rates.matmul.value
        per_token.append((products + flops.attention / rates.attention_forward.value) / (shape.tokens + text_tokens))
    passes = ELEMENTWISE_PASSES if recipe.parallel.compile else ELEMENTWISE_PASSES_EAGER
    elementwise = passes * config.width * itemsize / rates.memory.value
    tokens = heaviest_tokens(recipe) / mesh.sequence
    return tokens * (sum(per_token) / len(per_token) / config.blocks + elementwise)


def heaviest_tokens(recipe: Recipe) -> int:
    """Video tokens of the largest micro-batch that a recipe can draw: a full pack, or a longer sample alone."""
    return max(recipe.data.micro_batch_tokens, *(shape.tokens for shape in _shapes(recipe)))


def _shapes(recipe: Recipe) -> list[LatentShape]:
    shapes = [VideoShape(n, *size) for size in recipe.video_sizes for n in recipe.frame_counts]
    return [shape.latent for shape in (*shapes, *(VideoShape(1, *size) for size in recipe.image_sizes))]


def working_bytes(config: DiTConfig, tokens: int, itemsize: int, sequence: int = 1, *, compiled: bool = True) -> int:
    """What a block's backward has in use beside kept activations, for `tokens` on this worker (an estimate)."""
    tensors = (_WORKING if compiled else _WORKING_EAGER) + (_EXCHANGING if sequence > 1 else 0)
    return tensors * tokens * config.width * itemsize
