"""The clip table: which columns there are, who owns each, how shards are written and read (Parquet, Arrow).

Every field carries its owner (a stage), unit and a sentence in its metadata, so a manifest explains itself to the planes
that read it. Rows hold URIs, spans and scores; never pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from waver_core.errors import UserError
from waver_core.storage import is_local, join, list_files, local_path, open_file, read_bytes, remove, write_atomic

VERSION = 1
_NAMESPACE = uuid.UUID("6f0c3f0e-6a35-5d43-9b7e-2b0a0c1d7f51")
INDEX_NAME = "manifest.json"


@dataclass(frozen=True)
class Column:
    """A column of the clip table. `score` marks what deserves a histogram in the report."""

    name: str
    type: pa.DataType
    doc: str
    unit: str = ""
    score: bool = False

    def field(self, owner: str) -> pa.Field:
        """The Arrow field, with owner, unit, sentence and score mark as metadata."""
        metadata = {"owner": owner, "unit": self.unit, "doc": self.doc, "score": "1" if self.score else ""}
        return pa.field(self.name, self.type, metadata={k: v for k, v in metadata.items() if v})


CLIP_COLUMNS = (
    Column("clip_id", pa.string(), "UUIDv5 of source digest, first and last frame"),
    Column("source_id", pa.string(), "content digest of the raw file"),
    Column("source_uri", pa.string(), "where the raw file lies"),
    Column("kind", pa.string(), "video or image"),
    Column("dataset", pa.string(), "collection the file came from, as the input list says"),
    Column("licence", pa.string(), "licence, as the input list says"),
    Column("style", pa.string(), "style, as the input list says (real, anime, cg, ...)"),
    Column("start_s", pa.float64(), "first frame's time from the start of the video stream", "s"),
    Column("end_s", pa.float64(), "end of the last frame, from the start of the video stream", "s"),
    Column("duration_s", pa.float64(), "length", "s", score=True),
    Column("start_frame", pa.int64(), "index of the first frame", "frame"),
    Column("end_frame", pa.int64(), "index after the last frame", "frame"),
)
SOURCE_SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),
        ("uri", pa.string()),
        ("kind", pa.string()),
        ("dataset", pa.string()),
        ("licence", pa.string()),
        ("style", pa.string()),
        ("bytes", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("error", pa.string()),
        ("note", pa.string()),
        ("duration_s", pa.float64()),
        ("n_frames", pa.int64()),
        ("n_clips", pa.int64()),
    ]
)


def clip_id(source_id: str, start_frame: int, end_frame: int) -> str:
    """The identity of a clip: the same content and span give the same id on every run and machine."""
    return str(uuid.uuid5(_NAMESPACE, f"{source_id}:{start_frame}:{end_frame}"))


def build_schema(owned: Mapping[str, Sequence[Column]]) -> pa.Schema:
    """The clip table's schema from each stage's columns; raises `UserError` where two stages own one column."""
    fields: dict[str, pa.Field] = {c.name: c.field("ingest") for c in CLIP_COLUMNS}
    for owner, columns in owned.items():
        for column in columns:
            if column.name in fields:
                other = (fields[column.name].metadata or {}).get(b"owner", b"?").decode()
                raise UserError(f"column '{column.name}' is written by two stages: {other} and {owner}")
            fields[column.name] = column.field(owner)
    return pa.schema(list(fields.values()), metadata={"openwaver_manifest_version": str(VERSION)})


def rows_to_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table; missing keys become nulls, unknown keys are an error (a stage wrote what it does not own)."""
    rows = list(rows)
    unknown = {key for row in rows for key in row} - set(schema.names)
    if unknown:
        raise UserError(f"columns that no stage declares: {', '.join(sorted(unknown))}")
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)


def write_table(uri: str, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
    """Write one Parquet file atomically; `metadata` is added to the schema's."""
    if metadata:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomic(uri, buffer.getvalue())


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file on any file system. Read it with `use_threads` only where `is_local(uri)` holds.

    Local files are opened by Arrow itself. Through a Python file object Arrow's threads need the interpreter, and one
    that is still letting go of it when the process ends takes the process down with an abort.
    """
    if is_local(uri):
        with pq.ParquetFile(local_path(uri)) as file:
            yield file
    else:
        with open_file(uri) as handle, pq.ParquetFile(handle) as file:
            yield file


def read_tables(uris: Sequence[str], schema: pa.Schema) -> pa.Table:
    """Read Parquet shards into one table of the given schema; a shard's missing columns become nulls."""
    tables = []
    for uri in uris:
        with open_parquet(uri) as file:
            table = file.read(use_threads=is_local(uri))
        arrays = [table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(len(table), f.type) for f in schema]
        tables.append(pa.table(arrays, schema=schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def publish(folder: str, table: pa.Table, *, rows_per_shard: int, facts: Mapping[str, Any]) -> list[str]:
    """Write a manifest: Parquet shards named by content and, last, an index that lists them.

    A reader goes by the index, so it sees the old manifest or the new one and never a mixture. Shards of an older
    manifest are removed after the index has changed.
    """
    names: list[str] = []
    for start in range(0, max(1, len(table)), rows_per_shard):
        part = table.slice(start, rows_per_shard)
        buffer = io.BytesIO()
        pq.write_table(part, buffer, compression="zstd")
        name = f"part-{start // rows_per_shard:05d}-{hashlib.blake2b(buffer.getvalue(), digest_size=6).hexdigest()}.parquet"
        write_atomic(join(folder, name), buffer.getvalue())
        names.append(name)
    index = {"version": VERSION, "rows": len(table), "shards": names, **facts}
    write_atomic(join(folder, INDEX_NAME), json.dumps(index, indent=2) + "\n")
    for uri in list_files(folder, ".parquet"):
        if uri.rsplit("/", 1)[-1] not in names:
            remove(uri)
    return names


def read_index(folder: str) -> dict[str, Any]:
    """The index of a published manifest: {version, rows, shards, facts...}; raises `UserError` where there is none."""
    try:
        index: dict[str, Any] = json.loads(read_bytes(join(folder, INDEX_NAME)))
    except FileNotFoundError as error:
        raise UserError(f"no manifest at {folder}: run curation/run_funnel.py with this output first") from error
    if index["version"] != VERSION:
        raise UserError(
            f"{folder} holds a manifest of version {index['version']}, this code reads {VERSION}: run the funnel again"
        )
    return index


def read_manifest(folder: str) -> pa.Table:
    """The table that a published manifest's index names; raises `UserError` where there is none."""
    tables = []
    for name in read_index(folder)["shards"]:
        uri = join(folder, name)
        with open_parquet(uri) as file:
            tables.append(file.read(use_threads=is_local(uri)))
    return pa.concat_tables(tables)
