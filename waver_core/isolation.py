"""One bad item must cost no other its result: what batches do when they fail, in stages and backends alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from waver_core.errors import UserError

S = TypeVar("S")
T = TypeVar("T")


def isolated(call: Callable[[Sequence[S]], Sequence[T | Exception]], items: Sequence[S]) -> list[T | Exception]:
    """A result, or what went wrong, for every item: a batch that fails is halved until the culprit is alone.

    It also brings a batch that is too large for the memory down to size. A `UserError` (a missing package or weight) is no
    fault of an item and is raised; so is `RuntimeError` where there are not as many results as items.
    """
    if not items:
        return []
    try:
        results: Sequence[T | Exception] | None = call(items)
    except UserError:
        raise
    except Exception as error:
        if len(items) == 1:
            return [error.with_traceback(None)]
        results = None
    if results is None:  # outside of the handler, whose exception would keep the failed batch's frames and tensors
        half = len(items) // 2
        return [*isolated(call, items[:half]), *isolated(call, items[half:])]
    if len(results) != len(items):  # a bug, and one that would hand results to the wrong items
        raise RuntimeError(f"{len(results)} results for {len(items)} items")
    return list(results)


def one_by_one(call: Callable[[S], T], items: Sequence[S]) -> list[T | Exception]:
    """The same for what takes a single item."""
    return [isolated(lambda part: [call(part[0])], [item])[0] for item in items]
