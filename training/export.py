"""Writing weights to hand around (`waver_core.weights` reads them and says what lies where), and warm starts from them.

Tensors are written and gathered from the workers one at a time, so that 12B parameters never lie in memory twice.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.recipe import Recipe
from waver_core.config import digest_of
from waver_core.errors import UserError
from waver_core.tensor_files import Digest, Entry, plan_shards, write_shard
from waver_core.weights import INDEX, RECORD, Exported, load_export, load_into, local_folder, plain_name

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
    target = local_folder(folder)
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
