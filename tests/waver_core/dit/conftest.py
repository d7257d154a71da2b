"""Small networks with random weights in every place, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from waver_core.dit import DiTConfig, WaverDiT

TEXT_DIMS = (6, 10)


class Batch(NamedTuple):
    """Arguments of `WaverDiT.velocity`."""

    latents: list[Tensor]
    texts: list[tuple[Tensor, ...]]
    timesteps: Tensor

    def only(self, i: int) -> Batch:
        return Batch([self.latents[i]], [self.texts[i]], self.timesteps[i : i + 1])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_model() -> Callable[..., WaverDiT]:
    """`make_model(seed, **fields)`: as it starts, blocks are identities; so here every parameter gets a random value."""

    def make(seed: int = 0, **fields: object) -> WaverDiT:
        numbers = {"dual_blocks": 2, "single_blocks": 3, "heads": 2, "head_dim": 16, "full_blocks": 1, "max_grid": (4, 6, 6)}
        model = WaverDiT(DiTConfig(**{**numbers, "text_dims": TEXT_DIMS, **fields}))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                values = torch.randn(p.shape, generator=generator)
                if p.ndim > 1:
                    values /= p.shape[-1] ** 0.5
                p.copy_(1 + 0.3 * values if "_norm.weight" in name else values)
        return model

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """`make_batch(shapes of latents, numbers of text tokens from each encoder, seed)`."""

    def make(shapes: Sequence[tuple[int, int, int]], lengths: Sequence[Sequence[int]], seed: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        latents = [torch.randn(36, *shape, generator=generator) for shape in shapes]
        texts = [tuple(torch.randn(n, d, generator=generator) for n, d in zip(sample, TEXT_DIMS)) for sample in lengths]
        return Batch(latents, texts, torch.rand(len(shapes), generator=generator))

    return make
