"""What makes encoding resumable: every finished unit of samples is a shard that appears whole or not at all. Free of Ray.

A shard is named by what is in it, and a sample by all that its arrays depend on (its content key): a run that goes on, or one
after more clips were curated, encodes what no shard has yet. Samples that failed are in no shard, so a rerun tries them again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from training.data.shards import DTYPE, VERSION, describe_encoders, part_schema, recipe_facts, write_part
from training.encoding import ClipEncoder
from training.recipe import Recipe
from waver_core.config import digest_of
from waver_core.errors import UserError
from waver_core.manifest import open_parquet
from waver_core.shapes import LATENT_CHANNELS, VideoShape
from waver_core.storage import exists, join, list_files, read_bytes, remove, write_atomic

Row = dict[str, Any]
_UNIT_BYTES = 256 << 20
"""Latents of one unit at most, so that a worker's memory and what a kill costs stay small."""
_MAX_DEATHS = 2
"""Times that a worker may die on one sample within a run before the sample is given up."""
_CONTENT = ("sample_id", "source_id", "kind", "start_s", "fps", "frames", "height_px", "width_px", "captions", "active_box")
_CONTENT_FACTS = ("task", "captions", "feature_grid", "pixel_factor")
_ATTEMPTS = "attempts"


def content_keys(samples: pa.Table, recipe: Recipe) -> list[str]:
    """For every row a digest of all that its arrays depend on; weights and where the file lies are not among it."""
    facts = recipe_facts(recipe)
    shared = [VERSION, DTYPE, describe_encoders(recipe), {name: facts[name] for name in _CONTENT_FACTS}]
    context = digest_of(shared)
    columns = [name for name in _CONTENT if name in samples.column_names]
    return [digest_of([context, *row.values()]) for row in samples.select(columns).to_pylist()]


@dataclass(frozen=True)
class Finished:
    """Shards that earlier work left and this run can use."""

    parts: dict[str, list[tuple[str, int]]]
    """Name of a shard -> content key and text tokens of its rows, in its order."""

    @property
    def keys(self) -> set[str]:
        """Content keys of every sample that is in a shard."""
        return {key for rows in self.parts.values() for key, _ in rows}


def finished(folder: str, wanted: Iterable[str]) -> Finished:
    """The shards in `folder` all of whose rows are wanted, no row twice. Raises `UserError` for one that cannot be read."""
    wanted, seen = set(wanted), set[str]()
    uris = [uri for uri in list_files(folder, ".parquet") if uri.rsplit("/", 1)[-1].startswith("part-")]
    with ThreadPoolExecutor(16) as pool:
        read = list(pool.map(_keys_in, uris))
    parts: dict[str, list[tuple[str, int]]] = {}
    for uri, rows in zip(uris, read, strict=True):
        keys = {key for key, _ in rows}
        if keys <= wanted and not keys & seen:
            parts[uri.rsplit("/", 1)[-1]] = rows
            seen |= keys
    return Finished(parts)


def _keys_in(uri: str) -> list[tuple[str, int]]:
    try:
        with open_parquet(uri) as file:
            table = file.read(columns=["content_key", "text_tokens"], use_threads=False)
    except (pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{uri} is damaged ({error}): delete it and run again") from error
    return list(zip(table["content_key"].to_pylist(), table["text_tokens"].to_pylist(), strict=True))


def cut(samples: pa.Table, keys: Sequence[str], done: set[str], size: int) -> list[pa.Table]:
    """Rows that are not done yet, in units of `size` at most, with their content keys.

    Units are cut from the whole table first: what a killed run had not finished is cut as it would have been.
    """
    table = samples.append_column("content_key", pa.array(keys, pa.string()))
    weights = np.array([_latent_bytes(row) for row in samples.select(["frames", "height_px", "width_px"]).to_pylist()], np.int64)
    pending = np.array([key not in done for key in keys], bool)
    whole, rest = [], []
    for unit in _groups(np.arange(len(keys)), weights, size):
        if pending[unit].all():
            whole.append(unit)
        else:
            rest.extend(unit[pending[unit]])
    units = [*whole, *_groups(np.array(rest, np.int64), weights, size)]
    return [table.take(unit) for unit in sorted(units, key=lambda unit: int(unit[0]))]


def _latent_bytes(row: Row) -> int:
    shape = VideoShape(row["frames"], row["height_px"], row["width_px"]).latent
    return int(np.prod(shape)) * LATENT_CHANNELS * np.dtype(DTYPE).itemsize


def _groups(rows: np.ndarray, weights: np.ndarray, size: int) -> list[np.ndarray]:
    groups: list[np.ndarray] = []
    start, held = 0, 0
    for k, row in enumerate(rows):
        if k > start and (k - start >= size or held + weights[row] > _UNIT_BYTES):
            groups.append(rows[start:k])
            start, held = k, 0
        held += int(weights[row])
    return [*groups, rows[start:]] if len(rows) else []


@dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the samples."""

    folder: str
    recipe: Recipe
    samples: pa.Schema
    """Of the sample table."""
    run_id: str
    """Deaths of workers are counted within a run."""

    @property
    def schema(self) -> pa.Schema:
        """Of a shard."""
        return part_schema(self.samples, len(self.recipe.encoders.text))


class UnitEncoder:
    """Encodes units of samples to shards; one to a worker process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder = ClipEncoder(job.recipe)
        self._constants: bytes | None = None

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Rows of one unit -> one row that tells: part (null where all failed), samples, failed (JSON: sample_id, source_uri,
        reason), constants (NPZ, with a worker's first unit: the driver may be too small for the encoders). An empty unit gives
        nothing. Raises `UserError` as `ClipEncoder.encode`."""
        if not rows:
            return []
        unit = digest_of([row["content_key"] for row in rows])
        attempts = _Attempts(join(self._job.folder, _ATTEMPTS, self._job.run_id, f"{unit}.json"))
        results = self._encoder.encode(rows) if attempts.first else self._one_at_a_time(rows, attempts)
        encoded = [result for result in results if not isinstance(result, Exception)]
        failed = [_failure(row, result) for row, result in zip(rows, results, strict=True) if isinstance(result, Exception)]
        part = write_part(self._job.folder, unit, encoded, self._job.schema) if encoded else None
        attempts.end()
        told = {"part": part, "samples": len(rows), "failed": json.dumps(failed), "constants": b""}
        if self._constants is None:
            self._constants = told["constants"] = packed_arrays(self._encoder.constants())
        return [told]

    def _one_at_a_time(self, rows: list[Row], attempts: _Attempts) -> list[Row | Exception]:
        """The same after a worker has died on this unit: the sample that kills workers is found and given up."""
        results: list[Row | Exception] = []
        for row in rows:
            if attempts.deaths(row["sample_id"]) >= _MAX_DEATHS:
                results.append(RuntimeError(f"the worker died {_MAX_DEATHS} times while it was encoded"))
                continue
            attempts.begin(row["sample_id"])
            results += self._encoder.encode([row])
            attempts.survived(row["sample_id"])
        return results


def packed_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays by name as the bytes of an NPZ file."""
    buffer, given = io.BytesIO(), dict(arrays)
    np.savez(buffer, **given)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpacked_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The way back."""
    with np.load(io.BytesIO(data)) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _failure(row: Row, error: Exception) -> dict[str, str]:
    reason = f"{getattr(error, 'reason', type(error).__name__)}: {' '.join(str(error).split())}"
    return {"sample_id": row["sample_id"], "source_uri": row["source_uri"], "reason": reason}


class _Attempts:
    """A note beside the shards that outlives its worker: which samples of a unit a worker died on, and how often."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.first = not exists(uri)
        self._deaths: dict[str, int] = {} if self.first else json.loads(read_bytes(uri))
        if self.first:
            write_atomic(uri, "{}")

    def deaths(self, sample_id: str) -> int:
        """How often a worker has died on a sample."""
        return self._deaths.get(sample_id, 0)

    def begin(self, sample_id: str) -> None:
        """Counts a death before the fact; `survived` takes it back."""
        self._deaths[sample_id] = self.deaths(sample_id) + 1
        write_atomic(self._uri, json.dumps(self._deaths))

    def survived(self, sample_id: str) -> None:
        """The sample is no killer; written down with the next note."""
        self._deaths[sample_id] -= 1

    def end(self) -> None:
        """The unit is done."""
        remove(self._uri)


def clear_attempts(folder: str) -> None:
    """Forget what workers of earlier runs died on."""
    remove(join(folder, _ATTEMPTS), recursive=True)


def published_samples(samples: pa.Table, keys: Sequence[str], done: Finished) -> tuple[list[str], pa.Table]:
    """Shards in the order of the sample table, and the metadata of their rows with the column `shard`, for `shards.publish`.

    Rows come from the sample table, so that a changed weight counts without encoding again.
    """
    position = {key: k for k, key in enumerate(keys)}
    parts = sorted(done.parts, key=lambda name: min(position[key] for key, _ in done.parts[name]))
    rows = [(position[key], tokens, shard) for shard, name in enumerate(parts) for key, tokens in done.parts[name]]
    order, tokens, shard = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    table = samples.replace_schema_metadata(None).take(pa.array(order, pa.int64()))
    table = table.append_column("content_key", pa.array([keys[k] for k in order], pa.string()))
    table = table.append_column("text_tokens", pa.array(tokens, pa.int32()))
    return parts, table.append_column("shard", pa.array(shard, pa.int64()))
