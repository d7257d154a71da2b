"""What watches a worker that trains: a limit on silence, and who is slower than the others. No Ray in here.

In the loop:

    with Watchdog(recipe.workers.hang_after_s, tell, worker=worker, folder=job.folder / "hangs") as watchdog:
        stragglers = Stragglers(worker, tell)
        for ...:                                          # a step
            drawn, batches = next(...)                    # seconds that it waited for them:
            stragglers.add("data", waited_s)
            watchdog.beat(f"step {step}: examples")
            ...                                           # after every micro-batch, reduction, update, validation, checkpoint:
            watchdog.beat(f"step {step}: micro-batch {number}")
            if logged:                                    # at the same steps on all workers
                numbers |= stragglers.report()
        with watchdog.paused("export"):                   # long, and nothing to beat in between
            ...

`tell` takes one line for the person who watches the run, from any worker; with `report` of the loop that is
`lambda text: report({"warning": text})`.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist

from training.group import Worker

HUNG = 75
"""Exit status of a worker that its watchdog ends: sysexits' "try again"."""

Tell = Callable[[str], None]
_TICK_S = 5.0
_FAREWELL_S = 10.0
_STDERR = 2


class Watchdog:
    """Ends the process when nothing has been heard for too long.

    A worker that waits in a collective for one that is stuck cannot be raised out of it, so the process ends at once, without
    unwinding; whoever started it takes it for dead and starts the group again. Before, the stacks of all threads go to stderr and
    to a file of `folder`, and one line to `tell`: which worker, what it had done last, and how long ago. Of a stuck group the
    worker whose last deed differs is the one to look at.
    """

    def __init__(
        self,
        limit_s: float | None,
        tell: Tell,
        *,
        worker: Worker | None = None,
        folder: Path | None = None,
        end: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """limit_s: seconds of silence allowed, counted from now on; None watches nothing. end: takes the exit status."""
        self._tell, self._end, self._clock = tell, end, clock
        self._worker, self._folder = worker or Worker(), folder
        self._last = ("its start",)
        self._pauses = 0
        self._closed = threading.Event()
        if limit_s is not None:
            threading.Thread(target=self._watch, args=(limit_s,), name="watchdog", daemon=True).start()

    def beat(self, what: str) -> None:
        """`what` was done just now. Cheap enough for every micro-batch; any thread may call it."""
        self._last = (what,)

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """No limit inside, for work that is long by nature and has nothing in between to beat at. A hang in it goes unseen."""
        self._pauses += 1
        try:
            yield
        finally:
            self.beat(what)
            self._pauses -= 1

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watch(self, limit_s: float) -> None:
        """Look now and then. Time in which this thread did not run either (the process was stopped) is no silence."""
        tick_s = min(limit_s / 10, _TICK_S)
        seen, silent_s, before = self._last, 0.0, self._clock()
        while not self._closed.wait(tick_s):
            now = self._clock()
            elapsed_s, before = now - before, now
            if self._last is not seen or self._pauses:  # every beat makes a tuple of its own
                seen, silent_s = self._last, 0.0
                continue
            silent_s += min(elapsed_s, 2 * tick_s)
            if silent_s >= limit_s:
                self._farewell(seen[0], silent_s)
                self._end(HUNG)
                return

    def _farewell(self, what: str, silent_s: float) -> None:
        """Stacks and the line. What is reported may hang on the same file system or network: it gets some seconds, no more."""
        rank, world = self._worker.rank, self._worker.world
        line = (
            f"worker {rank} of {world} on {socket.gethostname()} (process {os.getpid()}) was silent for {silent_s:,.1f} s after "
            f"{what}; it ends, so that the workers start again from the last checkpoint (training.workers.hang_after_s)"
        )
        with suppress(OSError):
            os.write(_STDERR, f"{line}\n".encode())
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        for last_deed in (lambda: self._tell(line), lambda: self._write_stacks(line)):
            thread = threading.Thread(target=_quietly, args=(last_deed,), name="watchdog's farewell", daemon=True)
            thread.start()
            thread.join(_FAREWELL_S)

    def _write_stacks(self, line: str) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-worker-{self._worker.rank}.txt"
        with (self._folder / name).open("w") as file:
            file.write(f"{line}\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)


def _quietly(deed: Callable[[], None]) -> None:
    """A farewell that fails must not hide that the worker hung, and there is nobody left to raise it to."""
    with suppress(Exception):
        deed()


class Stragglers:
    """Which worker is slower than the others, and in what.

    Sharded weights tie workers together: inside forward and backward all wait for the slowest, so all take equally long there and
    only what a worker does by itself can be compared: its wait for data (`add`), and a fixed piece of work that `report` times on
    its device. Waits for data are compared from `floor_s` a step on: a tenth of nothing is no news.
    """

    def __init__(
        self,
        worker: Worker,
        tell: Tell,
        *,
        ratio: float = 1.5,
        patience: int = 3,
        floor_s: float = 0.1,
        probe: Callable[[str], float] | None = None,
        gather: Callable[[list[float], Worker], list[list[float]]] | None = None,
    ) -> None:
        """ratio: of a worker's mean to the median of all; patience: reports in succession before the slow one speaks up."""
        self._worker, self._tell = worker, tell
        self._ratio, self._patience, self._floor_s = ratio, patience, floor_s
        self._probe, self._gather = probe or probe_device, gather or gathered
        self._seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self._slow: dict[tuple[int, str], int] = {}

    def add(self, part: str, seconds: float) -> None:
        """Seconds of one step that this worker spent on `part` (of `PARTS`) without waiting for another one."""
        self._seconds[part].append(seconds)

    def report(self) -> dict[str, float]:
        """Compare what was added since the last report: the slowest worker, and its time over the median of all.

        All workers call it, at the same steps: one gather of a few numbers. Nothing for one worker alone. The slow worker itself
        tells, once for each time that it falls behind.
        """
        if self._worker.world == 1:
            return {}
        self.add("device", self._probe(self._worker.device))
        own = [fmean(self._seconds[part] or [0.0]) for part in PARTS]
        for seconds in self._seconds.values():
            seconds.clear()
        ratios = {
            (rank, part): mean / max(median(of_all), self._floor_s if part == "data" else 0.0)
            for part, of_all in zip(PARTS, zip(*self._gather(own, self._worker), strict=True), strict=True)
            for rank, mean in enumerate(of_all)
        }
        slowest = max(ratios, key=lambda key: ratios[key])
        self._slow = {key: self._slow.get(key, 0) + 1 for key, ratio in ratios.items() if ratio > self._ratio}
        for (rank, part), times in self._slow.items():
            if rank == self._worker.rank and times == self._patience:
                self._tell(
                    f"worker {rank} of {self._worker.world} on {socket.gethostname()} holds up the others: {_NAMES[part]} takes "
                    f"{ratios[rank, part]:.1f} times the median of all workers, {times} reports in succession"
                )
        return {"slowest_worker": slowest[0], "slowest_ratio": ratios[slowest]}


PARTS = ("data", "device")
"""What is compared: the wait for the next examples; the fixed piece of work."""
_NAMES = {"data": "its wait for data", "device": "a fixed piece of work on its device"}


def probe_device(device: str) -> float:
    """Seconds for a fixed piece of work, some tens of milliseconds: large products in bf16 on a GPU, small ones on a CPU."""
    gpu = device.startswith("cuda")
    size, times = (4096, 64) if gpu else (256, 16)
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    if gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        torch.mm(a, a, out=out)
    if gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def gathered(values: list[float], worker: Worker) -> list[list[float]]:
    """Every worker's values, by rank: one all-gather."""
    own = torch.tensor(values, dtype=torch.float64, device=worker.device)
    of_all = [torch.empty_like(own) for _ in range(worker.world)]
    dist.all_gather(of_all, own)
    return [one.tolist() for one in of_all]
