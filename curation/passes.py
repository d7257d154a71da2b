"""Which stages run together after the first decode, and the fingerprint of everything their results depend on.

Stages that score clips share one decode, the pass `scores`. A stage that `funnel.passes` names runs in a pass of its own:
its model gets its own actors and GPUs, at the price of one more decode of the clips that are still wanted by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from curation.stage import Stage, StageSet
from waver_core.config import Config, Pass, digest_of
from waver_core.errors import ConfigError
from waver_core.manifest import CLIP_COLUMNS


@dataclass(frozen=True)
class LaterPass:
    """A pass after the first decode: the stages it runs, by name, and where the first of them stands in the order."""

    name: str
    hook: str
    """`clip` (decodes) or `text` (does not)."""
    stages: tuple[str, ...]
    position: int
    key: str
    """Fingerprint: results are kept under it."""
    resources: Pass
    pooled: bool
    """Whether the configuration gives it actors of its own."""

    def members(self, stages: StageSet) -> list[Stage]:
        """Its stages."""
        return [stages.named(name) for name in self.stages]

    def schema(self, stages: StageSet) -> pa.Schema:
        """Columns it writes: the id, those of its stages, and for a decoding pass from which stage on it stopped early."""
        stream = {c.name for s in stages.with_hook("stream") for c in s.columns if is_source_column(s, c.name)}
        owners = set(self.stages)
        fields = [f for f in stages.schema if _owner(f) in owners and f.name not in stream]
        return pa.schema([("clip_id", pa.string()), *fields, *([("skipped_from", pa.string())] if self.hook == "clip" else [])])

    def reads(self, stages: StageSet, gate_columns: Sequence[str]) -> list[str]:
        """Columns of the clip table that its workers are given: identity, what its gates and its stages look at."""
        wanted = {c.name for c in CLIP_COLUMNS} | set(gate_columns)
        for stage in self.members(stages):
            wanted |= {*stage.reads, *stage.uses} | {c.name for c in stage.columns if is_source_column(stage, c.name)}
        written = self.schema(stages).names
        return [n for n in stages.schema.names if n in wanted and (n == "clip_id" or n not in written)]


def is_source_column(stage: Stage, column: str) -> bool:
    """Whether the first pass fills this column of a stage that otherwise scores clips: those named `<stage>_source_*`."""
    return "clip" in stage.hooks and column.startswith(f"{stage.name}_source_")


def shots_key(stages: StageSet) -> str:
    """Fingerprint of the first pass."""
    return digest_of([{"stage": s.name, **s.stream_fingerprint()} for s in stages.with_hook("stream")])


def later_passes(config: Config, stages: StageSet) -> list[LaterPass]:
    """The passes after the first, in order. Raises `ConfigError` when stages cannot be run in the order declared."""
    groups: list[tuple[str, str, list[Stage]]] = []
    for stage in stages.stages:
        hook = "clip" if "clip" in stage.hooks else "text" if "text" in stage.hooks else ""
        if not hook:
            continue
        own = hook == "text" or stage.name in config.funnel.passes
        if own:
            groups.append((stage.name, hook, [stage]))
        elif groups and groups[-1][0] == "scores":
            groups[-1][2].append(stage)
        elif groups:
            fix = f"give it one too (funnel.passes.{stage.name})"
            raise ConfigError(f"stage '{stage.name}' follows one that has a pass of its own: {fix}")
        else:
            groups.append(("scores", hook, [stage]))
    named = {name for name, _, _ in groups} | {"shots", "scores"}
    for name in config.funnel.passes:
        if name not in named:
            raise ConfigError(
                f"funnel.passes.{name}: stage '{name}' works in no pass after the first, so it can have none of its own"
            )
    passes = []
    position = {s.name: i for i, s in enumerate(stages.stages)}
    for name, hook, members in groups:
        passes.append(
            LaterPass(
                name,
                hook,
                tuple(s.name for s in members),
                position[members[0].name],
                _key(config, stages, hook, members),
                config.funnel.resources(name),
                name in config.funnel.passes,
            )
        )
    return passes


def _key(config: Config, stages: StageSet, hook: str, members: Sequence[Stage]) -> str:
    """Digest of the stages, of the clips (first pass), and of every other stage whose columns they read, however far back."""
    owners = {f.name: _owner(f) for f in stages.schema}
    inside, queue = {s.name for s in members}, list(members)
    needed: dict[str, Stage] = {}
    while queue:
        stage = queue.pop()
        for column in (*stage.reads, *stage.uses):
            owner = owners.get(column, "ingest")
            if owner not in inside | needed.keys() and owner in {s.name for s in stages.stages}:
                needed[owner] = stages.named(owner)
                queue.append(needed[owner])
    facts = [{"stage": s.name, **s.fingerprint()} for s in (*members, *(needed[n] for n in sorted(needed)))]
    # Which model answers, and how it is set up, is said by the pass and not by the backend that asks.
    llm = [p.llm.model_dump(include={"model", "engine"}) for s in members if (p := config.funnel.passes.get(s.name)) and p.llm]
    return digest_of([shots_key(stages), config.funnel.score_reference_frames_only if hook == "clip" else None, facts, llm])


def check_language_models(config: Config, stages: StageSet, later: Sequence[LaterPass]) -> None:
    """Raises `ConfigError` where a pass has a model to answer but its stage's backend asks none, or the other way round."""
    for part in later:
        for stage in part.members(stages):
            asks = getattr(stage.language_model, "engine_name", None) == "vllm"
            if part.resources.llm and not asks:
                fix = "set its option engine to vllm, or take llm out"
                where = f"funnel.passes.{part.name}.llm"
                raise ConfigError(f"{where}: stage '{stage.name}' asks no language model of the run: {fix}")
            if asks and not part.resources.llm:
                raise ConfigError(
                    f"funnel.stages.{stage.name}: engine vllm needs a model: funnel.passes.{stage.name}.llm={{model: ...}}"
                )


def _owner(field: pa.Field) -> str:
    return (field.metadata or {}).get(b"owner", b"").decode()
