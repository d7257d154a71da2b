"""What a worker holds of the model's state: weights, gradients, moments and average, its share of each (Waver §5, hybrid shard).

Counted from the real model on the meta device, so nothing is allocated and no formula of its size is written down twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from training.parallel.mesh import MeshPlan
from training.recipe import Recipe
from training.trainee import Trainee
from waver_core.dit import DiTConfig

FP32 = 4
GATHERED_BLOCKS = 2
"""Blocks whose gathered weights are there at once: the one that computes, and the next, on its way."""
RESERVED_BYTES = int(2.5 * 2**30)
"""Of a GPU's memory for what no tensor of ours is in: the CUDA context, libraries' workspaces, communication buffers."""
FRAGMENTED_SHARE = 0.04
"""Of a GPU's memory, which the allocator holds in pieces that nothing fits."""

_PARTS = {
    "dual_blocks": "dual blocks",
    "single_blocks": "single blocks",
    "text_in": "text projections",
    "time_in": "timestep and final modulation",
    "final_modulation": "timestep and final modulation",
    "video_in": "patches in and out",
    "video_out": "patches in and out",
    "positions": "position tables",
    "alignment": "alignment head",
}


@dataclass(frozen=True)
class Parameters:
    """How many there are, by part, and the shapes that sharding cuts."""

    parts: dict[str, int]
    shapes: tuple[tuple[int, ...], ...]
    largest_block: int
    """Parameters of a dual block, or of a single one where there is no other"""
    in_blocks: int
    """Parameters of all blocks; they are gathered block by block"""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    @property
    def root(self) -> int:
        """Those outside of blocks, which stay gathered from forward to backward."""
        return self.total - self.in_blocks

    def sharded(self, workers: int) -> int:
        """Most parameters that one of `workers` holds: each tensor is cut along its first axis, in whole rows."""
        return sum(-(-shape[0] // workers) * prod(shape[1:]) for shape in self.shapes)


def count_parameters(config: DiTConfig, recipe: Recipe, feature_dim: int | None) -> Parameters:
    """Count a stage's model. `feature_dim` is the width of the semantic features of a stage with alignment; None leaves its head
    out, which is a thousandth of the model."""
    if feature_dim is None:
        recipe = recipe.model_copy(update={"align": False})
    with torch.device("meta"):
        trainee = Trainee(config, recipe, feature_dim)
    parts: dict[str, int] = {}
    for name, parameter in trainee.named_parameters():
        part = _PARTS[name.removeprefix("dit.").split(".")[0]]
        parts[part] = parts.get(part, 0) + parameter.numel()
    blocks = [_numel(block) for block in (*trainee.dit.dual_blocks, *trainee.dit.single_blocks)]
    shapes = tuple(tuple(p.shape) or (1,) for p in trainee.parameters())
    order = list(dict.fromkeys(_PARTS.values()))
    return Parameters({part: parts[part] for part in order if part in parts}, shapes, max(blocks), sum(blocks))


class StateBytes(NamedTuple):
    """Bytes on one worker that do not depend on the samples."""

    weights: int
    """fp32 master weights, its shard"""
    gradients: int
    """fp32, its shard"""
    moments: int
    """Adam's two, fp32"""
    average: int
    """The exponential moving average, fp32"""
    gathered: int
    """Whole blocks in the type of computation: one computes, the next arrives"""
    root: int
    """Weights outside of blocks, whole, in the type of computation, and their gradients"""
    reducing: int
    """Gradients of whole blocks: of one as computed, of the one before in fp32 on its way to the shards"""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def state_bytes(parameters: Parameters, mesh: MeshPlan, itemsize: int = 2) -> StateBytes:
    """State of the worker that holds most. `itemsize`: bytes of a number in forward and backward, 2 for bf16.

    A lone worker holds its weights whole and gathers nothing; under autocast it keeps a copy of them in bf16.
    """
    held = FP32 * parameters.sharded(mesh.inner)
    if mesh.world == 1:
        copies = itemsize * parameters.total if itemsize < FP32 else 0
        return StateBytes(held, held, 2 * held, held, copies, 0, 0)
    return StateBytes(
        weights=held,
        gradients=held,
        moments=2 * held,
        average=held,
        gathered=GATHERED_BLOCKS * itemsize * parameters.largest_block,
        root=2 * itemsize * parameters.root,
        reducing=(itemsize + FP32) * parameters.largest_block,
    )


def activation_budget(memory_bytes: float, state: StateBytes, *, on_gpu: bool = True) -> int:
    """Bytes left for activations of a device's memory; negative where the state alone does not fit."""
    reserved = RESERVED_BYTES + FRAGMENTED_SHARE * memory_bytes if on_gpu else 0
    return int(memory_bytes - reserved) - state.total


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
