"""Checkpoints of a running stage: sharded, written in the background, exact on resume, and readable at any number of workers.

`<folder>/step-00001000/` holds the shards of `torch.distributed.checkpoint` (weights, average and optimiser, each worker
writing its own part), `recipe.yaml` (what they belong to) and, written last, `complete.json` with the position in the data. A
folder without `complete.json` does not count: a run that is killed in mid-write goes on from the checkpoint before.

Training waits only while the state is copied to host memory (16 bytes a parameter over all workers with AdamW and an average:
about 200 GB for the report's 12B, kept for the next time). Errors of the background write are raised at the next save.

The folder lies on anything that fsspec opens and that all workers see: a local or mounted file system, s3:// and gs:// with
their extras. Object stores get no fsync and no rename: there the last small object, `complete.json`, is what publishes the rest.
Shards hold pickles, so a step folder is for the run that made it; `training.export` writes what may be handed around.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from training.ema import Ema
from waver_core.errors import RunFailed, UserError
from waver_core.storage import exists, filesystem, is_local, join, local_path, read_bytes, remove, write_atomic
from waver_core.weights import reshard

COMPLETE = "complete.json"
RECORD = "recipe.yaml"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Where a stage stands after `step` steps: with it, the weights and the optimiser a run goes on as if never interrupted.

    There is no state of random generators: noise, timesteps and conditions follow from (seed, epoch, sample). `scalars` and
    `spike_guard` hold what JSON can (tuples come back as lists); floats come back bit for bit.
    """

    step: int
    epoch: int = 0
    step_in_epoch: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    scalars: dict[str, Any] = field(default_factory=dict)
    spike_guard: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run below `folder`: one each `every` steps, the `keep` newest.

    `record` is written beside each (see `training.export.record_of`). Works with one process without torch.distributed; where
    that is initialised, every worker builds the object and calls its methods, in the same order. Building it removes folders
    that an earlier run left incomplete, so build it in training only; `latest` and `completed` look without touching.
    """

    def __init__(self, folder: str, *, keep: int, every: int, record: Mapping[str, Any] | None = None) -> None:
        if keep < 1 or every < 1:
            raise ValueError(f"keep and every are at least 1, not {keep} and {every}")
        self.folder, self.keep, self.every, self.record = str(folder), keep, every, record
        self._alone = not (dist.is_available() and dist.is_initialized())
        # A group of its own: the background thread's messages must not mix with those of the training step.
        self._group = None if self._alone else dist.new_group(backend="gloo")
        self._leads = self._alone or dist.get_rank() == 0
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(use_pinned_memory=cuda, use_non_blocking_copy=cuda, use_shared_memory=False, use_async_staging=False)
        )
        self._pending: Any = None
        self._writing = ""
        self._step: int | None = None
        if self._alone:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._agree(lambda: _remove_incomplete(self.folder))

    def due(self, step: int) -> bool:
        """True after the steps at which a checkpoint is written."""
        return step % self.every == 0

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        ema: Ema | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Copy the state and write it in the background; returns once training may go on.

        Waits for the write before it, and raises `RunFailed` where that one failed. A step that this object has saved or
        restored is not written again. Raises `UserError` where another run's complete checkpoint of that step is there.
        """
        self._wait()
        if progress.step == self._step:
            return
        folder = join(self.folder, f"step-{progress.step:08d}")
        self._agree(lambda: _claim(folder))
        ready = optimizer is not None and bool(optimizer.state)  # empty where no step was taken yet
        complete = {"version": 1, "torch": str(torch.__version__), "optimizer": ready, "progress": asdict(progress)}
        texts = {COMPLETE: json.dumps(complete, indent=1)}
        if self.record is not None:
            texts = {RECORD: yaml.safe_dump({**self.record, "step": progress.step}, sort_keys=False), **texts}
        self._pending = dcp.async_save(
            _state(model, ema, optimizer if ready else None),
            storage_writer=_writer(folder, lambda shards: self._finish(folder, shards, texts)),
            async_stager=self._stager,
            process_group=self._group,
            no_dist=self._alone,
        )
        self._writing, self._step = folder, progress.step

    def finish(self) -> None:
        """Wait for the last write. Raises `RunFailed` where it failed. Call it before the process ends."""
        self._wait()

    def restore(
        self, model: nn.Module, ema: Ema | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> Progress | None:
        """Load the newest complete checkpoint, bit for bit, at whatever number of workers; None where there is none.

        What is not asked for is not read. Raises `UserError` where the checkpoint holds other parameters, or shapes, or is
        damaged.
        """
        self._wait()
        found = self._agree(lambda: _newest(self.folder))
        if found is None:
            return None
        folder, complete = found
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)  # with gradients or older state there, its slots would not be made
            optimizer.state.clear()
        wanted = optimizer if complete["optimizer"] else None
        state = _state(model, ema, wanted)
        try:
            reader = reader_of(folder)
            _fit(folder, state, reader.read_metadata().state_dict_metadata)
            dcp.load(state, storage_reader=reader, process_group=self._group, no_dist=self._alone)
        except UserError:
            raise
        except (Exception, CheckpointException) as error:
            mend = "delete that folder to go on from the checkpoint before it"
            raise UserError(f"{folder} cannot be read: {_cause(error)}; {mend}") from error
        set_model_state_dict(model, state["model"])
        if wanted is not None:
            set_optimizer_state_dict(model, wanted, state["optimizer"], options=StateDictOptions(strict=False))
        reshard(model)
        progress = Progress(**complete["progress"])
        self._step = progress.step
        return progress

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (Exception, CheckpointException) as error:
            raise RunFailed(f"checkpoint {self._writing} was not written: {_cause(error)}") from error

    def _finish(self, folder: str, shards: set[str], texts: dict[str, str]) -> None:
        """On the first worker, in the background, once every worker has written: publish, then drop the oldest."""
        fs, path = filesystem(folder)
        fs.invalidate_cache()
        missing = shards - {str(name).rsplit("/", 1)[-1] for name in fs.find(path)}
        if missing:
            raise UserError(f"{min(missing)} of another worker is not there: checkpoints need a folder that all workers share")
        for name, text in texts.items():
            write_atomic(join(folder, name), text)
        for old in completed(self.folder)[: -self.keep]:
            remove(join(old, COMPLETE))  # first, so that a half-deleted one does not count
            remove(old, recursive=True)

    def _agree(self, decide: Callable[[], T]) -> T:
        """What the first worker finds, or the error that it meets, for all: views of a file system may differ."""
        answer: list[Any] = [None, None]
        if self._leads:
            try:
                answer[0] = decide()
            except Exception as error:
                answer[1] = error
        if self._group is not None:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise answer[1]
        found: T = answer[0]
        return found


def completed(folder: str) -> list[str]:
    """Step folders that are complete, oldest first."""
    return [path for path in _step_folders(folder) if exists(join(path, COMPLETE))]


def latest(folder: str) -> str | None:
    """The newest complete step folder below `folder`, if there is one."""
    return next(iter(completed(folder)[::-1]), None)


def read_complete(folder: str) -> dict[str, Any]:
    """`complete.json` of a step folder. Raises `UserError` where the folder is incomplete or the file no such thing."""
    path = join(folder, COMPLETE)
    if not exists(path):
        raise UserError(f"{folder} is no complete checkpoint: {COMPLETE} is missing")
    try:
        complete: dict[str, Any] = json.loads(read_bytes(path))
        Progress(**complete["progress"])
        return {"optimizer": True, **complete}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {_cause(error)}; delete {folder} to go on from the one before it") from error


def reader_of(folder: str) -> FileSystemReader:
    """What reads the shards of a step folder, wherever it lies."""
    return FileSystemReader(Path(local_path(folder))) if is_local(folder) else FsspecReader(folder)


def _step_folders(folder: str) -> list[str]:
    fs, path = filesystem(folder)
    fs.invalidate_cache()
    if not fs.exists(path):
        return []
    names = {str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)}
    return [join(folder, n) for n in sorted(names, key=lambda n: (len(n), n)) if _STEP_FOLDER.fullmatch(n)]


def _newest(folder: str) -> tuple[str, dict[str, Any]] | None:
    path = latest(folder)
    return (path, read_complete(path)) if path else None


def _remove_incomplete(folder: str) -> None:
    whole = set(completed(folder))
    for path in _step_folders(folder):
        if path not in whole:
            remove(path, recursive=True)


def _claim(folder: str) -> None:
    if exists(join(folder, COMPLETE)):
        raise UserError(f"{folder} is there already, from another run: restore it first, or choose another output folder")
    remove(folder, recursive=True)


def _state(model: nn.Module, ema: Ema | None, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What is written, as tensors that share memory with their owners."""
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if ema is not None:
        state["ema"] = ema.state_dict()
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def _fit(folder: str, state: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise `UserError` where names or shapes of the checkpoint are not those of the model."""
    for part in ("model", "ema"):
        if part not in state:
            continue
        prefix = f"{part}."
        sizes: dict[str, Any] = {
            n.removeprefix(prefix): getattr(v, "size", None) for n, v in stored.items() if n.startswith(prefix)
        }
        if not sizes and state[part]:
            raise UserError(f"{folder} holds no averaged weights (ema): it was written without them")
        for name, tensor in state[part].items():
            if name not in sizes:
                raise UserError(f"{folder} has no parameter {name}: it was written by another model; resume with its recipe")
            if sizes[name] is not None and tuple(sizes[name]) != tuple(tensor.shape):
                shapes = f"{list(sizes[name])} in {folder} and {list(tensor.shape)} in the model"
                raise UserError(f"parameter {name} is {shapes}; resume with the recipe that wrote it")
        if unknown := sorted(set(sizes) - set(state[part])):
            raise UserError(
                f"{folder} holds parameter {unknown[0]}, which the model has not; resume with the recipe that wrote it"
            )
    if "optimizer" in state:  # parameters that never had a gradient have no state, here as there
        kept = state["optimizer"]["state"]
        for name in [n for n in kept if not all(f"optimizer.state.{n}.{slot}" in stored for slot in kept[n])]:
            del kept[name]
        slots = sum(len(of_one) for of_one in kept.values())
        if slots != sum(name.startswith("optimizer.state.") for name in stored):
            raise UserError(f"{folder} was written with another optimiser or other trained parameters; resume with its recipe")


def _cause(error: BaseException) -> str:
    """The first reason behind an error, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (first, _) = min(error.failures.items())
        return f"{_cause(first)} (worker {rank})"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _Publishing:
    """A writer that calls `then` on the first worker with the names of all shards, after every worker has written."""

    then: Callable[[set[str]], None]

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)  # type: ignore[misc]
        self.then({info.relative_path for info in metadata.storage_data.values()})


class _FileWriter(_Publishing, FileSystemWriter):
    pass


class _ObjectWriter(_Publishing, FsspecWriter):
    pass


def _writer(folder: str, then: Callable[[set[str]], None]) -> Any:
    # No copying ahead: the state is in host memory already, and a stream of a thread would wake the first GPU in every worker.
    if is_local(folder):
        writer: Any = _FileWriter(Path(local_path(folder)), per_thread_copy_ahead=0)
    else:
        writer = _ObjectWriter(folder, sync_files=False, per_thread_copy_ahead=0)
    writer.then = then
    return writer
