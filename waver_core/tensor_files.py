"""Files of tensors: which tensor goes into which safetensors file, writing one tensor at a time, and the digest of them all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from waver_core.errors import UserError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


class Entry(NamedTuple):
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(entries: Mapping[str, Entry], max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in the order of `entries` but wide dtypes first (a file keeps them aligned); a tensor
    above `max_bytes` gets a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.bytes
    return [sorted(shard, key=lambda n: -entries[n].dtype.itemsize) for shard in shards]


def write_shard(
    handle: IO[bytes], names: list[str], entries: Mapping[str, Entry], tensors: Iterator[Tensor], digest: Digest
) -> None:
    """One safetensors file: eight bytes that give the length of a JSON header, the header, the tensors end to end.

    Written by hand because the library's writer wants all of a file in memory, twice.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape, dtype = entries[name]
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + entries[name].bytes]}
        offset += entries[name].bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little"))
    handle.write(text)
    for name in names:
        tensor = next(tensors).to("cpu", entries[name].dtype)
        if tuple(tensor.shape) != entries[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, not {list(entries[name].shape)} as announced")
        handle.write(digest.add(name, tensor))
        del tensor  # before the next one is made
    handle.flush()


class Digest:
    """Digest of named tensors, whatever their order or the files that they are in."""

    def __init__(self) -> None:
        self._of_tensors: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> memoryview:
        """Take in a tensor; returns its bytes."""
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        head = f"{name} {_DTYPES[tensor.dtype]} {list(tensor.shape)} "
        self._of_tensors[name] = head + hashlib.blake2b(data, digest_size=16).hexdigest()
        return data

    def value(self) -> str:
        """32 hex digits."""
        return hashlib.blake2b("\n".join(sorted(self._of_tensors.values())).encode(), digest_size=16).hexdigest()


def opened(path: str) -> Any:
    """A safetensors file mapped into memory, for `with`. Raises `UserError` where it is missing or damaged."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy the export again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or cut short ({error}): copy the export again") from error
