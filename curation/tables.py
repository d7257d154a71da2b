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
from curation.scores_pass import score_schema
from curation.stage import StageSet
from curation.workfolder import WorkFolder

Row = dict[str, Any]


def clips_of(sources: list[Row], finished: list[Row], work: WorkFolder, stages: StageSet) -> pa.Table:
    """Clips of the sources of this input, sorted by id, with names and licences as the input gives them now."""
    wanted = {s["source_id"]: s for s in sources if s["status"] == "ok"}
    clips = work.read_clips([s["unit"] for s in finished if s["source_id"] in wanted], stages.schema)
    clips = clips.filter(pc.is_in(clips["source_id"], pa.array(list(wanted), pa.string()))).sort_by("clip_id")
    ids = pa.array(list(wanted), pa.string())
    at = pc.index_in(clips["source_id"], ids)
    for column, key in (("source_uri", "uri"), ("dataset", "dataset"), ("licence", "licence"), ("style", "style")):
        values = pa.array([wanted[i][key] for i in wanted], pa.string())
        index = clips.schema.get_field_index(column)
        clips = clips.set_column(index, clips.schema.field(index), values.take(at.combine_chunks()))
    return clips


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


def first_clip_stage(stages: StageSet) -> int:
    """Position of the first stage of the second pass."""
    return next((i for i, s in enumerate(stages.stages) if "clip" in s.hooks), len(stages.stages))


def pending_scores(clips: pa.Table, sources: list[Row], work: WorkFolder, stages: StageSet, tiers: Tiers) -> list[Row]:
    """Sources with clips that are still wanted and have no scores, or scores cut short by gates since loosened."""
    scores, _ = work.read_scores(score_schema(stages))
    joined = join_scores(clips, scores, stages, tiers)
    wanted = ~rejected_by(clips, tiers, first_clip_stage(stages) - 1)
    scored = np.asarray(pc.is_in(clips["clip_id"], scores["clip_id"].combine_chunks()))
    short = np.asarray(pc.is_valid(joined["skipped_from"])) & scored
    if short.any():
        position = {s.name: i for i, s in enumerate(stages.stages)}
        for name in set(joined["skipped_from"].to_pylist()) - {None}:
            here = np.asarray(pc.fill_null(pc.equal(joined["skipped_from"], name), False))
            short &= ~(here & rejected_by(joined, tiers, position[name] - 1))
    need = wanted & (~scored | short)
    by_source: dict[str, list[str]] = {}
    for source_id, clip_id in zip(
        clips["source_id"].filter(pa.array(need)).to_pylist(), clips["clip_id"].filter(pa.array(need)).to_pylist(), strict=True
    ):
        by_source.setdefault(source_id, []).append(clip_id)
    names = ("source_id", "uri", "kind", "unit", "bytes", "anchor_gap_s")
    items = [
        {**{n: s.get(n) for n in names}, "clip_ids": by_source[s["source_id"]]}
        for s in sources
        if s.get("source_id") in by_source and s["status"] == "ok"
    ]
    return sorted(items, key=lambda s: (-(s["bytes"] or 0), s["uri"]))


def join_scores(clips: pa.Table, scores: pa.Table, stages: StageSet, tiers: Tiers) -> pa.Table:
    """Score columns by clip_id. Clips without scores keep nulls; a clip scored twice takes its fullest row."""
    names = pa.array([s.name for s in stages.stages])
    reached = pc.fill_null(pc.index_in(scores["skipped_from"], names), len(names))
    full_first = scores.take(pc.sort_indices(pa.table({"reached": reached}), [("reached", "descending")]))
    at = pc.index_in(clips["clip_id"], full_first["clip_id"].combine_chunks()).combine_chunks()
    for name in scores.column_names:
        if name != "clip_id":
            index = clips.schema.get_field_index(name)
            clips = clips.set_column(index, clips.schema.field(index), full_first[name].take(at))
    # What never entered the second pass was cut short before its first stage.
    first = first_clip_stage(stages)
    if first < len(stages.stages):
        never = np.asarray(pc.is_null(at)) & rejected_by(clips, tiers, first - 1)
        index = clips.schema.get_field_index("skipped_from")
        filled = pc.if_else(pa.array(never), stages.stages[first].name, clips["skipped_from"])
        clips = clips.set_column(index, clips.schema.field(index), filled)
    return clips
