"""One bad item costs no other its result."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waver_core.errors import BackendUnavailable
from waver_core.isolation import isolated, one_by_one


@given(st.lists(st.integers(-3, 20)), st.integers(1, 8))
def test_every_item_has_its_own_result(items: list[int], room: int) -> None:
    def call(part: Sequence[int]) -> list[int | Exception]:
        if len(part) > room:
            raise MemoryError("too many at once")
        if min(part) < 0:
            raise ValueError(f"bad {min(part)}")
        return [10 * item for item in part]

    for results in (isolated(call, items), one_by_one(lambda item: call([item])[0], items)):
        assert [str(r) if isinstance(r, Exception) else r for r in results] == [f"bad {i}" if i < 0 else 10 * i for i in items]


def test_a_missing_package_is_no_item_s_fault_and_a_miscount_is_a_bug() -> None:
    def unavailable(part: Sequence[int]) -> list[int]:
        raise BackendUnavailable("pip install it")

    with pytest.raises(BackendUnavailable):
        isolated(unavailable, [1, 2])
    with pytest.raises(BackendUnavailable):
        one_by_one(lambda item: unavailable([item]), [1, 2])
    with pytest.raises(RuntimeError, match="1 results for 2 items"):
        isolated(lambda part: [0], [1, 2])
