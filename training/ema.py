"""The exponential moving average of the weights: what is sampled from while training, and what a stage hands on.

The average is kept in fp32 and sharded as the weights are, so it costs 4 bytes a parameter divided by the number of workers.
Build it once the weights are there (after a warm start, and after `fully_shard`): it starts as a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from waver_core.weights import plain_name, reshard


class Ema:
    """Averaged weights of `model`: `average = d * average + (1 - d) * weights` after each step.

    d rises as `min(decay, (1 + step) / (10 + step))`, so that the start values are soon forgotten. Every parameter is averaged;
    buffers are not.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average lies in [0, 1), not {decay}")
        self.decay = decay
        self._average = {name: p.detach().clone().float() for name, p in named_weights(model)}
        self._swapped = False

    def decay_at(self, step: int) -> float:
        """d after `step` optimiser steps."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step number `step` (the first is 1). No worker waits for another."""
        self._must_not_be_swapped()
        live = dict(named_weights(model))
        averages = [_local(a) for a in self._average.values()]
        # One kernel over all tensors; bf16 weights are read as fp32, or the average would stand still.
        torch._foreach_lerp_(averages, [_local(live[name]).float() for name in self._average], 1 - self.decay_at(step))

    def state_dict(self) -> dict[str, Tensor]:
        """Name of the parameter -> its fp32 average, the tensors themselves (sharded where the weights are): loading into them
        restores the average."""
        self._must_not_be_swapped()
        return dict(self._average)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model computes with the averaged weights inside; afterwards weights and average are bit for bit what they were,
        also after an exception.

        fp32 weights change places with their average one tensor at a time, without a second copy of the model; weights of
        another dtype are copied aside. Do not train inside.
        """
        self._must_not_be_swapped()
        aside: dict[str, Tensor] = {}
        self._exchange(model, aside, back=False)
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            self._exchange(model, aside, back=True)

    @torch.no_grad()
    def _exchange(self, model: nn.Module, aside: dict[str, Tensor], *, back: bool) -> None:
        live = dict(named_weights(model))
        for name, average in self._average.items():
            weight, other = _local(live[name]), _local(average)
            if weight.dtype == other.dtype:
                kept = weight.clone()
                weight.copy_(other)
                other.copy_(kept)
            elif back:
                weight.copy_(aside.pop(name))
            else:
                aside[name] = weight.clone()
                weight.copy_(other)

    def _must_not_be_swapped(self) -> None:
        if self._swapped:
            raise RuntimeError("the averaged weights are in the model now: leave `swapped` first")


def named_weights(model: nn.Module) -> list[tuple[str, Any]]:
    """Parameters by the names that they have in a model that is neither compiled nor wrapped, as checkpoints name them; of
    sharded ones the shards, also after a forward that left them gathered."""
    reshard(model)
    return [(plain_name(name), parameter) for name, parameter in model.named_parameters()]


def _local(tensor: Tensor) -> Tensor:
    """This worker's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
