"""Which results of a block are kept for its backward, and which are computed again (Waver §5, activation checkpointing).

- `none`: all that autograd wants.
- `selective`: results of attention, matrix products and exchanges between workers, and what goes into the block; norms,
  modulation, rotation and activations are computed again.
- `full`: what goes into the block; all of its forward is computed again.

Whether `selective` keeps attention hangs on the name of the kernel that runs, and that changes with the device, the type, the
lengths and the packages installed. So attention is run, and its kernels are taken down.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from waver_core.dit.attention import AttentionPlan, attention
from waver_core.dit.opaque import segmented_attention
from waver_core.errors import UserError

Mode = Literal["none", "selective", "full"]
Ops = frozenset[Any]
"""Operators (`OpOverload`) of torch's dispatcher."""

_TRIED_LENGTHS = ((64, 64), (64, 60), (128, 16))
"""Equal segments, unequal ones that may be padded to each other, and ones too unequal for that."""

_MATRIX_PRODUCTS = ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "linear", "_scaled_mm")
_OTHER_KERNELS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""torch chooses among these by length too, so at training lengths it may take another than the one that was seen; a compiled
block may take `segmented_attention`."""
_EXCHANGES = ("all_to_all_single", "wait_tensor")


_SEEN_BY_HOOKS = {name: True for name in ("respect_saved_tensors_hooks",) if name in inspect.signature(checkpoint).parameters}


class _Recorder(TorchDispatchMode):
    """Takes down the operators that look like attention: those that take three tensors of heads, queries, keys and values.
    Nothing else in it takes so many."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        floats = [x for x in given if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 3]
        if sum(x.shape[-1] >= self.head_dim for x in floats) >= 3:  # more where a kernel wants heads padded to a round size
            self.seen.add(func)
        return func(*args, **(kwargs or {}))


def attention_ops(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Ops:
    """The kernels with which `waver_core.dit.attention` computes its forward on this device, in this type, for packs of equal
    and of unequal samples.

    Raises `UserError` where none was seen: `selective` would compute attention twice and say nothing.
    """
    found: set[Any] = set()
    for lengths in _TRIED_LENGTHS:
        plan = AttentionPlan(lengths, lengths, device=device)
        q, k, v = (torch.ones(sum(lengths), 2, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        with _Recorder(head_dim) as recorder:
            attention(q, k, v, plan)
        if not recorder.seen:
            raise UserError(
                f"no attention kernel passed torch's dispatcher on {device} in {dtype} for segments of {lengths} tokens, so "
                "selective checkpointing could not keep its result (a kernel inside a plain autograd.Function is not seen): set "
                "parallel.checkpointing to none or full, or make the kernel a torch.library.custom_op"
            )
        found |= recorder.seen
    return frozenset(found)


def kept_ops(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Ops:
    """What `selective` keeps: attention as it runs here, matrix products, and exchanges between the workers of a sequence.

    Raises `UserError` where no kernel of attention was seen.
    """
    import torch.distributed._functional_collectives  # registers the exchanges

    named = [*_overloads("aten", (*_MATRIX_PRODUCTS, *_OTHER_KERNELS)), *_overloads("_c10d_functional", _EXCHANGES)]
    named.append(torch.ops.openwaver.segmented_attention.default)  # what compiled blocks take on a CPU
    return attention_ops(device, dtype, head_dim) | {*named, segmented_attention._opoverload}


def _overloads(namespace: str, names: Iterable[str]) -> list[Any]:
    packets = [getattr(getattr(torch.ops, namespace), name) for name in names]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def _policy(kept: Ops, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_block(block: nn.Module, mode: Mode, kept: Ops) -> None:
    """Give a block this mode, in place: its type and the names of its weights stay. `kept` comes from `kept_ops` and matters
    for `selective` only.

    Comes before `compile_block` and `fully_shard`. Blocks draw no random numbers, so no generator is set back.
    """
    if "forward" in vars(block):
        raise ValueError(f"this {type(block).__name__} is checkpointed or compiled already: checkpointing comes first, once")
    if mode == "selective":
        # The hooks of `Offload` see what is kept; before 2.12 torch left that out, and offloading moves less of eager blocks.
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
        block.forward = _checkpointed(block.forward, mode, context_fn=contexts, **_SEEN_BY_HOOKS)
    elif mode == "full":
        block.forward = _checkpointed(block.forward, mode)
    elif mode != "none":
        raise ValueError(f"no mode of checkpointing '{mode}'")


def _checkpointed(forward: Callable[..., Any], mode: Mode, **settings: Any) -> Callable[..., Any]:
    def checkpointed(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **settings)

    checkpointed.mode = mode  # type: ignore[attr-defined]
    return checkpointed
