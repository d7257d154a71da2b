"""Hybrid sharding by FSDP2 (Waver §5): weights, gradients and optimiser state over the inner shard, copies on the replicas.

Forward and backward run in `dtype`; weights, optimiser state and the reduction of gradients stay fp32. The model comes on the
meta device and gets its memory block by block, each sharded before the next, so that no worker ever holds it whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from training.parallel.mesh import MeshPlan, weights_mesh
from training.trainee import Trainee
from waver_core.dit.model import WaverDiT


def materialise(trainee: Trainee, device: str, plan: MeshPlan, dtype: torch.dtype, *, seed: int) -> None:
    """Give a trainee on the meta device its memory and start values, in place, sharded as the plan says.

    Start values follow from the seed alone, whatever the plan. With one worker nothing is sharded.
    """
    sharded = plan.world > 1
    # Blocks return their tokens reshaped, and nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy, mesh = _policy(dtype), weights_mesh(plan, device) if sharded else None
    torch.manual_seed(seed)
    dit = trainee.dit
    for block in dit.blocks():
        block.to_empty(device=device)
        dit.reset_block(block)
        if mesh is not None:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    for module in _outside_blocks(trainee, dit):
        module.to_empty(device=device, recurse=False)
    dit.reset_ends()
    if trainee.alignment is not None:
        trainee.alignment.reset_parameters()
    if mesh is not None:
        # The transformer is a root of its own, too: previews call it without the trainee around it.
        fully_shard(dit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        fully_shard(trainee, mesh=mesh, mp_policy=policy)


def reduce_over_replicas(trainee: nn.Module, wanted: bool) -> None:
    """Whether the next backward sums gradients over the replicas, too: only the last micro-batch of a step needs to."""
    if isinstance(trainee, FSDPModule):
        trainee.set_requires_all_reduce(wanted)


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    # Inputs are left alone: FSDP would cast timesteps, targets and rotary angles too, and t = 0.9991 would become 1.
    low = dtype if dtype != torch.float32 else None
    return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _outside_blocks(trainee: Trainee, dit: WaverDiT) -> Iterator[nn.Module]:
    inside = {id(module) for block in dit.blocks() for module in block.modules()}
    return (module for module in trainee.modules() if id(module) not in inside)
