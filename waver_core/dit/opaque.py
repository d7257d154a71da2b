"""Attention of unequal segments as one operator, for compiled blocks where there is no kernel for variable lengths.

A graph of its groups would be another one for every pack. Segment by segment, so slower than the groups of `attention`; on a GPU
in half precision neither is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("openwaver::segmented_attention", mutates_args=())
def segmented_attention(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor) -> Tensor:
    """Segment i of q [Nq, H, d] attends to segment i of k and v [Nk, H, d]; ends: int32 [segments + 1], beginning with 0."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for of_q, of_k in _segments(ends_q, ends_k):
        parts = (x.transpose(0, 1)[None] for x in (q[of_q], k[of_k], v[of_k]))
        out[of_q] = F.scaled_dot_product_attention(*parts)[0].transpose(0, 1)
    return out


@torch.library.custom_op("openwaver::segmented_attention_backward", mutates_args=())
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    scale = q.shape[-1] ** -0.5
    for of_q, of_k in _segments(ends_q, ends_k):
        q_s, k_s, v_s, d_out = (x.transpose(0, 1) for x in (q[of_q], k[of_k], v[of_k], grad[of_q]))  # [H, n, d]
        p = torch.softmax(q_s @ k_s.mT * scale, dim=-1)
        d_p = d_out @ v_s.mT
        d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
        found = (d_scores @ k_s, of_q), (d_scores.mT @ q_s, of_k), (p.mT @ d_out, of_k)
        for into, (value, where) in zip(grads, found, strict=True):
            into[where] = value.transpose(0, 1)
    return grads[0], grads[1], grads[2]


@segmented_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


segmented_attention.register_autograd(
    lambda ctx, grad: (*_backward(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _segments(ends_q: Tensor, ends_k: Tensor) -> Iterator[tuple[slice, slice]]:
    return ((slice(*a), slice(*b)) for a, b in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True))
