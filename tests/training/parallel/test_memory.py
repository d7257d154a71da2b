"""What is counted is what autograd saves, and plans take no more recomputation than they must."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.parallel.checkpointing import Mode, checkpoint_block, kept_ops
from training.parallel.memory import MemoryPlan, block_bytes, plan_memory, shared_bytes
from waver_core.dit import PRESETS, DiTConfig
from waver_core.errors import UserError

MODES: tuple[Mode, ...] = ("none", "selective", "full")
TOLERANCE = 0.05
GIB = 2**30
LARGE = PRESETS["waver_12b"]
PACK = (75_600, 512, 1)
"""Tokens of 720p, 5 s at 24 fps in the right order of magnitude, and of its text."""


def saved_bytes(tiny: Any, config: DiTConfig, mode: Mode, batch: Any) -> tuple[list[int], int]:
    """Bytes of the storages that each block saves by itself, weights apart; and of those that several save."""
    model = tiny.model(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    per_block: list[dict[int, int]] = []
    alive: list[Tensor] = []
    at_work = False

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if at_work and storage.data_ptr() not in weights:
            per_block[-1][storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())  # so that no other storage takes this one's place
        return tensor

    def begin(*_: Any) -> None:
        nonlocal at_work
        per_block.append({})
        at_work = True

    def end(*_: Any) -> None:
        nonlocal at_work
        at_work = False

    for block in tiny.blocks(model):
        checkpoint_block(block, mode, kept_ops("cpu", torch.float32, 16))
        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = tiny.loss(model, batch)
    assert loss.requires_grad
    pointers = [set(block) for block in per_block]
    shared = {p for i, a in enumerate(pointers) for b in pointers[:i] for p in a & b}
    own = [sum(n for p, n in block.items() if p not in shared) for block in per_block]
    return own, sum({p: n for block in per_block for p, n in block.items() if p in shared}.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shapes", [[(2, 8, 12)], [(2, 8, 8)] * 3, [(3, 16, 16)], [(1, 4, 4)]])
@pytest.mark.parametrize("heads, head_dim, mlp_ratio", [(2, 16, 4.0), (4, 32, 4.0), (6, 8, 2.0)])
def test_counts_are_what_autograd_saves(
    heads: int, head_dim: int, mlp_ratio: float, shapes: list[tuple[int, int, int]], mode: Mode, tiny: Any
) -> None:
    config = DiTConfig(2, 2, heads, head_dim, text_dims=(8, 12), mlp_ratio=mlp_ratio, max_grid=(8, 16, 16))
    latents, texts, _ = batch = tiny.batch("equal", shapes)
    video, text = sum(x[0].numel() // 4 for x in latents), sum(len(t) for sample in texts for t in sample)
    own, shared = saved_bytes(tiny, config, mode, batch)
    kinds: list[Literal["dual", "single"]] = ["dual", "dual", "single", "single"]
    for kind, found in zip(kinds, own, strict=True):
        counted = getattr(block_bytes(config, kind, video, text, len(shapes), itemsize=4, uniform=True), mode)
        assert counted == pytest.approx(found, rel=TOLERANCE), f"{kind}: {counted} counted, {found} saved"
    assert shared <= shared_bytes(config, video, text, len(shapes), itemsize=4)


@pytest.mark.parametrize("mode", MODES)
def test_packs_of_unequal_samples_save_a_row_for_each_token(mode: Mode, tiny: Any) -> None:
    """On a CPU attention pads, which is not counted; it comes on top."""
    config = DiTConfig(2, 2, 2, 16, text_dims=(8, 12), max_grid=(8, 16, 16))
    latents, texts, _ = batch = tiny.batch("packed")
    video, text = sum(x[0].numel() // 4 for x in latents), sum(len(t) for sample in texts for t in sample)
    own, _ = saved_bytes(tiny, config, mode, batch)
    for kind, found in zip(("dual", "dual", "single", "single"), own, strict=True):
        counted = getattr(block_bytes(config, kind, video, text, 3, itemsize=4), mode)  # type: ignore[arg-type]
        assert 0.95 * counted <= found <= 1.25 * counted


def test_windows_save_gathered_keys_and_values(tiny: Any) -> None:
    config = DiTConfig(0, 4, 2, 16, text_dims=(8, 12), max_grid=(8, 16, 16), windowed=True, full_blocks=1)
    batch = tiny.batch(shapes=[(4, 16, 16)])
    own, _ = saved_bytes(tiny, config, "none", batch)
    full, space, time, _ = (block_bytes(config, "single", 256, 8, 1, 4, windows=w).none for w in (1, 4, 2, 1))
    assert own[0] == pytest.approx(full, rel=TOLERANCE)
    assert full < time < space
    assert 0.95 * space <= own[1] <= 1.4 * space and 0.95 * time <= own[2] <= 1.4 * time  # padding on top


def rank(plan: MemoryPlan) -> int:
    return sum(MODES.index(mode) for mode in plan.modes)


def need(**choices: Any) -> MemoryPlan:
    return plan_memory(LARGE, *PACK, float("inf"), **choices)


def test_the_order_of_what_is_given_up() -> None:
    everything = need()
    assert set(everything.modes) == {"none"} and not any(everything.offloaded) and everything.host_bytes == 0
    a_bit_less = plan_memory(LARGE, *PACK, everything.device_bytes - 1)
    assert set(a_bit_less.modes) == {"none", "selective"} and not any(a_bit_less.offloaded)
    selective = need(checkpointing="selective", offload="none").device_bytes
    assert set(plan_memory(LARGE, *PACK, selective).modes) == {"selective"}
    offloading = plan_memory(LARGE, *PACK, selective - 1)
    assert set(offloading.modes) == {"selective"} and 0 < sum(offloading.offloaded) < 10 and not offloading.offloaded[-1]
    least = need(checkpointing="selective", offload="all").device_bytes
    fuller = plan_memory(LARGE, *PACK, least - 1)
    assert "full" in fuller.modes


@settings(max_examples=40, deadline=None)
@given(
    a=st.floats(2, 2000),
    b=st.floats(2, 2000),
    tokens=st.integers(1000, 200_000),
    seconds=st.sampled_from([None, 0.01, 0.1]),
    host=st.sampled_from([None, 50 * GIB]),
)
def test_more_memory_never_takes_more_recomputation(
    a: float, b: float, tokens: int, seconds: float | None, host: int | None
) -> None:
    low, high = sorted((a, b))
    options: dict[str, Any] = {"block_seconds": seconds, "host_budget_bytes": host}
    try:
        tight = plan_memory(LARGE, tokens, 512, 1, low * GIB, **options)
    except UserError:
        return
    wide = plan_memory(LARGE, tokens, 512, 1, high * GIB, **options)
    assert rank(wide) <= rank(tight)
    if rank(wide) == rank(tight):
        assert sum(wide.offloaded) <= sum(tight.offloaded)
    for plan, limit in ((tight, low), (wide, high)):
        assert plan.device_bytes <= limit * GIB
        assert host is None or plan.host_bytes <= host
        assert len(plan.modes) == len(plan.offloaded) == 56


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 300_000),
    text=st.integers(0, 2000),
    samples=st.integers(1, 64),
    kind=st.sampled_from(["dual", "single"]),
)
def test_the_more_is_computed_again_the_less_is_kept(tokens: int, text: int, samples: int, kind: Any) -> None:
    bytes_ = block_bytes(LARGE, kind, tokens, text, samples)
    assert bytes_.none > bytes_.selective > bytes_.full > 0
    more = block_bytes(LARGE, kind, tokens + 1, text, samples)
    assert all(x > y for x, y in zip(more, bytes_, strict=True))


def test_offload_is_as_much_as_copies_hide() -> None:
    selective = block_bytes(LARGE, "single", *PACK).selective
    budget = need(checkpointing="selective", offload="none").device_bytes * 0.9
    free = plan_memory(LARGE, *PACK, budget)
    assert any(free.offloaded) and "full" not in free.modes
    slow = plan_memory(LARGE, *PACK, budget, block_seconds=selective / 50e9 / 100)  # a link a hundred times too slow
    assert not any(slow.offloaded) and "full" in slow.modes
    half = plan_memory(LARGE, *PACK, selective * 12, block_seconds=selective / 50e9 / 1.9)
    assert sum(half.offloaded) == 29 and half.ahead == 1
    assert all(not (a and b and c) for a, b, c in zip(half.offloaded, half.offloaded[1:], half.offloaded[2:], strict=False))


def test_a_copy_longer_than_a_backward_is_fetched_earlier() -> None:
    selective = block_bytes(LARGE, "single", *PACK).selective
    plan = plan_memory(LARGE, *PACK, float("inf"), checkpointing="selective", offload="all", block_seconds=selective / 50e9 / 5)
    assert plan.ahead == 3


@settings(max_examples=40, deadline=None)
@given(gib=st.floats(20, 270), tokens=st.integers(5_000, 200_000))
def test_a_micro_batch_that_is_not_offloaded_fits(gib: float, tokens: int) -> None:
    try:
        plan = plan_memory(LARGE, tokens, 512, 1, gib * GIB, checkpointing="selective")
    except UserError:
        return
    if not any(plan.offloaded):
        assert plan.offload_above == 0
        return
    assert 0 < plan.offload_above < tokens
    video = max(1, plan.offload_above - 512)
    kept = plan_memory(LARGE, video, 512, 8, float("inf"), checkpointing="selective", offload="none")
    assert kept.device_bytes <= gib * GIB


def test_choices_may_be_fixed() -> None:
    budget = need(checkpointing="full", offload="none").device_bytes * 1.2
    for mode in MODES:
        plan = plan_memory(LARGE, *PACK, 0.0, checkpointing=mode, offload="none")
        assert set(plan.modes) == {mode} and not any(plan.offloaded) and plan.host_bytes == 0
    assert all(plan_memory(LARGE, *PACK, budget, checkpointing="full", offload="all").offloaded)
    auto = plan_memory(LARGE, *PACK, budget, offload="none")
    assert not any(auto.offloaded) and "full" in auto.modes
    kept = plan_memory(LARGE, *PACK, budget, checkpointing="none")
    assert set(kept.modes) == {"none"} and any(kept.offloaded)


@pytest.mark.parametrize(
    "choices, mend",
    [
        ({}, "raise parallel.sequence or lower data.micro_batch_tokens$"),
        ({"checkpointing": "none"}, "or set parallel.checkpointing to auto$"),
        ({"offload": "none"}, "or set parallel.offload to auto$"),
    ],
)
def test_what_cannot_fit_says_what_to_change(choices: dict[str, Any], mend: str) -> None:
    with pytest.raises(
        UserError, match=f"^activations of 76112 tokens take .* GiB at the least and 1.00 GiB are left for them: .*{mend}"
    ):
        plan_memory(LARGE, *PACK, GIB, **choices)


def test_a_host_that_is_too_small_is_said() -> None:
    with pytest.raises(UserError, match=r"host memory of a worker: set parallel.offload to auto or none"):
        plan_memory(LARGE, *PACK, 1000 * GIB, offload="all", host_budget_bytes=GIB)
