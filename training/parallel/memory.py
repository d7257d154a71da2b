"""How much the blocks keep for the backward, and what is given up so that it fits a device (Waver §5).

Counted are results that eager execution saves, in tokens x width; the tests hold the counts against what autograd really saves.
Compiled blocks save less: torch then chooses what to compute again even without checkpointing. Kernels of a GPU save less, too
(a fused norm of queries and keys: 2 of the 24 below); under autocast more is saved in fp32. What all blocks share (angles,
timesteps, indices of a pack) is counted once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from training.parallel.checkpointing import Mode
from waver_core.dit import DiTConfig
from waver_core.errors import UserError

IN_FLIGHT = 2
"""Blocks whose storages may still be on the device while they are copied to the host (`Offload`'s default)."""
HOST_BYTES_PER_S = 50e9
"""Between a device and pinned host memory: PCIe 5 x16 as it is measured; its datasheet says 64e9."""
_FP32 = 4
_WINDOWS = {"full": 1, "space": 4, "time": 2}


class BlockBytes(NamedTuple):
    """What one block keeps of one micro-batch on one worker, by mode of checkpointing."""

    none: int
    selective: int
    full: int


@dataclass(frozen=True)
class MemoryPlan:
    """What each block does, first to last."""

    modes: tuple[Mode, ...]
    offloaded: tuple[bool, ...]
    device_bytes: int
    """Peak of activations on the device."""
    host_bytes: int
    """Of a micro-batch, on the host of one worker."""
    ahead: int = 1
    """Blocks by which `Offload` must fetch early so that copies hide."""
    offload_above: int = 0
    """Tokens on a worker up to which a micro-batch fits the device without offloading, whatever `offloaded` says."""


def block_bytes(
    config: DiTConfig,
    kind: Literal["dual", "single"],
    video_tokens: int,
    text_tokens: int,
    samples: int,
    itemsize: int = 2,
    *,
    uniform: bool | None = None,
    windows: int = 1,
    sequence: int = 1,
) -> BlockBytes:
    """Saved activations of one block.

    video_tokens, text_tokens: of all samples, those on this worker; itemsize: bytes of an activation; uniform: whether all
    samples have the same lengths (None: where there is one); windows: into how many a sample is cut; sequence: workers that share
    it.
    """
    width, heads = config.width, config.heads
    tokens = video_tokens + text_tokens
    uniform = samples == 1 if uniform is None else uniform
    # The input; its norm, modulated; queries, keys and values in one; queries and keys normed, then rotated; attention;
    # its projection; the residual; its norm, modulated; the MLP's two hidden layers; its output.
    none = 1 + 2 + 3 + 4 + 1 + 1 + 1 + 2 + 2 * config.mlp_ratio + 1
    # The input; queries, keys and values; attention; its projection; the MLP's first layer; its output.
    selective = 1 + 3 + 1 + 1 + config.mlp_ratio + 1
    if not uniform:
        none += 4  # scales and gates of both halves, a row for each token
    if kind == "dual":
        none += 1 + (not (uniform and samples == 1))  # values of text and video in one; attention parted again
    if windows > 1:  # keys and values are gathered, text for every window; attention put back in order
        none += 2 * (2 * video_tokens + (1 + windows) * text_tokens) / max(1, tokens) - (kind == "dual")
    if sequence > 1:  # what came of the exchanges, of all tokens for some heads and back
        none += 2
        selective += 4
    statistics = tokens * _FP32 * (4 + 2 * heads)  # of two norms of tokens, and of those of queries and keys
    attention = tokens * _FP32 * heads  # logarithms of its sums
    streams = 2 if kind == "dual" else 1
    modulation = streams * samples * width * itemsize
    return BlockBytes(
        none=int(none * tokens * width * itemsize) + statistics + attention + 8 * modulation,
        selective=int(selective * tokens * width * itemsize) + attention + 6 * modulation,
        full=tokens * width * itemsize,
    )


def shared_bytes(config: DiTConfig, video_tokens: int, text_tokens: int, samples: int, itemsize: int = 2) -> int:
    """What all blocks are given alike: cosines and sines of angles, timesteps, numbers of samples and places of tokens."""
    tokens = video_tokens + text_tokens
    return tokens * config.head_dim * _FP32 + samples * config.width * itemsize + 4 * tokens * 8


def plan_memory(
    config: DiTConfig,
    video_tokens: int,
    text_tokens: int,
    samples: int,
    budget_bytes: float,
    *,
    itemsize: int = 2,
    checkpointing: Mode | Literal["auto"] = "auto",
    offload: Literal["auto", "none", "all"] = "auto",
    block_seconds: float | None = None,
    host_bytes_per_s: float = HOST_BYTES_PER_S,
    host_budget_bytes: float | None = None,
    sequence: int = 1,
    uniform: bool | None = None,
) -> MemoryPlan:
    """The plan with the least recomputation whose activations fit.

    Tried in this order: everything kept; more and more blocks `selective`; of these more and more offloaded, as many as their
    copies hide behind compute and as the host holds; more and more blocks `full`. `checkpointing` and `offload` may fix a choice;
    where both do there is nothing to plan, and the choice is returned whether it fits or not.

    budget_bytes: of one device, for activations alone; tokens and samples: of a micro-batch, tokens those on one worker;
    block_seconds: forward of one block, None where it is not known; host_budget_bytes: of one worker; sequence, uniform: as in
    `block_bytes`.
    Raises `UserError` where nothing of what is tried fits.
    """
    blocks = _Blocks(
        [
            block_bytes(
                config,
                "dual" if i < config.dual_blocks else "single",
                video_tokens,
                text_tokens,
                samples,
                itemsize,
                uniform=uniform,
                windows=_WINDOWS[config.attention_kind(i)],
                sequence=sequence,
            )
            for i in range(config.blocks)
        ],
        shared_bytes(config, video_tokens, text_tokens, samples, itemsize),
        None if block_seconds is None else block_seconds * host_bytes_per_s,
        host_budget_bytes,
    )
    plans = [blocks.plan(*choices) for choices in _ladder(blocks, checkpointing, offload)]
    if checkpointing != "auto" and offload != "auto":
        return plans[0]
    on_device = [plan for plan in plans if plan.device_bytes <= budget_bytes]
    for plan in on_device:
        if host_budget_bytes is None or plan.host_bytes <= host_budget_bytes:
            return replace(plan, offload_above=blocks.fitting_tokens(plan, video_tokens + text_tokens, budget_bytes))
    raise UserError(_does_not_fit(plans, on_device, budget_bytes, video_tokens + text_tokens, checkpointing, offload))


def _does_not_fit(
    plans: Sequence[MemoryPlan],
    on_device: Sequence[MemoryPlan],
    budget_bytes: float,
    tokens: int,
    checkpointing: str,
    offload: str,
) -> str:
    gib = 2**30
    if on_device:
        needed = min(plan.host_bytes for plan in on_device) / gib
        return f"{needed:.2f} GiB of activations do not fit the host memory of a worker: set parallel.offload to auto or none"
    least = min(plan.device_bytes for plan in plans) / gib
    told = f"activations of {tokens} tokens take {least:.2f} GiB at the least and {max(0.0, budget_bytes) / gib:.2f} GiB are left"
    fixed = [f"parallel.{name} to auto" for name, x in (("checkpointing", checkpointing), ("offload", offload)) if x != "auto"]
    free = f", or set {' and '.join(fixed)}" if fixed else ""
    return f"{told} for them: raise parallel.sequence or lower data.micro_batch_tokens{free}"


class _Blocks(NamedTuple):
    each: Sequence[BlockBytes]
    shared: int
    copied_per_block: float | None
    """Bytes that are copied in the time of one block's forward."""
    host_budget: float | None

    def plan(self, modes: Sequence[Mode], offloaded: Sequence[bool]) -> MemoryPlan:
        """Bytes of these choices."""
        kept = [getattr(b, mode) for b, mode in zip(self.each, modes, strict=True)]
        away = [n for n, off in zip(kept, offloaded, strict=True) if off]
        largest = max(away, default=0)
        ahead = self._ahead(largest)
        recomputed = max((b.none - n for b, n in zip(self.each, kept, strict=True)), default=0)
        # While blocks go out there are some on their way and the one that computes; on the way back, those fetched early and the
        # one that computes, with what it computes again.
        out = min(len(away), IN_FLIGHT + 1) * largest
        back = min(len(away), ahead + 1) * largest
        device = sum(kept) - sum(away) + max(out, back + recomputed) + self.shared
        return MemoryPlan(tuple(modes), tuple(offloaded), device, sum(away), ahead)

    def fitting_tokens(self, plan: MemoryPlan, tokens: int, budget_bytes: float) -> int:
        """Tokens that fit without offloading: what is kept grows with them. A little less, for what each sample adds."""
        kept = self.plan(plan.modes, [False] * len(plan.modes)).device_bytes
        return int(0.95 * tokens * min(1.0, budget_bytes / kept)) if any(plan.offloaded) else 0

    def _ahead(self, moved: int) -> int:
        """A block's backward takes twice its forward."""
        return 1 if not self.copied_per_block else max(1, -int(-moved // (2 * self.copied_per_block)))

    def most_offloaded(self, mode: Mode) -> int:
        """How many blocks the forward's time and the host allow for."""
        moved = max(getattr(b, mode) for b in self.each)
        count = len(self.each)
        if self.copied_per_block is not None:
            count = min(count, int(self.copied_per_block * len(self.each) / moved))
        if self.host_budget is not None:
            count = min(count, int(self.host_budget / moved))
        return count


def _ladder(
    blocks: _Blocks, checkpointing: Mode | Literal["auto"], offload: Literal["auto", "none", "all"]
) -> Iterator[tuple[list[Mode], list[bool]]]:
    """Choices from the least recomputation to the most."""
    n = len(blocks.each)
    offloaded = [offload == "all"] * n
    modes: list[Mode] = ["none"] * n
    if checkpointing == "auto":
        for k in range(n + 1):
            modes = ["selective" if i < k else "none" for i in range(n)]
            yield modes, offloaded
    else:
        modes = [checkpointing] * n
        yield modes, offloaded
    if offload == "auto":
        for m in range(1, blocks.most_offloaded(modes[0]) + 1):
            offloaded = _spread(m, n)
            yield modes, offloaded
    if checkpointing == "auto":
        order = sorted(range(n), key=lambda i: offloaded[i])  # those that stay on the device first
        for k in range(1, n + 1):
            chosen = set(order[:k])
            yield ["full" if i in chosen else mode for i, mode in enumerate(modes)], offloaded


def _spread(count: int, total: int) -> list[bool]:
    """So many of `total`, evenly, so that a copy has the time of several blocks; the last only where all are."""
    return [(i + 1) * count // total > i * count // total for i in range(total)][::-1]
