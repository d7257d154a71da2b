"""Numbers of a stage while it runs: the loss of every step, and means by kind and by timestep between two reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.conditioning import IMAGE, VIDEO, Example
from training.group import Worker
from training.trainee import Losses

BINS = 10
_KINDS = (IMAGE, VIDEO)
_ROWS = ["alignment", *(f"flow/{kind}" for kind in _KINDS), *(f"flow/t{b / BINS:.1f}" for b in range(BINS))]


class Measures:
    """Sums and counts since the last report. They are part of a checkpoint, so a resumed run reports the same numbers."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(_ROWS), 2, dtype=torch.float64)

    def add(self, examples: Sequence[Example], losses: Losses) -> None:
        """Take in a micro-batch of this worker."""
        flow = losses.flow.detach().double().cpu()
        bins = torch.tensor([min(int(float(e.t) * BINS), BINS - 1) for e in examples]) + 1 + len(_KINDS)
        kinds = torch.tensor([_KINDS.index(e.kind) for e in examples]) + 1
        for rows in (bins, kinds):
            self._sums[:, 0].index_add_(0, rows, flow)
            self._sums[:, 1].index_add_(0, rows, torch.ones_like(flow))
        if losses.alignment is not None:
            self._sums[0] += torch.tensor([float(losses.alignment.detach().double().sum()), len(examples)], dtype=torch.float64)

    def report(self, worker: Worker) -> dict[str, float]:
        """Means over all workers since the last report, by name; starts anew."""
        total: Tensor = worker.sum(self._sums)
        self._sums = torch.zeros_like(self._sums)
        return {name: (s / n).item() for name, (s, n) in zip(_ROWS, total, strict=True) if n > 0}

    def state(self, worker: Worker) -> list[Any]:
        """Sums over all workers, for a checkpoint. What `load` takes, at any number of workers."""
        return list(worker.sum(self._sums.clone()).tolist())

    def load(self, state: list[Any], worker: Worker) -> None:
        """The first worker goes on with the sums of all."""
        self._sums = torch.tensor(state, dtype=torch.float64) if worker.leads else torch.zeros_like(self._sums)
