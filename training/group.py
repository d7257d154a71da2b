"""One worker among those that train together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Worker:
    """Rank and number of workers, and the device of this one. Alone, nothing is communicated."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    sequence: int = 1
    """Neighbouring ranks that compute the same samples together, each a part of their tokens."""

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    @property
    def counts(self) -> bool:
        """Whether its losses count; the others of its sequence group find the same."""
        return self.rank % self.sequence == 0

    @property
    def data_rank(self) -> int:
        """Which of those that compute samples of their own it belongs to."""
        return self.rank // self.sequence

    @property
    def data_workers(self) -> int:
        """How many compute samples of their own."""
        return self.world // self.sequence

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all workers, on the CPU."""
        if self.world == 1:
            return values.cpu()
        values = values.to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def most(self, value: float) -> float:
        """The largest of all workers' values."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())
