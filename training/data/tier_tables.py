"""Published tiers -> one table of clips: the columns that training reads, every clip once (Waver §3.5).

Manifests are the only thing that training has of curation. They must belong together: made for the tier that the recipe
names, scored and captioned by the same models with the same options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.recipe import Recipe
from waver_core.errors import UserError, did_you_mean
from waver_core.manifest import INDEX_NAME, open_parquet, read_index
from waver_core.storage import exists, is_local, join

COLUMNS = (
    *("clip_id", "source_id", "source_uri", "kind", "start_s", "duration_s", "fps"),
    *("width_px", "height_px", "short_side_px", "sampling_weight"),
)
OPTIONAL = ("technical_active_box",)
_FINGERPRINTS = ("backends", "passes", "models_served")


def read_indices(manifests: Sequence[str], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Folder -> index. Raises `UserError` for a missing manifest, one of another tier, or ones that do not belong together."""
    if not manifests:
        raise UserError(f"no manifest given: name a folder that curation published, <output>/tiers/{recipe.tier}")
    indices: dict[str, dict[str, Any]] = {}
    for folder in dict.fromkeys(m.rstrip("/") or m for m in manifests):
        below = join(folder, "tiers", recipe.tier)
        if not exists(join(folder, INDEX_NAME)) and exists(join(below, INDEX_NAME)):
            raise UserError(f"{folder} is the output of a whole funnel: name the tier in it, {below}")
        index = read_index(folder)
        if index.get("tier") != recipe.tier:
            holds = f"the tier '{index['tier']}'" if index.get("tier") else "the table of all clips"
            wanted = f"stage '{recipe.stage}' trains on '{recipe.tier}': name that tier's folder"
            raise UserError(f"{folder} holds {holds}, but {wanted}")
        indices[folder] = index
    _refuse_mixture(indices)
    return indices


def _refuse_mixture(indices: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `UserError` that says what differs where manifests were made by other models or with other options."""
    (first, reference), *others = indices.items()
    for folder, index in others:
        for part in _FINGERPRINTS:
            a, b = _flat(reference.get(part)), _flat(index.get(part))
            differing = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
            if differing:
                key = differing[0]
                what = f"{part}.{key} is '{a.get(key, 'none')}' in {first} and '{b.get(key, 'none')}' in {folder}"
                more = f" (and {len(differing) - 1} more differ)" if len(differing) > 1 else ""
                raise UserError(f"mixed fingerprints: {what}{more}; curate both with one configuration, or train on one of them")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as one, keys joined by dots."""
    if not isinstance(value, Mapping):
        return {prefix: str(value)} if prefix else {}
    parts = (_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: text for part in parts for key, text in part.items()}


def read_clips(indices: Mapping[str, Mapping[str, Any]], captions: Sequence[str]) -> tuple[pa.Table, int]:
    """Clips of all manifests, and how many rows were left out because an earlier manifest has the clip already.

    Rows are sorted by source, time and clip, so the table does not depend on the order of manifests or shards, and clips of
    one file lie together. Strings are large_string: more than 2 GiB of them can be taken at once. Raises `UserError` where a
    manifest lacks a column.
    """
    wanted = [*COLUMNS, *(c for c in captions if c not in COLUMNS)]
    tables = [_read_shard(join(folder, name), folder, wanted) for folder, index in indices.items() for name in index["shards"]]
    clips = pa.concat_tables(tables, promote_options="default")
    codes = clips["clip_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.unique(codes, return_index=True)[1]
    duplicates = len(clips) - len(first)
    order = _sorted(clips.select(["source_id", "start_s", "clip_id"]).take(first))
    return clips.take(first[order]), duplicates


def _sorted(keys: pa.Table) -> np.ndarray:
    """Order of the rows by (source_id, start_s, clip_id); ranks of strings, as numbers sort several times faster."""
    ranks = []
    for name in ("source_id", "clip_id"):
        encoded = keys[name].combine_chunks().dictionary_encode()
        rank = np.empty(len(encoded.dictionary), np.int64)
        rank[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(rank))
        ranks.append(rank[encoded.indices.to_numpy()])
    return np.lexsort((ranks[1], keys["start_s"].to_numpy(), ranks[0]))


def _read_shard(uri: str, folder: str, wanted: Sequence[str]) -> pa.Table:
    with open_parquet(uri) as file:
        there = file.schema_arrow.names
        for name in wanted:
            if name not in there:
                fix = did_you_mean(name, there)
                raise UserError(f"{folder} has no column '{name}': {fix} Captions are chosen by training.data.captions")
        table = file.read(columns=[*wanted, *(c for c in OPTIONAL if c in there)], use_threads=is_local(uri))
    return table.replace_schema_metadata(None).cast(pa.schema([_wide(field) for field in table.schema]))


def _wide(field: pa.Field) -> pa.Field:
    return pa.field(field.name, pa.large_string() if pa.types.is_string(field.type) else field.type)
