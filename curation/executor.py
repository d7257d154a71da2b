"""Ray Data under the passes: units of work as blocks of plain columns, a pool of actors per pass, summaries back.

The only module of the plane that imports Ray; `curation.serial` does the same in one process.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
from fsspec.core import url_to_fs

from curation.serial import Factory, Row, Worker, added_up
from waver_core.checkpoints import Checkpoint
from waver_core.config import Llm, Pass
from waver_core.errors import BackendUnavailable, RunFailed, UserError
from waver_core.ray_environment import init_options, prepare_private_cluster, user_error_in
from waver_core.storage import is_local, local_path

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


class _AskingActor(_Actor):
    """The same before a language model, which would choke on a row that is no question: errors go their own way."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(self._worker(batch.to_pylist()))


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (as `ray job submit` sets it), or start a local one."""
    prepare_private_cluster()
    import ray

    if not ray.is_initialized():
        ray.init(**init_options())


class OnRay:
    """Every unit of work a block of a Ray Dataset, every pass a pool of actors."""

    def run(
        self, factory: Callable[..., Worker], args: tuple[Any, ...], units: Sequence[pa.Table], resources: Pass
    ) -> Iterator[Row]:
        """See `curation.serial.Executor`. Raises `RunFailed` when workers cannot run."""
        if not units:
            return
        dataset = _blocks(units).map_batches(
            _Actor, fn_constructor_args=(factory, args), **_pool(resources, len(units)), batch_size=None, batch_format="pyarrow"
        )
        yield from _rows(dataset)

    def require(self, model: Llm) -> None:
        """See `curation.serial.Executor`."""
        if importlib.util.find_spec("vllm") is None:
            what = f"funnel.passes.*.llm ({model.model})"
            raise BackendUnavailable(f"{what} needs vLLM and GPUs on the machines of the cluster: pip install -e '.[vllm]'")
        Checkpoint(model.model).locate()  # vLLM would fetch what it lacks in the middle of a run

    def converse(
        self, asker: Factory, answerer: Factory, args: tuple[Any, ...], units: Sequence[pa.Table], resources: Pass
    ) -> Iterator[Row]:
        """See `curation.serial.Executor`. Frames travel as JPEG inside the questions and no further than the model."""
        if not units:
            return
        assert resources.llm is not None
        dataset = _blocks(units)
        pool = _pool(resources, len(units), eager=False)
        questions = dataset.map_batches(
            _AskingActor, fn_constructor_args=(asker, args), **pool, batch_format="pyarrow", batch_size=None
        )
        answered = language_model(resources.llm)(questions)
        # Reading answers is next to no work: a share of a core, or the two pools would wait for each other on a small machine.
        results = answered.map_batches(
            _Actor, fn_constructor_args=(answerer, args), num_cpus=0.1, concurrency=1, batch_format="pyarrow", batch_size=None
        )
        yield from _rows(results)

    def count(self, uris: Sequence[str], keys: Sequence[str], memberships: dict[str, str]) -> pa.Table:
        """See `curation.serial.Executor`: every block is added up where it lies, then Ray Data groups what is left."""
        connect()
        import ray.data
        from ray.data.aggregate import Sum

        columns = list(dict.fromkeys([*keys, *memberships.values()]))
        paths = [local_path(u) if is_local(u) else u for u in uris]
        dataset = ray.data.read_parquet(paths, filesystem=_filesystem(uris[0])).select_columns(columns)
        added = [Sum(name, alias_name=name) for name in ("rows", *memberships)]
        counted = (
            dataset.map_batches(added_up, fn_args=(list(keys), memberships), batch_format="pyarrow", batch_size=None)
            .groupby(list(keys), num_partitions=max(1, min(len(uris), 200)))
            .aggregate(*added)
        )
        tables = [ray.get(r) for r in counted.to_arrow_refs()]
        return pa.concat_tables([t for t in tables if t.num_rows]).select([*keys, "rows", *memberships])


def language_model(settings: Llm) -> Callable[[Any], Any]:
    """Dataset of questions -> the same with `generated_text`, by vLLM under `ray.data.llm`.

    A question that the model could not answer comes back with
    `__inference_error__` and costs no other.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=str(Checkpoint(settings.model).locate()),
        engine_kwargs=settings.engine,
        concurrency=settings.replicas,
        batch_size=settings.batch_size,
        accelerator_type=settings.accelerator,
        prepare_multimodal_stage={"enabled": True},
        should_continue_on_error=True,
    )
    return build_processor(config, preprocess=question, postprocess=answer)


def question(row: Row) -> Row:
    """What vLLM is given: the messages, greedy decoding, and the schema that the answer must keep to."""
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": row["max_tokens"]}
    schema = json.loads(row["schema"])
    if schema is not None:
        sampling["structured_outputs"] = {"json": schema}
    return {"messages": json.loads(row["messages"]), "sampling_params": sampling}


def answer(row: Row) -> Row:
    """What goes on to the `Answerer`: all but the question itself."""
    return {name: row[name] for name in ("clip_id", "bytes", "answers", "context", "generated_text")}


def _blocks(units: Sequence[pa.Table]) -> Any:
    connect()
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # `curation.progress` counts sources, not blocks
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data.from_arrow(list(units))


def _pool(resources: Pass, n_units: int, eager: bool = True) -> dict[str, Any]:
    """Arguments of `map_batches` for a pool of actors; an eager one takes all cores at once, for nothing else wants them."""
    import ray

    cores = ray.cluster_resources().get("CPU", 1.0)
    most = max(1, min(resources.max_actors, n_units))
    gpus = ray.cluster_resources().get("GPU", 0.0)
    for wanted, there, what in ((resources.cpus, cores, "CPU"), (resources.gpus, gpus, "GPU")):
        if wanted > there:
            fix = f"lower funnel.passes.*.{what.lower()}s"
            raise UserError(f"a worker wants {wanted:g} {what}s but the cluster has {there:g}: {fix}")
    start = min(most, max(resources.min_actors, int(cores // resources.cpus)))
    options: dict[str, Any] = {"num_cpus": resources.cpus}
    if resources.gpus:
        share = resources.gpus
        # Not as `num_gpus`: Ray Data then wants a batch size, and a unit of work is a block, however many rows it has.
        options["ray_remote_args_fn"] = lambda: {"num_gpus": share}
    if resources.gpus or not eager:
        start = min(most, resources.min_actors)
    if resources.memory_gb:
        options["memory"] = int(resources.memory_gb * 2**30)
    return {**options, "compute": ray.data.ActorPoolStrategy(min_size=start, max_size=most)}


def _rows(dataset: Any) -> Iterator[Row]:
    import ray

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


def _filesystem(uri: str) -> Any:
    """The Arrow filesystem of a URL, by way of fsspec; None for local paths, which Arrow knows."""
    if is_local(uri):
        return None
    return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(url_to_fs(uri)[0]))
