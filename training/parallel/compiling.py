"""Every block as one graph (Waver §5), and what compiling them took.

Blocks of one kind share their graphs. The first shape gets a graph of its own; at the second, torch makes one that takes any
number of tokens. So a run has few graphs however its packs differ.
"""

from __future__ import annotations

import shutil
import time
from typing import Any

import torch
from torch import nn
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

from waver_core.errors import UserError

RECOMPILE_LIMIT = 256
"""Graphs that blocks may have together. torch's own 8 is soon spent: two kinds of block, checkpointed in three ways, each with a
fixed and with any number of tokens, with equal samples and unequal ones. Beyond the limit torch refuses to run a full graph."""


class _Watch:
    """Counts what torch compiles from the first compiled block on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.graphs = 0
        self.kinds: set[tuple[type, str]] = set()
        self._since = 0.0
        callback_handler.register_start_callback(self._started)
        callback_handler.register_end_callback(self._ended)

    def _started(self, args: CallbackArgs) -> None:
        self._since = time.perf_counter()
        self.graphs += args.callback_trigger is CallbackTrigger.DYNAMO

    def _ended(self, args: CallbackArgs) -> None:
        self.seconds += time.perf_counter() - self._since


_watch: _Watch | None = None


def compile_block(block: nn.Module, *, dynamic: bool | None = None, backend: str = "inductor") -> None:
    """Compile what a block computes as one graph, in place: its type and the names of its weights stay. A graph that breaks is an
    error.

    Comes after `checkpoint_block` and before `fully_shard`. The forward is compiled and not the call, so hooks stay outside of
    the graph: those of `Offload` and of FSDP, which gathers the weights before. `dynamic`: False makes a graph for each shape,
    True one for all, None one for the first and one for all others.

    Raises `UserError` where inductor has no C++ compiler to work with.
    """
    global _watch
    if backend == "inductor" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise UserError("compiled blocks need a C++ compiler and none was found: install g++, or set parallel.compile to false")
    if _watch is None:
        _watch = _Watch()
    _watch.kinds.add((type(block), getattr(block.forward, "mode", "none")))
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * RECOMPILE_LIMIT)
    block.forward = torch.compile(block.forward, fullgraph=True, dynamic=dynamic, backend=backend)


def warm_up_report() -> dict[str, Any]:
    """What compiling took since the first `compile_block`: `graphs`, forwards traced; `seconds` on the clock, backwards
    included; `recompiles`, graphs beyond the first of every kind of block, each for other shapes.

    A backward is compiled when it first runs, so ask after a step of each shape.
    """
    if _watch is None:
        return {"graphs": 0, "seconds": 0.0, "recompiles": 0}
    recompiles = max(0, _watch.graphs - len(_watch.kinds))
    return {"graphs": _watch.graphs, "seconds": round(_watch.seconds, 3), "recompiles": recompiles}
