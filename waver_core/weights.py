"""Weights to hand around: safetensors with `recipe.yaml` beside them, as training writes them and all planes read them.

```
<folder>/model-00001-of-00010.safetensors ...   about 5 GB each, fp32 or bf16
         model.safetensors.index.json           name -> file, as Hugging Face has it
         recipe.yaml                            model, encoders, recipe, lineage, step, weights, digest
```
`recipe.yaml`: `model` are the fields of `DiTConfig`, `recipe` the resolved recipe of the stage, `lineage` one entry a stage from
the first to this one, `weights` is ema, raw or average, `digest` changes when any weight does. Folders are on a local or mounted
file system: weights are mapped into memory, which object stores cannot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from waver_core.errors import UserError, did_you_mean
from waver_core.storage import is_local, local_path
from waver_core.tensor_files import TORCH_DTYPES, Digest, Entry, opened

RECORD = "recipe.yaml"
INDEX = "model.safetensors.index.json"
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What compilation and recomputation put into the names of parameters."""


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


def read_record(folder: str) -> dict[str, Any]:
    """`recipe.yaml` of an export or a step folder. Raises `UserError` where it is missing or says too little."""
    path = local_folder(folder) / RECORD
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
    path = local_folder(folder)
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


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def reshard(model: nn.Module) -> None:
    """Drop gathered copies of sharded weights.

    FSDP keeps those of the root module after a forward without a backward, so that a change of the shards would go unseen in
    the next forward. Call it whenever weights were changed other than by the optimiser.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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


def local_folder(folder: str) -> Path:
    """Its path; raises `UserError` for one on an object store."""
    if not is_local(str(folder)):
        raise UserError(f"weights are read and written on local or mounted file systems; copy {folder} to one")
    return Path(local_path(str(folder)))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
