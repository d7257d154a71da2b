"""The one entry point of attention: dense, packed and windowed, on whatever kernel the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from waver_core.dit.layout import AttentionPlan

MAX_PADDING = 1.5
"""Segments of unequal length are computed together where that costs at most so many times their own pairs."""


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Softmax attention of flat tokens: q, k, v [N, H, d] -> [N, H, d], within the segments of the plan.

    Bidirectional, scaled by 1/sqrt(d), without dropout. On a GPU in half precision unequal segments go to a kernel for variable
    lengths: flash-attn's where it is installed, else torch's own. Elsewhere they go to SDPA, in groups of like length.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves what was normalised in fp32
    if plan.q_index is not None:
        q, k, v = q[plan.q_index], k[plan.k_index], v[plan.k_index]
    out = segmented(q, k, v, plan.q_lengths, plan.k_lengths)
    return out if plan.q_back is None else out[plan.q_back]


def segmented(q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Tensor:
    """Segment i of q [Nq, H, d] attends to segment i of k and v [Nk, H, d]."""
    if len(set(q_lengths)) == 1 and len(set(k_lengths)) == 1:
        parts = (x.unflatten(0, (len(q_lengths), -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(0, 1)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _variable_length(q, k, v, tuple(q_lengths), tuple(k_lengths))
    return _grouped(q, k, v, q_lengths, k_lengths)


def _grouped(q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Tensor:
    """Segments of like lengths side by side, the shorter ones padded and masked; exact for any lengths."""
    results = []
    for group in _padded_groups(tuple(q_lengths), tuple(k_lengths), q.device):
        parts = (x.index_select(0, i.flatten()).unflatten(0, i.shape) for x, i in ((q, group.q), (k, group.k), (v, group.k)))
        out = F.scaled_dot_product_attention(*(p.transpose(1, 2) for p in parts), attn_mask=group.mask)
        results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, _back(tuple(q_lengths), tuple(k_lengths), q.device))


class _Group(NamedTuple):
    """Segments computed together: which tokens stand where, int64 [S, n] (padding repeats token 0 of the batch)."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    """bool [S, 1, 1, n]: which keys are there; None where all are"""
    q_valid: Tensor
    """bool [S, n]"""


@lru_cache(maxsize=64)
def _padded_groups(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], device: torch.device) -> list[_Group]:
    q_starts, k_starts = (torch.tensor([0, *lengths]).cumsum(0)[:-1] for lengths in (q_lengths, k_lengths))
    groups = []
    for members in groups_of_like_length(q_lengths, k_lengths):
        q, q_valid = _table([q_lengths[i] for i in members], q_starts[members])
        k, k_valid = _table([k_lengths[i] for i in members], k_starts[members])
        mask = None if bool(k_valid.all()) else k_valid[:, None, None].to(device)
        groups.append(_Group(q.to(device), k.to(device), mask, q_valid))
    return groups


def _table(lengths: Sequence[int], starts: Tensor) -> tuple[Tensor, Tensor]:
    """Token numbers [S, n] of segments side by side, and which of them are real."""
    offsets = torch.arange(max(lengths))
    valid = offsets < torch.tensor(lengths)[:, None]
    return torch.where(valid, starts[:, None] + offsets, 0), valid


@lru_cache(maxsize=64)
def _back(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each token's result stands among those of all groups."""
    groups = _padded_groups(q_lengths, k_lengths, device)
    tokens = torch.cat([group.q.cpu().flatten() for group in groups])
    valid = torch.cat([group.q_valid.flatten() for group in groups])
    back = torch.empty(sum(q_lengths), dtype=torch.int64)
    back[tokens[valid]] = torch.arange(len(tokens))[valid]
    return back.to(device)


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


@lru_cache(maxsize=1)
def _flash_attn() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    return flash_attn_varlen_func


@lru_cache(maxsize=256)
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _variable_length(q: Tensor, k: Tensor, v: Tensor, q_lengths: tuple[int, ...], k_lengths: tuple[int, ...]) -> Tensor:
    cu_q, cu_k = _boundaries(q_lengths, q.device), _boundaries(k_lengths, q.device)
    flash = _flash_attn()
    if flash is not None:
        out: Tensor = flash(q, k, v, cu_q, cu_k, max(q_lengths), max(k_lengths))
        return out
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu_q, cu_k, max(q_lengths), max(k_lengths))
