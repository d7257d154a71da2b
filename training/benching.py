"""Measures training steps for `training/bench.py`: builds real blocks under some settings, warms them up, times them.

One device holds as many blocks as fit, with weights in the type that FSDP hands to a block. So no communication is in the
figures; nor is the optimiser, which a step of many micro-batches runs once.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from training.bench_cases import Case, Settings
from training.parallel.ceilings import ATTENTION_KERNELS, one_line, patient_seconds
from training.parallel.checkpointing import checkpoint_block, kept_ops
from training.parallel.compiling import compile_block
from training.parallel.offload import Offload
from training.parallel.overlap import overlap, read_trace
from waver_core.dit import DiTConfig, Layout, WaverDiT
from waver_core.dit import attention as attention_module
from waver_core.dit.attention import AttentionPlan
from waver_core.shapes import LatentShape

_ATTENTION = re.compile(r"_scaled_dot_product_\w+|flash_(fwd|bwd)|FlashAttn(Fwd|Bwd)|fmha|sdpa|_attn_(fwd|bwd)", re.IGNORECASE)
"""Names of attention's operations on a CPU and of its kernels on a GPU."""


class Batch:
    """A case's inputs on a device, as one micro-batch or several."""

    def __init__(self, case: Case, config: DiTConfig, device: torch.device, dtype: torch.dtype, packed: bool) -> None:
        everything = list(zip(case.shapes, case.text_lengths, strict=True))
        self.parts = [
            self._part(group, config, device, dtype) for group in ([everything] if packed else [[s] for s in everything])
        ]
        self.samples = len(everything)

    @staticmethod
    def _part(
        samples: Sequence[tuple[LatentShape, tuple[int, ...]]], config: DiTConfig, device: torch.device, dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], Tensor]:
        """Arguments of the model's forward, and the target."""
        layout = Layout([shape for shape, _ in samples], [text for _, text in samples], device)
        tokens = sum(shape.tokens for shape, _ in samples)
        patches = torch.randn(tokens, config.in_features, device=device, dtype=dtype)
        texts = [
            torch.randn(sum(text[e] for _, text in samples), dim, device=device, dtype=dtype)
            for e, dim in enumerate(config.text_dims)
        ]
        return (patches, texts, torch.rand(len(samples), device=device), layout), torch.randn(
            tokens, config.out_features, device=device
        )


def new_model(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> WaverDiT:
    """The transformer with random weights everywhere: those that start at zero make zero gradients, and zeros are faster."""
    with torch.device(device):
        dit = WaverDiT(config)
    for parameter in dit.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    return dit.to(dtype)


@contextmanager
def attention_by(name: str) -> Iterator[None]:
    """Within, attention takes the kernel of that name; compiled code must be traced within."""
    with ExitStack() as stack:
        if name == "padded":
            stack.enter_context(patch.object(attention_module, "_variable_length", _padded))
        elif name == "each":
            stack.enter_context(patch.object(attention_module, "_variable_length", _each))
            stack.enter_context(sdpa_kernel(list(ATTENTION_KERNELS.values()), set_priority=True))
        elif name != "default":
            stack.enter_context(sdpa_kernel(ATTENTION_KERNELS[name]))
        yield


def _padded(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    return attention_module._grouped(q, k, v, plan.groups(q.device))


def _each(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    segments = zip(q.split(plan.q_lengths), k.split(plan.k_lengths), v.split(plan.k_lengths), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in parts))[0].transpose(0, 1) for parts in segments]
    )


@dataclass(frozen=True)
class Bench:
    """Measures settings on a device."""

    device: torch.device
    dtype: torch.dtype
    repeats: int = 5
    compiler: str = "inductor"
    """Backend of `torch.compile`"""
    offload_min_bytes: int = 2**20
    """Smaller activations stay on the device"""
    patience_s: float = 20.0
    """Longest that a step is repeated for"""
    trace_folder: Path | None = None
    """Where traces of steps with offloading go"""

    def row(self, case: Case, config: DiTConfig, settings: Settings) -> dict[str, Any]:
        """Build, warm up, measure. What does not fit the device's memory, or does not run on it, is told in `error`."""
        told: dict[str, Any] = {"label": settings.label, "settings": asdict(settings), "error": None}
        try:
            # torch's cache of compiled code does not tell kernels of attention apart, and would hand out those of another row.
            with torch._functorch.config.patch(enable_autograd_cache=False), attention_by(settings.attention):
                told |= self._measured(case, replace(config, windowed=settings.windowed), settings)
        except torch.OutOfMemoryError:
            told["error"] = "out of memory"
        except Exception as error:  # one row must not cost the others
            told["error"] = one_line(error)
        self._clean_up()
        return told

    def _measured(self, case: Case, config: DiTConfig, settings: Settings) -> dict[str, Any]:
        torch.manual_seed(0)
        dit = new_model(config, self.device, self.dtype)
        offload = self._apply(dit, config, settings)
        batch = Batch(case, config, self.device, self.dtype, settings.packed)
        if settings.attention == "padded":
            for (*_, layout), _ in batch.parts:
                for kind in {config.attention_kind(i) for i in range(config.blocks)}:
                    layout.plan(kind).groups(self.device)  # made before a compiled block asks for them

        def forget() -> None:
            dit.zero_grad(set_to_none=True)

        def step() -> None:
            for arguments, target in batch.parts:
                F.mse_loss(dit(*arguments).patches.float(), target).backward()

        graphs_before = counters["stats"]["unique_graphs"]
        warm_up_s, calls = self._warm_up(step, forget, settings.compile)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        moved_before = offload.moved_bytes if offload else 0
        times = patient_seconds(step, self.device, self.repeats, self.patience_s, forget)
        told: dict[str, Any] = {
            "step_ms": 1e3 * statistics.median(times),
            "steps_ms": [1e3 * t for t in times],
            "first_step_s": warm_up_s,
            "peak_memory_gib": torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None,
            "attention_calls": calls,
        }
        if settings.compile:
            told["graphs"] = counters["stats"]["unique_graphs"] - graphs_before
        if offload:
            told["offloaded_gib"] = (offload.moved_bytes - moved_before) / len(times) / 2**30
            if self.trace_folder is not None:
                told |= self._traced(case, settings, step, forget)
        return told

    def _apply(self, dit: WaverDiT, config: DiTConfig, settings: Settings) -> Offload | None:
        """Recomputation, then offloading, then compilation of every block, as training does."""
        offload = Offload(self.device, self.offload_min_bytes) if settings.offload else None
        kept = kept_ops(self.device, self.dtype, config.head_dim)
        for block in (*dit.dual_blocks, *dit.single_blocks):
            checkpoint_block(block, settings.checkpointing, kept)
            if offload is not None:
                offload.wrap(block)
            if settings.compile:
                compile_block(block, backend=self.compiler)
        return offload

    def _warm_up(self, step: Callable[[], None], forget: Callable[[], None], compiled: bool) -> tuple[float, dict[str, int]]:
        """Seconds of the first step, and what the second one ran of attention: a block that computes it twice is seen here."""
        started = time.perf_counter()
        step()
        self._wait()
        first_s = time.perf_counter() - started
        forget()
        return first_s, self._attention_calls(step, compiled)

    def _attention_calls(self, step: Callable[[], None], compiled: bool) -> dict[str, int]:
        """Run a step; how often it ran each kernel of attention (on a CPU each operation)."""
        if self.device.type == "cpu" and not compiled:
            # A profiler would count results that checkpointing kept as if they were computed again.
            with _Counter() as counter:
                step()
            return dict(counter.calls)
        with profile(activities=[ProfilerActivity.CUDA if self.device.type == "cuda" else ProfilerActivity.CPU]) as watched:
            step()
            self._wait()
        names = (event.name() for event in watched.profiler.kineto_results.events())  # `key_averages` takes seconds
        return dict(Counter(name[:80] for name in names if _ATTENTION.search(name)))

    def _traced(self, case: Case, settings: Settings, step: Callable[[], None], forget: Callable[[], None]) -> dict[str, Any]:
        """One more step under the profiler; its trace as a file, and how far copies hide behind computation."""
        assert self.trace_folder is not None
        self.trace_folder.mkdir(parents=True, exist_ok=True)
        path = self.trace_folder / f"{case.name}_{settings.checkpointing}_offload.json.gz"
        on_gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        forget()
        with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as watched:
            step()
            self._wait()
        watched.export_chrome_trace(str(path))
        found = overlap(read_trace(path))
        return {"trace": path.name, "overlap": {**found._asdict(), "hidden_share": found.hidden_share}}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _clean_up(self) -> None:
        torch.compiler.reset()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


class _Counter(TorchDispatchMode):
    """Counts operations of attention that are really computed: the modes of checkpointing lie within it and pass those on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if _ATTENTION.search(func.__name__):
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))
