"""The clip table between the passes: from finished units of work to one Arrow table, and back to what is still to do.

No pixels here. Clips come from the first pass, stages that look over all clips fill their columns, scores are joined by
clip_id, and the gates tell which clips a run still has to score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.gates import Tiers, first_failures
from curation.passes import LaterPass
from curation.reviews import review_states
from curation.stage import StageSet
from curation.workfolder import WorkFolder

Row = dict[str, Any]
_NARROW_BYTES = 1 << 30
_TAKE_ROWS = 100_000


def clips_of(sources: list[Row], finished: list[Row], work: WorkFolder, stages: StageSet) -> pa.Table:
    """Clips of the sources of this input, sorted by id, with names and licences as the input gives them now."""
    wanted = {s["source_id"]: s for s in sources if s["status"] == "ok"}
    clips = work.read_clips([s["unit"] for s in finished if s["source_id"] in wanted], stages.schema)
    clips = clips.filter(pc.is_in(clips["source_id"], pa.array(list(wanted), pa.string())))
    clips = sort_rows(clips, [("clip_id", "ascending")])
    ids = pa.array(list(wanted), pa.string())
    at = pc.index_in(clips["source_id"], ids)
    for column, key in (("source_uri", "uri"), ("dataset", "dataset"), ("licence", "licence"), ("style", "style")):
        values = pa.array([wanted[i][key] for i in wanted], pa.string())
        index = clips.schema.get_field_index(column)
        clips = clips.set_column(index, clips.schema.field(index), values.take(at.combine_chunks()))
    states = review_states(clips, stages.named("ingest").options.reviews)
    index = clips.schema.get_field_index("review")
    return clips.set_column(index, clips.schema.field(index), states)


def resolve_tables(clips: pa.Table, stages: StageSet, tiers: Tiers) -> pa.Table:
    """Run the stages that look over all clips at once, on the rows that nothing has rejected so far."""
    for position, stage in enumerate(stages.stages):
        if "table" in stage.hooks:
            eligible = ~rejected_by(clips, tiers, position - 1)
            for name, values in stage.resolve(clips, eligible).items():
                index = clips.schema.get_field_index(name)
                clips = clips.set_column(index, clips.schema.field(index), values)
    return clips


def rejected_by(clips: pa.Table, tiers: Tiers, position: int) -> np.ndarray:
    """Bool [N]: rows that every tier rejects by the columns of stages up to `position`."""
    early = {tier: [g for g in gates if g.stage <= position] for tier, gates in tiers.items()}
    return np.all([first >= 0 for first in first_failures(clips, early).values()], axis=0)


def pending_clips(
    clips: pa.Table, sources: list[Row], work: WorkFolder, later: LaterPass, stages: StageSet, tiers: Tiers
) -> pa.Table:
    """Clips that are still wanted and have no results of this pass, only failed ones, or some cut short by gates since loosened.

    With the columns that the pass's workers need, `bytes` and `anchor_gap_s` of the source; sources in order of size, the
    largest first, and the clips of one together in order of time.
    """
    results, _ = work.read(later.name, later.schema(stages))
    joined = join_results(clips, results, later, stages, tiers)
    wanted = ~rejected_by(clips, tiers, later.position - 1)
    if later.hook == "text":
        for column in later.members(stages)[0].reads:
            wanted &= np.asarray(pc.is_valid(clips[column]))
    scored = np.asarray(pc.is_in(clips["clip_id"], results["clip_id"].combine_chunks()))
    failed = _any_error(joined, later)  # another run is another try: an endpoint may be up again, a bug mended
    short = scored & np.asarray(pc.is_in(joined["skipped_from"], pa.array(later.stages, pa.string())))
    if short.any():
        position = {s.name: i for i, s in enumerate(stages.stages)}
        for name in later.stages:
            here = np.asarray(pc.fill_null(pc.equal(joined["skipped_from"], name), False))
            short &= ~(here & rejected_by(joined, tiers, position[name] - 1))
    columns = later.reads(stages, sorted({c for t in tiers.values() for g in t for c in (g.gate.column, *g.gate.condition)}))
    todo = clips.select(columns).filter(pa.array(wanted & (~scored | short | failed)))
    order = sorted((s for s in sources if s["status"] == "ok"), key=lambda s: (-(s["bytes"] or 0), s["uri"]))
    at = pc.index_in(todo["source_id"], pa.array([s["source_id"] for s in order], pa.string())).combine_chunks()
    todo = todo.append_column("source_order", at)
    for name, kind in (("bytes", pa.int64()), ("anchor_gap_s", pa.float64())):
        todo = todo.append_column(name, pa.array([s.get(name) for s in order], kind).take(at))
    return sort_rows(todo, [("source_order", "ascending"), ("start_s", "ascending")])


def _any_error(table: pa.Table, later: LaterPass) -> np.ndarray:
    """Bool [N]: rows in which a stage of the pass has failed."""
    return np.any([np.asarray(pc.is_valid(table[f"{name}_error"])) for name in later.stages], axis=0)


def units_by_source(clips: pa.Table, sources_per_unit: int) -> list[pa.Table]:
    """Slices of a table sorted by `source_order`, each with all clips of so many sources."""
    if not clips.num_rows:
        return []
    starts = np.flatnonzero(np.diff(np.asarray(clips["source_order"]), prepend=-1))[::sources_per_unit]
    ends = [*starts[1:], clips.num_rows]
    return [clips.slice(a, b - a).drop_columns(["source_order"]) for a, b in zip(starts, ends, strict=True)]


def join_results(clips: pa.Table, results: pa.Table, later: LaterPass, stages: StageSet, tiers: Tiers) -> pa.Table:
    """Columns of a later pass by clip_id. Clips without results keep nulls; of several rows one without an error is taken,
    and of those the fullest.

    Nothing else than the id says which row belongs to which clip: rows come back in any order, some of them twice.
    """
    names = pa.array([s.name for s in stages.stages])
    keys = {"failed": pa.array(_any_error(results, later))}
    if later.hook == "clip":
        keys["reached"] = pc.negate(pc.fill_null(pc.index_in(results["skipped_from"], names), len(names)))
    best = pc.sort_indices(pa.table(keys), [(k, "ascending") for k in keys])
    ids = results["clip_id"].take(best).combine_chunks()
    at = pc.index_in(clips["clip_id"], ids).combine_chunks()
    rows = best.take(at)  # positions in `results`, null for clips that it lacks
    for name in results.column_names:
        if name not in ("clip_id", "skipped_from"):
            index = clips.schema.get_field_index(name)
            clips = clips.set_column(index, clips.schema.field(index), take(results[name], rows))
    if later.hook == "text":
        return clips
    # What never entered the pass was cut short before its first stage.
    never = np.asarray(pc.is_null(at)) & rejected_by(clips, tiers, later.position - 1)
    here = pc.if_else(pa.array(never), later.stages[0], results["skipped_from"].take(rows))
    index = clips.schema.get_field_index("skipped_from")
    return clips.set_column(index, clips.schema.field(index), pc.coalesce(clips["skipped_from"], here))


def sort_rows(table: pa.Table, keys: list[tuple[str, str]]) -> pa.Table:
    """`Table.sort_by` for tables of any size: see `take`."""
    order = pc.sort_indices(table.select([k for k, _ in keys]), keys)
    return pa.table([take(table[name], order) for name in table.column_names], schema=table.schema)


def take(column: pa.ChunkedArray, at: pa.Array) -> pa.ChunkedArray:
    """`column.take(at)`, also where the values hold more than Arrow's 32-bit offsets can count (2 GB of text, say)."""
    wide = {pa.string(): pa.large_string()}.get(column.type)
    if pa.types.is_list(column.type):
        wide = pa.large_list(column.type.value_type)
    if wide is None or column.nbytes < _NARROW_BYTES:
        taken = column.take(at)
        return taken if isinstance(taken, pa.ChunkedArray) else pa.chunked_array([taken], column.type)
    whole = column.cast(wide).combine_chunks()
    parts = [whole.take(at.slice(i, _TAKE_ROWS)).cast(column.type) for i in range(0, len(at), _TAKE_ROWS)]
    return pa.chunked_array(parts, column.type)
