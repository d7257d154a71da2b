"""What serving costs: time by stage, what Ray Serve, the job store and HTTP add to the bare cascade, videos a minute, and whether
clips that come out of the endpoint still show what was asked for.

    python benchmarks/serving.py --base RUN/t2v_192p_12fps/export --refiner RUN/refine_1080p/export
    python benchmarks/serving.py --base ... --parts overhead --n 3

The real server (`serving/run.py`) runs beside this process, which has the same cascade without Ray (`serving.local`). A request
is made by both in turn, so that whatever else the machine does falls on both; the files must be the same to the byte.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # as replicas have it (`waver_core.ray_environment`); numpy reads it when it is imported
    os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import asyncio
import hashlib
import statistics
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from benchmarks import common, serving_quality
from benchmarks.serving_process import ServerProcess
from serving.arguments import Arguments, settings_of
from serving.cascade import BaseWork, RefineWork, Wish, generate
from serving.generate_request import GenerateRequest
from serving.local import LocalStages
from serving.plan import facts, plan
from serving.rewriting import Rewritten
from serving.settings import Deployment, Settings
from serving.streaming import Done, Step

app = common.new_app()
STAGES = ("rewrite", "encode", "base", "upscale", "refine", "decode")
PROMPT = "red disc moving left"
REQUESTS: dict[str, dict[str, Any]] = {
    "default": {},
    "longest": {"seconds": 10},
    "100 steps": {"steps": 100},
    "longest, 100 steps": {"seconds": 10, "steps": 100},
}
PARTS = ("overhead", "throughput", "adherence")
AIM = 0.03
"""Most that serving may add to the cascade's time."""


class Direct(NamedTuple):
    """One request to the cascade in this process."""

    data: bytes
    total_s: float
    cpu_s: float
    stage_seconds: Mapping[str, float]


class Local(LocalStages):
    """The cascade in this process, each stage with the threads that its deployment has."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._parts = settings.deployments
        self._known = facts(settings)
        self._settings = settings

    def make(self, asked: Mapping[str, Any]) -> Direct:
        """A request as HTTP takes it, without any of HTTP: from the checked request to the file."""
        request = GenerateRequest.model_validate(asked)
        assert request.seed is not None
        cpu_s, started = time.process_time(), time.perf_counter()
        wish = Wish(request.prompt, plan(request, self._known, self._settings, request.seed), request.rewrite)
        result = asyncio.run(generate(wish, self, _Nobody()))
        total_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
        return Direct(result.data, total_s, cpu_s, result.stage_seconds)

    def base(self, work: BaseWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        """See `Stages`."""
        _set_threads(self._parts.base)
        return super().base(work)

    def refine(self, work: RefineWork) -> AsyncGenerator[Step | Done[np.ndarray], None]:
        """See `Stages`."""
        _set_threads(self._parts.refiner)
        return super().refine(work)


def _set_threads(options: Deployment) -> None:
    torch.set_num_threads(options.threads or max(1, int(options.cpus)))


class _Nobody:
    """An observer who is told and does nothing."""

    async def step(self, stage: str, done: int, steps: int) -> None:
        """See `Observer`."""

    async def rewritten(self, prompt: Rewritten) -> None:
        """See `Observer`."""

    async def preview(self, data: bytes) -> None:
        """See `Observer`."""


class Served(NamedTuple):
    """One request to the server, taken apart: the parts add up to `total_s`."""

    data: bytes
    total_s: float
    cpu_s: float
    """Of all the server's processes"""
    parts_s: dict[str, float]
    stage_seconds: dict[str, float]


def served(server: ServerProcess, asked: Mapping[str, Any]) -> Served:
    """Post with `wait`, and look where the time went; the server's clock is this machine's."""
    cpu_s, sent, started = server.cpu_s(), time.time(), time.perf_counter()
    data, job_id = server.generate(**asked)
    total_s, cpu_s = time.perf_counter() - started, server.cpu_s() - cpu_s
    job = server.job(job_id)
    stages = job["stage_seconds"]
    parts = {
        "until the job is stored": job["created_at"] - sent,
        "until it is claimed": job["started_at"] - job["created_at"],
        "between the stages": job["finished_at"] - job["started_at"] - sum(stages.values()),
        "until the file is here": sent + total_s - job["finished_at"],
    }
    return Served(data, total_s, cpu_s, parts, stages)


def measure_overhead(server: ServerProcess, local: Local, requests: Mapping[str, Mapping[str, Any]], n: int) -> dict[str, Any]:
    """Each request `n` times by both, in turn (and each first in turn), after one of each that does not count."""
    figures = {}
    for name, request in requests.items():
        asked = {"prompt": PROMPT, "seed": 7, **request}
        direct: list[Direct] = []
        remote: list[Served] = []
        for number in range(n + 1):
            for way in (0, 1) if number % 2 else (1, 0):
                if way:
                    remote.append(served(server, asked))
                else:
                    direct.append(local.make(asked))
        files = {hashlib.sha256(data).hexdigest() for data in [*(d.data for d in direct), *(r.data for r in remote)]}
        if len(files) > 1:
            raise SystemExit(f"{name}: {len(files)} different files of one request; serving must not change a byte")
        figures[name] = _compared(direct[1:], remote[1:], asked)
    return figures


def _compared(direct: list[Direct], remote: list[Served], asked: Mapping[str, Any]) -> dict[str, Any]:
    median = statistics.median
    pairs = list(zip(direct, remote, strict=True))
    own = {stage: median(run.stage_seconds.get(stage, 0.0) for run in direct) for stage in STAGES}
    theirs = {stage: median(run.stage_seconds.get(stage, 0.0) for run in remote) for stage in STAGES}
    parts = {part: median(s.parts_s[part] for s in remote) for part in remote[0].parts_s}
    parts |= {f"in {stage}": theirs[stage] - own[stage] for stage in STAGES}
    extra_s = median(s.total_s - d.total_s for d, s in pairs)
    http = "until the job is stored", "until the file is here"
    return {
        "asked": dict(asked),
        "runs": len(pairs),
        "bytes": len(remote[0].data),
        "same_bytes": True,
        "direct_s": median(d.total_s for d in direct),
        "served_s": median(s.total_s for s in remote),
        "ratio": median(s.total_s / d.total_s for d, s in pairs),
        "job_only_ratio": median((s.total_s - sum(s.parts_s[h] for h in http)) / d.total_s for d, s in pairs),
        "overhead_s": extra_s,
        "within_aim_from_s": extra_s / AIM,
        "direct_cpu_s": statistics.fmean(d.cpu_s for d in direct),
        "served_cpu_s": statistics.fmean(s.cpu_s for s in remote),  # counted in ticks of 10 ms, hence no median
        "direct_stage_s": own,
        "served_stage_s": theirs,
        "overhead_parts_s": parts,
    }


def print_overhead(figures: Mapping[str, Any]) -> None:
    """Three tables: the whole, by stage, and where the difference goes."""
    columns = (
        "request",
        "direct s",
        "served s",
        "overhead",
        "job alone",
        "ms",
        f"{AIM:.0%} from s",
        "direct cpu s",
        "served cpu s",
    )
    rows = [
        (name, f["direct_s"], f["served_s"], f"{f['ratio'] - 1:+.1%}", f"{f['job_only_ratio'] - 1:+.1%}", 1e3 * f["overhead_s"])
        + (f["within_aim_from_s"], f["direct_cpu_s"], f["served_cpu_s"])
        for name, f in figures.items()
    ]
    common.print_table("Served over HTTP against the cascade called directly; medians, the same bytes", columns, rows)
    stages = [
        (n, way, *(1e3 * f[f"{way}_stage_s"][s] for s in STAGES)) for n, f in figures.items() for way in ("direct", "served")
    ]
    common.print_table("Milliseconds by stage", ("request", "way", *STAGES), stages, left=(0, 1))
    names = list(next(iter(figures.values()))["overhead_parts_s"])
    lost = [(part, *(1e3 * f["overhead_parts_s"][part] for f in figures.values())) for part in names]
    common.print_table("Where the overhead goes, ms", ("part", *figures), lost)


def measure_idle(server: ServerProcess, seconds: float) -> float:
    """Cores that the server keeps busy with nothing to do."""
    time.sleep(1.0)
    before, started = server.cpu_s(), time.perf_counter()
    time.sleep(seconds)
    return (server.cpu_s() - before) / (time.perf_counter() - started)


def measure_throughput(server: ServerProcess, clients: list[int], videos: int) -> dict[str, dict[str, float]]:
    """Videos a minute of so many clients, each of which waits for its file before it asks anew."""
    figures = {}
    for count in clients:
        each = -(-videos // count)

        def client(number: int, each: int = each) -> list[float]:
            times = []
            for k in range(each):
                started = time.perf_counter()
                server.generate(prompt=PROMPT, seed=1000 * number + k)
                times.append(time.perf_counter() - started)
            return times

        started = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            waits = [wait for times in pool.map(client, range(count)) for wait in times]
        wall_s = time.perf_counter() - started
        figures[str(count)] = {
            "videos": len(waits),
            "videos_per_minute": 60 * len(waits) / wall_s,
            "wait_median_s": statistics.median(waits),
            "wait_longest_s": max(waits),
        }
    return figures


@app.command()
def main(
    base: Annotated[str, typer.Option(help="Export of the base model.")],
    refiner: Annotated[str | None, typer.Option(help="Export of the refiner; the base model alone without it.")] = None,
    parts: Annotated[str, typer.Option(help="What to measure, of " + ", ".join(PARTS) + ".")] = ",".join(PARTS),
    requests: Annotated[str, typer.Option(help="Requests of the overhead, separated by semicolons.")] = ";".join(REQUESTS),
    n: Annotated[int, typer.Option(min=1, help="Runs of each request on each side.")] = 9,
    clients: Annotated[str, typer.Option(help="Numbers of clients at once.")] = "1,2,4",
    videos: Annotated[int, typer.Option(min=1, help="Videos for each number of clients.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each of the 24 prompts.")] = 2,
    stills: Annotated[int, typer.Option(min=1, help="Images, and videos from given first frames.")] = 12,
    profile: Annotated[str, typer.Option(help="Profiles, separated by commas.")] = "embedded,tiny",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Overrides of the configuration.")] = None,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "serving",
    save: common.Save = False,
) -> None:
    """Start the server, measure, stop it."""
    before = common.machine()
    wanted, asked = _words(parts, ",", PARTS, "--parts"), _words(requests, ";", tuple(REQUESTS), "--requests")
    settings = settings_of(Arguments(profile=profile, set=overrides or [], base=base, refiner=refiner))
    names = [word for p in profile.split(",") for word in ("--profile", p)]
    sets = [word for o in overrides or [] for word in ("--set", o)]
    models = [word for flag, path in (("--base", base), ("--refiner", refiner)) if path for word in (flag, os.path.abspath(path))]
    known = facts(settings)
    figures: dict[str, Any] = {"base": known.base, "refiner": known.refiner}
    local = Local(settings)
    with ExitStack() as stack:
        alone = {}
        if "overhead" in wanted:
            for label in asked:  # before there is a server, whose processes are never quite idle
                times = [local.make({"prompt": PROMPT, "seed": 7, **REQUESTS[label]}).total_s for _ in range(n + 1)]
                alone[label] = statistics.median(times[1:])
        server = stack.enter_context(ServerProcess([*names, *models, *sets]))
        figures["ready_s"] = server.ready_s
        if "overhead" in wanted:
            figures["idle_cores"] = measure_idle(server, 5.0)
            figures["overhead"] = measure_overhead(server, local, {label: REQUESTS[label] for label in asked}, n)
            for label, seconds in alone.items():
                figures["overhead"][label]["direct_without_server_s"] = seconds
            print_overhead(figures["overhead"])
            rest = ", ".join(f"{label} {s:.3g} s" for label, s in alone.items())
            common.console().print(f"Ready after {server.ready_s:.1f} s; idle, it keeps {figures['idle_cores']:.2f} cores busy.")
            common.console().print(f"Direct calls before there was a server: {rest}.")
        if "throughput" in wanted:
            found = figures["throughput"] = measure_throughput(server, [int(c) for c in clients.split(",")], videos)
            columns = ("clients", "videos", "videos a minute", "median wait s", "longest s")
            common.print_table("Throughput of default requests", columns, [(c, *f.values()) for c, f in found.items()])
        if "adherence" in wanted:
            figures["adherence"] = serving_quality.measure(server, settings, known, rounds, stills)
    common.finish(name, figures, save, before)


def _words(given: str, separator: str, known: tuple[str, ...], option: str) -> list[str]:
    words = [w.strip() for w in given.split(separator) if w.strip()]
    if not words or set(words) - set(known):
        raise typer.BadParameter(f"{option} takes some of: {f'{separator} '.join(known)}")
    return words


if __name__ == "__main__":
    app()
