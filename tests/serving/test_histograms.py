"""Sums over stages."""

from __future__ import annotations

import math
from typing import Any

import pytest

from serving.store import JobStore


def test_stages_are_summed_and_outlive_their_jobs(store: JobStore, clock: Any) -> None:
    for seconds in (0.0, 0.3, 0.4, 3000.0):
        store.add_stage_seconds("base", seconds)
    store.add_stage_seconds("decode", 1.0)
    store.add_steps("base", 20)
    store.add_steps("base", 5)
    store.forget(clock.now + 1e9)
    histograms = store.stage_histogram()
    assert set(histograms) == {"base", "decode"}
    base = histograms["base"]
    assert (base.sum, base.count) == (3000.7, 4)
    buckets = dict(base.buckets)
    assert (buckets[0.01], buckets[0.25], buckets[0.5], buckets[2500.0], buckets[math.inf]) == (1, 1, 3, 3, 4)
    assert store.step_counts() == {"base": 25}
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="no duration"):
            store.add_stage_seconds("base", wrong)
