"""Attention in packs and windows against a softmax with an explicit mask, gradients too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from waver_core.dit.attention import MAX_PADDING, AttentionPlan, attention, groups_of_like_length, segmented
from waver_core.dit.layout import Layout
from waver_core.shapes import LatentShape

HEADS, DIM = 2, 8
BATCHES = {
    "one": ([(2, 5, 6)], [[2, 1]]),
    "uniform": ([(2, 4, 4)] * 3, [[2, 1]] * 3),
    "ragged": ([(3, 5, 7), (1, 2, 2), (2, 4, 4), (2, 4, 6)], [[2, 3], [1, 1], [4, 1], [2, 2]]),
}


def owners(size: int, parts: int) -> list[int]:
    """Which of `parts` windows each of `size` places is in: as even as whole places allow, the larger ones first."""
    parts = min(parts, size)
    return [w for w in range(parts) for _ in range(size // parts + (w < size % parts))]


def allowed(layout: Layout, kind: str) -> Tensor:
    """bool [N, N] over the joint tokens, from the rule in words: no use of the plan."""
    counts = {"full": (1, 1, 1), "space": (1, 2, 2), "time": (2, 1, 1)}[kind]
    labels: list[tuple[int, object]] = []  # sample, and "text" or the window
    for number, (shape, n_text) in enumerate(zip(layout.shapes, layout.text.lengths)):
        labels += [(number, "text")] * n_text
        t, y, x = (owners(size, count) for size, count in zip(shape.grid, counts))
        labels += [(number, (a, b, c)) for a in t for b in y for c in x]
    rows = [[q[0] == k[0] and ("text" in (q[1], k[1]) or q[1] == k[1]) for k in labels] for q in labels]
    return torch.tensor(rows)


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def qkv(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, HEADS, DIM, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


@pytest.mark.parametrize("kind", ["full", "space", "time"])
@pytest.mark.parametrize("name", BATCHES)
def test_packed_attention_is_masked_softmax_and_so_are_its_gradients(name: str, kind: str) -> None:
    shapes, texts = BATCHES[name]
    layout = Layout([LatentShape(*s) for s in shapes], texts)
    inputs = qkv(layout.joint.total)
    out, wanted = attention(*inputs, layout.plan(kind)), naive(*inputs, allowed(layout, kind))
    assert torch.allclose(out, wanted, atol=1e-12)
    for ours, theirs in zip(gradients(out, inputs), gradients(wanted, inputs)):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "space", "time"])
def test_a_packed_sample_attends_as_it_does_alone(kind: str) -> None:
    shapes, texts = BATCHES["ragged"]
    layout = Layout([LatentShape(*s) for s in shapes], texts)
    q, k, v = qkv(layout.joint.total, torch.float32)
    packed = attention(q, k, v, layout.plan(kind)).split(list(layout.joint.lengths))
    parts = zip(*(x.split(list(layout.joint.lengths)) for x in (q, k, v)))
    for out, part, shape, text in zip(packed, parts, shapes, texts, strict=True):
        alone = attention(*part, Layout([LatentShape(*shape)], [text]).plan(kind))
        assert torch.allclose(out, alone, atol=1e-6)


LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=8)


@given(LENGTHS)
def test_segments_of_any_lengths_are_exact(lengths: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(5)
    q_lengths, k_lengths = zip(*lengths)
    q = torch.randn(sum(q_lengths), HEADS, DIM, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, sum(k_lengths), HEADS, DIM, generator=generator, dtype=torch.float64)
    q_owner, k_owner = (torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in (q_lengths, k_lengths))
    wanted = naive(q, k, v, q_owner[:, None] == k_owner)
    assert torch.allclose(segmented(q, k, v, AttentionPlan(q_lengths, k_lengths)), wanted, atol=1e-12)


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=40))
def test_groups_hold_every_segment_once_and_pad_within_the_bound(lengths: list[tuple[int, int]]) -> None:
    q_lengths, k_lengths = zip(*lengths)
    groups = groups_of_like_length(q_lengths, k_lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(q_lengths[i] for i in group) * max(k_lengths[i] for i in group)
        assert padded <= MAX_PADDING * sum(q_lengths[i] * k_lengths[i] for i in group)


def test_segments_of_one_length_are_one_group() -> None:
    assert len(groups_of_like_length((7,) * 9, (7,) * 9)) == 1


def test_padding_leaves_no_trace_of_the_token_it_repeats() -> None:
    q, k, v = qkv(9)
    out = segmented(q, k, v, AttentionPlan((5, 4), (5, 4)))
    (q_grad, k_grad, v_grad) = torch.autograd.grad(out[5:].sum(), (q, k, v))
    for grad in (q_grad, k_grad, v_grad):
        assert not grad[:5].any()


def test_queries_and_keys_that_autocast_left_in_fp32_take_the_type_of_the_values() -> None:
    layout = Layout([LatentShape(1, 2, 4), LatentShape(1, 2, 6)], [[1], [1]])
    q, k, v = (x.detach() for x in qkv(layout.joint.total, torch.float32))
    out = attention(q, k, v.bfloat16(), layout.plan("full"))
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), naive(q, k, v, allowed(layout, "full")), atol=0.03)
