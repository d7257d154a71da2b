"""Encoded samples on disk: Parquet shards of latents, text vectors and features, and an index that lists them.

    <output>/encoded/<stage>/index.json                what there is, and which encoders made it; written last
                             samples-<digest>.parquet  the rows without their arrays: what a plan of the training is made of
                             constants-<digest>.npz    vectors of the empty text, latents of a black image
                             part-<digest>.parquet     rows with arrays, in row groups of about 16 MB

A reader goes by the index, so it sees the old set or the new one and never a mixture.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.data.byte_cache import ByteCache
from training.recipe import Recipe
from waver_core.errors import UserError
from waver_core.manifest import open_parquet
from waver_core.registry import create
from waver_core.shapes import LATENT_CHANNELS, VideoShape
from waver_core.storage import is_local, join, list_files, read_bytes, remove, write_atomic

VERSION = 1
INDEX_NAME = "index.json"
DTYPE = "float16"
"""In which arrays are stored. About three digits: latents and text vectors are of the order of one."""
_GROUP_BYTES = 16 << 20
_GROUP_ROWS = 256
_ARRAY_COLUMNS = ("latents", "last_latent", "degraded", "features")


class Sample(NamedTuple):
    """What the model is trained on, float32; T, h and w are latent frames, rows and columns."""

    latents: np.ndarray
    """[16, T, h, w]"""
    last_latent: np.ndarray | None
    """[16, 1, h, w], the last frame encoded as an image; None for images."""
    degraded: np.ndarray | None
    """[16, T, h, w], the same clip after pixel degradation; refine stages only (Waver §2.2)."""
    texts: list[tuple[np.ndarray, ...]]
    """Per caption, in the order of the recipe: [L, dim] of every text encoder."""
    features: np.ndarray | None
    """[Tf, Hf, Wf, dim]; stages with alignment only (Waver §4.2)."""

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        texts = [array for text in self.texts for array in text]
        arrays = [self.latents, self.last_latent, self.degraded, self.features, *texts]
        return sum(array.nbytes for array in arrays if array is not None)


def encoded_folder(output: str, stage: str) -> str:
    """Where the encoded samples of a stage lie below a run's output."""
    return join(output, "encoded", stage)


def part_schema(samples: pa.Schema, n_text_encoders: int) -> pa.Schema:
    """Columns of a shard: those of the sample table, what identifies the row's content, and the arrays."""
    blob = pa.large_binary()
    arrays = [pa.field(name, blob) for name in _ARRAY_COLUMNS]
    texts = [pa.field(f"text_{k}", pa.list_(blob)) for k in range(n_text_encoders)]
    further = [("content_key", pa.string()), ("text_tokens", pa.int32()), ("features_shape", pa.list_(pa.int32()))]
    return pa.schema([*samples.remove_metadata(), *(pa.field(*f) for f in further), *arrays, *texts])


def write_part(folder: str, unit: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> str:
    """Write one shard atomically and return its name; arrays are left as they are, floats hardly shrink."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    group = max(1, min(_GROUP_ROWS, _GROUP_BYTES * len(table) // max(1, table.nbytes)))
    buffer = io.BytesIO()
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, buffer, row_group_size=group, **plain)
    name = part_name(unit)
    write_atomic(join(folder, name), buffer.getvalue())
    return name


def part_name(unit: str) -> str:
    """File name of a unit of work."""
    return f"part-{unit}.parquet"


def publish(
    folder: str, parts: Sequence[str], samples: pa.Table, constants: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Make shards that lie in `folder` a set that can be read, and return its index; what it does not list is removed.

    `samples` holds the metadata of the shards' rows in the order of `parts` and has the columns `shard` (position in `parts`),
    which is left out of the file.
    """
    counts = np.bincount(samples["shard"].to_numpy(), minlength=len(parts))
    table, arrays = io.BytesIO(), io.BytesIO()
    pq.write_table(samples.drop_columns(["shard"]), table, compression="zstd")
    given: dict[str, Any] = dict(constants)
    np.savez(arrays, **given)
    names = {"samples": _named("samples", table, "parquet"), "constants": _named("constants", arrays, "npz")}
    for key, buffer in (("samples", table), ("constants", arrays)):
        write_atomic(join(folder, names[key]), buffer.getvalue())
    shards = [{"name": name, "rows": int(count)} for name, count in zip(parts, counts, strict=True)]
    index = {"version": VERSION, "rows": len(samples), "dtype": DTYPE, "shards": shards, **names, **facts}
    write_atomic(join(folder, INDEX_NAME), json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    listed = {INDEX_NAME, *names.values(), *parts}
    for uri in list_files(folder):
        if uri.rsplit("/", 1)[-1] not in listed:
            remove(uri)
    return index


def _named(what: str, buffer: io.BytesIO, suffix: str) -> str:
    return f"{what}-{hashlib.blake2b(buffer.getvalue(), digest_size=6).hexdigest()}.{suffix}"


def read_encoded_index(folder: str) -> dict[str, Any]:
    """The index of encoded samples. Raises `UserError` where there is none, or one of another version."""
    try:
        index: dict[str, Any] = json.loads(read_bytes(join(folder, INDEX_NAME)))
    except FileNotFoundError as error:
        raise UserError(f"no encoded samples at {folder}: make them with {encode_command()}") from error
    if index.get("version") != VERSION:
        found = index.get("version")
        raise UserError(f"{folder} holds samples of version {found}, this code reads {VERSION}: encode again, {_again(index)}")
    return index


def encode_command(stage: str = "STAGE") -> str:
    """The command that encodes a stage, for error messages."""
    return f"`python training/encode.py --stage {stage} --curated DIR --output RUN`"


def _again(index: Mapping[str, Any]) -> str:
    return encode_command((index.get("recipe") or {}).get("stage", "STAGE"))


def describe_encoders(recipe: Recipe) -> dict[str, Any]:
    """Fingerprints of a recipe's encoders: {autoencoder, text: [...], features}; features None where no stage needs them.

    Building encoders loads no weights. Raises `ConfigError` where there is none of that name.
    """
    chosen = recipe.encoders
    features = chosen.features if recipe.align else None
    return {
        "autoencoder": create("video_autoencoder", chosen.autoencoder.backend, **chosen.autoencoder.options).fingerprint,
        "text": [create("text_encoder", t.backend, **t.options).fingerprint for t in chosen.text],
        "features": create("feature_extractor", features.backend, **features.options).fingerprint if features else None,
    }


def check_fingerprints(index: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises `UserError` with what differs where samples were not encoded the way that a recipe wants them.

    That is another encoder, other caption columns, no features for a stage that aligns, no degraded latents for a refiner.
    """
    made, wanted = index["encoders"], describe_encoders(recipe)
    facts = index["recipe"]
    pairs = [("autoencoder", made["autoencoder"], wanted["autoencoder"])]
    pairs += [(f"text encoder {k + 1}", a, b) for k, (a, b) in enumerate(_padded(made["text"], wanted["text"]))]
    if recipe.align:
        grids = (facts["feature_grid"], recipe_facts(recipe)["feature_grid"])
        pairs += [("feature extractor", made["features"], wanted["features"]), ("feature grid", *grids)]
    pairs.append(("caption columns", ", ".join(facts["captions"]), ", ".join(recipe.data.captions)))
    if recipe.task == "refine":
        pairs.append(("pixel degradation", facts["pixel_factor"], recipe.refinement.pixel_factor))
    differing = [f"{what} {a or 'none'} instead of {b or 'none'}" for what, a, b in pairs if a != b]
    if differing:
        raise UserError(f"the samples were encoded with {'; '.join(differing)}: encode again, {encode_command(recipe.stage)}")


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """What an index records of the recipe: what the arrays depend on besides the encoders, and what a person wants to know."""
    factors = recipe.alignment
    grid = f"1/{factors.temporal_factor} in time, 1/{factors.spatial_factor} in space"
    return {
        "stage": recipe.stage,
        "task": recipe.task,
        "tier": recipe.tier,
        "digest": recipe.digest,
        "fps": recipe.fps,
        "captions": list(recipe.data.captions),
        "feature_grid": grid if recipe.align else None,
        "pixel_factor": recipe.refinement.pixel_factor if recipe.task == "refine" else None,
    }


def _padded(a: Sequence[str], b: Sequence[str]) -> list[tuple[str | None, str | None]]:
    longest = max(len(a), len(b))
    return list(zip([*a, *[None] * (longest - len(a))], [*b, *[None] * (longest - len(b))], strict=True))


def sample_of(row: Mapping[str, Any], dims: Mapping[str, Any], dtype: str = DTYPE) -> Sample:
    """A shard's row as arrays. Raises `UserError` where the bytes are not as many as the row's shape says."""
    shape = VideoShape(row["frames"], row["height_px"], row["width_px"]).latent
    full, single = (LATENT_CHANNELS, *shape), (LATENT_CHANNELS, 1, shape.height, shape.width)
    where = f"sample {row['sample_id']}"

    def array(data: bytes | None, wanted: Sequence[int], what: str) -> np.ndarray | None:
        if data is None:
            return None
        flat = np.frombuffer(data, dtype)
        if flat.size != np.prod(wanted, dtype=np.int64):
            raise UserError(f"{where}: {flat.size} {what}, not those of {list(wanted)}: encode again, {encode_command()}")
        return flat.reshape(wanted).astype(np.float32)

    latents = array(row["latents"], full, "latent values")
    if latents is None:
        raise UserError(f"{where} has no latents: encode again, {encode_command()}")
    columns = []
    for k, dim in enumerate(dims["text"]):
        flat = [np.frombuffer(text, dtype) for text in row[f"text_{k}"]]
        if any(vectors.size % dim or not vectors.size for vectors in flat):
            raise UserError(f"{where}: text vectors are not of {dim} values each: encode again, {encode_command()}")
        columns.append([vectors.reshape(-1, dim).astype(np.float32) for vectors in flat])
    return Sample(
        latents,
        array(row["last_latent"], single, "values of the last latent"),
        array(row["degraded"], full, "degraded latent values"),
        list(zip(*columns, strict=True)),
        array(row["features"], row["features_shape"] or (0,), "feature values"),
    )


class EncodedSamples:
    """Encoded samples by row number. `table` has their metadata, `constants` the arrays that all of them share.

    A row is read with the whole row group in which it lies. Those read last stay in memory up to `cache_bytes`, and so do
    samples as arrays: of a small set everything, after its first epoch.
    """

    def __init__(self, folder: str, cache_bytes: int = 512 << 20) -> None:
        """Raises `UserError` where the set is missing, incomplete or of another version."""
        self.folder = folder
        self.index = read_encoded_index(folder)
        self._cache_bytes = cache_bytes
        present = {uri.rsplit("/", 1)[-1] for uri in list_files(folder)}
        shards = self.index["shards"]
        missing = [n for n in (self.index["samples"], self.index["constants"], *(s["name"] for s in shards)) if n not in present]
        if missing:
            raise UserError(
                f"{len(missing)} files of {folder} are missing, such as {missing[0]}: encode again, {_again(self.index)}"
            )
        self._starts = np.cumsum([0, *(s["rows"] for s in shards)])
        self.table = self._read_table()
        with np.load(io.BytesIO(read_bytes(join(folder, self.index["constants"])))) as arrays:
            self.constants: dict[str, np.ndarray] = {name: arrays[name].astype(np.float32) for name in arrays.files}
        self._group_starts: dict[int, np.ndarray] = {}
        self._groups, self._samples = ByteCache(cache_bytes // 2), ByteCache(cache_bytes // 2)

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> tuple[type[EncodedSamples], tuple[str, int]]:
        return EncodedSamples, (self.folder, self._cache_bytes)

    def __getitem__(self, row: int) -> Sample:
        """The sample of a row of `table`, which others get too: its arrays are not to be written to.

        Raises `IndexError` beyond the table, `UserError` where a shard is not what the index says.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        sample = self._samples.get(row)
        if sample is None:
            shard = int(np.searchsorted(self._starts, row, side="right")) - 1
            sample = sample_of(self._stored(shard, row - int(self._starts[shard])), self.index["dims"], self.index["dtype"])
            self._samples.put(row, sample, sample.nbytes)
        return sample

    def _read_table(self) -> pa.Table:
        uri = join(self.folder, self.index["samples"])
        with open_parquet(uri) as file:
            table = file.read(use_threads=is_local(uri))
        if not len(table) == self.index["rows"] == self._starts[-1]:
            told = f"its shards {self._starts[-1]}, its table {len(table)}"
            raise UserError(
                f"the index of {self.folder} says {self.index['rows']} rows, {told}: encode again, {_again(self.index)}"
            )
        return table

    def _stored(self, shard: int, row: int) -> dict[str, Any]:
        """A row of a shard as it is stored."""
        starts = self._group_starts.get(shard)
        group = None if starts is None else int(np.searchsorted(starts, row, side="right")) - 1
        table = None if group is None else self._groups.get((shard, group))
        if table is None:
            entry = self.index["shards"][shard]
            uri = join(self.folder, entry["name"])
            with open_parquet(uri) as file:
                footer = file.metadata
                starts = np.cumsum([0, *(footer.row_group(g).num_rows for g in range(footer.num_row_groups))])
                if starts[-1] != entry["rows"]:
                    told = f"{starts[-1]} rows, the index says {entry['rows']}"
                    raise UserError(f"{uri} has {told}: encode again, {_again(self.index)}")
                group = int(np.searchsorted(starts, row, side="right")) - 1
                table = file.read_row_group(group, use_threads=is_local(uri))
            self._group_starts[shard] = starts
            self._groups.put((shard, group), table, table.nbytes)
        assert starts is not None and group is not None
        stored: dict[str, Any] = table.slice(row - int(starts[group]), 1).to_pylist()[0]
        return stored
