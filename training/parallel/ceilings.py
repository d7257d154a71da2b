"""What the device can do at best, measured: a large matrix product, the bare attention kernel, copies.

A step is no faster than its matrix products and its attention at these rates, so its time is told as a share of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Kernels of `scaled_dot_product_attention` that can be asked for by name; a CPU has `flash` only."""

BACKWARD_OVER_FORWARD = 2
"""Operations of attention's backward over its forward's, as MFU counts them; kernels, which compute the scores anew, do 2.5."""


class Kernel(NamedTuple):
    """A way to compute attention, timed. Rates count the model's operations; None where it does not run here, with the reason."""

    name: str
    forward_tflops: float | None
    backward_tflops: float | None
    error: str | None = None


def seconds(run: Callable[[], Any], device: torch.device, repeats: int, prepare: Callable[[], Any] | None = None) -> list[float]:
    """Time of each of `repeats` runs; by events of the device where it is a GPU. `prepare` comes before each and is not timed."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            if prepare is not None:
                prepare()
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return times
    marks = []
    for _ in range(repeats):
        if prepare is not None:
            prepare()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        marks.append((before, after))
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in marks]


PATIENCE_S = 3.0
"""Longest that one figure is repeated for; what takes longer is run twice, and the second time counts."""


def best_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The shortest of at most `repeats` runs, after one that does not count: the ceiling, not the mean."""
    run()
    return min(patient_seconds(run, device, repeats, PATIENCE_S))


def patient_seconds(
    run: Callable[[], Any], device: torch.device, repeats: int, patience_s: float, prepare: Callable[[], Any] | None = None
) -> list[float]:
    """`seconds` of at most `repeats` runs that take `patience_s` together, at least one."""
    times = seconds(run, device, 1, prepare)
    more = min(repeats, int(patience_s / max(times[0], 1e-9))) - 1
    return [*times, *seconds(run, device, more, prepare)]


def matmul_tflops(m: int, k: int, n: int, device: torch.device, dtype: torch.dtype, repeats: int = 20) -> float:
    """Rate of [m, k] @ [k, n] of random numbers (zeros would run faster), in 10^12 operations a second."""
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / best_seconds(lambda: torch.mm(a, b, out=out), device, repeats) / 1e12


def copy_gb_s(nbytes: int, device: torch.device, repeats: int = 20) -> float:
    """Bandwidth of the device's own memory in 10^9 bytes a second: a copy, bytes read and written both counted."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / best_seconds(lambda: target.copy_(source), device, repeats) / 1e9


def host_gb_s(nbytes: int, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Bandwidth to pinned host memory and back, each alone, in 10^9 bytes a second; empty on a CPU, which has no such way."""
    if device.type != "cuda":
        return {}
    there = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return {
        "to_host": nbytes / best_seconds(lambda: here.copy_(there, non_blocking=True), device, repeats) / 1e9,
        "to_device": nbytes / best_seconds(lambda: there.copy_(here, non_blocking=True), device, repeats) / 1e9,
    }


def attention_kernels(
    lengths: Sequence[int], heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, repeats: int = 5
) -> list[Kernel]:
    """Every way to compute full attention within samples of these lengths, forward and backward, fastest first.

    Samples of one length go to each kernel together, others one after another; kernels for variable lengths take them all at
    once where the device has such.
    """
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    ways: dict[str, Callable[[], Tensor]] = {
        name: _by_sdpa(q, k, v, lengths, backend)
        for name, backend in ATTENTION_KERNELS.items()
        if device.type == "cuda" or name == "flash"
    }
    if device.type == "cuda" and len(set(lengths)) > 1:
        ways |= _by_variable_length(q, k, v, lengths)
    operations = 4 * heads * head_dim * sum(n * n for n in lengths)
    kernels = [_timed(name, run, (q, k, v), operations, device, repeats) for name, run in ways.items()]
    return sorted(kernels, key=_whole_time)


def _whole_time(kernel: Kernel) -> float:
    if kernel.forward_tflops is None or kernel.backward_tflops is None:
        return float("inf")
    return 1 / kernel.forward_tflops + BACKWARD_OVER_FORWARD / kernel.backward_tflops


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], backend: SDPBackend) -> Callable[[], Tensor]:
    if len(set(lengths)) == 1:
        groups = [tuple(x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))]
    else:
        groups = [
            tuple(p[None].transpose(1, 2) for p in parts)
            for parts in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
        ]

    def run() -> Tensor:
        with sdpa_kernel(backend):
            parts = [F.scaled_dot_product_attention(*g).transpose(1, 2).flatten(0, 1) for g in groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return run


def _by_variable_length(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> dict[str, Callable[[], Tensor]]:
    bounds = torch.tensor([0, *lengths], device=q.device).cumsum(0).to(torch.int32)
    longest = max(lengths)
    ways: dict[str, Callable[[], Tensor]] = {}
    try:
        from torch.nn.attention.varlen import varlen_attn

        ways["variable length (torch)"] = lambda: varlen_attn(q, k, v, bounds, bounds, longest, longest)
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

        ways["variable length (flash-attn)"] = lambda: flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest)
    except ImportError:
        pass
    return ways


def _timed(
    name: str, run: Callable[[], Tensor], inputs: tuple[Tensor, ...], operations: int, device: torch.device, repeats: int
) -> Kernel:
    try:
        with torch.no_grad():
            forward_s = best_seconds(run, device, repeats)
        out = run()
        gradient = torch.randn_like(out)
        backward_s = best_seconds(lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True), device, repeats)
    except (RuntimeError, ValueError) as error:  # this kernel is not for this device, type or length; the others may be
        return Kernel(name, None, None, one_line(error))
    return Kernel(name, operations / forward_s / 1e12, BACKWARD_OVER_FORWARD * operations / backward_s / 1e12)


def one_line(error: BaseException, most: int = 200) -> str:
    """An exception's type and the start of what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:most]
