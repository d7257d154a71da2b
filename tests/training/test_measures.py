"""Means by kind and timestep are those of all samples, whoever computed them and however often a run was broken off."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from training.conditioning import Example
from training.group import Worker
from training.measures import Measures
from training.trainee import Losses

ALONE = Worker()


def example(t: float, kind: str = "video") -> Example:
    nothing = torch.zeros(())
    return Example(nothing, nothing, torch.tensor(t), (), None, kind, "t2v")


def losses(flow: Sequence[float], alignment: Sequence[float] | None = None) -> Losses:
    values = torch.tensor(flow)
    return Losses(values, values, None if alignment is None else torch.tensor(alignment))


def test_means_by_kind_and_by_tenths_of_time() -> None:
    measures = Measures()
    measures.add([example(0.05, "image"), example(0.31), example(0.39)], losses([1.0, 2.0, 4.0]))
    measures.add([example(0.99999)], losses([8.0]))
    assert measures.report(ALONE) == pytest.approx(
        {"flow/image": 1.0, "flow/video": 14 / 3, "flow/t0.0": 1.0, "flow/t0.3": 3.0, "flow/t0.9": 8.0}
    )


def test_the_end_of_time_is_in_the_last_tenth() -> None:
    measures = Measures()
    measures.add([example(0.0), example(1.0)], losses([1.0, 2.0]))
    assert measures.report(ALONE) == {"flow/video": 1.5, "flow/t0.0": 1.0, "flow/t0.9": 2.0}


def test_alignment_is_reported_where_there_is_any() -> None:
    measures = Measures()
    measures.add([example(0.5), example(0.5)], losses([1.0, 1.0], [-0.25, -0.75]))
    assert measures.report(ALONE)["alignment"] == -0.5


def test_a_report_starts_anew() -> None:
    measures = Measures()
    measures.add([example(0.5)], losses([3.0]))
    assert measures.report(ALONE)
    assert measures.report(ALONE) == {}
    measures.add([example(0.5)], losses([1.0]))
    assert measures.report(ALONE)["flow/video"] == 1.0


def test_sums_are_kept_in_fp64() -> None:
    measures = Measures()
    for _ in range(2000):
        measures.add([example(0.5)], losses([0.1], [0.1]))
    wanted = float(torch.tensor(0.1))
    assert measures.report(ALONE) == pytest.approx({"alignment": wanted, "flow/video": wanted, "flow/t0.5": wanted}, rel=1e-12)


def test_gradients_are_let_go() -> None:
    measures = Measures()
    flow = torch.ones(1, requires_grad=True)
    measures.add([example(0.5)], Losses(flow * 2, flow * 2, flow * 3))
    assert measures.report(ALONE) == {"alignment": 3.0, "flow/video": 2.0, "flow/t0.5": 2.0}


def test_a_broken_off_run_reports_what_a_whole_one_does() -> None:
    whole, before, after = Measures(), Measures(), Measures()
    parts = [([example(0.2), example(0.7, "image")], losses([1.1, 2.2], [0.5, 0.25])), ([example(0.71)], losses([3.3], [0.125]))]
    for part in parts:
        whole.add(*part)
    before.add(*parts[0])
    after.load(json.loads(json.dumps(before.state(ALONE))), ALONE)
    after.add(*parts[1])
    assert before.state(ALONE) == before.state(ALONE)  # asking changes nothing
    assert after.report(ALONE) == whole.report(ALONE)


class Two(Worker):
    """One of two workers whose sums meet through a list in place of a network."""

    def __init__(self, rank: int, others: list[torch.Tensor]) -> None:
        super().__init__(rank=rank, world=2)
        object.__setattr__(self, "others", others)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = values + sum(self.others)  # type: ignore[attr-defined]
        return total


def test_the_state_of_two_workers_is_taken_up_by_any_number() -> None:
    first, second = Measures(), Measures()
    first.add([example(0.2)], losses([1.0]))
    second.add([example(0.2)], losses([3.0]))
    state = first.state(Two(0, [torch.tensor(second.state(ALONE), dtype=torch.float64)]))
    for ranks in (1, 2, 3):
        resumed = [Measures() for _ in range(ranks)]
        for rank, measures in enumerate(resumed):
            measures.load(state, Worker(rank=rank, world=ranks))
        held = [torch.tensor(m.state(ALONE), dtype=torch.float64) for m in resumed]
        assert resumed[0].report(Two(0, held[1:] or [torch.zeros(1)])) == {"flow/video": 2.0, "flow/t0.2": 2.0}
