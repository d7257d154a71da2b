"""What runs a pass: the interface, and the implementation in this very process, for tests, profiling and small steps.

`curation.executor.OnRay` is the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from waver_core.config import Llm, Pass
from waver_core.errors import UserError
from waver_core.manifest import read_tables

Row = dict[str, Any]
Worker = Callable[[list[Row]], list[Row]]
Factory = Callable[..., Worker]
_NO_POOL = "funnel.passes.*.llm serves its model through Ray Data: run without --serial, or take another engine"


class Executor(Protocol):
    """Where the work is done."""

    def run(
        self, factory: Callable[..., Worker], args: tuple[Any, ...], units: Sequence[pa.Table], resources: Pass
    ) -> Iterator[Row]:
        """Build workers from a factory, call them with units of rows; yields what they return, in any order."""

    def require(self, model: Llm) -> None:
        """Raises `UserError` where a language model cannot be served; asked before anything is done."""

    def converse(
        self, asker: Factory, answerer: Factory, args: tuple[Any, ...], units: Sequence[pa.Table], resources: Pass
    ) -> Iterator[Row]:
        """Rows to questions (`asker`), questions to a language model, answers to results (`answerer`), which it yields."""

    def count(self, uris: Sequence[str], keys: Sequence[str], memberships: dict[str, str]) -> pa.Table:
        """Group the rows of Parquet files by the values of `keys` (null counts as "none") and count them.

        memberships: name -> column; a row is a member where that column is null. Columns: keys, `rows`, and every name.
        """


class Serial:
    """Everything in this process, unit by unit."""

    def run(
        self, factory: Callable[..., Worker], args: tuple[Any, ...], units: Sequence[pa.Table], resources: Pass
    ) -> Iterator[Row]:
        """See `Executor`; results come in order."""
        if not units:
            return
        worker = factory(*args)
        for unit in units:
            yield from worker(unit.to_pylist())

    def require(self, model: Llm) -> None:
        """See `Executor`; here there is no pool to put a language model in."""
        raise UserError(_NO_POOL)

    def converse(
        self, asker: Factory, answerer: Factory, args: tuple[Any, ...], units: Sequence[pa.Table], resources: Pass
    ) -> Iterator[Row]:
        """See `Executor`, and `require`, which says the same sooner."""
        raise UserError(_NO_POOL)

    def count(self, uris: Sequence[str], keys: Sequence[str], memberships: dict[str, str]) -> pa.Table:
        """See `Executor`."""
        schema = pa.schema([(name, pa.string()) for name in dict.fromkeys([*keys, *memberships.values()])])
        return added_up(read_tables(uris, schema), keys, memberships)


def added_up(table: pa.Table, keys: Sequence[str], memberships: dict[str, str]) -> pa.Table:
    """One row per group: keys without nulls, `rows`, and for every membership how many of them are members."""
    columns = {key: pc.fill_null(table[key], "none") for key in keys}
    ones = {name: pc.cast(pc.is_null(table[c]), pa.int64()) for name, c in memberships.items()}
    grouped = pa.table({**columns, "rows": pa.array([1] * len(table), pa.int64()), **ones}).group_by(list(keys))
    summed = grouped.aggregate([(n, "sum") for n in ("rows", *memberships)])
    plain = summed.rename_columns([n.removesuffix("_sum") for n in summed.column_names])
    return plain.select([*keys, "rows", *memberships])


def units_of(items: Sequence[Row], size: int) -> list[pa.Table]:
    """Rows cut into units of work."""
    return [pa.Table.from_pylist(list(items[i : i + size])) for i in range(0, len(items), size)]
