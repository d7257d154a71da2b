"""A tiny transformer whose blocks all do something, and batches for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from waver_core.dit import DiTConfig, WaverDiT

Batch = tuple[list[Tensor], list[list[Tensor]], Tensor]
LATENTS = {"alone": [(2, 8, 12)], "equal": [(2, 8, 8), (2, 8, 8)], "packed": [(3, 8, 8), (1, 8, 8), (2, 6, 10)]}


class Tiny:
    """`model()` makes the same weights every time; `batch(name)` the same samples: one alone, two equal ones, three of a pack."""

    config = DiTConfig(2, 2, heads=2, head_dim=16, text_dims=(8, 12), max_grid=(8, 16, 16))

    def model(self, config: DiTConfig | None = None) -> WaverDiT:
        model = WaverDiT(config or self.config)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5))
        return model

    def batch(self, name: str = "packed", shapes: Sequence[tuple[int, int, int]] | None = None) -> Batch:
        shapes, g = shapes or LATENTS[name], torch.Generator().manual_seed(1)
        texts = [
            [torch.randn(5 + (i if name == "packed" else 0), 8, generator=g), torch.randn(3, 12, generator=g)]
            for i in range(len(shapes))
        ]
        return [torch.randn(36, *s, generator=g) for s in shapes], texts, torch.rand(len(shapes), generator=g)

    def blocks(self, model: WaverDiT) -> list[nn.Module]:
        return [*model.dual_blocks, *model.single_blocks]

    def loss(self, model: WaverDiT, batch: Batch) -> Tensor:
        velocities, _ = model.velocity(*batch)
        return torch.stack([v.square().mean() for v in velocities]).sum()

    def gradients(self, model: WaverDiT, batch: Batch) -> dict[str, Tensor]:
        model.zero_grad()
        self.loss(model, batch).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def difference(self, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
        """Largest over all parameters, relative to the parameter's largest gradient."""
        assert set(found) == set(wanted) and len(wanted) > 30
        return max(((found[k] - w).abs().max() / w.abs().max()).item() for k, w in wanted.items() if w.any())


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs of other tests are none of this one's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def counted() -> Callable[..., Any]:
    """`counted(ops)`: a mode under which `.calls` counts calls of these operators, by name."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        def __init__(self, ops: frozenset[Any]) -> None:
            super().__init__()
            self.ops, self.calls = ops, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func in self.ops
            return func(*args, **(kwargs or {}))

    return Counted
