"""The one entry point of attention: dense, packed, windowed and shared out over workers, on whatever kernel the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from waver_core.dit.opaque import segmented_attention
from waver_core.dit.permute import permuted

MAX_PADDING = 1.5
"""Segments of unequal length are computed together where that costs at most so many times their own pairs."""


class SequenceGroup(Protocol):
    """Workers that compute one batch together, each a part of its tokens (`waver_core.sequence_parallel`)."""

    rank: int
    size: int

    def __hash__(self) -> int: ...

    def to_heads(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """Own tokens and all heads [n, ..., H, d] -> all tokens, part after part, and own heads [N, ..., H / size, d]; `parts`
        are the numbers of tokens of all members."""

    def to_tokens(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """The way back: [N, ..., H / size, d] -> [n, ..., H, d]."""

    def whole(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """Own tokens [n, ...] -> all tokens [N, ...] on every member."""


class AttentionPlan:
    """A gather of queries, a gather of keys, and how many of each go together. None as index: all, in order.

    `q_index` is a permutation; a key may be gathered several times. With a `group`, tokens are exchanged for heads before and
    back after; `parts` are the numbers of joint tokens that its members hold.
    """

    def __init__(
        self,
        q_lengths: Sequence[int],
        k_lengths: Sequence[int],
        q_index: Tensor | None = None,
        k_index: Tensor | None = None,
        *,
        group: SequenceGroup | None = None,
        parts: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.q_lengths, self.k_lengths = tuple(q_lengths), tuple(k_lengths)
        self.q_index, self.k_index = q_index, k_index
        self.q_back = None if q_index is None else _inverse(q_index)
        self.group, self.parts = group, list(parts or ())
        self.segments = len(self.q_lengths)
        self.uniform = len(set(self.q_lengths)) == 1 and len(set(self.k_lengths)) == 1
        # What kernels for variable lengths want. As tensors and two numbers, so that one compiled block serves all packs.
        self.max_q, self.max_k = max(self.q_lengths), max(self.k_lengths)
        self.ends_q, self.ends_k = (_ends(lengths, device) for lengths in (self.q_lengths, self.k_lengths))
        self._groups: _Groups | None = None
        if not self.uniform and torch.device(device).type == "cpu":
            self.groups(torch.device(device))

    def pairs(self) -> int:
        """Query-key pairs, for counting operations."""
        return sum(q * k for q, k in zip(self.q_lengths, self.k_lengths, strict=True))

    def groups(self, device: torch.device) -> _Groups:
        """Segments of like lengths side by side, for where there is no kernel for variable lengths."""
        if self._groups is None:
            self._groups = _groups(self.q_lengths, self.k_lengths, device)
        return self._groups


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Softmax attention of flat tokens: q, k, v [N, H, d] -> [N, H, d], within the segments of the plan.

    Bidirectional, scaled by 1/sqrt(d), without dropout. On a GPU in half precision unequal segments go to a kernel for variable
    lengths: flash-attn's where it is installed, else torch's own. Elsewhere they go to SDPA, in groups of like length.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves what was normalised in fp32
    if plan.group is not None:
        q, k, v = plan.group.to_heads(torch.stack([q, k, v], dim=1), plan.parts).unbind(1)
    if plan.q_index is not None and plan.q_back is not None and plan.k_index is not None:
        q = permuted(q, plan.q_index, plan.q_back)
        k, v = k.index_select(0, plan.k_index), v.index_select(0, plan.k_index)
    out = segmented(q, k, v, plan)
    if plan.q_index is not None and plan.q_back is not None:
        out = permuted(out, plan.q_back, plan.q_index)
    return out if plan.group is None else plan.group.to_tokens(out, plan.parts)


def segmented(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Segment i of q [Nq, H, d] attends to segment i of k and v [Nk, H, d]."""
    if plan.uniform:
        parts = (x.unflatten(0, (plan.segments, x.shape[0] // plan.segments)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(0, 1)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _variable_length(q, k, v, plan)
    if torch.compiler.is_compiling():  # groups differ from pack to pack: one node of the graph, whatever they are
        return segmented_attention(q, k, v, plan.ends_q, plan.ends_k)
    return _grouped(q, k, v, plan.groups(q.device))


class _Group(NamedTuple):
    """Segments computed together: which tokens stand where, int64 [S, n] (padding repeats token 0 of the batch)."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    """bool [S, 1, 1, n]: which keys are there; None where all are"""


class _Groups(NamedTuple):
    each: list[_Group]
    back: Tensor
    """Where each token's result stands among those of all groups, int64 [Nq]"""


def _grouped(q: Tensor, k: Tensor, v: Tensor, groups: _Groups) -> Tensor:
    """Segments of like lengths side by side, the shorter ones padded and masked; exact for any lengths."""
    results = []
    for group in groups.each:
        parts = (x.index_select(0, i.flatten()).unflatten(0, i.shape) for x, i in ((q, group.q), (k, group.k), (v, group.k)))
        out = F.scaled_dot_product_attention(*(p.transpose(1, 2) for p in parts), attn_mask=group.mask)
        results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, groups.back)


@lru_cache(maxsize=64)
def _groups(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], device: torch.device) -> _Groups:
    q_starts, k_starts = (torch.tensor([0, *lengths]).cumsum(0)[:-1] for lengths in (q_lengths, k_lengths))
    groups, tokens, real = [], [], []
    for members in groups_of_like_length(q_lengths, k_lengths):
        q, q_valid = _table([q_lengths[i] for i in members], q_starts[members])
        k, k_valid = _table([k_lengths[i] for i in members], k_starts[members])
        mask = None if bool(k_valid.all()) else k_valid[:, None, None].to(device)
        groups.append(_Group(q.to(device), k.to(device), mask))
        tokens.append(q.flatten())
        real.append(q_valid.flatten())
    valid = torch.cat(real)
    back = torch.empty(sum(q_lengths), dtype=torch.int64)
    back[torch.cat(tokens)[valid]] = torch.arange(len(valid))[valid]
    return _Groups(groups, back.to(device))


def _table(lengths: Sequence[int], starts: Tensor) -> tuple[Tensor, Tensor]:
    """Token numbers [S, n] of segments side by side, and which of them are real."""
    offsets = torch.arange(max(lengths))
    valid = offsets < torch.tensor(lengths)[:, None]
    return torch.where(valid, starts[:, None] + offsets, 0), valid


@lru_cache(maxsize=64)
def groups_of_like_length(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...]) -> list[list[int]]:
    """Segments that are computed together: taken from the longest down while padding stays below `MAX_PADDING`."""
    order = sorted(range(len(q_lengths)), key=lambda i: (k_lengths[i], q_lengths[i]), reverse=True)
    groups: list[list[int]] = []
    for i in order:
        group = [*groups[-1], i] if groups else []
        pairs = sum(q_lengths[j] * k_lengths[j] for j in group)
        padded = len(group) * max((q_lengths[j] for j in group), default=0) * max((k_lengths[j] for j in group), default=0)
        if group and padded <= MAX_PADDING * pairs:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _ends(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def _inverse(index: Tensor) -> Tensor:
    back = torch.empty_like(index)
    back[index] = torch.arange(len(index), device=index.device)
    return back


@lru_cache(maxsize=1)
def _flash_attn() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    return flash_attn_varlen_func


def _variable_length(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    flash = _flash_attn()
    if flash is not None:
        out: Tensor = flash(q, k, v, plan.ends_q, plan.ends_k, plan.max_q, plan.max_k)
        return out
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, plan.ends_q, plan.ends_k, plan.max_q, plan.max_k)
