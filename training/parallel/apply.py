"""All that makes a model fit its workers, applied from outside and in this order: sequence groups, checkpointing, compilation,
offload, sharding (Waver §5)."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from training.parallel.budget import stage_memory
from training.parallel.checkpointing import checkpoint_block, kept_ops
from training.parallel.compiling import compile_block
from training.parallel.fsdp import materialise
from training.parallel.hardware import accelerator_of
from training.parallel.memory import MemoryPlan
from training.parallel.mesh import MeshPlan, sequence_group
from training.parallel.offload import Offload
from training.parallel.rates import rates_of
from training.recipe import Recipe
from training.trainee import Trainee
from waver_core.sequence_parallel import Ulysses


class Spread(NamedTuple):
    """What was done to a trainee."""

    memory: MemoryPlan
    offload: Offload | None

    @property
    def gives_up(self) -> bool:
        """Whether anything is computed again or moved."""
        return set(self.memory.modes) != {"none"} or any(self.memory.offloaded)

    def prepare(self, tokens: int) -> None:
        """Of the next micro-batch, so many tokens on this worker: one that fits the device anyway is not offloaded."""
        if self.offload is not None:
            self.offload.enabled = tokens > self.memory.offload_above

    def __str__(self) -> str:
        modes = Counter(self.memory.modes)
        told = ", ".join(f"{count} {_KEPT[mode]}" for mode, count in modes.items())
        away = sum(self.memory.offloaded)
        return f"of {len(self.memory.modes)} blocks {told}" + (f"; {away} of them in host memory" if away else "")


_KEPT = {"none": "keep all activations", "selective": "keep attention and matrix products", "full": "keep their input only"}


def parallelise(trainee: Trainee, recipe: Recipe, plan: MeshPlan, device: str) -> Spread:
    """Make a trainee on the meta device ready to train, in place: with memory and start values on `device`.

    Names of parameters stay what they are. Raises `UserError` where the recipe does not fit the device.
    """
    dit, dtype = trainee.dit, getattr(torch, recipe.workers.dtype)
    if plan.sequence > 1:
        dit.sequence_group = Ulysses(sequence_group(plan, device))
    memory = memory_plan(trainee, recipe, plan, device)
    kept = kept_ops(device, dtype, dit.config.head_dim) if "selective" in memory.modes else frozenset()
    offload = Offload(device, ahead=memory.ahead) if any(memory.offloaded) else None
    for block, mode, offloaded in zip(dit.blocks(), memory.modes, memory.offloaded, strict=True):
        checkpoint_block(block, mode, kept)
        if recipe.parallel.compile:
            compile_block(block)
        if offload is not None:
            offload.wrap(block, moves=offloaded)
    materialise(trainee, device, plan, dtype, seed=recipe.data.seed)
    return Spread(memory, offload)


def memory_plan(trainee: Trainee, recipe: Recipe, plan: MeshPlan, device: str) -> MemoryPlan:
    """What each block keeps for its backward, and where: as the recipe says, or, with `auto`, what fits beside the weights.

    The same on all workers: where one computed a block again and another did not, their exchanges would not meet.
    """
    on_gpu = device.startswith("cuda")
    rates = None
    memory_bytes = None if recipe.parallel.memory_gib is None else recipe.parallel.memory_gib * 2**30
    if on_gpu:
        known = accelerator_of(torch.cuda.get_device_name(device))
        rates = None if known is None else rates_of(known)
        memory_bytes = memory_bytes or _least(torch.cuda.get_device_properties(device).total_memory, plan, device)
    neighbours = torch.cuda.device_count() if on_gpu else plan.world
    found = stage_memory(
        recipe,
        trainee.dit.config,
        plan,
        memory_bytes,
        on_gpu=on_gpu,
        host_bytes=_least(_host_bytes() / neighbours, plan, device),
        feature_dim=None if trainee.alignment is None else trainee.alignment.dim,
        rates=rates,
    )
    answer = [found.plan]
    if plan.world > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _host_bytes() -> float:
    """Memory of this host, or what its container may take of it."""
    limit = Path("/sys/fs/cgroup/memory.max")
    told = limit.read_text().strip() if limit.is_file() else "max"
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), float("inf") if told == "max" else int(told))


def _least(value: float, plan: MeshPlan, device: str) -> float:
    """The least of all workers' values."""
    if plan.world == 1:
        return float(value)
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MIN)
    return float(shared.item())
