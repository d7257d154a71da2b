"""What is kept and what is computed again: same gradients, and attention never twice where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from training.parallel import checkpointing
from training.parallel.checkpointing import Mode, attention_ops, checkpoint_block, kept_ops
from training.parallel.compiling import compile_block
from waver_core.dit.attention import AttentionPlan
from waver_core.dit.opaque import segmented_attention
from waver_core.errors import UserError

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def apply(tiny: Any, mode: Mode, kept: frozenset[Any] | None = None) -> Any:
    model = tiny.model()
    for block in tiny.blocks(model):
        checkpoint_block(block, mode, kept_ops("cpu", torch.float32, 16) if kept is None else kept)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 16, 128])
def test_the_kernel_in_use_is_found(dtype: torch.dtype, head_dim: int) -> None:
    assert attention_ops("cpu", dtype, head_dim) == {FLASH}


def test_kernels_that_differ_with_the_pack_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    equal_only = checkpointing.attention

    def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        return equal_only(q, k, v, plan) if plan.uniform else segmented_attention(q, k, v, plan.ends_q, plan.ends_k)

    monkeypatch.setattr(checkpointing, "attention", attention)
    assert attention_ops("cpu", torch.float32, 16) == {FLASH, torch.ops.openwaver.segmented_attention.default}


def test_a_kernel_that_the_dispatcher_does_not_see_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "attention", lambda q, k, v, plan: q + 0)
    with pytest.raises(UserError, match=r"no attention kernel passed .*autograd.Function.*set parallel.checkpointing"):
        kept_ops("cpu", torch.float32, 16)


def test_matrix_products_and_exchanges_are_kept() -> None:
    kept = kept_ops("cpu", torch.float32, 16)
    aten, exchanges = torch.ops.aten, torch.ops._c10d_functional
    assert {aten.mm.default, aten.addmm.default, aten.bmm.default, FLASH} <= kept
    assert {exchanges.all_to_all_single.default, exchanges.wait_tensor.default} <= kept
    assert not {aten.add.Tensor, aten.mul.Tensor, aten.gelu.default, aten.native_layer_norm.default} & kept


@pytest.mark.parametrize("batch", ["alone", "equal", "packed"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_those_without(mode: Mode, batch: str, tiny: Any) -> None:
    wanted = tiny.gradients(tiny.model(), tiny.batch(batch))
    assert tiny.difference(tiny.gradients(apply(tiny, mode), tiny.batch(batch)), wanted) <= 1e-6


@pytest.mark.parametrize("batch", ["alone", "equal", "packed"])
def test_backward_runs_attention_forward_again_for_full_only(batch: str, tiny: Any, counted: Callable[..., Any]) -> None:
    ops, again = attention_ops("cpu", torch.float32, 16), {}
    for mode in ("none", "selective", "full"):
        model = apply(tiny, mode)
        with counted(ops) as forward:
            loss = tiny.loss(model, tiny.batch(batch))
        assert forward.calls >= 4
        with counted(ops) as backward:
            loss.backward()
        again[mode] = backward.calls / forward.calls
    assert again == {"none": 0, "selective": 0, "full": 1}


def test_backward_runs_no_matrix_product_of_the_forward_again(tiny: Any, counted: Callable[..., Any]) -> None:
    products = frozenset(op for op in kept_ops("cpu", torch.float32, 16) if op.namespace == "aten" and "mm" in op.name())
    calls = {}
    for mode in ("none", "selective", "full"):
        loss = tiny.loss(apply(tiny, mode), tiny.batch("equal"))
        with counted(products) as backward:
            loss.backward()
        calls[mode] = backward.calls
    assert calls["none"] == calls["selective"] < calls["full"]


def test_a_list_without_the_kernel_would_run_it_again(tiny: Any, counted: Callable[..., Any]) -> None:
    """The failure that the discovery is there for; the count above would see it."""
    ops = attention_ops("cpu", torch.float32, 16)
    loss = tiny.loss(apply(tiny, "selective", kept_ops("cpu", torch.float32, 16) - ops), tiny.batch("equal"))
    with counted(ops) as backward:
        loss.backward()
    assert backward.calls == 4


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["equal", "packed"])
def test_compiled_blocks_keep_attention_too(batch: str, tiny: Any, counted: Callable[..., Any], fresh_compiler: None) -> None:
    kept = kept_ops("cpu", torch.float32, 16)
    attention = frozenset({FLASH, torch.ops.openwaver.segmented_attention.default})
    again = {}
    for mode in ("selective", "full"):
        model = apply(tiny, mode, kept)
        for block in tiny.blocks(model):
            compile_block(block, backend="aot_eager")
        tiny.gradients(model, tiny.batch(batch))  # compiled by now, backward too
        loss = tiny.loss(model, tiny.batch(batch))
        with counted(attention) as backward:
            loss.backward()
        again[mode] = backward.calls
    assert again["selective"] == 0 and again["full"] >= 4


def test_names_and_types_stay(tiny: Any) -> None:
    plain, changed = tiny.model(), apply(tiny, "selective")
    assert list(plain.state_dict()) == list(changed.state_dict())
    assert [type(b) for b in tiny.blocks(plain)] == [type(b) for b in tiny.blocks(changed)]


def test_a_block_takes_one_mode(tiny: Any) -> None:
    block = tiny.model().single_blocks[0]
    with pytest.raises(ValueError, match="no mode of checkpointing 'some'"):
        checkpoint_block(block, "some", frozenset())  # type: ignore[arg-type]
    checkpoint_block(block, "none", frozenset())
    assert "forward" not in vars(block)
    checkpoint_block(block, "full", frozenset())
    with pytest.raises(ValueError, match="checkpointing comes first"):
        checkpoint_block(block, "full", frozenset())
