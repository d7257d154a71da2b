"""Activations go to the host and come back in time, once each, and nothing of the mathematics changes.

On a CPU the same bookkeeping runs with plain copies; what streams and events add is not covered here.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from training.parallel.checkpointing import Mode, checkpoint_block, kept_ops
from training.parallel.compiling import compile_block
from training.parallel.offload import HostPool, Offload
from waver_core.errors import UserError

SMALL = {"min_bytes": 64, "piece_bytes": 4096}


class Square(nn.Module):
    """Saves what comes in, twice, and its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((32, 32), 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.flatten().view(x.shape) + (x @ self.weight.t()) * 0.01


def chain(length: int, **settings: Any) -> tuple[list[Square], Offload]:
    blocks, offload = [Square() for _ in range(length)], Offload("cpu", **{**SMALL, **settings})
    for block in blocks:
        offload.wrap(block)
    return blocks, offload


def run(blocks: list[Square], seed: int = 0) -> Tensor:
    x = torch.rand(8, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_() * 1
    for block in blocks:
        x = block(x)
    return x.mean()


def applied(tiny: Any, mode: Mode, compiled: bool = False, **settings: Any) -> tuple[Any, Offload]:
    model, offload = tiny.model(), Offload("cpu", **{**SMALL, **settings})
    kept = kept_ops("cpu", torch.float32, 16)
    for block in tiny.blocks(model):
        checkpoint_block(block, mode, kept)
        offload.wrap(block)
        if compiled:
            compile_block(block, backend="aot_eager")
    return model, offload


def settled(offload: Offload) -> bool:
    """Nothing is left on the host or on its way."""
    gc.collect()
    return len(offload._pool.free) == offload._pool.pieces and not offload._leaving and not offload._fetching


@pytest.mark.parametrize("batch", ["alone", "equal", "packed"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_gradients_are_those_without(mode: Mode, batch: str, tiny: Any) -> None:
    wanted = tiny.gradients(tiny.model(), tiny.batch(batch))
    model, offload = applied(tiny, mode)
    for _ in range(2):
        assert tiny.difference(tiny.gradients(model, tiny.batch(batch)), wanted) <= 1e-6
    assert offload.traffic.moved == offload.traffic.fetched + offload.traffic.revived > 0
    assert settled(offload)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_gradients_of_compiled_blocks_are_those_without(mode: Mode, tiny: Any, fresh_compiler: None) -> None:
    wanted = tiny.gradients(tiny.model(), tiny.batch("packed"))
    model, offload = applied(tiny, mode, compiled=True)
    for _ in range(2):
        assert tiny.difference(tiny.gradients(model, tiny.batch("packed")), wanted) <= 1e-5
    assert offload.moved_bytes > 0 and settled(offload)


def test_the_less_is_kept_the_less_is_moved(tiny: Any) -> None:
    moved: dict[Mode, int] = {}
    for mode in ("none", "selective", "full"):
        model, offload = applied(tiny, mode)
        tiny.gradients(model, tiny.batch("equal"))
        moved[mode] = offload.moved_bytes
    tokens = 2 * (2 * 4 * 4 + 8) * 32 * 4
    assert moved["full"] > 4 * tokens and moved["selective"] > 4 * 11 * tokens and moved["none"] > 4 * 24 * tokens
    assert moved["full"] < 7 * tokens and moved["selective"] < 4 * 13 * tokens and moved["none"] < 4 * 28 * tokens


def test_a_storage_is_moved_once_and_weights_never() -> None:
    blocks, offload = chain(4)
    run(blocks).backward()
    # Each saves its input as x, as a view of x and for the product, and a view of its weight: one storage of 8 x 32 numbers.
    assert offload.traffic.moved == 4 and offload.moved_bytes == 4 * 8 * 32 * 4


def test_a_tensor_that_blocks_share_is_moved_once() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            return x * angles

    blocks, offload, angles = [Turned() for _ in range(3)], Offload("cpu", **SMALL), torch.rand(8, 32)
    x = torch.rand(8, 32, requires_grad=True)
    for block in blocks:
        offload.wrap(block)
    out = x
    for block in blocks:
        out = block(out, angles)
    out.sum().backward()
    assert offload.traffic.moved == 1
    assert x.grad is not None and torch.equal(x.grad, angles * angles * angles)


def test_small_tensors_stay() -> None:
    blocks, offload = chain(2, min_bytes=8 * 32 * 4 + 1)
    run(blocks).backward()
    assert offload.traffic.moved == 0 and offload.host_bytes == 0


def test_it_can_be_left_out_for_a_micro_batch() -> None:
    blocks, offload = chain(3)
    offload.enabled = False
    run(blocks).backward()
    assert offload.traffic.moved == 0
    alone = [block.weight.grad.clone() for block in blocks if block.weight.grad is not None]
    for block in blocks:
        block.weight.grad = None
    offload.enabled = True
    run(blocks).backward()
    assert offload.traffic.moved > 0 and len(alone) == 3
    assert all(torch.equal(a, block.weight.grad) for a, block in zip(alone, blocks, strict=True) if block.weight.grad is not None)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_what_a_block_saved_is_fetched_while_the_one_after_it_is_at_work(ahead: int) -> None:
    blocks, offload = chain(8, ahead=ahead, in_flight=1)
    fetched: list[int] = []
    """After the backward of each block but the first of the chain, how many have been fetched."""
    for block in blocks[1:]:
        block.register_full_backward_hook(lambda *_: fetched.append(offload.traffic.fetched))
    run(blocks).backward()
    assert offload.traffic.revived == 1, "what the last block saved has not left the device yet"
    assert offload.traffic.late == 0
    assert fetched == [min(7, n + ahead) for n in range(7)]


def test_without_fetching_ahead_each_block_waits() -> None:
    blocks, offload = chain(8, ahead=0, in_flight=1)
    run(blocks).backward()
    assert offload.traffic.late == offload.traffic.fetched == 7


def test_the_device_holds_few_blocks_at_a_time() -> None:
    """Counted where it matters: when a block begins, forward or backward."""
    blocks, offload = chain(10, ahead=1, in_flight=2)
    alive: list[int] = []

    def count(*_: Any) -> None:
        helds = [known.held() for known in offload._known.values()]
        alive.append(sum(held is not None and (held.storage is not None or held.leaving is not None) for held in helds))

    for block in blocks:
        block.register_forward_pre_hook(count)
        block.register_full_backward_hook(count)
    run(blocks).backward()
    assert len(alive) == 20 and max(alive) <= 3


def test_blocks_that_keep_theirs_still_say_when_to_fetch() -> None:
    blocks, offload = [Square() for _ in range(6)], Offload("cpu", **SMALL)
    for i, block in enumerate(blocks):
        offload.wrap(block, moves=i < 2)
    run(blocks).backward()
    assert offload.traffic.moved == offload.traffic.fetched == 2 and offload.traffic.late == offload.traffic.revived == 0


def test_a_forward_without_a_backward_leaves_nothing() -> None:
    blocks, offload = chain(5)
    with torch.no_grad():
        run(blocks)
    assert offload.traffic.moved == 0
    for seed in range(3):
        run(blocks, seed)  # the loss is dropped at once
    assert offload.traffic.moved == 15 and offload.traffic.fetched == 0
    run(blocks).backward()
    assert settled(offload)


def test_micro_batches_one_after_the_other_and_nested() -> None:
    plain = [Square() for _ in range(4)]
    (run(plain, 1) + run(plain, 2)).backward()
    blocks, offload = chain(4)
    run(blocks, 1).backward()
    run(blocks, 2).backward()
    for a, b in zip(blocks, plain, strict=True):
        assert torch.equal(a.weight.grad, b.weight.grad)
        a.weight.grad = None
    host_bytes = offload.host_bytes
    (run(blocks, 1) + run(blocks, 2)).backward()
    for a, b in zip(blocks, plain, strict=True):
        assert torch.equal(a.weight.grad, b.weight.grad)
    assert settled(offload) and offload.host_bytes == 2 * host_bytes


def test_a_second_backward_finds_all_again() -> None:
    plain, (blocks, offload) = [Square() for _ in range(4)], chain(4)
    for these in (plain, blocks):
        loss = run(these)
        loss.backward(retain_graph=True)
        loss.backward()
    for a, b in zip(blocks, plain, strict=True):
        assert torch.equal(a.weight.grad, b.weight.grad)
    del loss
    assert settled(offload)


def test_host_memory_is_used_again() -> None:
    blocks, offload = chain(4)
    sizes = []
    for seed in range(4):
        run(blocks, seed).backward()
        sizes.append(offload.host_bytes)
    assert len(set(sizes)) == 1 and sizes[0] == 4 * 4096


def test_storages_longer_and_shorter_than_a_piece() -> None:
    blocks, offload = chain(4, piece_bytes=96)
    plain = [Square() for _ in range(4)]
    run(blocks).backward()
    run(plain).backward()
    for a, b in zip(blocks, plain, strict=True):
        assert torch.equal(a.weight.grad, b.weight.grad)
    assert offload.host_bytes == 4 * 1056  # 11 pieces for 1024 bytes


def test_a_block_that_fails_moves_nothing_and_the_next_one_works() -> None:
    blocks, offload = chain(2)
    with pytest.raises(RuntimeError):
        blocks[0](torch.rand(8, 31, requires_grad=True))
    assert offload.traffic.moved == 0
    run(blocks).backward()
    assert offload.traffic.moved == 2 and settled(offload)


def test_a_saved_tensor_that_is_changed_is_an_error() -> None:
    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            z = y * y
            y.add_(1)
            return z

    block, offload = Spoils(), Offload("cpu", **SMALL)
    offload.wrap(block)
    with pytest.raises(RuntimeError, match="changed in place"):
        block(torch.rand(8, 32, requires_grad=True))


def test_a_block_inside_of_another_is_refused() -> None:
    outer, offload = nn.Sequential(nn.Linear(4, 4)), Offload("cpu")
    offload.wrap(outer)
    offload.wrap(outer[0])
    with pytest.raises(RuntimeError, match="wrap one of them"):
        outer(torch.rand(2, 4))


def test_host_memory_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(UserError, match=r"^host memory for 2\.0 GiB .*CUDA error: out of memory\): set parallel.offload to none"):
        HostPool(2**30, pinned=True).take(2 * 2**30)


def test_torch_hands_kept_results_to_hooks_only_where_it_is_asked_to() -> None:
    """Selective checkpointing keeps results outside of autograd; without this setting offloading would miss them and say
    nothing. Fails where torch changes it."""
    seen: dict[bool, int] = {}
    kept = kept_ops("cpu", torch.float32, 16)

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(list(kept))

    linear, x = nn.Linear(32, 32), torch.rand(8, 32, requires_grad=True)
    for asked in (False, True):
        packed: list[Tensor] = []

        def pack(t: Tensor, packed: list[Tensor] = packed) -> Tensor:
            packed.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fields: dict[str, Any] = {"use_reentrant": False, "respect_saved_tensors_hooks": asked}
            checkpoint(lambda t: linear(t).sin(), x, context_fn=contexts, **fields).sum().backward()
        seen[asked] = len(packed)
    assert seen[True] == seen[False] + 1


def test_modes_of_all_three_kinds_mix(tiny: Any) -> None:
    wanted = tiny.gradients(tiny.model(), tiny.batch("packed"))
    model, offload = tiny.model(), Offload("cpu", **SMALL)
    kept = kept_ops("cpu", torch.float32, 16)
    modes: list[tuple[Mode, bool]] = [("none", True), ("selective", False), ("full", True), ("selective", True)]
    for block, (mode, moves) in zip(tiny.blocks(model), modes, strict=True):
        checkpoint_block(block, mode, kept)
        offload.wrap(block, moves)
    assert tiny.difference(tiny.gradients(model, tiny.batch("packed")), wanted) <= 1e-6
    assert offload.traffic.moved > 0 and settled(offload)
