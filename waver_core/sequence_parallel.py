"""Ulysses: several workers compute one batch, each a part of its tokens (Waver §5; Jacobs et al. 2023).

All that a block does to a token needs that token alone, but for attention. There each worker gives away its tokens' heads and
gets all tokens of its own share of the heads, by one all-to-all before and one after; heads must be a multiple of the workers.
Parts may differ in length, so nothing is padded. No random number is drawn in the model, so members cannot differ in any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


class Ulysses:
    """The exchange over a process group; a `waver_core.dit.attention.SequenceGroup`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()

    def to_heads(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """Own tokens and all heads [n, ..., H, d] -> all tokens and own heads [N, ..., H / size, d]."""
        own = x.shape[0]
        by_member = x.unflatten(-2, (self.size, x.shape[-2] // self.size)).movedim(-3, 0)
        return all_to_all_single_autograd(by_member.flatten(0, 1).contiguous(), list(parts), [own] * self.size, self.group)

    def to_tokens(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """All tokens and own heads [N, h, d] -> own tokens and all heads [n, h * size, d]."""
        own = parts[self.rank]
        by_member = all_to_all_single_autograd(x.contiguous(), [own] * self.size, list(parts), self.group)
        return by_member.unflatten(0, (self.size, own)).movedim(0, 1).flatten(1, 2)

    def whole(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """Own tokens [n, ...] -> all tokens [N, ...] on every member.

        Every member computes the same from them, so the loss is there `size` times; the gradients of all members add up to that
        of the loss once where each counts it with weight 1 / size. Backward therefore needs no messages.
        """
        whole: Tensor = _Whole.apply(x, tuple(parts), self)
        return whole


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: tuple[int, ...], ulysses: Ulysses) -> Tensor:
        ctx.size, ctx.start, ctx.own = ulysses.size, sum(parts[: ulysses.rank]), parts[ulysses.rank]
        longest = max(parts)  # gathers want equal shapes; parts differ by a token at most
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
        gathered = x.new_empty(ulysses.size * longest, *x.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=ulysses.group)
        return torch.cat([g[:n] for g, n in zip(gathered.chunk(ulysses.size), parts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[ctx.start : ctx.start + ctx.own] * ctx.size, None, None


class PromptBranches:
    """Two processes of which the first computes the prompt, the second the negative prompt; a `denoising.Branches`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        if group.size() != 2:
            raise ValueError(f"prompt and negative prompt are shared by two, not by {group.size()}")
        self.group, self.rank = group, group.rank()

    def both(self, own: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See `Branches.both`."""
        sides = []
        for x in own:
            gathered = x.new_empty(2, *x.shape)
            dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=self.group)
            sides.append(gathered)
        return [pair[0] for pair in sides], [pair[1] for pair in sides]
