"""The passes that need no pixels: stages that add columns to clips by their text, such as action labels (Waver §3.4)."""

from __future__ import annotations

from curation.passes import later_passes
from curation.scores_pass import error_text, failures_of
from curation.stage import Row, load_stages
from curation.workfolder import WorkFolder
from waver_core.config import Config, digest_of
from waver_core.isolation import isolated
from waver_core.manifest import rows_to_table
from waver_core.telemetry import StageTimer


class TextPass:
    """Built once per worker; called with units of rows of the clip table."""

    def __init__(self, config: Config, work: WorkFolder, name: str) -> None:
        self._work = work
        stages = load_stages(config)
        self.part = next(p for p in later_passes(config, stages) if p.name == name)
        self.stage = self.part.members(stages)[0]
        self._schema = self.part.schema(stages)

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Annotate a unit and make it durable; results meet rows by clip_id."""
        timer = StageTimer()
        with timer.measure(self.stage.name):
            results = isolated(self.stage.annotate, rows)
        out = []
        for row, found in zip(rows, results, strict=True):
            columns = {f"{self.stage.name}_error": error_text(found)} if isinstance(found, Exception) else found
            out.append({"clip_id": row["clip_id"], **columns})
        unit = digest_of(sorted(r["clip_id"] for r in rows))
        self._work.commit(self.part.name, unit, rows_to_table(out, self._schema), timer.seconds)
        return [{"bytes": 0, **failures_of(out)}]
