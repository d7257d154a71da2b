"""Hybrid position embedding (Waver §2.1): 3D rotary positions for attention, factorised learnable ones for the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rope_angles(positions_N3: Tensor, dims: tuple[int, int, int], theta: float = 10_000.0) -> Tensor:
    """Angles of rotary embedding over three axes: int64 [N, 3] -> fp32 [N, sum(dims) / 2].

    The first dims[0] / 2 pairs of a head turn with time, the next with height, the last with width, each pair i of an axis
    at theta^(-2i / dim).
    """
    parts = []
    for axis, dim in enumerate(dims):
        exponents = torch.arange(0, dim, 2, device=positions_N3.device, dtype=torch.float64) / dim
        parts.append(positions_N3[:, axis, None].double() * theta**-exponents)
    return torch.cat(parts, dim=1).float()


def rotate(x_NHd: Tensor, cos_N1d: Tensor, sin_N1d: Tensor) -> Tensor:
    """Turn pairs of dimensions: cos and sin are fp32 [N, 1, d / 2]; dimension i pairs with i + d / 2. The result has the type
    of x."""
    first, second = x_NHd.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos_N1d - second * sin_N1d, second * cos_N1d + first * sin_N1d], dim=-1)
    return turned.to(x_NHd.dtype)


_PHASES = (0.0, 1.2, 2.5)
"""Not thirds of a turn: those add up to nothing wherever time, row and column are equal."""


class FactorisedPositions(nn.Module):
    """A learnable vector for every time, every row and every column; a token's position is the sum of its three.

    They start as sinusoids of different phases: from small random vectors the tiny model took twice as long to learn.
    """

    def __init__(self, max_grid: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(n, width)) for n in max_grid)
        self.max_grid = max_grid
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sinusoids over the width, of another phase for each axis."""
        with torch.no_grad():
            for axis, table in enumerate(self.tables):
                table.copy_(_sinusoids(table.shape[0], table.shape[1], phase=_PHASES[axis]).to(table.device))

    def forward(self, positions_N3: Tensor) -> Tensor:
        """int64 [N, 3] -> [N, D]."""
        time, row, column = (table[positions_N3[:, axis]] for axis, table in enumerate(self.tables))
        return time + row + column


def _sinusoids(length: int, width: int, phase: float) -> Tensor:
    half = -(-width // 2)
    frequencies = 100.0 ** -(torch.arange(half) / max(1, half - 1))  # periods of 6 to 600 tokens
    angles = torch.arange(length)[:, None] * frequencies + phase
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width] * 0.5


def timestep_features(t_S: Tensor, width: int = 256) -> Tensor:
    """Sinusoids of timesteps in [0, 1]: fp32 [S] -> fp32 [S, width]."""
    half = width // 2
    frequencies = 10_000.0 ** -(torch.arange(half, device=t_S.device, dtype=torch.float32) / half)
    angles = 1000.0 * t_S.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
