"""Activations wait for their backward in host memory (Waver §5 and Fig. 24, activation offloading).

What a block saves for its backward is copied to pinned host memory once its forward is over, on a stream of its own, while the
next block computes. When a block begins its backward, what the block before it saved is fetched on the same stream. So copies
hide behind compute where they are faster than it; where they are slower, compute waits and memory stays bounded.

    saved      autograd hands a tensor over; its storage is moved whole, and once, however many views of it are saved
    leaving    copied to the host; the device's copy lives until `in_flight` more blocks have gone by
    away       on the host only
    back       fetched, and kept until autograd lets go of it

What is seen: all that autograd saves in an eager block without checkpointing, and in a compiled one whatever its checkpointing;
inputs of an eager block checkpointed in `full`; inputs and kept results of one in `selective`. Weights and their views stay, also
those that FSDP has gathered; so do tensors of less than `min_bytes`. Under autocast copies of weights in the lower precision are
saved and moved like activations. A CPU takes the same path with plain copies.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from waver_core.errors import UserError

PIECE_BYTES = 16 * 2**20
"""Host memory comes in pieces of this size, so that batches of any shapes share it. torch pins powers of two."""


@dataclass
class Traffic:
    """What has been moved since the start."""

    moved: int = 0
    """Storages copied to the host."""
    moved_bytes: int = 0
    fetched: int = 0
    """Storages copied back."""
    late: int = 0
    """Of these, fetched by the block that needed them and not before."""
    revived: int = 0
    """Storages needed again before the device's copy was given up."""


class HostPool:
    """Pieces of pinned host memory, used again and again: pinning is slow."""

    def __init__(self, piece_bytes: int, pinned: bool) -> None:
        self.piece_bytes, self.pinned = piece_bytes, pinned
        self.free: list[Tensor] = []
        self.pieces = 0

    def take(self, count_bytes: int) -> list[Tensor]:
        """Pieces that hold so many bytes together. Raises `UserError` where the host has no more to give."""
        wanted = -(-count_bytes // self.piece_bytes)
        missing = wanted - len(self.free)
        if missing > 0:
            try:
                new = [torch.empty(self.piece_bytes, dtype=torch.uint8, pin_memory=self.pinned) for _ in range(missing)]
            except RuntimeError as error:
                gib = (self.pieces + missing) * self.piece_bytes / 2**30
                told = f"host memory for {gib:.1f} GiB of activations cannot be had ({str(error).splitlines()[0]})"
                raise UserError(f"{told}: set parallel.offload to none, or lower data.micro_batch_tokens") from error
            self.free += new
            self.pieces += missing
        taken, self.free = self.free[:wanted], self.free[wanted:]
        return taken

    def give(self, pieces: Sequence[Tensor]) -> None:
        """Take pieces back. All copies run on one stream, so the next one into them starts after the last one out of them."""
        self.free += pieces


class _Held:
    """One storage that waits for the backward. Dies with the last saved tensor that lies in it."""

    def __init__(self, tensor: Tensor, pool: HostPool) -> None:
        self.pool = pool
        self.pieces: list[Tensor] = []
        self.source: Tensor | None = tensor
        """The saved tensor, until it is copied."""
        self.version = tensor._version
        self.storage: torch.UntypedStorage | None = tensor.untyped_storage()
        """On the device; None where it is away."""
        self.leaving: torch.UntypedStorage | None = None
        """The device's copy while the host's is being made, and some time after."""
        self.bytes = tensor.untyped_storage().nbytes()

    def __del__(self) -> None:
        self.pool.give(self.pieces)


class _Known(NamedTuple):
    storage: StorageWeakRef
    held: weakref.ref[_Held]


class _Fetch(NamedTuple):
    """A copy to the device that compute has not waited for yet; its memory must not be used for anything else before."""

    event: Any
    storage: torch.UntypedStorage


class _Group:
    """One forward of one block."""

    def __init__(self, previous: weakref.ref[_Group] | None, moves: bool, weights: set[int]) -> None:
        self.previous, self.moves, self.weights = previous, moves, weights
        self.begun = False
        """Whether its backward has."""
        self.fresh: list[_Held] = []
        """To be copied when the forward ends."""
        self.held: list[weakref.ref[_Held]] = []


class _Saved(NamedTuple):
    """What autograd keeps: a tensor, or where it lies in a storage that may be away. The group lives as long as it does."""

    group: _Group
    tensor: Tensor | None
    held: _Held | None = None
    dtype: torch.dtype | None = None
    place: tuple[int, torch.Size, tuple[int, ...]] = (0, torch.Size(), ())


class Offload:
    """Moves what blocks save. One for a model, and the only user of its stream.

    device: where the model computes; min_bytes: smaller storages stay; ahead: blocks whose storages are fetched before they are
    needed; in_flight: blocks that may go on before the copies of an earlier one are waited for.
    """

    def __init__(
        self,
        device: torch.device | str,
        min_bytes: int = 2**20,
        *,
        ahead: int = 1,
        in_flight: int = 2,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.device = torch.device(device)
        self.min_bytes, self.ahead, self.in_flight = min_bytes, ahead, in_flight
        self.enabled = True
        """Whether blocks whose forward begins now move what they save."""
        self.traffic = Traffic()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool = HostPool(piece_bytes, pinned=self._stream is not None)
        self._known: dict[int, _Known] = {}
        self._leaving: deque[tuple[Any, list[_Held]]] = deque()
        self._fetching: dict[int, _Fetch] = {}
        self._last: weakref.ref[_Group] | None = None
        self._open: tuple[_Group, saved_tensors_hooks] | None = None

    @property
    def moved_bytes(self) -> int:
        """Bytes copied to the host since the start."""
        return self.traffic.moved_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory held, in use or not."""
        return self._pool.pieces * self._pool.piece_bytes

    def wrap(self, block: nn.Module, moves: bool = True) -> None:
        """Move what this block saves, in place: by hooks around its call, so the order of this and of `compile_block` is free.

        Wrap all blocks, those that keep what they save with `moves` False: it is the start of their backward that tells when to
        fetch for the block before.
        """
        block.register_forward_pre_hook(partial(self._enter_forward, moves))
        block.register_forward_hook(self._leave_forward, always_call=True)

    # Forward

    def _enter_forward(self, moves: bool, block: nn.Module, args: Any) -> None:
        if self._open is not None:
            raise RuntimeError("a block inside of another one is wrapped for offloading: wrap one of them")
        if not torch.is_grad_enabled():
            return
        self._forget()
        weights = {p.untyped_storage().data_ptr() for p in block.parameters()}  # those that FSDP has gathered by now
        group = _Group(self._last, moves and self.enabled, weights)
        hooks = saved_tensors_hooks(partial(self._pack, group), self._unpack)
        hooks.__enter__()
        self._last, self._open = weakref.ref(group), (group, hooks)

    def _leave_forward(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._open is None:
            return
        (group, hooks), self._open = self._open, None
        hooks.__exit__(None, None, None)
        if output is not None:  # None where the forward failed
            self._move(group)

    def _forget(self) -> None:
        """What nobody waits for any more: fetches of a backward that was given up, and storages that are gone."""
        for fetch in self._fetching.values():
            self._wait(fetch.event)
        self._fetching.clear()
        self._known = {k: v for k, v in self._known.items() if not v.storage.expired() and v.held() is not None}

    def _pack(self, group: _Group, tensor: Tensor) -> _Saved:
        if not group.moves or not self._movable(tensor, group.weights):
            return _Saved(group, tensor)
        storage = tensor.untyped_storage()
        known = self._known.get(storage.data_ptr())
        held = None if known is None or known.storage.expired() else known.held()
        if held is None or held.version != tensor._version:
            held = _Held(tensor, self._pool)
            group.fresh.append(held)
            self._known[storage.data_ptr()] = _Known(StorageWeakRef(storage), weakref.ref(held))
        group.held.append(weakref.ref(held))
        return _Saved(group, None, held, tensor.dtype, (tensor.storage_offset(), tensor.size(), tensor.stride()))

    def _movable(self, tensor: Tensor, weights: set[int]) -> bool:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type != self.device.type:
            return False
        if tensor.is_conj() or tensor.is_neg():
            return False
        storage = tensor.untyped_storage()
        return storage.nbytes() >= self.min_bytes and storage.data_ptr() not in weights

    def _move(self, group: _Group) -> None:
        event = None
        if group.fresh:
            with self._side():
                for held in group.fresh:
                    if held.source is None or held.storage is None or held.source._version != held.version:
                        raise RuntimeError("a tensor that was saved for the backward has been changed in place since")
                    held.pieces = self._pool.take(held.bytes)
                    for device, host in _pairs(held.storage, held.pieces):
                        host.copy_(device, non_blocking=True)
                    held.leaving, held.storage, held.source = held.storage, None, None
                    self.traffic.moved += 1
                    self.traffic.moved_bytes += held.bytes
                event = self._event()
        self._leaving.append((event, group.fresh))  # empty where the block moves nothing: others leave for good meanwhile
        group.fresh = []
        while len(self._leaving) > self.in_flight:
            self._give_up(*self._leaving.popleft())

    def _give_up(self, event: Any, helds: Iterable[_Held]) -> None:
        """Free the device's copies. Compute waits for those that are still read, lest their memory be used for something else;
        of one that was needed again before, nobody wants the host's."""
        if any(held.leaving is not None for held in helds):
            self._wait(event)
        for held in helds:
            held.leaving = None

    # Backward

    def _unpack(self, saved: _Saved) -> Tensor:
        self._enter_backward(saved.group)
        if saved.held is None:
            assert saved.tensor is not None
            return saved.tensor
        held = saved.held
        if held.storage is None:  # a second backward, or a storage shared with a block further on
            self._fetch([held], late=True)
        if id(held) in self._fetching:
            self._wait(self._fetching.pop(id(held)).event)
        return torch.empty(0, dtype=saved.dtype, device=self.device).set_(held.storage, *saved.place)

    def _enter_backward(self, group: _Group) -> None:
        """Fetch for this block what has not come yet, and for those before it."""
        if group.begun:
            return
        group.begun = True
        self._fetch(_alive(group), late=True)
        before: _Group | None = group
        for _ in range(self.ahead):
            before = before.previous() if before is not None and before.previous is not None else None
            if before is not None:
                self._fetch(_alive(before), late=False)
        while self._leaving:
            self._give_up(*self._leaving.popleft())

    def _fetch(self, helds: Iterable[_Held], late: bool) -> None:
        away = []
        for held in helds:
            if held.leaving is not None:
                held.storage, held.leaving = held.leaving, None
                self._return(held)
                self.traffic.revived += 1
            elif held.storage is None:
                away.append(held)
        if not away:
            return
        # Allocated on compute's stream, where it is used and freed; the copy waits for whatever used that memory before.
        for held in away:
            held.storage = torch.empty(held.bytes, dtype=torch.uint8, device=self.device).untyped_storage()
        with self._side():
            for held in away:
                assert held.storage is not None
                for device, host in _pairs(held.storage, held.pieces):
                    device.copy_(host, non_blocking=True)
            event = self._event()
        for held in away:
            assert held.storage is not None
            self._return(held)
            self._fetching[id(held)] = _Fetch(event, held.storage)
        self.traffic.fetched += len(away)
        self.traffic.late += len(away) if late else 0

    def _return(self, held: _Held) -> None:
        self._pool.give(held.pieces)
        held.pieces = []

    # Streams; nothing of it on a CPU

    def _side(self) -> AbstractContextManager[Any]:
        """The stream of copies, after all that compute has been given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _event(self) -> Any:
        return None if self._stream is None else self._stream.record_event()

    def _wait(self, event: Any) -> None:
        """Compute goes on after this event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def _alive(group: _Group) -> list[_Held]:
    """What is still waited for, each once."""
    found = (ref() for ref in group.held)
    return list({id(held): held for held in found if held is not None}.values())


def _pairs(storage: torch.UntypedStorage, pieces: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """The storage's bytes and the host's, piece by piece."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    parts = flat.split(pieces[0].numel())
    return ((part, piece[: part.numel()]) for part, piece in zip(parts, pieces, strict=True))
