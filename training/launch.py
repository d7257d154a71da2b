"""A stage through Ray Train: workers, their process group, restarts, and the driver's progress bar.

What a worker does is `training.loop.train`; Ray is only here and in `training.ray_cluster`. A worker that dies takes its group
with it; Ray Train starts the group again, and the loop goes on from its last checkpoint. An error that a person must mend is told
once and not tried again.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.group import Worker
from training.job import Job
from training.loop import train
from training.ray_cluster import connect
from waver_core.errors import RunFailed, UserError

_ROOT = str(Path(__file__).resolve().parent.parent)
_POLL_S = 0.5


class Board:
    """Where workers write what the driver shows. An actor, so that it outlives a worker's death."""

    def __init__(self) -> None:
        self._news: list[dict[str, Any]] = []
        self._stop: tuple[str, int] | None = None

    def put(self, news: dict[str, Any]) -> None:
        """Add one report."""
        self._news.append(news)

    def stop(self, message: str, exit_code: int) -> None:
        """Tell why no worker shall try again; the first reason counts."""
        self._stop = self._stop or (message, exit_code)

    def stopped(self) -> tuple[str, int] | None:
        """The reason, if there is one."""
        return self._stop

    def take(self) -> list[dict[str, Any]]:
        """Reports since the last call."""
        news, self._news = self._news, []
        return news


def train_on_ray(job: Job, console: Console) -> dict[str, Any]:
    """Train a stage on the workers that its recipe asks for; returns the loop's summary.

    Raises what the loop raises, and `RunFailed` when workers died more often than `workers.max_failures` allows.
    """
    connect()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = job.recipe.workers
    _check_room(ray.cluster_resources(), job)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    board = ray.remote(num_cpus=0)(Board).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(job.folder.resolve()),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
    outcome: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            outcome.append(error)

    summary: dict[str, Any] = {}
    with shown_progress(job, console) as show:
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        while True:
            running = thread.is_alive()
            for news in ray.get(board.take.remote()):
                summary = news["summary"] if "summary" in news else (show(news) or summary)
            if not running:
                break
            thread.join(_POLL_S)
    stopped = ray.get(board.stopped.remote())
    if stopped is not None:
        raise (RunFailed if stopped[1] == RunFailed.exit_code else UserError)(stopped[0])
    if outcome or not summary:
        told = str(outcome[0]).strip().splitlines()[-1] if outcome else "no worker reported its end"
        mend = "run the same command to go on from the last checkpoint"
        raise RunFailed(f"the workers failed more than {workers.max_failures} times: {told}; {mend}")
    return summary


def _check_room(resources: dict[str, float], job: Job) -> None:
    """Ray waits for ever for what a cluster does not have: say so instead."""
    workers = job.recipe.workers
    for name, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        have = resources.get(name, 0.0)
        if each * workers.count > have:
            raise UserError(
                f"{workers.count} workers want {each * workers.count:g} {name}s but the cluster has {have:g}: "
                f"lower training.workers.count or training.workers.{name.lower()}s"
            )


def _worker(config: dict[str, Any]) -> None:
    """In every worker process, by Ray Train."""
    if _ROOT not in sys.path:
        sys.path.insert(0, _ROOT)
    import ray
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    job, board = config["job"], config["board"]
    if ray.get(board.stopped.remote()) is not None:
        return
    context = get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), str(get_device()))
    torch.set_num_threads(job.recipe.workers.threads or max(1, int(job.recipe.workers.cpus)))
    try:
        summary = train(job, worker, lambda news: board.put.remote(news) if worker.leads else None)
    except UserError as error:
        ray.get(board.stop.remote(str(error), error.exit_code))
        raise
    if worker.leads:
        ray.get(board.put.remote({"summary": summary}))


@contextmanager
def shown_progress(job: Job, console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar on a terminal, a line every ten seconds in a log; yields what takes the loop's reports."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(job.recipe.stage, total=1.0, told="")
        last_line = 0.0

        def show(news: dict[str, Any]) -> None:
            nonlocal last_line
            told = _told(news)
            if "fraction" in news:
                bar.update(task, completed=news["fraction"], told=told)
            now = time.monotonic()
            if not console.is_terminal and (now - last_line > 10 or "held_out/loss" in news or news.get("fraction") == 1.0):
                last_line = now
                console.print(f"{job.recipe.stage} {told}")
            elif console.is_terminal and "held_out/loss" in news:
                bar.console.print(f"{job.recipe.stage} {told}")

        yield show


def _told(news: dict[str, Any]) -> str:
    if "held_out/loss" in news:
        return f"step {news['step']:,}: held-out loss {news['held_out/loss']:.4f}"
    speed = f", {news['seconds'] / news['step']:.2f} s a step" if news.get("seconds") and news["step"] else ""
    return f"step {news['step']:,} of {news['total']:,}: loss {news['loss']:.4f}, gradient norm {news['grad_norm']:.2f}{speed}"
