"""A spike is skipped; a NaN, and spikes on end, stop the run with what to do."""

from __future__ import annotations

import json
import math

import pytest

from training.spikes import SpikeGuard
from waver_core.errors import RunFailed


def warmed(norm: float = 2.0, **fields: float) -> SpikeGuard:
    guard = SpikeGuard(**{"ratio": 10.0, "max_spikes": 3, "max_grad_norm": 1.0, **fields})  # type: ignore[arg-type]
    assert all(guard.accepts(step, 1.0, norm) for step in range(20))
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf), (-math.inf, 1.0)])
def test_what_is_not_finite_stops_the_run(loss: float, norm: float) -> None:
    with pytest.raises(RunFailed, match=r"step 7: .*lower optimizer\.lr") as caught:
        SpikeGuard(10, 3, 1.0).accepts(7, loss, norm)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_nothing_is_a_spike_before_there_is_a_history() -> None:
    guard = SpikeGuard(10, 3, 1.0)
    assert all(guard.accepts(step, 1.0, norm) for step, norm in enumerate([1.0] * 18 + [1e6]))
    assert guard.skipped == 0


def test_a_spike_is_skipped_and_the_run_goes_on() -> None:
    guard = warmed()
    assert guard.accepts(20, 1.0, 20.0)  # ten times the usual, no more
    assert not guard.accepts(21, 1.0, 20.1)
    assert guard.accepts(22, 1.0, 2.0)
    assert guard.skipped == 1


def test_spikes_do_not_become_the_usual() -> None:
    guard = warmed(max_spikes=1000)
    assert not any(guard.accepts(step, 1.0, 50.0) for step in range(200))
    assert guard.skipped == 200 and guard.accepts(220, 1.0, 2.0)


def test_a_norm_below_clipping_is_never_a_spike() -> None:
    guard = warmed(norm=1e-4)
    assert guard.accepts(20, 1.0, 1.0)
    assert not guard.accepts(21, 1.0, 1.01)


def test_too_many_in_succession_stop_the_run_and_others_do_not() -> None:
    guard = warmed()
    for _ in range(5):
        assert not guard.accepts(20, 1.0, 100.0) and not guard.accepts(21, 1.0, 100.0)
        assert guard.accepts(22, 1.0, 2.0)
    assert not guard.accepts(23, 1.0, 100.0) and not guard.accepts(24, 1.0, 100.0)
    with pytest.raises(RunFailed, match=r"step 25: 3 steps in succession .* usual 2 \(now 100\).*optimizer\.spike_ratio"):
        guard.accepts(25, 1.0, 100.0)


def test_the_usual_is_the_median_of_the_last_hundred() -> None:
    guard = warmed(norm=1.0)
    assert all(guard.accepts(step, 1.0, 5.0) for step in range(100))
    assert guard.accepts(120, 1.0, 49.0)  # the old ones are forgotten


def test_a_guard_goes_on_where_another_was_through_json() -> None:
    guard = warmed()
    assert not guard.accepts(20, 1.0, 100.0) and not guard.accepts(21, 1.0, 100.0)
    other = SpikeGuard(10, 3, 1.0)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.skipped == 2 and other.state_dict() == guard.state_dict()
    with pytest.raises(RunFailed, match="3 steps in succession"):
        other.accepts(22, 1.0, 100.0)
    assert all(other.accepts(step, 1.0, 3.0) for step in range(100)) and len(other.state_dict()["norms"]) == 100
