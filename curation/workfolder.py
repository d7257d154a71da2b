"""What makes a run resumable: every finished unit of work is a file that appears whole or not at all.

    work/<pass>-<fingerprint>/done-<unit>.parquet     rows of a finished unit (atomic; the commit)
    work/<pass>-<fingerprint>/sources-<unit>.parquet  first pass only: the sources of the unit, written after their clips
    work/attempts/<run>/<source>.<n>                  a worker began with this source for the n-th time in this run

Results lie under the fingerprint of everything they depend on, so a changed threshold of a tier recomputes nothing and a
changed option of a stage recomputes what it must.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from waver_core.config import digest_of
from waver_core.errors import UserError
from waver_core.manifest import SOURCE_SCHEMA, open_parquet, read_tables, write_table
from waver_core.storage import exists, join, list_files, make_folder, remove, write_atomic

SOURCE_WORK_SCHEMA = pa.schema([*SOURCE_SCHEMA, ("stamp", pa.string()), ("anchor_gap_s", pa.float64()), ("unit", pa.string())])


@dataclass(frozen=True)
class WorkFolder:
    """Paths and shards below `<output>/work`; safe to use from any worker."""

    output: str
    keys: Mapping[str, str]
    """Pass -> fingerprint of everything its results depend on."""
    run_id: str

    def _path(self, *parts: str) -> str:
        return join(self.output, "work", *parts)

    def _folder(self, name: str) -> str:
        return self._path(f"{name}-{self.keys[name]}")

    def thumbnail_uri(self, clip_id: str) -> str:
        """Where a clip's filmstrip lies."""
        return join(self.output, "thumbnails", clip_id[:2], f"{clip_id}.jpg")

    def begin_attempt(self, source_id: str) -> int:
        """Note that work on a source begins; the number of times in this run, this one included.

        The note is removed when the unit ends, so what is left over was left by a worker that died.
        """
        n = 1
        while exists(self._path("attempts", self.run_id, f"{source_id}.{n}")):
            n += 1
        write_atomic(self._path("attempts", self.run_id, f"{source_id}.{n}"), "")
        return n

    def end_attempts(self, source_ids: Iterable[str]) -> None:
        """Forget the attempts of finished sources."""
        for source_id in source_ids:
            n = 1
            while exists(self._path("attempts", self.run_id, f"{source_id}.{n}")):
                remove(self._path("attempts", self.run_id, f"{source_id}.{n}"))
                n += 1

    def commit_shots(self, sources: list[dict[str, Any]], clips: pa.Table, seconds: Mapping[str, float]) -> str:
        """Make a unit of the first pass durable: clips first, then the sources, whose presence is the commit."""
        unit = digest_of(sorted(s["uri"] for s in sources))
        folder = self._folder("shots")
        write_table(join(folder, f"done-{unit}.parquet"), clips)
        rows = [{name: s.get(name) for name in SOURCE_WORK_SCHEMA.names} | {"unit": unit} for s in sources]
        table = pa.Table.from_pylist(rows, schema=SOURCE_WORK_SCHEMA)
        write_table(join(folder, f"sources-{unit}.parquet"), table, {"seconds": json.dumps(dict(seconds))})
        return unit

    def read_sources(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Sources that the first pass has finished, and the seconds spent per stage."""
        uris = [u for u in list_files(self._folder("shots"), ".parquet") if "/sources-" in u]
        return read_tables(uris, SOURCE_WORK_SCHEMA).to_pylist(), _seconds_in(uris)

    def read_clips(self, units: Iterable[str], schema: pa.Schema) -> pa.Table:
        """Clips of finished units of the first pass."""
        folder = self._folder("shots")
        return read_tables([join(folder, f"done-{u}.parquet") for u in sorted(set(units))], schema)

    def commit(self, name: str, unit: str, rows: pa.Table, seconds: Mapping[str, float]) -> None:
        """Make a unit of a later pass durable."""
        write_table(join(self._folder(name), f"done-{unit}.parquet"), rows, {"seconds": json.dumps(dict(seconds))})

    def read(self, name: str, schema: pa.Schema) -> tuple[pa.Table, dict[str, float]]:
        """Rows of all finished units of a later pass, and the seconds spent per stage."""
        uris = list_files(self._folder(name), ".parquet")
        return read_tables(uris, schema), _seconds_in(uris)

    def prepare(self) -> None:
        """Create the folders and clear the attempts of earlier runs; refuses an output that cannot be written."""
        try:
            for name in self.keys:
                make_folder(self._folder(name))
            remove(self._path("attempts"), recursive=True)
        except OSError as error:
            raise UserError(f"cannot write to the output {self.output}: {error}") from error


def _seconds_in(uris: Iterable[str]) -> dict[str, float]:
    total: dict[str, float] = {}
    for uri in uris:
        with open_parquet(uri) as file:
            metadata = file.schema_arrow.metadata or {}
        for name, value in json.loads(metadata.get(b"seconds", b"{}")).items():
            total[name] = total.get(name, 0.0) + value
    return total
