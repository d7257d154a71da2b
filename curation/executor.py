"""Ray Data under the passes: units of work as blocks of plain columns, a pool of actors per pass, summaries back.

The only module of the plane that imports Ray; `curation.serial` does the same in one process.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from waver_core.config import Pass
from waver_core.errors import RunFailed, UserError

Row = dict[str, Any]
Worker = Callable[[list[Row]], list[Row]]
_ROOT = str(Path(__file__).resolve().parent.parent)


_STOP = "stop"
"""Column of a result that ends the run: the text of a worker's `UserError`."""


class _Actor:
    """What Ray Data builds in every worker process: a pass, called with the rows of one unit."""

    def __init__(self, factory: Callable[..., Worker], args: tuple[Any, ...]) -> None:
        if _ROOT not in sys.path:
            sys.path.insert(0, _ROOT)
        self._worker = factory(*args)

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            rows = self._worker(batch.to_pylist())
        except UserError as error:  # Ray would wrap it until nobody knows it: hand it over as a row
            return pa.table({_STOP: [str(error)]})
        return pa.Table.from_pylist(rows)


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (as `ray job submit` sets it), or start a local one."""
    if not os.environ.get("RAY_ADDRESS") and "ray" not in sys.modules:
        _prepare_private_cluster()
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    environment = {"OMP_NUM_THREADS": "1"}  # parallelism comes from many workers
    if not os.environ.get("RAY_ADDRESS"):
        options["include_dashboard"] = False
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")]))
    ray.init(**options, runtime_env={"env_vars": environment})


def _prepare_private_cluster() -> None:
    """Settings that Ray reads when it is imported, and never again."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else every actor pool prints a warning meant for Ray's authors
    # Ray listens on more than loopback: guard the cluster by a token of its own, and leave no token file in the home.
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def run_on_ray(factory: Callable[..., Worker], args: tuple[Any, ...], items: list[Row], resources: Pass) -> Iterator[Row]:
    """Run a pass over items; yields summaries as units finish, in any order. Raises `RunFailed` when workers cannot run."""
    if not items:
        return
    connect()
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # `curation.progress` counts sources, not blocks
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    size = resources.sources_per_task
    blocks = [pa.Table.from_pylist(items[i : i + size]) for i in range(0, len(items), size)]
    cores = ray.cluster_resources().get("CPU", 1.0)
    most = max(1, min(resources.max_actors, len(blocks)))
    if resources.gpus == 0 and resources.cpus > cores:
        raise UserError(f"a worker wants {resources.cpus:g} CPUs but the cluster has {cores:g}: lower funnel.passes.*.cpus")
    start = min(most, max(resources.min_actors, int(cores // resources.cpus)))
    options: dict[str, Any] = {"num_cpus": resources.cpus}
    if resources.gpus:
        options["num_gpus"] = resources.gpus
    if resources.memory_gb:
        options["memory"] = int(resources.memory_gb * 2**30)
    dataset = ray.data.from_arrow(blocks).map_batches(
        _Actor,
        fn_constructor_args=(factory, args),
        batch_size=size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=start, max_size=most),
        **options,
    )
    try:
        for row in dataset.iter_rows():
            if row.get(_STOP):
                raise UserError(row[_STOP])
            yield row
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[-1]
        raise RunFailed(f"the workers failed: {first} (details in the logs of Ray's session)") from error
