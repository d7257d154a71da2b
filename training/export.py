"""Weights to hand around: safetensors with `recipe.yaml` beside them, and what a stage starts from (a warm start).

```
<folder>/model-00001-of-00010.safetensors ...   about 5 GB each, fp32 or bf16
         model.safetensors.index.json           name -> file, as Hugging Face has it
         recipe.yaml                            model, encoders, recipe, lineage, step, weights, digest
```
`recipe.yaml`: `model` are the fields of `DiTConfig`, `recipe` the resolved recipe of the stage, `lineage` one entry a stage from
the first to this one, `weights` is ema, raw or average, `digest` changes when any weight does. Tensors are written, read and
gathered from the workers one at a time, so that 12B parameters never lie in memory twice. Folders are on a local or mounted file
system: weights are mapped into memory, which object stores cannot.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from training.ema import plain_name, reshard
from training.recipe import Recipe
from training.tensor_files import TORCH_DTYPES, Digest, Entry, opened, plan_shards, write_shard
from waver_core.config import digest_of
from waver_core.errors import UserError, did_you_mean
from waver_core.storage import is_local, local_path

RECORD = "recipe.yaml"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
ATTENTION_FIELDS = frozenset({"windowed", "full_blocks"})
"""Fields of `DiTConfig` that change how the blocks look at tokens but no parameter: the refiner (§2.2) starts from a base."""


@dataclass(frozen=True)
class Facts:
    """What `recipe.yaml` says beside the recipe."""

    model: Mapping[str, Any]
    """Fields of `DiTConfig` (`to_dict`)."""
    encoders: Mapping[str, Any]
    """Fingerprints: autoencoder, text (a list), features."""
    step: int = 0
    weights: Literal["ema", "raw", "average"] = "raw"
    lineage: tuple[Mapping[str, Any], ...] = ()
    """`Exported.lineage` of what the stage started from."""


@dataclass(frozen=True)
class Exported:
    """An export on disk; tensors are read when asked for."""

    folder: str
    record: Mapping[str, Any]
    """All of `recipe.yaml`."""
    files: Mapping[str, str] = field(repr=False)
    """Name of a tensor -> its file."""

    @property
    def model(self) -> dict[str, Any]:
        """Fields of `DiTConfig`."""
        return dict(self.record["model"])

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe of its stage; `Recipe.model_validate` makes an object of it."""
        return dict(self.record["recipe"])

    @property
    def stage(self) -> str:
        """The training stage that made it."""
        return str(self.recipe["stage"])

    @property
    def lineage(self) -> tuple[Mapping[str, Any], ...]:
        """Stages from the first to this one, with step, kind of weights and digests."""
        return tuple(self.record["lineage"])

    @property
    def digest(self) -> str:
        """Digest of the weights."""
        return str(self.record["digest"])

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Shapes and dtypes from the files' heads. Raises `UserError` where a file is missing or damaged."""
        found: dict[str, Entry] = {}
        for path in dict.fromkeys(self.files.values()):
            with opened(path) as file:
                inside = set(file.keys())
                for name in (n for n, p in self.files.items() if p == path):
                    if name not in inside:
                        raise UserError(f"{path} lacks {name}, which {INDEX} says is there: copy the export again")
                    part = file.get_slice(name)
                    dtype = TORCH_DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise UserError(f"{path}: {name} has dtype {part.get_dtype()}; known are {', '.join(TORCH_DTYPES)}")
                    found[name] = Entry(tuple(part.get_shape()), dtype)
        return {name: found[name] for name in self.files}

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with opened(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def part(self, name: str, target: DTensor) -> Tensor:
        """What this worker holds of a tensor that is sharded like `target`; no more than that is read."""
        shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        with opened(self.files[name]) as file:
            part: Tensor = file.get_slice(name)[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        return part

    def verify(self) -> None:
        """Read everything; raises `UserError` where the weights are not those that were written."""
        digest = Digest()
        for name in self.files:
            digest.add(name, self.tensor(name))
        if digest.value() != self.digest:
            raise UserError(f"the weights in {self.folder} are not those that {RECORD} was written for: copy the export again")


def record_of(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    """What stands in `recipe.yaml`, but for the digest of weights that are not there yet."""
    return {
        "version": 1,
        "step": facts.step,
        "weights": facts.weights,
        "model": dict(facts.model),
        "encoders": dict(facts.encoders),
        "lineage": [dict(entry) for entry in facts.lineage],
        "recipe": recipe.model_dump(mode="json"),
    }


def export(
    folder: str,
    state_dict: Mapping[str, Any],
    recipe: Recipe,
    facts: Facts,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> str:
    """Write weights (`get_model_state_dict`, inside `Ema.swapped` for averaged ones) and return their digest.

    Where torch.distributed is initialised all workers call it: sharded tensors are gathered one by one and the first worker
    writes. `dtype` converts floating-point tensors. The folder appears whole or not at all; raises `UserError` where it is there
    already, unless `replace`.
    """
    together = dist.is_available() and dist.is_initialized()
    tensors = {plain_name(name): value for name, value in state_dict.items() if isinstance(value, Tensor)}
    entries = {n: Entry(tuple(t.shape), dtype if dtype and t.is_floating_point() else t.dtype) for n, t in tensors.items()}
    whole = ((t.full_tensor() if isinstance(t, DTensor) else t).detach() for t in in_order(tensors, entries, max_shard_bytes))
    answer: list[Any] = ["", None]
    if not together or dist.get_rank() == 0:
        try:
            answer[0] = write_export(folder, entries, whole, record_of(recipe, facts), max_shard_bytes, replace=replace)
        except Exception as error:
            answer[1] = error
    for _ in whole:  # gathering takes all workers, also where the first one cannot write
        pass
    if together:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return str(answer[0])


def in_order(tensors: Mapping[str, Any], entries: Mapping[str, Entry], max_bytes: int) -> Iterator[Any]:
    """The values in the order in which `write_export` takes them."""
    return (tensors[name] for shard in plan_shards(entries, max_bytes) for name in shard)


def write_export(
    folder: str,
    entries: Mapping[str, Entry],
    tensors: Iterable[Tensor],
    record: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    replace: bool = False,
) -> str:
    """Write an export from tensors that come one by one in the order of `in_order`; returns the digest of the weights."""
    target = _local_folder(folder)
    if not entries:
        raise UserError(f"there are no weights to write to {target}")
    if target.exists() and not replace:
        raise UserError(f"{target} is there already: choose another folder or delete it")
    shards = plan_shards(entries, max_shard_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        digest, files, source = Digest(), {}, iter(tensors)
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with open(temporary / file, "wb") as handle:
                write_shard(handle, names, entries, source, digest)
                os.fsync(handle.fileno())
            files.update(dict.fromkeys(names, file))
        total = sum(entry.bytes for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: files[name] for name in entries}}
        (temporary / INDEX).write_text(json.dumps(index, indent=1))
        (temporary / RECORD).write_text(yaml.safe_dump(_signed(record, digest.value()), sort_keys=False, allow_unicode=True))
        old = target.with_name(f".{target.name}.old.{uuid.uuid4().hex[:8]}")
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
        return digest.value()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_record(folder: str) -> dict[str, Any]:
    """`recipe.yaml` of an export or a step folder. Raises `UserError` where it is missing or says too little."""
    path = _local_folder(folder) / RECORD
    if not path.is_file():
        raise UserError(f"{folder} is no export: {RECORD} is missing")
    try:
        record = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    parts = {"model": dict, "encoders": dict, "recipe": dict, "lineage": list, "weights": str}
    for key, kind in parts.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise UserError(f"{path} holds no '{key}': it was not written by training, or is cut short")
    if "stage" not in record["recipe"]:
        raise UserError(f"{path} does not say which stage its weights are of (recipe.stage)")
    return dict(record)


def load_export(folder: str) -> Exported:
    """Open an export. Raises `UserError`, one line, where a file is missing, not what it should be, or cut short."""
    path = _local_folder(folder)
    record = read_record(folder)
    if not isinstance(record.get("digest"), str):
        raise UserError(f"{folder} is no export but a checkpoint of a running stage: its weights have no digest yet")
    try:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        files = {str(name): str(path / Path(file).name) for name, file in weight_map.items()}
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no export: {INDEX} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path / INDEX} is damaged ({type(error).__name__}): copy the export again") from error
    exported = Exported(str(folder), record, files)
    if not exported.entries:
        raise UserError(f"{folder} holds no weights")
    return exported


def load_into(
    model: nn.Module,
    folder: str | Exported,
    strict: bool = True,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[list[str], list[str]]:
    """Fill a model with exported weights, one tensor at a time; returns missing and unexpected names (empty when `strict`).

    Values are cast to the model's dtype, or to `dtype`, which the model is converted to first. Weights sharded by `fully_shard`
    take their part of each tensor, without messages. A model built on the meta device gets its weights on `device`, in `dtype`
    or as they were saved. Raises `UserError` before any weight is changed where names or shapes differ.
    """
    exported = folder if isinstance(folder, Exported) else load_export(folder)
    targets = {plain_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    missing = [name for name in targets if name not in exported.entries]
    unexpected = [name for name in exported.entries if name not in targets]
    if strict and missing:
        raise UserError(f"{exported.folder} lacks {missing[0]}{_more(missing)}, which the model needs: it is of another model")
    if strict and unexpected:
        near = did_you_mean(unexpected[0], targets)
        raise UserError(f"{exported.folder} holds {unexpected[0]}{_more(unexpected)}, which the model lacks: {near}")
    shared = [name for name in targets if name in exported.entries]
    for name in shared:
        here, there = tuple(targets[name][1].shape), exported.entries[name].shape
        if here != there:
            raise UserError(f"parameter {name} is {list(there)} in {exported.folder} and {list(here)} in the model")
        if targets[name][1].is_meta and isinstance(targets[name][1], DTensor):
            raise UserError(f"sharded parameter {name} has no memory yet: call model.to_empty(device=...) before loading")
    if dtype is not None and not any(tensor.is_meta for _, tensor in targets.values()):
        model.to(dtype)
        targets = {plain_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name in shared:
            key, target = targets[name]
            if isinstance(target, DTensor):
                target.to_local().copy_(exported.part(name, target))
            else:
                _put(model, key, target, exported.tensor(name), dtype, device)
    reshard(model)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if strict and left:
        raise UserError(f"{left[0]} is on the meta device and not in the export: build the model on a real device")
    return missing, unexpected


def warm_start(
    model: nn.Module,
    folder: str,
    expected_stage: str | None,
    *,
    stage: str = "this stage",
    encoders: Mapping[str, Any] | None = None,
) -> Exported:
    """Start a stage from the export of the one before (Waver Table 2); its `lineage` goes into the `Facts` of this stage.

    Raises `UserError` where the export is of another stage than `expected_stage` (None takes any), of a model with other numbers
    (`model.config.to_dict()`; attention windows may differ, the refiner starts from a base model), or made with `encoders` of
    other fingerprints. An average of checkpoints counts as the stage of its last source.
    """
    exported = check_parent(folder, model.config.to_dict(), expected_stage, stage=stage, encoders=encoders)
    load_into(model, exported)
    return exported


def check_parent(
    folder: str,
    model: Mapping[str, Any],
    expected_stage: str | None,
    *,
    stage: str = "this stage",
    encoders: Mapping[str, Any] | None = None,
) -> Exported:
    """What `warm_start` refuses, without a model: `model` are the fields of the one to be trained."""
    exported = load_export(folder)
    if expected_stage is not None and exported.stage != expected_stage:
        mend = f"give the export of {expected_stage}, or set `after` of the stage to {exported.stage}"
        raise UserError(f"{stage} starts from {expected_stage}, but {folder} holds {exported.stage}: {mend}")
    for name in sorted({*model, *exported.model} - ATTENTION_FIELDS):
        if model.get(name) != exported.model.get(name):
            there = exported.model.get(name)
            raise UserError(f"{folder} is of a model with {name} {there}, {stage} trains one with {model.get(name)}")
    for name, fingerprint in (encoders or {}).items():
        if (other := exported.record["encoders"].get(name, fingerprint)) != fingerprint:
            raise UserError(f"{folder} was trained with {name} {other}, {stage} uses {fingerprint}: encode with the same")
    return exported


def _put(model: nn.Module, key: str, target: Any, value: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Store one tensor in the model."""
    if not target.is_meta:
        target.copy_(value)
        return
    module, leaf = model.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
    value = value.to(device, dtype if dtype and value.is_floating_point() else value.dtype, copy=True)
    if leaf in module._parameters:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=module._parameters[leaf].requires_grad))
    else:
        module.register_buffer(leaf, value)


def _signed(record: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """The record with the digest of its weights, and the stage itself at the end of the lineage."""
    own = {
        "stage": record["recipe"]["stage"],
        "step": record["step"],
        "weights": record["weights"],
        "recipe_digest": digest_of(record["recipe"]),
        "digest": digest,
    }
    head = {key: record[key] for key in ("version", "step", "weights") if key in record}
    rest = {key: value for key, value in record.items() if key not in (*head, "digest", "lineage", "recipe")}
    return {**head, "digest": digest, **rest, "lineage": [*record["lineage"], own], "recipe": record["recipe"]}


def _local_folder(folder: str) -> Path:
    if not is_local(str(folder)):
        raise UserError(f"weights are read and written on local or mounted file systems; copy {folder} to one")
    return Path(local_path(str(folder)))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
