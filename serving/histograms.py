"""What the stages took, as sums that outlive the jobs: a histogram of seconds and a count of denoising steps for each stage."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table, select
from sqlalchemy.dialects import postgresql, sqlite

from serving.database import Database
from serving.tables import STAGE_STEPS, STAGE_TIMES

BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, math.inf)


@dataclass(frozen=True)
class Histogram:
    """As Prometheus has it: (upper bound in s, how many took no longer), then the sum in s and the number of all."""

    buckets: list[tuple[float, int]]
    sum: float
    count: int


class Measures(Database):
    """The part of the store that metrics come from. Nothing here is worth waiting for the disk."""

    def add_stage_seconds(self, stage: str, seconds: float) -> None:
        """Count one run of a stage. Raises ValueError for a time that is none."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"{seconds} is no duration in seconds")
        bound_s = next(bound for bound in BOUNDS_S if seconds <= bound)
        self._add(STAGE_TIMES, {"stage": stage, "bound_s": bound_s}, {"count": 1, "seconds": seconds})

    def add_steps(self, stage: str, n: int) -> None:
        """Count denoising steps that were made, of jobs that end well or not."""
        self._add(STAGE_STEPS, {"stage": stage}, {"steps": n})

    def stage_histogram(self) -> dict[str, Histogram]:
        """Stage -> its histogram; stages that never ran are left out."""
        with self.read() as connection:
            rows = connection.execute(select(STAGE_TIMES).order_by(STAGE_TIMES.c.stage)).mappings().all()
        found: dict[str, Histogram] = {}
        for stage, group in itertools.groupby(rows, key=lambda row: row["stage"]):
            own = list(group)
            buckets = [(bound, sum(row["count"] for row in own if row["bound_s"] <= bound)) for bound in BOUNDS_S]
            found[stage] = Histogram(buckets, math.fsum(row["seconds"] for row in own), buckets[-1][1])
        return found

    def step_counts(self) -> dict[str, int]:
        """Stage -> denoising steps made."""
        with self.read() as connection:
            rows = connection.execute(select(STAGE_STEPS.c.stage, STAGE_STEPS.c.steps)).all()
        return {row.stage: row.steps for row in rows}

    def _add(self, table: Table, key: dict[str, Any], amounts: dict[str, Any]) -> None:
        """Add to a row's numbers, or make the row; one statement on one row, so that writers wait and never deadlock."""
        dialect = sqlite if self._sqlite else postgresql
        statement = dialect.insert(table).values(key | amounts)
        sums = {name: table.c[name] + statement.excluded[name] for name in amounts}
        with self.write(durable=False) as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=sums))
