"""Moves of whole rows of a flat batch whose gradients need no scattered additions.

The backward of plain indexing adds up rows one by one, for an index may name a row twice. A permutation names each once, and rows
spread over a sample's tokens are summed by one small matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, back = ctx.saved_tensors
        return permuted(grad, back, index), None, None


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(owner)
        ctx.rows = rows.shape[0]
        return rows.index_select(0, owner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (owner,) = ctx.saved_tensors
        members = torch.arange(ctx.rows, device=owner.device)[:, None] == owner
        return members.to(grad.dtype) @ grad, None


def permuted(x: Tensor, index: Tensor, back: Tensor) -> Tensor:
    """Rows of x [N, ...] in the order of `index` int64 [N], a permutation; `back` is its inverse."""
    moved: Tensor = _Permuted.apply(x, index, back)
    return moved


def spread_rows(rows_SD: Tensor, owner_N: Tensor) -> Tensor:
    """Row `owner[i]` for every token i: [S, D] and int64 [N] -> [N, D]."""
    spread: Tensor = _SpreadRows.apply(rows_SD, owner_N)
    return spread
