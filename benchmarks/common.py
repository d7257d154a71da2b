"""What all benchmarks share: the machine they ran on, rendered inputs kept between runs, tables, and result files.

Inputs and caches lie in `out/bench`, which git ignores; results in `benchmarks/results`, which it does not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import cv2
import psutil  # type: ignore[import-untyped]
import typer
import yaml
from rich.console import Console
from rich.table import Table

from waver_core import synthetic
from waver_core.config import DEFAULT_PATH
from waver_core.synthetic import Video, write_video

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("av", "lemminflect", "numpy", "onnxruntime", "opencv-python-headless", "pyarrow", "rapidocr", "ray"),
    *("scenedetect-headless", "torch", "transformers"),
)

Work = Annotated[Path, typer.Option("--work", help="Folder for rendered inputs and caches.")]
Save = Annotated[bool, typer.Option("--save", help="Write the figures to benchmarks/results/.")]
Jobs = Annotated[int, typer.Option("--jobs", help="Processes that render and decode.", min=1)]
WORK_DEFAULT = ROOT / "out" / "bench"
JOBS_DEFAULT = os.cpu_count() or 1

OPEN_TIERS: dict[str, Any] = {"all": {"any": {"column": "duration_s", "min": 0}}}
"""A tier that keeps everything, so that every stage scores every clip."""

A = TypeVar("A")
B = TypeVar("B")


def new_app() -> typer.Typer:
    """A command line with plain errors and no shell completion, as the entry scripts have it."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def console() -> Console:
    """Wide enough for the tables when the output is a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 150)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[int] = (0,)) -> None:
    """Columns to the right, those numbered in `left` to the left; floats at three significant digits, None as a dash."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, operating system, Python."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found.group(1) if found else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that the figures depend on, and the commit of this checkout."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    shown = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {**found, "openwaver": shown.stdout.strip() or "unknown"}


def finish(name: str, figures: dict[str, Any], save: bool, before: dict[str, Any]) -> None:
    """Write `benchmarks/results/<name>.json` if asked to: figures, command, date, versions and hardware."""
    if not save:
        return
    # Where files lie on this machine is nobody else's business: paths outside the tree are kept by name alone.
    words = [a.removeprefix(f"{ROOT}/") for a in sys.argv]
    command = shlex.join(["python", *(Path(w).name if w.startswith("/") else w for w in words)])
    head = {"benchmark": name, "command": command, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**head, "machine": before, "versions": versions(), "figures": rounded(figures)}, indent=2) + "\n")
    console().print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def rounded(value: Any) -> Any:
    """Floats at four significant digits, so that a result file can be read and compared."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def scores(true: int, hit: int, false: int) -> dict[str, float | None]:
    """Counts of what is there, of it found, and wrongly reported, with precision, recall and F1 (None where undefined)."""
    precision = hit / (hit + false) if hit + false else None
    recall = hit / true if true else None
    f1 = 2 * hit / (2 * hit + false + true - hit) if true + false else None
    return {"true": true, "found": hit, "false": false, "precision": precision, "recall": recall, "f1": f1}


def digest(*parts: Any) -> str:
    """Twelve hex digits of anything with a faithful `repr`."""
    return hashlib.blake2b("\n".join(map(repr, parts)).encode(), digest_size=6).hexdigest()


@cache
def source_digest(*modules: Any) -> str:
    """Digest of the source files of modules (of all files, for a package): what caches made by them depend on."""
    paths: list[Path] = []
    for module in modules:
        path = Path(module.__file__)
        paths += sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    return digest(*(path.read_bytes() for path in paths))


def in_parallel(work: Callable[[A], B], items: Sequence[A], jobs: int) -> list[B]:
    """Map over fresh processes (fork and OpenCV's threads do not mix), or right here for one job."""
    if jobs == 1 or len(items) < 2:
        return [work(item) for item in items]
    with ProcessPoolExecutor(min(jobs, len(items)), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(work, items))


def rendered(videos: Sequence[Video], work: Path, jobs: int = 1) -> list[Path]:
    """Files of the described videos below `work/rendered`, made where they are missing."""
    generator = source_digest(synthetic)
    folder = work / "rendered"
    paths = [folder / f"{video.name}-{digest(video, generator)}{video.file.suffix}" for video in videos]
    todo = [(video, path) for video, path in zip(videos, paths, strict=True) if not path.exists()]
    if todo:
        console().print(f"rendering {len(todo)} of {len(videos)} videos into {folder}")
        in_parallel(_render, todo, jobs)
    return paths


def _render(item: tuple[Video, Path]) -> None:
    video, path = item
    cv2.setNumThreads(1)
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    write_video(video, part)
    part.replace(path)


class Usage:
    """Wall and processor seconds, and with `memory` the memory, of the processes started while a block runs, and theirs.

    Processor seconds of a process that nobody waits for (Ray's are such) come from samples and lack its last half second.
    Memory that processes share (Ray's object store, libraries) counts once in `peak_pss_mb`, which divides a shared page
    by the number of its users; `peak_uss_mb` is the sum of what each has to itself; `peak_rss_mb` counts shared pages for
    each process anew. `series` holds (seconds, MB of the largest process's own memory) per sample.
    """

    def __init__(self, memory: bool = False, interval_s: float = 0.5) -> None:
        self._memory, self._interval_s = memory, interval_s
        self.wall_s = self.cpu_s = 0.0
        self.peaks = dict.fromkeys(("peak_pss_mb", "peak_uss_mb", "peak_rss_mb", "peak_process_uss_mb"), 0.0)
        self.series: list[tuple[float, float]] = []
        self._cpu: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Usage:
        self._me = psutil.Process()
        self._reaped_before_s = _reaped_s()
        self._others = {p.pid for p in self._me.children(recursive=True)}
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        self.cpu_s = max(_reaped_s() - self._reaped_before_s, sum(self._cpu.values()))

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(self._interval_s)

    def _sample(self) -> None:
        now = dict.fromkeys(self.peaks, 0.0)
        for process in self._me.children(recursive=True):
            if process.pid in self._others:
                continue
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    self._cpu[process.pid, process.create_time()] = times.user + times.system
                    if not self._memory:
                        continue
                    memory = process.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            own_mb = memory.uss / 2**20
            now["peak_pss_mb"] += getattr(memory, "pss", memory.uss) / 2**20
            now["peak_uss_mb"] += own_mb
            now["peak_rss_mb"] += memory.rss / 2**20
            now["peak_process_uss_mb"] = max(now["peak_process_uss_mb"], own_mb)
        self.series.append((time.perf_counter() - self._started, now["peak_process_uss_mb"]))
        self.peaks = {name: max(peak, now[name]) for name, peak in self.peaks.items()}

    def figures(self) -> dict[str, float]:
        """The totals, for a result file."""
        return {"wall_s": self.wall_s, "cpu_s": self.cpu_s, **(self.peaks if self._memory else {})}


def _reaped_s() -> float:
    """Processor seconds of all ended children of this process."""
    spent = os.times()
    return spent.children_user + spent.children_system


def config_file(path: Path, *, tiers: dict[str, Any] | None = None) -> Path:
    """pipelines.yaml with other tiers (all of them replaced, which --set cannot do), written to `path`."""
    raw = yaml.safe_load(DEFAULT_PATH.read_text())
    if tiers is not None:
        raw |= {"tiers": tiers, "profiles": {}}
        raw["funnel"]["stages"]["balance"]["tiers"] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def input_list(path: Path, files: Sequence[Path]) -> Path:
    """A list of sources as the funnel's --input takes it."""
    path.write_text("uri\n" + "".join(f"{file}\n" for file in files))
    return path


def run_measured(command: Sequence[str]) -> dict[str, Any]:
    """Run a command at the root to its end: {wall_s, cpu_s, peak_rss_mb, output}, as the kernel counts them for this child.

    Raises SystemExit with what the command printed when it fails.
    """
    with tempfile.TemporaryFile("w+") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)
        _, status, spent = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        output = printed.read()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{output[-3000:]}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {"wall_s": wall_s, "cpu_s": spent.ru_utime + spent.ru_stime, "peak_rss_mb": spent.ru_maxrss / unit, "output": output}
