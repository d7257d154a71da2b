"""Ingest (Waver §3.1, multi-source acquisition): which raw files there are, and each one's identity by content.

Input is a folder, a glob, a single file, an fsspec URL (s3://, gs://), or a list (Parquet, CSV or JSONL) with a `uri`
column and, if wanted, `dataset`, `licence` and `style` per row.
"""

from __future__ import annotations

import io
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from pydantic import Field

from curation import stage
from waver_core import storage
from waver_core.config import Strict
from waver_core.errors import MediaError, UserError
from waver_core.manifest import Column
from waver_core.video import VIDEO_SUFFIXES, is_image

LIST_SUFFIXES = (".parquet", ".csv", ".jsonl")
_TEXT_COLUMNS = ("dataset", "licence", "style")


class Options(Strict):
    """Limits and defaults of ingestion."""

    max_bytes: int = Field(200 << 30, gt=0)
    """Larger files are quarantined unread."""
    max_frame_px: int = Field(8192 * 8192, gt=0)
    max_duration_s: float = Field(6 * 3600.0, gt=0)
    max_damaged_share: float = Field(0.1, ge=0, le=1)
    """A source with a larger share of damaged frames is quarantined; below it the damaged stretches are cut out."""
    reviews: str | None = None
    """Parquet file of opinions on clips (clip_id, reviewer, approved): see `curation.reviews`."""


class Stage(stage.Stage):
    """Lists the input and digests files; the first pass writes what it finds as sources."""

    name = "ingest"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("source",)
    columns = (
        Column("review", pa.string(), "real, picked (real, approved by two), or of a generated clip approved, rejected, pending"),
    )

    def fingerprint(self) -> dict[str, Any]:
        """Nothing that is computed depends on reviews: they are read anew in every run."""
        return {"options": self.options.model_dump(mode="json", exclude={"reviews"})}

    def list_input(self, uri: str) -> list[dict[str, Any]]:
        """Every file of the input as {uri, kind, dataset, licence, style}, sorted by URI.

        kind is video, image or other (by name; an unknown suffix is never opened). Raises `UserError` when the input is
        missing, empty or a list without a `uri` column.
        """
        if uri.lower().endswith(LIST_SUFFIXES):
            rows = _read_list(uri)
        else:
            rows = [{"uri": name} for name in _expand(uri)]
        if not rows:
            raise UserError(f"no files in {uri}: give a folder, a glob or a list (.parquet, .csv, .jsonl) that holds some")
        seen: dict[str, dict[str, Any]] = {}
        for row in rows:
            facts = {name: row.get(name) or None for name in _TEXT_COLUMNS}
            seen.setdefault(str(row["uri"]), {"uri": str(row["uri"]), "kind": _kind_of(str(row["uri"])), **facts})
        return [seen[key] for key in sorted(seen)]

    def identify(self, uri: str) -> dict[str, Any]:
        """Digest and size of one file; raises `MediaError` with reason unreadable, empty or too_large."""
        try:
            size, stamp = storage.size_and_mtime(uri)
            if size == 0:
                raise MediaError("empty", "is an empty file")
            if size > self.options.max_bytes:
                raise MediaError(
                    "too_large", f"has {size / 1e9:.1f} GB, more than the limit of {self.options.max_bytes / 1e9:.1f} GB"
                )
            return {"bytes": size, "stamp": stamp, "source_id": storage.content_digest(uri)}
        except OSError as error:
            raise MediaError("unreadable", f"cannot be read: {error}") from error


def _kind_of(uri: str) -> str:
    if is_image(uri):
        return "image"
    return "video" if uri.lower().endswith(VIDEO_SUFFIXES) else "other"


def _expand(uri: str) -> list[str]:
    fs, path = storage.filesystem(uri)
    local = storage.is_local(uri)
    if any(mark in path for mark in "*?["):
        # as in a shell, * does not match hidden files
        names = [n for n in map(str, fs.glob(path)) if not n.rsplit("/", 1)[-1].startswith(".") and not fs.isdir(n)]
    elif fs.isfile(path):
        names = [path]
    elif fs.isdir(path):
        return storage.list_files(uri)
    else:
        raise UserError(f"no such input: {uri}")
    return sorted(names if local else [fs.unstrip_protocol(n) for n in names])


def _read_list(uri: str) -> list[dict[str, Any]]:
    if not storage.exists(uri):
        raise UserError(f"no such list: {uri}")
    buffer = io.BytesIO(storage.read_bytes(uri))
    try:
        if uri.lower().endswith(".parquet"):
            table = pq.ParquetFile(buffer).read(use_threads=False)
        elif uri.lower().endswith(".csv"):
            table = pa_csv.read_csv(buffer)
        else:
            table = pa_json.read_json(buffer)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri} cannot be read as a list of sources: {error}") from error
    if "uri" not in table.column_names:
        raise UserError(f"{uri} has no column 'uri', only: {', '.join(table.column_names)}")
    wanted = [c for c in ("uri", *_TEXT_COLUMNS) if c in table.column_names]
    base = uri.rsplit("/", 1)[0] if "/" in uri else "."
    rows: list[dict[str, Any]] = table.select(wanted).to_pylist()
    for row in rows:
        # Paths in a list are relative to the list itself, so that a list travels with its files.
        name = str(row["uri"])
        row["uri"] = name if "://" in name or name.startswith("/") else storage.join(base, name)
    return rows
