"""Ray under training: the cluster, and units of work on a pool of Ray Data actors. `training.encode` alone runs units here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from waver_core.errors import RunFailed, UserError
from waver_core.ray_environment import init_options, prepare_private_cluster, user_error_in

Row = dict[str, Any]
Worker = Callable[[list[Row]], list[Row]]

_ROOT = str(Path(__file__).resolve().parent.parent)
_STOP = "stop"
"""Column of a result that ends the run: the text of a worker's `UserError`."""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (as `ray job submit` sets it), or start a local one."""
    prepare_private_cluster()
    import ray

    if not ray.is_initialized():
        ray.init(**init_options())


class _Actor:
    """What Ray Data builds in every worker process: called with the rows of one unit."""

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


def run_units(
    factory: Callable[..., Worker],
    args: tuple[Any, ...],
    units: Sequence[pa.Table],
    *,
    actors: int | None = None,
    gpus: float = 0.0,
) -> Iterator[Row]:
    """Build workers from a factory, one to an actor, and call them with the rows of a unit each; yields what they return.

    actors: how many; None takes as many as the cluster has CPUs, or GPUs for `gpus` each. A worker that dies is replaced and its
    unit given to another. Raises `UserError` where the cluster has too few GPUs, and `RunFailed` when workers cannot run.
    """
    if not units:
        return
    connect()
    import ray.data

    cores, devices = (float(ray.cluster_resources().get(name, 0.0)) for name in ("CPU", "GPU"))
    if gpus > devices:
        raise UserError(f"an actor wants {gpus:g} GPUs but the cluster has {devices:g}: lower --gpus-per-actor")
    most = max(1, min(len(units), actors or int(devices / gpus if gpus else cores)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the driver counts samples, not blocks
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    options: dict[str, Any] = {"num_cpus": min(1.0, cores / most)}
    if gpus:  # not as `num_gpus`: Ray Data then wants a batch size, and a unit of work is a block, however many rows it has
        options["ray_remote_args_fn"] = lambda: {"num_gpus": gpus}
    dataset = ray.data.from_arrow(list(units)).map_batches(
        _Actor,
        fn_constructor_args=(factory, args),
        compute=ray.data.ActorPoolStrategy(size=most),
        batch_size=None,
        batch_format="pyarrow",
        **options,
    )
    try:
        for row in dataset.iter_rows():
            if row.get(_STOP):
                raise UserError(row[_STOP])
            yield row
    except ray.exceptions.RayError as error:
        told = user_error_in(str(error))
        if told:  # what a worker could not hand over as a row
            raise UserError(told) from error
        first = str(error).strip().splitlines()[-1]
        raise RunFailed(f"the workers failed: {first} (details in the logs of Ray's session)") from error
