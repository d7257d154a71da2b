"""A stage through Ray Train: workers, their process group, restarts, and the driver's progress bar.

What a worker does is `training.loop.train`; Ray is only here and in `training.ray_cluster`. A worker that dies takes its group
with it; Ray Train starts the group again, with as many workers as before or, where `workers.min_count` allows it, as there
are; the loop goes on from its last checkpoint. A worker that hangs ends itself (`training.watch`), so it dies, too. What a person
must mend is told once and not tried again.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.group import Worker
from training.job import Job, text_dims
from training.loop import train
from training.parallel.mesh import plan_mesh
from training.ray_cluster import connect
from training.recipe import Recipe
from training.trainee import model_config
from waver_core.errors import RunFailed, UserError

_ROOT = str(Path(__file__).resolve().parent.parent)
_POLL_S = 0.5
_TELL_S = 5.0
_RESIZE_S = 600.0
"""How often a shrunken stage looks for room to grow again: that is a restart, which costs the steps since the last checkpoint."""
_MARGIN_S = 60
"""By which a collective's limit is longer than the watchdog's: the watchdog ends a hang first, for it tells where it is."""
_NO_LIMIT_S = 7 * 86_400
_HEALTH_S = (30.0, 600.0)
"""Limits of what Ray allows a worker's process to leave a question unanswered; 600 s is Ray's own."""


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

    Raises what the loop raises, `RunFailed` when workers died more often than `workers.max_failures` allows, and `UserError`
    where the mesh does not fit the workers or the cluster has no room for them.
    """
    check_mesh(job.recipe)
    connect()
    import ray
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig

    workers = job.recipe.workers
    check_room(ray.cluster_resources(), job.recipe)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    if workers.hang_after_s is not None:  # a stopped process has no watchdog: Ray gives it up when it does not answer
        least_s, most_s = _HEALTH_S
        answer_s = min(max(workers.hang_after_s, least_s), most_s)
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(answer_s))
    board = ray.remote(num_cpus=0)(Board).remote()
    scaling = scaling_config(job.recipe)
    trainer = _trainer_class(job.recipe)(
        _worker,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo", timeout_s=_collective_timeout_s(job.recipe)),
        scaling_config=scaling,
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
                if "summary" in news:
                    summary = news["summary"]
                else:
                    show(news)
            stopped = ray.get(board.stopped.remote())
            if stopped is not None or not running:
                break
            thread.join(_POLL_S)
    if stopped is not None:  # Ray would start the workers again first, to be told the same
        raise (RunFailed if stopped[1] == RunFailed.exit_code else UserError)(stopped[0])
    if outcome or not summary:
        told = str(outcome[0]).strip().splitlines()[-1] if outcome else "no worker reported its end"
        mend = "run the same command to go on from the last checkpoint"
        raise RunFailed(f"the workers failed more than {workers.max_failures} times: {told}; {mend}")
    return summary


def check_mesh(recipe: Recipe) -> None:
    """Raise `UserError` where `workers.count` or `workers.min_count` cannot be laid out as `parallel` says."""
    workers, heads = recipe.workers, model_config(recipe, text_dims(recipe)).heads
    if workers.min_count is not None and workers.min_count > workers.count:
        raise UserError(
            f"training.workers.min_count {workers.min_count} is more than training.workers.count {workers.count}: lower it"
        )
    for name, number in (("count", workers.count), ("min_count", workers.min_count)):
        if number is not None:
            try:
                plan_mesh(number, heads, recipe.parallel.shard, recipe.parallel.sequence)
            except UserError as error:
                raise UserError(f"training.workers.{name} is {number}: {error}") from None


def scaling_config(recipe: Recipe) -> Any:
    """Ray's `ScalingConfig` of a recipe: a number of workers, or from `min_count` to `count` of them."""
    from ray.train import ScalingConfig

    workers = recipe.workers
    return ScalingConfig(
        num_workers=(workers.min_count, workers.count) if _elastic(recipe) else workers.count,
        elastic_resize_monitor_interval_s=_RESIZE_S,
        use_gpu=workers.gpus > 0,
        resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
    )


def _elastic(recipe: Recipe) -> bool:
    return recipe.workers.min_count is not None and recipe.workers.min_count < recipe.workers.count


def _trainer_class(recipe: Recipe) -> Any:
    """Ray's trainer; where a mesh wants multiples of workers, one that never starts another number.

    Ray Train takes any number from `min_count` on and has no setting for multiples, so its policy is given a step.
    """
    from ray.train.torch import TorchTrainer

    multiple = recipe.parallel.sequence * (recipe.parallel.shard or 1)
    if multiple == 1 or not _elastic(recipe):
        return TorchTrainer

    class InMultiples(TorchTrainer):
        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            policy = policy_in_multiples(self.scaling_config, multiple)
            return super()._initialize_and_run_controller(**{**arguments, "scaling_policy": policy})

    return InMultiples


def policy_in_multiples(scaling: Any, multiple: int) -> Any:
    """Ray's elastic scaling policy, rounded down to a multiple of workers."""
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

    class Policy(ElasticScalingPolicy):
        def _count_possible_workers(self, reserved_resources: Any) -> int:
            possible: int = super()._count_possible_workers(reserved_resources)
            return possible - possible % multiple

    return Policy(scaling)


def _collective_timeout_s(recipe: Recipe) -> int:
    """How long torch.distributed waits for the others. One that died is noticed by Ray within seconds, whatever this says."""
    limit_s = recipe.workers.hang_after_s
    return _NO_LIMIT_S if limit_s is None else int(limit_s) + _MARGIN_S


def check_room(resources: Mapping[str, float], recipe: Recipe) -> None:
    """Raise `UserError` where a cluster has not what the fewest workers want: Ray would wait for it for ever."""
    workers = recipe.workers
    least, setting = (workers.min_count, "min_count") if workers.min_count else (workers.count, "count")
    for name, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        have = resources.get(name, 0.0)
        if each * least > have:
            raise UserError(
                f"{least} workers want {each * least:g} {name}s but the cluster has {have:g}: "
                f"lower training.workers.{setting} or training.workers.{name.lower()}s"
            )


def _worker(config: dict[str, Any]) -> None:
    """In every worker process, by Ray Train."""
    if _ROOT not in sys.path:
        sys.path.insert(0, _ROOT)
    # Packs have another shape every time: without it the allocator's pieces fit ever less. Read when CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
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

    def report(news: dict[str, Any]) -> None:
        if "warning" in news:  # of any worker, and perhaps its last words: wait until they are there
            ray.wait([board.put.remote(news)], timeout=_TELL_S)
        elif worker.leads:
            board.put.remote(news)

    report({"workers": worker.world})
    try:
        summary = train(job, worker, report)
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
        last_line, starts = 0.0, 0

        def show(news: dict[str, Any]) -> None:
            nonlocal last_line, starts
            if "warning" in news:
                bar.console.print(f"{job.recipe.stage}: {news['warning']}", soft_wrap=True)
                return
            if "workers" in news:
                wanted, starts = job.recipe.workers.count, starts + 1
                if starts > 1 or news["workers"] < wanted:
                    again = " again," if starts > 1 else ""
                    bar.console.print(f"{job.recipe.stage}: started{again} with {news['workers']} of {wanted} workers")
                return
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
