"""The model over several workers: FSDP2, block by block (Waver §5)."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from training.group import Worker
from training.trainee import Trainee


def shard(trainee: Trainee, worker: Worker, dtype: torch.dtype) -> None:
    """Shard weights, gradients and optimiser state over all workers, in place; nothing for one worker.

    Forward and backward run in `dtype`; weights and the reduction of gradients stay fp32.
    """
    if worker.world == 1:
        return
    mesh = init_device_mesh(worker.device.split(":")[0], (worker.world,), mesh_dim_names=("shard",))
    # Inputs are left alone: FSDP would cast timesteps, targets and rotary angles too, and t = 0.9991 would become 1.
    low = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in (*trainee.dit.dual_blocks, *trainee.dit.single_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The transformer is a root of its own, too: previews call it without the trainee around it.
    fully_shard(trainee.dit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(trainee, mesh=mesh, mp_policy=policy)
