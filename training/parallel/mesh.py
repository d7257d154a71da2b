"""How workers are laid out: replicate x shard x sequence (Waver §5, hybrid sharding and Ulysses).

Sequence is the innermost axis, for its members exchange activations in every block and should share a node; then come shards,
and outermost the replicas. One copy of the weights is spread over shard x sequence workers, the *inner shard* (64 or 128 in the
report); replicas hold the same and only sum their gradients. The members of a sequence group compute the same samples together,
so the data are dealt to replicate x shard *data workers*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from waver_core.errors import ConfigError


@dataclass(frozen=True)
class MeshPlan:
    """Workers along each axis."""

    replicate: int
    shard: int
    sequence: int

    @property
    def world(self) -> int:
        """All workers."""
        return self.replicate * self.shard * self.sequence

    @property
    def inner(self) -> int:
        """Inner shard size: workers that hold one copy of the weights among them."""
        return self.shard * self.sequence

    @property
    def data_workers(self) -> int:
        """Groups that compute samples of their own."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        return f"{self.replicate} replicas x {self.shard} shards x {self.sequence} along the sequence"


def plan_mesh(world: int, heads: int, shard: int | None = None, sequence: int = 1) -> MeshPlan:
    """Lay out `world` workers. `shard` None takes all that are there, so that there is one replica.

    Raises `ConfigError` that lists what would fit: a sequence group shares out the heads, and all axes multiply to the world.
    """
    if heads % sequence or world % sequence:
        fits = [n for n in divisors(heads) if world % n == 0]
        raise ConfigError(
            f"parallel.sequence {sequence} does not fit {world} workers and {heads} heads: {heads} heads allow groups of "
            f"{_listed(divisors(heads))}, of which {_listed(fits)} divide{'s' * (len(fits) == 1)} the workers"
        )
    data_workers = world // sequence
    if shard is None:
        shard = data_workers
    if data_workers % shard:
        raise ConfigError(
            f"parallel.shard {shard} does not fit {world} workers"
            + (f" in sequence groups of {sequence}" if sequence > 1 else "")
            + f": {_listed(divisors(data_workers))} would (with parallel.sequence it makes the inner shard size)"
        )
    return MeshPlan(data_workers // shard, shard, sequence)


def weights_mesh(plan: MeshPlan, device: str) -> DeviceMesh:
    """Replicas x inner shard, over the process group that is running; neighbouring ranks share a copy of the weights."""
    kind = device.split(":")[0]
    if plan.replicate == 1:
        return init_device_mesh(kind, (plan.inner,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (plan.replicate, plan.inner), mesh_dim_names=("replicate", "shard"))


def sequence_group(plan: MeshPlan, device: str) -> dist.ProcessGroup:
    """The workers that compute samples together with this one. All workers call it."""
    kind = device.split(":")[0]
    return init_device_mesh(kind, (plan.data_workers, plan.sequence), mesh_dim_names=("data", "sequence")).get_group("sequence")


def divisors(n: int) -> list[int]:
    """All of them, ascending."""
    return [k for k in range(1, n + 1) if n % k == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
